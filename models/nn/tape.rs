//! The tape: a list of what was done. Backward pops it from its end, and each entry frees what it
//! saved as it goes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use kiln_kernels::Grad;

use super::{Data, Parameter, Tensor, trace};
use crate::{Error, Result};

/// A recording of one forward. Clones share it.
pub struct Tape<T = Data>(Rc<RefCell<Vec<Entry<T>>>>);

/// What a gradient is: numbers, or the memory that they would take.
pub(super) trait Gradient: Sized + 'static {
    /// The sum, in `self`'s place.
    fn plus(self, other: Self) -> Result<Self>;
}

impl Gradient for Data {
    fn plus(self, other: Self) -> Result<Self> {
        Ok(kiln_kernels::add(self, &other)?)
    }
}

type Backward<T> = Box<dyn FnOnce(T, &mut Gradients<'_, T>) -> Result<()>>;
type Forward<T> = Box<dyn Fn(&Tape<T>) -> Result<Tensor>>;

enum Entry<T> {
    /// One op, and the parameters that its backward adds gradients to.
    Op { inputs: Vec<Option<usize>>, parameters: Vec<Parameter>, backward: Backward<T> },
    /// A part of the forward that kept nothing, to be done again before it is gone back through, and
    /// the parameters that its ops add gradients to, as often as they do.
    Again { forward: Forward<T>, parameters: Vec<Parameter> },
}

impl<T> Entry<T> {
    fn parameters(&self) -> &[Parameter] {
        match self {
            Self::Op { parameters, .. } | Self::Again { parameters, .. } => parameters,
        }
    }
}

impl<T> Clone for Tape<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Tape<T> {
    fn default() -> Self {
        Self(Rc::default())
    }
}

impl<T> Tape<T> {
    /// Records an op's backward, which owns what it saved, and returns its output's slot.
    pub(super) fn record(
        &self,
        inputs: Vec<Option<usize>>,
        parameters: Vec<Parameter>,
        backward: impl FnOnce(T, &mut Gradients<'_, T>) -> Result<()> + 'static,
    ) -> usize {
        self.push(Entry::Op { inputs, parameters, backward: Box::new(backward) })
    }

    /// Does `forward` and forgets what it recorded: one entry does it again in backward.
    pub(super) fn recompute(&self, forward: impl Fn(&Self) -> Result<Tensor> + 'static) -> Result<Tensor> {
        let start = self.len();
        let y = forward(self)?;
        let done = self.0.borrow_mut().split_off(start);
        let parameters = done.iter().flat_map(|entry| entry.parameters().iter().cloned()).collect();
        drop(done);
        Ok(match y.slot() {
            Some(_) => y.recorded(self.push(Entry::Again { forward: Box::new(forward), parameters })),
            None => y, // nothing in it is trained
        })
    }

    /// An entry's slot is its own index.
    fn push(&self, entry: Entry<T>) -> usize {
        let mut entries = self.0.borrow_mut();
        entries.push(entry);
        entries.len() - 1
    }

    fn pop(&self) -> Option<Entry<T>> {
        self.0.borrow_mut().pop()
    }

    fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

impl<T> Tape<T> {
    /// Goes back from `output`, whose gradient is `dy`, to every parameter. The tape is empty afterwards.
    ///
    /// # Errors
    /// `output` is not on this tape, or a kernel's error.
    pub fn backward(&self, output: &Tensor, dy: T) -> Result<()> {
        self.backward_with(output, dy, |_| Ok(()))
    }

    /// As [`backward`](Self::backward); `complete` hears of each parameter when its last use on the tape
    /// has added to its gradient, while the rest goes on. What no op on the tape uses it does not hear of.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), and what `complete` returns.
    pub fn backward_with(
        &self,
        output: &Tensor,
        dy: T,
        mut complete: impl FnMut(&Parameter) -> Result<()>,
    ) -> Result<()> {
        let mut uses = Uses::default();
        self.0.borrow().iter().for_each(|entry| uses.add(entry.parameters()));
        let mut slots: Vec<Option<T>> = Vec::new();
        slots.resize_with(self.len(), || None);
        slots[slot(output)?] = Some(dy);
        while let Some(entry) = self.pop() {
            let dy = slots.pop().flatten();
            match (entry, dy) {
                (Entry::Op { inputs, parameters, backward }, dy) => {
                    if let Some(dy) = dy {
                        backward(dy, &mut Gradients { slots: &mut slots, inputs: &inputs })?;
                    }
                    uses.end(&parameters, &mut complete)?;
                }
                (Entry::Again { forward, parameters }, Some(dy)) => {
                    // It records where it stood: its input's slot is below, and its ops come next.
                    let start = self.len();
                    let span = trace::span("recompute", "backward");
                    let output = slot(&forward(self)?)?;
                    drop(span);
                    self.0.borrow()[start..].iter().for_each(|entry| uses.add(entry.parameters()));
                    uses.end(&parameters, &mut complete)?; // none is the last: they are there again
                    slots.resize_with(self.len(), || None);
                    slots[output] = Some(dy);
                }
                (Entry::Again { parameters, .. }, None) => uses.end(&parameters, &mut complete)?,
            }
        }
        Ok(())
    }
}

/// How often each parameter is still to be added to, by its place in the buffers.
#[derive(Default)]
struct Uses(HashMap<usize, usize>);

impl Uses {
    fn add(&mut self, parameters: &[Parameter]) {
        for parameter in parameters {
            *self.0.entry(parameter.range().start).or_default() += 1;
        }
    }

    fn end(&mut self, parameters: &[Parameter], complete: &mut impl FnMut(&Parameter) -> Result<()>) -> Result<()> {
        for parameter in parameters {
            if let Some(uses) = self.0.get_mut(&parameter.range().start) {
                *uses -= 1;
                if *uses == 0 {
                    complete(parameter)?;
                }
            }
        }
        Ok(())
    }
}

fn slot(output: &Tensor) -> Result<usize> {
    output.slot().ok_or_else(|| Error::Input("nothing on the tape leads to this output".into()))
}

/// The gradients of one op's inputs.
pub struct Gradients<'a, T = Data> {
    slots: &'a mut [Option<T>],
    inputs: &'a [Option<usize>],
}

impl<T> Gradients<'_, T> {
    /// Where input `i`'s gradient goes, if it is wanted, and what other uses of the input have added
    /// there so far.
    pub(super) fn slot(&mut self, i: usize) -> Option<&mut Option<T>> {
        self.inputs[i].map(|slot| &mut self.slots[slot])
    }
}

#[allow(private_bounds)] // numbers or memory: nothing else is a gradient
impl<T: Gradient> Gradients<'_, T> {
    /// Adds to input `i`'s gradient.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn add(&mut self, i: usize, gradient: T) -> Result<()> {
        if let Some(slot) = self.slot(i) {
            *slot = Some(match slot.take() {
                Some(sum) => sum.plus(gradient)?,
                None => gradient,
            });
        }
        Ok(())
    }
}

impl Gradients<'_> {
    /// Takes where input `i`'s gradient goes: nowhere, to a new tensor, or into what other uses of the
    /// input have added so far. [`put`](Self::put) gives the result back.
    pub fn take(&mut self, i: usize) -> Grad {
        match self.slot(i).map(Option::take) {
            None => Grad::Skip,
            Some(None) => Grad::New,
            Some(Some(sum)) => Grad::Into(sum),
        }
    }

    /// Sets input `i`'s gradient, which [`take`](Self::take) took.
    pub fn put(&mut self, i: usize, gradient: Option<Data>) {
        if let Some(slot) = self.slot(i) {
            *slot = gradient;
        }
    }
}

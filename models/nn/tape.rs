//! The tape: a list of what was done. Backward pops it from its end, and each entry frees what it
//! saved as it goes.

use std::cell::RefCell;
use std::rc::Rc;

use kiln_kernels::Grad;

use super::{Data, Op, Tensor};
use crate::{Error, Result};

type Backward = Box<dyn FnOnce(Data, &mut Gradients<'_>) -> Result<()>>;

/// A recording of one forward. Clones share it.
#[derive(Clone, Default)]
pub struct Tape(Rc<RefCell<Vec<Entry>>>);

struct Entry {
    inputs: Vec<Option<usize>>,
    backward: Backward,
}

impl Tape {
    /// Records an op and returns its output's slot, which is the entry's own index.
    pub(super) fn record<O: Op>(&self, op: O, saved: O::Saved, inputs: Vec<Option<usize>>) -> usize {
        let mut entries = self.0.borrow_mut();
        let backward = Box::new(move |dy, gradients: &mut Gradients<'_>| op.backward(saved, dy, gradients));
        entries.push(Entry { inputs, backward });
        entries.len() - 1
    }

    /// Goes back from `output`, whose gradient is `dy`, to every parameter. The tape is empty afterwards.
    ///
    /// # Errors
    /// `output` is not on this tape, or a kernel's error.
    pub fn backward(&self, output: &Tensor, dy: Data) -> Result<()> {
        let slot = match output {
            Tensor::Value(value) => value.slot,
            Tensor::Symbol(_) => None,
        };
        let slot = slot.ok_or_else(|| Error::Input("nothing on the tape leads to this output".into()))?;
        let mut slots: Vec<Option<Data>> = Vec::new();
        slots.resize_with(self.0.borrow().len(), || None);
        slots[slot] = Some(dy);
        while let Some(Entry { inputs, backward }) = self.pop() {
            if let Some(dy) = slots.pop().flatten() {
                backward(dy, &mut Gradients { slots: &mut slots, inputs: &inputs })?;
            }
        }
        Ok(())
    }

    fn pop(&self) -> Option<Entry> {
        self.0.borrow_mut().pop()
    }
}

/// The gradients of one op's inputs.
pub struct Gradients<'a> {
    slots: &'a mut [Option<Data>],
    inputs: &'a [Option<usize>],
}

impl Gradients<'_> {
    /// Takes where input `i`'s gradient goes: nowhere, to a new tensor, or into what other uses of the
    /// input have added so far. [`put`](Self::put) gives the result back.
    pub fn take(&mut self, i: usize) -> Grad {
        match self.inputs[i].map(|slot| self.slots[slot].take()) {
            None => Grad::Skip,
            Some(None) => Grad::New,
            Some(Some(sum)) => Grad::Into(sum),
        }
    }

    /// Sets input `i`'s gradient, which [`take`](Self::take) took.
    pub fn put(&mut self, i: usize, gradient: Option<Data>) {
        if let Some(slot) = self.inputs[i] {
            self.slots[slot] = gradient;
        }
    }

    /// Adds to input `i`'s gradient.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn add(&mut self, i: usize, gradient: Data) -> Result<()> {
        let sum = match self.take(i) {
            Grad::Skip => return Ok(()),
            Grad::New => gradient,
            Grad::Into(sum) => kiln_kernels::add(sum, &gradient)?,
        };
        self.put(i, Some(sum));
        Ok(())
    }
}

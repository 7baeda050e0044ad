//! What a batch costs, before it is computed: the model's own forward, on tensors that have a shape
//! and a [`Block`] of memory but no numbers.
//!
//! No lifetime is guessed. A block is given back when its last holder goes, as a candle tensor's
//! storage is: a variable of the forward, an entry of the tape, a gradient. And the tape is the code
//! that training runs.

use std::cell::Cell;
use std::rc::Rc;

use super::op::is_recorded;
use super::tape::Gradient;
use super::tensor::Origin;
use super::{Dim, Gradients, Inputs, Mode, Op, Packing, Shape, Tape, Tensor};
use crate::{Error, Result};

/// What a forward costs, and in training its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of activations and of their gradients, where they are most. Parameters come on top.
    pub peak_bytes: usize,
    /// Floating-point operations of forward's matrix products; a multiply and an add are two. Other
    /// work is not counted, as in PaLM's model FLOPs (Chowdhery et al., 2022).
    pub forward_flops: u64,
    /// The same of backward, with what it computes again.
    pub backward_flops: u64,
}

/// What one op costs. Tensors are counted in f32.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// As [`Plan::forward_flops`].
    pub forward_flops: u64,
    /// As [`Plan::backward_flops`].
    pub backward_flops: u64,
    /// The inputs that backward reads, by number.
    pub keeps: &'static [usize],
    /// Whether backward reads the output.
    pub keeps_output: bool,
    /// Bytes that forward makes for backward beside its output.
    pub saved_bytes: usize,
    /// Bytes that backward needs while it runs, beside gradients.
    pub scratch_bytes: usize,
    /// Where the gradient of each input comes to lie.
    pub gradients: &'static [Place],
}

/// Where backward leaves the gradient of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a tensor of its own.
    New,
    /// In that of the output's gradient.
    Output,
    /// In what other uses of the input have added so far; a tensor of its own where there is none.
    Sum,
}

/// Reads `forward` on the columns `names` of sequences as `packing` has them.
///
/// # Errors
/// Shapes that do not fit.
pub fn plan(
    names: &'static [&'static str],
    packing: Packing,
    mode: Mode,
    recompute: bool,
    forward: impl FnOnce(&Inputs) -> Result<Tensor>,
) -> Result<Plan> {
    let tape = matches!(mode, Mode::Train { .. }).then(Tape::default);
    let planner = Planner { meter: Meter::default(), tape };
    let meter = planner.meter.clone();
    let logits = forward(&Inputs::planned(planner.clone(), names, packing, mode).recompute(recompute))?;
    let forward_flops = meter.0.flops.get();
    if let (Some(tape), Tensor::Planned(planned)) = (&planner.tape, &logits) {
        tape.backward(&logits, meter.tensor(&planned.dims))?;
    }
    Ok(Plan { peak_bytes: meter.0.peak.get(), forward_flops, backward_flops: meter.0.flops.get() - forward_flops })
}

/// A tensor that is planned, not computed.
#[derive(Clone)]
pub struct Planned {
    pub(super) dims: Vec<usize>,
    pub(super) slot: Option<usize>,
    pub(super) planner: Planner,
    pub(super) block: Block,
}

/// Where planned tensors are made.
#[derive(Clone)]
pub(super) struct Planner {
    pub(super) meter: Meter,
    pub(super) tape: Option<Tape<Block>>,
}

impl Planner {
    /// What an op would make, keep and give back.
    pub fn apply<O: Op>(&self, op: &O, xs: &[&Planned]) -> Result<Tensor> {
        let shapes: Vec<Shape> = xs.iter().map(|x| x.dims.iter().map(|&size| Dim::Fixed(size)).collect()).collect();
        let dims = op.shape(&shapes.iter().collect::<Vec<_>>())?;
        let fixed = |dim: &Dim| match dim {
            Dim::Fixed(size) => Ok(*size),
            Dim::Symbol(name) => Err(Error::Input(format!("{name} is not known, but a plan needs sizes"))),
        };
        let dims = dims.iter().map(fixed).collect::<Result<Vec<_>>>()?;
        let cost = op.cost(&xs.iter().map(|x| x.dims.as_slice()).collect::<Vec<_>>());

        self.meter.count(cost.forward_flops);
        let block = self.meter.tensor(&dims);
        let mut kept: Vec<Block> = cost.keeps.iter().map(|&i| xs[i].block.clone()).collect();
        kept.push(self.meter.block(cost.saved_bytes));
        kept.extend(cost.keeps_output.then(|| block.clone()));
        let slots: Vec<Option<usize>> = xs.iter().map(|x| x.slot).collect();
        let slot = match &self.tape {
            Some(tape) if is_recorded(op, &slots) => {
                let (meter, dims) = (self.meter.clone(), xs.iter().map(|x| x.dims.clone()).collect::<Vec<_>>());
                let backward =
                    move |dy, gradients: &mut Gradients<'_, Block>| meter.backward(&cost, &dims, kept, dy, gradients);
                Some(tape.record(slots, Vec::new(), backward))
            }
            _ => None,
        };
        Ok(Tensor::Planned(Planned { dims, slot, planner: self.clone(), block }))
    }

    /// [`Tape::recompute`], with this planner's meter.
    pub fn recompute(self, forward: impl Fn(&Origin) -> Result<Tensor> + 'static) -> Result<Tensor> {
        let Self { meter, tape } = self;
        let again = move |tape: &Tape<Block>| {
            forward(&Origin::Plan(Planner { meter: meter.clone(), tape: Some(tape.clone()) }))
        };
        tape.unwrap_or_default().recompute(again)
    }
}

/// Memory that is taken, until its last holder goes.
#[derive(Clone)]
pub(super) struct Block {
    _taken: Rc<Taken>,
}

struct Taken {
    bytes: usize,
    meter: Meter,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.meter.0.live.update(|live| live - self.bytes);
    }
}

impl Gradient for Block {
    fn plus(self, _: Self) -> Result<Self> {
        Ok(self)
    }
}

/// What is taken now, was at most, and how much is computed.
#[derive(Clone, Default)]
pub(super) struct Meter(Rc<Reading>);

#[derive(Default)]
struct Reading {
    live: Cell<usize>,
    peak: Cell<usize>,
    flops: Cell<u64>,
}

impl Meter {
    fn block(&self, bytes: usize) -> Block {
        let Reading { live, peak, .. } = &*self.0;
        live.update(|live| live + bytes);
        peak.update(|peak| peak.max(live.get()));
        Block { _taken: Rc::new(Taken { bytes, meter: self.clone() }) }
    }

    fn tensor(&self, dims: &[usize]) -> Block {
        self.block(size_of::<f32>() * dims.iter().product::<usize>())
    }

    fn count(&self, flops: u64) {
        self.0.flops.update(|sum| sum + flops);
    }

    /// Backward of an op whose inputs have these `dims` and for which blocks were `kept`, which it
    /// holds to its end, as it does `dy`.
    fn backward(
        &self,
        cost: &Cost,
        dims: &[Vec<usize>],
        kept: Vec<Block>,
        dy: Block,
        gradients: &mut Gradients<'_, Block>,
    ) -> Result<()> {
        self.count(cost.backward_flops);
        let scratch = self.block(cost.scratch_bytes);
        let places = cost.gradients.iter().enumerate();
        let made: Vec<(usize, Option<Block>)> = places
            .map(|(i, place)| match place {
                Place::New => (i, Some(self.tensor(&dims[i]))),
                Place::Output => (i, Some(dy.clone())),
                Place::Sum => {
                    let new = gradients.slot(i).is_some_and(|sum| sum.is_none());
                    (i, new.then(|| self.tensor(&dims[i])))
                }
            })
            .collect();
        drop(scratch);
        for (i, gradient) in made {
            if let Some(gradient) = gradient {
                gradients.add(i, gradient)?;
            }
        }
        drop(kept);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};

    use kiln_kernels::cross_entropy;
    use serde_json::json;

    use super::*;
    use crate::Built;

    /// Counts what the thread that asks for memory has in use: kernels take theirs before they share
    /// the work out.
    struct Counting;

    thread_local! {
        static USED: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
    }

    fn count(bytes: isize) {
        USED.with(|used| {
            let (now, peak) = used.get();
            used.set((now + bytes, peak.max(now + bytes)));
        });
    }

    // SAFETY: the system's allocator, counted.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(layout.size() as isize);
            // SAFETY: the caller's promise.
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            count(-(layout.size() as isize));
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(at, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    const LENGTHS: [usize; 4] = [100, 37, 128, 250];

    fn bert() -> Built {
        let config = json!({
            "model_type": "bert", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "intermediate_size": 256, "num_labels": 5,
        });
        crate::build(config.as_object().unwrap(), 1).unwrap()
    }

    fn packing() -> Packing {
        let ends = LENGTHS.iter().scan(0, |end, &length| {
            *end += length as u32;
            Some(*end)
        });
        Packing::new(std::iter::once(0).chain(ends).collect(), (0..LENGTHS.len() as u64).collect()).unwrap()
    }

    /// The most that a batch really takes, and what is planned.
    fn peaks(built: &Built, mode: Mode, recompute: bool) -> [usize; 2] {
        let planned = crate::plan(built, packing(), mode, recompute).unwrap().peak_bytes;
        let ids = (0..packing().tokens() as u32).map(|i| i % 300).collect();
        let inputs = Inputs::packed(packing(), vec![("input_ids", ids)], mode).unwrap().recompute(recompute);
        let before = USED.get().0;
        USED.set((before, before));
        let logits = built.model.forward(&inputs).unwrap();
        if let Some(tape) = inputs.tape() {
            let (_, dlogits) = cross_entropy::forward(logits.data().unwrap(), &[0, 1, 2, 3], None, 0.0, 4.0).unwrap();
            tape.backward(&logits, dlogits).unwrap();
        }
        [(USED.get().1 - before) as usize, planned]
    }

    #[test]
    fn a_batch_takes_what_was_planned() {
        kiln_kernels::threads::set(2).unwrap();
        let built = bert();
        built.parameters.allocate_gradients().unwrap();
        let train = Mode::Train { seed: 1, step: 2 };
        let mut planned = Vec::new();
        for frozen in [false, true] {
            let lower =
                |name: &str| name.contains("embeddings") || name.contains("layer.0") || name.contains("layer.1");
            built.parameters.iter().filter(|p| lower(p.name())).for_each(|p| p.set_trainable(!frozen));
            for (mode, recompute) in [(train, false), (train, true), (Mode::Evaluate, false)] {
                let [taken, plan] = peaks(&built, mode, recompute);
                let ratio = plan as f64 / taken as f64;
                assert!((0.97..1.03).contains(&ratio), "{mode:?} {recompute} {frozen}: {plan} planned, {taken} taken");
                planned.push(plan);
            }
        }
        let [all, again, evaluation, frozen, ..] = planned[..] else { unreachable!() };
        assert!(again < all / 2 && evaluation < again && frozen < all * 2 / 3, "{planned:?}");
    }

    #[test]
    fn products_are_counted() {
        let plan = |recompute| crate::plan(&bert(), packing(), Mode::Train { seed: 0, step: 0 }, recompute).unwrap();
        let tokens: usize = LENGTHS.iter().sum();
        let squares: usize = LENGTHS.iter().map(|length| length * length).sum();
        let layer = |rows: usize, pairs: usize| {
            2 * tokens * 2 * 64 * 64 + 2 * rows * (2 * 64 * 64 + 2 * 64 * 256) + 4 * pairs * 64
        };
        // The last layer has keys and values of all tokens, and one query a sequence.
        let layers = 3 * layer(tokens, squares) + layer(LENGTHS.len(), tokens);
        let forward = (layers + 2 * 4 * (64 * 64 + 64 * 5)) as u64;
        assert_eq!((plan(false).forward_flops, plan(false).backward_flops), (forward, 2 * forward));
        assert_eq!((plan(true).forward_flops, plan(true).backward_flops), (forward, 2 * forward + layers as u64));
    }
}

//! Dropout (Srivastava et al., 2014) by a counter-based generator: the bits depend on (seed, step,
//! example, site, element) alone, so that no mask is kept and no split of the batch changes them.

use kiln_kernels::{Packing, dropout};

use super::op::apply;
use super::{Cost, Data, Gradients, Graph, Op, Place, Sequences, Shape, Symbol, Tensor};
use crate::Result;

/// A dropout of one site of the model.
#[derive(Clone, Copy)]
pub struct Dropout {
    pub(super) probability: f32,
    pub(super) site: u32,
}

impl Dropout {
    /// Drops elements of `[tokens, size]` or of `[sequences, size]`. A sequence's first token loses the
    /// same ones in both.
    ///
    /// # Errors
    /// Another number of rows.
    pub fn forward(&self, x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        match self.kernel(x, sequences)? {
            Some((dropout, packing)) => apply(Drop { dropout, packing }, &[x]),
            None => Ok(x.clone()),
        }
    }

    /// What the kernel needs, where this forward drops anything.
    pub(super) fn kernel(&self, x: &Tensor, sequences: &Sequences) -> Result<Option<(kiln_kernels::Dropout, Packing)>> {
        match sequences.dropout(self) {
            Some(dropout) => Ok(Some((dropout, sequences.packing(x.rows()?)?.clone()))),
            None => Ok(None),
        }
    }
}

struct Drop {
    dropout: kiln_kernels::Dropout,
    packing: Packing,
}

impl Op for Drop {
    type Saved = ();

    fn forward(&self, xs: &[&Data]) -> Result<(Data, ())> {
        Ok((dropout::forward(xs[0], &self.dropout, &self.packing)?, ()))
    }

    fn backward(&self, (): (), dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        gradients.add(0, dropout::backward(dy, &self.dropout, &self.packing)?)
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        Ok(xs[0].clone())
    }

    fn onnx(&self, _: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        Ok(xs[0].name.clone()) // nothing is dropped at inference
    }

    fn cost(&self, _: &[&[usize]]) -> Cost {
        Cost { gradients: &[Place::New], ..Cost::default() }
    }
}

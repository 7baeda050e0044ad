//! From tokens to sequences.

use kiln_kernels::{Packing, pooling};

use super::inputs::SequencesKind;
use super::op::apply;
use super::{Attribute, Cost, Data, Dim, Gradients, Graph, Op, Place, Sequences, Shape, Symbol, Tensor};
use crate::{Error, Result};

/// Each sequence's first token: `[tokens, size]` to `[sequences, size]`.
///
/// # Errors
/// Rows that are not the packing's tokens.
pub fn first_token(x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
    let packing = match &sequences.kind {
        SequencesKind::Packed { packing, .. } => Some(packing.clone()),
        SequencesKind::Symbolic { .. } => None,
    };
    apply(FirstToken { packing }, &[x])
}

struct FirstToken {
    packing: Option<Packing>,
}

impl FirstToken {
    fn packing(&self) -> Result<&Packing> {
        self.packing.as_ref().ok_or_else(|| Error::Input("symbolic sequences have no packing".into()))
    }
}

impl Op for FirstToken {
    type Saved = ();

    fn forward(&self, xs: &[&Data]) -> Result<(Data, ())> {
        Ok((pooling::first(xs[0], self.packing()?)?, ()))
    }

    fn backward(&self, (): (), dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        gradients.add(0, pooling::first_backward(&dy, self.packing()?)?)
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        match (&self.packing, xs[0].as_slice()) {
            (None, [batch, _, size]) => Ok(vec![*batch, *size]),
            (Some(packing), [_, size]) => Ok(vec![Dim::Fixed(packing.sequences()), *size]),
            (_, other) => Err(Error::Input(format!("first_token takes [batch, sequence, size], got {other:?}"))),
        }
    }

    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        let zero = g.initializer("first", Vec::new(), super::InitializerData::I64(vec![0]));
        Ok(g.node("Gather", &[&xs[0].name, &zero], &[("axis", Attribute::Int(1))]))
    }

    fn cost(&self, _: &[&[usize]]) -> Cost {
        Cost { gradients: &[Place::New], ..Cost::default() }
    }
}

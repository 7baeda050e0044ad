//! Scaled dot-product attention (Vaswani et al., 2017) over packed sequences: no padding anywhere,
//! and memory linear in length, since backward computes the probabilities again from the
//! log-sum-exp that forward keeps (Dao et al., 2022).

use kiln_kernels::{Packing, attention};

use super::inputs::SequencesKind;
use super::op::apply;
use super::{Attribute, Cost, Data, Dropout, Gradients, Graph, Op, Place, Sequences, Shape, Symbol, Tensor};
use crate::{Error, Result};

/// Attention of each token to all tokens of its sequence, head by head.
#[derive(Clone)]
pub struct Attention {
    heads: usize,
    head_dim: usize,
    dropout: Dropout,
}

impl Attention {
    /// Attention with `heads` heads of `head_dim`, scores scaled by `1 / sqrt(head_dim)`, and
    /// dropout on the probabilities.
    pub fn new(heads: usize, head_dim: usize, dropout: Dropout) -> Self {
        Self { heads, head_dim, dropout }
    }

    /// `softmax(q kᵀ / sqrt(head_dim)) v`; all are `[tokens, heads · head_dim]`, or `q` and the output
    /// are `[sequences, heads · head_dim]`: then only each sequence's first token asks.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let over = match &sequences.kind {
            SequencesKind::Packed { packing, .. } => Over::Packed(packing.clone(), sequences.dropout(&self.dropout)),
            SequencesKind::Symbolic { .. } => Over::Mask(sequences.additive_mask()?),
        };
        apply(Attend { heads: self.heads, head_dim: self.head_dim, over }, &[q, k, v])
    }
}

enum Over {
    Packed(Packing, Option<kiln_kernels::Dropout>),
    Mask(String),
}

struct Attend {
    heads: usize,
    head_dim: usize,
    over: Over,
}

impl Attend {
    fn packed(&self) -> Result<(&Packing, Option<&kiln_kernels::Dropout>, f32)> {
        match &self.over {
            Over::Packed(packing, dropout) => Ok((packing, dropout.as_ref(), (self.head_dim as f32).sqrt().recip())),
            Over::Mask(_) => Err(Error::Input("symbolic sequences have no packing".into())),
        }
    }
}

impl Op for Attend {
    type Saved = [Data; 5]; // q, k, v, the output, log-sum-exp [heads, rows of q]

    fn forward(&self, xs: &[&Data]) -> Result<(Data, Self::Saved)> {
        let (q, k, v) = (xs[0], xs[1], xs[2]);
        let (packing, dropout, scale) = self.packed()?;
        let (out, lse) = attention::forward(q, k, v, packing, self.heads, scale, dropout)?;
        Ok((out.clone(), [q.clone(), k.clone(), v.clone(), out, lse]))
    }

    fn backward(&self, [q, k, v, out, lse]: Self::Saved, dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        let (packing, dropout, scale) = self.packed()?;
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &out, &lse, &dy, packing, self.heads, scale, dropout)?;
        gradients.add(0, dq)?;
        gradients.add(1, dk)?;
        gradients.add(2, dv)
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        Ok(xs[0].clone())
    }

    /// The exact pattern that ONNX Runtime's attention fusion looks for.
    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        let Over::Mask(mask) = &self.over else {
            return Err(Error::Input("packed sequences cannot be captured".into()));
        };
        let (heads, dim) = (self.heads as i64, self.head_dim as i64);
        let firsts = xs[0].shape.len() == 2; // q is [batch, hidden]
        let split = g.ints("split", &[0, 0, heads, dim]);
        let split_firsts = if firsts { g.ints("split", &[0, 1, heads, dim]) } else { split.clone() };
        let mut head = |x: &Symbol, perm: [i64; 4]| {
            let split = if x.shape.len() == 2 { &split_firsts } else { &split };
            let x = g.node("Reshape", &[&x.name, split], &[]); // [batch, sequence or 1, heads, head_dim]
            g.node("Transpose", &[&x], &[("perm", Attribute::Ints(perm.to_vec()))])
        };
        let q = head(xs[0], [0, 2, 1, 3]); // [batch, heads, sequence or 1, head_dim]
        let k = head(xs[1], [0, 2, 3, 1]); // [batch, heads, head_dim, sequence]
        let v = head(xs[2], [0, 2, 1, 3]);
        let scores = g.node("MatMul", &[&q, &k], &[]);
        let root = g.scalar("root", (self.head_dim as f32).sqrt());
        let scores = g.node("Div", &[&scores, &root], &[]);
        let scores = g.node("Add", &[&scores, mask], &[]);
        let probabilities = g.node("Softmax", &[&scores], &[("axis", Attribute::Int(3))]);
        let out = g.node("MatMul", &[&probabilities, &v], &[]); // [batch, heads, sequence, head_dim]
        let out = g.node("Transpose", &[&out], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))]);
        let join = if firsts { g.ints("join", &[0, heads * dim]) } else { g.ints("join", &[0, 0, heads * dim]) };
        Ok(g.node("Reshape", &[&out, &join], &[]))
    }

    fn cost(&self, xs: &[&[usize]]) -> Cost {
        let [queries, hidden] = [xs[0][0], xs[0][1]];
        let firsts = queries < xs[1][0]; // one query a sequence
        let pairs = |span: &[u32]| u64::from(span[1] - span[0]).pow(if firsts { 1 } else { 2 });
        let pairs: u64 = match &self.over {
            Over::Packed(packing, _) => packing.offsets().windows(2).map(pairs).sum(),
            Over::Mask(_) => 0,
        };
        let product = 2 * pairs * hidden as u64;
        Cost {
            forward_flops: 2 * product,
            backward_flops: 4 * product, // the scores that are made again are not of the mathematics
            keeps: &[0, 1, 2],
            keeps_output: true,
            saved_bytes: size_of::<f32>() * self.heads * queries, // log-sum-exp
            gradients: &[Place::New; 3],
            ..Cost::default()
        }
    }
}

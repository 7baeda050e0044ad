//! Layer normalisation (Ba et al., 2016), alone or with the dropout and residual before it:
//! `y = LN(residual + dropout(x))` is one pass over memory instead of three.

use kiln_kernels::{Packing, layer_norm};

use super::op::apply;
use super::parameters::add_gradients;
use super::{
    Attribute, Builder, Cost, Data, Dropout, Gradients, Graph, Init, Op, Parameter, Place, Sequences, Shape, Symbol,
    Tensor,
};
use crate::Result;

/// A layer norm with weight and bias.
#[derive(Clone)]
pub struct LayerNorm {
    weight: Parameter, // [size]
    bias: Parameter,   // [size]
    eps: f64,
}

impl LayerNorm {
    /// Declares `weight` and `bias`, `[size]`.
    ///
    /// # Errors
    /// None today; layers share the form.
    pub fn new(size: usize, eps: f64, b: &Builder) -> Result<Self> {
        let weight = b.parameter("weight", &[size], Init::Ones, false);
        let bias = b.parameter("bias", &[size], Init::Zeros, false);
        Ok(Self { weight, bias, eps })
    }

    /// `LN(x)`, rows of `[rows, size]`.
    ///
    /// # Errors
    /// A width that is not the layer's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        apply(Norm { layer: self.clone(), dropout: None }, &[x])
    }

    /// `LN(residual + dropout(x))`, rows of `[tokens, size]` or of `[sequences, size]`.
    ///
    /// # Errors
    /// A width that is not the layer's.
    pub fn residual(&self, x: &Tensor, residual: &Tensor, dropout: &Dropout, sequences: &Sequences) -> Result<Tensor> {
        let dropout = dropout.kernel(x, sequences)?;
        apply(Norm { layer: self.clone(), dropout }, &[x, residual])
    }
}

struct Norm {
    layer: LayerNorm,
    dropout: Option<(kiln_kernels::Dropout, Packing)>,
}

impl Norm {
    fn dropout(&self) -> Option<(&kiln_kernels::Dropout, &Packing)> {
        self.dropout.as_ref().map(|(dropout, packing)| (dropout, packing))
    }
}

impl Op for Norm {
    type Saved = (layer_norm::Saved, bool); // and whether there is a residual

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.layer.weight, &self.layer.bias]
    }

    fn forward(&self, xs: &[&Data]) -> Result<(Data, Self::Saved)> {
        let LayerNorm { weight, bias, eps } = &self.layer;
        let (residual, values) = (xs.get(1).copied(), weight.values());
        let (gamma, beta) = (values.view(weight.range()), values.view(bias.range()));
        let (y, saved) = layer_norm::forward(xs[0], residual, self.dropout(), gamma, beta, *eps)?;
        Ok((y, (saved, residual.is_some())))
    }

    fn backward(&self, (saved, residual): Self::Saved, dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        let LayerNorm { weight, bias, .. } = &self.layer;
        let values = weight.values();
        let (dx, dresidual) = add_gradients([weight, bias], |[dgamma, dbeta]| {
            layer_norm::backward(&saved, self.dropout(), dy, values.view(weight.range()), dgamma, dbeta, residual)
        })?;
        gradients.add(0, dx)?;
        match dresidual {
            Some(dresidual) => gradients.add(1, dresidual),
            None => Ok(()),
        }
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        Ok(xs[0].clone())
    }

    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        let sum = match xs {
            [x, residual] => g.node("Add", &[&x.name, &residual.name], &[]),
            _ => xs[0].name.clone(),
        };
        // LayerNormalization is of opset 17: the decomposed form, which ONNX Runtime fuses.
        let last = || [("axes", Attribute::Ints(vec![-1]))];
        let mean = g.node("ReduceMean", &[&sum], &last());
        let centred = g.node("Sub", &[&sum, &mean], &[]);
        let two = g.scalar("exponent", 2.0);
        let square = g.node("Pow", &[&centred, &two], &[]);
        let variance = g.node("ReduceMean", &[&square], &last());
        let eps = g.scalar("epsilon", self.layer.eps as f32);
        let variance = g.node("Add", &[&variance, &eps], &[]);
        let deviation = g.node("Sqrt", &[&variance], &[]);
        let normal = g.node("Div", &[&centred, &deviation], &[]);
        let (weight, bias) = (g.parameter(&self.layer.weight), g.parameter(&self.layer.bias));
        let scaled = g.node("Mul", &[&normal, &weight], &[]);
        Ok(g.node("Add", &[&scaled, &bias], &[]))
    }

    fn cost(&self, xs: &[&[usize]]) -> Cost {
        let [rows, size] = [xs[0][0], xs[0][1]];
        let (residual, float) = (xs.len() > 1, size_of::<f32>());
        let statistics = 2 * float * rows;
        let sums = residual || self.dropout.is_some(); // else the input is the sum
        Cost {
            keeps: if sums { &[] } else { &[0] },
            saved_bytes: statistics + if sums { float * rows * size } else { 0 },
            scratch_bytes: 2 * float * size * rows.div_ceil(64), // the weight's and bias's gradients by task
            gradients: if residual { &[Place::New, Place::Output] } else { &[Place::Output] },
            ..Cost::default()
        }
    }
}

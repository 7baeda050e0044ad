//! `y = x Wᵀ + b`, one op: the bias rides on the product, forward and backward.

use kiln_kernels::linear;

use super::op::apply;
use super::parameters::add_gradients;
use super::{Attribute, Builder, Cost, Data, Dim, Gradients, Graph, Init, Op, Parameter, Place, Shape, Symbol, Tensor};
use crate::{Error, Result};

/// A linear layer with bias.
#[derive(Clone)]
pub struct Linear {
    weight: Parameter, // [out, in]
    bias: Parameter,   // [out]
}

impl Linear {
    /// Declares `weight` `[output, input]` and `bias` `[output]`.
    ///
    /// # Errors
    /// None today; layers share the form.
    pub fn new(input: usize, output: usize, init: Init, b: &Builder) -> Result<Self> {
        let weight = b.parameter("weight", &[output, input], init, true);
        let bias = b.parameter("bias", &[output], Init::Zeros, false);
        Ok(Self { weight, bias })
    }

    /// `[rows, in]` to `[rows, out]`.
    ///
    /// # Errors
    /// A width that is not the layer's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        apply(self.clone(), &[x])
    }
}

impl Op for Linear {
    type Saved = Data; // the input

    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.weight, &self.bias]
    }

    fn forward(&self, xs: &[&Data]) -> Result<(Data, Data)> {
        let values = self.weight.values();
        let (weight, bias) = (values.view(self.weight.range()), values.view(self.bias.range()));
        Ok((linear::forward(xs[0], weight, Some(bias))?, xs[0].clone()))
    }

    fn backward(&self, x: Data, dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        let values = self.weight.values();
        let dx = gradients.take(0);
        let dx = add_gradients([&self.weight, &self.bias], |[dw, db]| {
            linear::backward(&x, &dy, values.view(self.weight.range()), dx, dw, db)
        })?;
        gradients.put(0, dx);
        Ok(())
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        let [output, input] = [self.weight.shape()[0], self.weight.shape()[1]];
        match xs[0].split_last() {
            Some((&Dim::Fixed(width), rows)) if width == input => Ok([rows, &[Dim::Fixed(output)]].concat()),
            _ => Err(Error::Input(format!("{} takes [.., {input}], got {:?}", self.weight.name(), xs[0]))),
        }
    }

    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        let bias = g.parameter(&self.bias);
        if xs[0].shape.len() == 2 {
            let weight = g.parameter(&self.weight);
            return Ok(g.node("Gemm", &[&xs[0].name, &weight, &bias], &[("transB", Attribute::Int(1))]));
        }
        let weight = g.transposed(&self.weight);
        let product = g.node("MatMul", &[&xs[0].name, &weight], &[]);
        Ok(g.node("Add", &[&product, &bias], &[]))
    }

    fn cost(&self, xs: &[&[usize]]) -> Cost {
        let product = 2 * (xs[0][0] * self.weight.range().len()) as u64;
        Cost {
            forward_flops: product,
            backward_flops: 2 * product,
            keeps: &[0],
            gradients: &[Place::Sum],
            ..Cost::default()
        }
    }
}

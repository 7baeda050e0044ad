//! The rectified linear unit, `max(x, 0)` (Nair and Hinton, 2010).

use kiln_kernels::relu as kernel;

use super::op::apply;
use super::{Cost, Data, Gradients, Graph, Op, Place, Shape, Symbol, Tensor};
use crate::Result;

/// `max(x, 0)`, element by element.
///
/// # Errors
/// A kernel's.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    apply(Relu, &[x])
}

struct Relu;

impl Op for Relu {
    type Saved = Data; // the output

    fn forward(&self, xs: &[&Data]) -> Result<(Data, Data)> {
        let y = kernel::forward(xs[0])?;
        Ok((y.clone(), y))
    }

    fn backward(&self, y: Data, dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        gradients.add(0, kernel::backward(&y, dy)?)
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        Ok(xs[0].clone())
    }

    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        Ok(g.node("Relu", &[&xs[0].name], &[]))
    }

    fn cost(&self, _: &[&[usize]]) -> Cost {
        Cost { keeps_output: true, gradients: &[Place::Output], ..Cost::default() }
    }
}

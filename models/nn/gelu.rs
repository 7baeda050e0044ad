//! The exact GELU, `x Φ(x)` by erf (Hendrycks and Gimpel, 2016).

use kiln_kernels::gelu as kernel;

use super::op::apply;
use super::{Cost, Data, Gradients, Graph, Op, Place, Shape, Symbol, Tensor};
use crate::Result;

/// `x Φ(x)`, element by element.
///
/// # Errors
/// A kernel's.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    apply(Gelu, &[x])
}

struct Gelu;

impl Op for Gelu {
    type Saved = Data; // the input

    fn forward(&self, xs: &[&Data]) -> Result<(Data, Data)> {
        Ok((kernel::forward(xs[0])?, xs[0].clone()))
    }

    fn backward(&self, x: Data, dy: Data, gradients: &mut Gradients<'_>) -> Result<()> {
        gradients.add(0, kernel::backward(&x, dy)?)
    }

    fn shape(&self, xs: &[&Shape]) -> Result<Shape> {
        Ok(xs[0].clone())
    }

    fn onnx(&self, g: &mut Graph, xs: &[&Symbol]) -> Result<String> {
        let x = &xs[0].name;
        let (root, one, half) =
            (g.scalar("root", std::f32::consts::SQRT_2), g.scalar("one", 1.0), g.scalar("half", 0.5));
        let scaled = g.node("Div", &[x, &root], &[]);
        let erf = g.node("Erf", &[&scaled], &[]);
        let cdf = g.node("Add", &[&erf, &one], &[]);
        let product = g.node("Mul", &[x, &cdf], &[]);
        Ok(g.node("Mul", &[&product, &half], &[]))
    }

    fn cost(&self, _: &[&[usize]]) -> Cost {
        Cost { keeps: &[0], gradients: &[Place::Output], ..Cost::default() }
    }
}

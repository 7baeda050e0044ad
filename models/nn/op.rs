//! What an op is, and the one place where value and symbol part ways.

use super::tensor::Origin;
use super::{Data, Gradients, Graph, Parameter, Shape, Symbol, Tensor, Value};
use crate::{Error, Result};

/// One op: every reading of it. Parameters lie in the op itself, tensors come as inputs.
pub trait Op: 'static {
    /// What backward needs, nothing else.
    type Saved: 'static;

    /// The parameters that backward adds gradients to.
    fn parameters(&self) -> Vec<&Parameter> {
        Vec::new()
    }

    /// Computes the output.
    ///
    /// # Errors
    /// A kernel's: shapes that do not fit, an id out of range.
    fn forward(&self, xs: &[&Data]) -> Result<(Data, Self::Saved)>;

    /// Gives the inputs their gradients through `gradients`, and adds the parameters' in place.
    ///
    /// # Errors
    /// A kernel's.
    fn backward(&self, saved: Self::Saved, dy: Data, gradients: &mut Gradients<'_>) -> Result<()>;

    /// The output's symbolic shape.
    ///
    /// # Errors
    /// Shapes that the op cannot take.
    fn shape(&self, xs: &[&Shape]) -> Result<Shape>;

    /// Writes standard-opset nodes and returns the output's name.
    ///
    /// # Errors
    /// What ONNX cannot say.
    fn onnx(&self, graph: &mut Graph, xs: &[&Symbol]) -> Result<String>;
}

/// Applies `op` where its first input stands.
pub(super) fn apply<O: Op>(op: O, xs: &[&Tensor]) -> Result<Tensor> {
    let first = xs.first().ok_or_else(|| Error::Input("an op without inputs needs an origin".into()))?;
    apply_at(&Origin::from(*first), op, xs)
}

/// Applies `op` at `origin`: computes and records, or writes nodes.
pub(super) fn apply_at<O: Op>(origin: &Origin, op: O, xs: &[&Tensor]) -> Result<Tensor> {
    match origin {
        Origin::Value(tape) => {
            let mut values = Vec::with_capacity(xs.len());
            for x in xs {
                match x {
                    Tensor::Value(value) => values.push(value),
                    Tensor::Symbol(_) => return Err(mixed()),
                }
            }
            let data: Vec<&Data> = values.iter().map(|value| &value.data).collect();
            let (data, saved) = op.forward(&data)?;
            let slots: Vec<Option<usize>> = values.iter().map(|value| value.slot).collect();
            // What no trainable parameter stands behind is not recorded, and keeps nothing.
            let needed = slots.iter().any(Option::is_some) || op.parameters().iter().any(|p| p.is_trainable());
            let slot = match tape {
                Some(tape) if needed => Some(tape.record(op, saved, slots)),
                _ => None,
            };
            Ok(Tensor::Value(Value { data, tape: tape.clone(), slot }))
        }
        Origin::Symbol(graph) => {
            let mut symbols = Vec::with_capacity(xs.len());
            for x in xs {
                match x {
                    Tensor::Symbol(symbol) => symbols.push(symbol),
                    Tensor::Value(_) => return Err(mixed()),
                }
            }
            let shapes: Vec<&Shape> = symbols.iter().map(|symbol| &symbol.shape).collect();
            let shape = op.shape(&shapes)?;
            let name = op.onnx(&mut graph.borrow_mut(), &symbols)?;
            Ok(Tensor::Symbol(Symbol { name, shape, graph: graph.clone() }))
        }
    }
}

fn mixed() -> Error {
    Error::Input("values and symbols are mixed in one op".into())
}

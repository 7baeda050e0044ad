//! What an op is, and the one place where value, symbol and plan part ways.

use super::tensor::Origin;
use super::trace::{Running, span_of, type_name};
use super::{Cost, Data, Gradients, Graph, Parameter, Shape, Symbol, Tensor, Value};
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

    /// The output's shape, of symbols or of sizes.
    ///
    /// # Errors
    /// Shapes that the op cannot take.
    fn shape(&self, xs: &[&Shape]) -> Result<Shape>;

    /// Writes standard-opset nodes and returns the output's name.
    ///
    /// # Errors
    /// What ONNX cannot say.
    fn onnx(&self, graph: &mut Graph, xs: &[&Symbol]) -> Result<String>;

    /// What inputs of these sizes cost.
    fn cost(&self, xs: &[&[usize]]) -> Cost;
}

/// Applies `op` where its first input stands.
pub(super) fn apply<O: Op>(op: O, xs: &[&Tensor]) -> Result<Tensor> {
    let first = xs.first().ok_or_else(|| Error::Input("an op without inputs needs an origin".into()))?;
    apply_at(&Origin::from(*first), op, xs)
}

/// What no trainable parameter stands behind is not recorded, and keeps nothing.
pub(super) fn is_recorded(op: &impl Op, inputs: &[Option<usize>]) -> bool {
    inputs.iter().any(Option::is_some) || op.parameters().iter().any(|p| p.is_trainable())
}

/// Applies `op` at `origin`: computes and records, writes nodes, or counts.
pub(super) fn apply_at<O: Op>(origin: &Origin, op: O, xs: &[&Tensor]) -> Result<Tensor> {
    match origin {
        Origin::Value(tape) => {
            let values = all(xs, |x| if let Tensor::Value(value) = x { Some(value) } else { None })?;
            let data: Vec<&Data> = values.iter().map(|value| &value.data).collect();
            let (data, saved) = {
                let _span = span(&op, "forward");
                op.forward(&data)?
            };
            let slots: Vec<Option<usize>> = values.iter().map(|value| value.slot).collect();
            let slot = match tape {
                Some(tape) if is_recorded(&op, &slots) => {
                    let trained = op.parameters().into_iter().filter(|p| p.is_trainable()).cloned().collect();
                    Some(tape.record(slots, trained, move |dy, gradients| {
                        let _span = span(&op, "backward");
                        op.backward(saved, dy, gradients)
                    }))
                }
                _ => None,
            };
            Ok(Tensor::Value(Value { data, tape: tape.clone(), slot }))
        }
        Origin::Symbol(graph) => {
            let symbols = all(xs, |x| if let Tensor::Symbol(symbol) = x { Some(symbol) } else { None })?;
            let shapes: Vec<&Shape> = symbols.iter().map(|symbol| &symbol.shape).collect();
            let shape = op.shape(&shapes)?;
            let name = op.onnx(&mut graph.borrow_mut(), &symbols)?;
            Ok(Tensor::Symbol(Symbol { name, shape, graph: graph.clone() }))
        }
        Origin::Plan(planner) => {
            let planned = all(xs, |x| if let Tensor::Planned(planned) = x { Some(planned) } else { None })?;
            planner.apply(&op, &planned)
        }
    }
}

/// The time that an op takes, where somebody wants to know it.
fn span<O: Op>(op: &O, kind: &'static str) -> Option<Running> {
    span_of(type_name::<O>(), kind, || op.parameters().first().map(|parameter| parameter.name().to_owned()))
}

/// The inputs, which are all of one kind.
fn all<'a, T>(xs: &[&'a Tensor], kind: impl Fn(&'a Tensor) -> Option<&'a T>) -> Result<Vec<&'a T>> {
    let kinds: Option<Vec<_>> = xs.iter().map(|x| kind(x)).collect();
    kinds.ok_or_else(|| Error::Input("values, symbols and plans are mixed in one op".into()))
}

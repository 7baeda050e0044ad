//! Value or symbol.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Data, Graph, Tape};
use crate::{Error, Result};

/// An activation: computed now, or a node of the graph being captured.
#[derive(Clone)]
pub enum Tensor {
    /// Numbers, and their place on the tape.
    Value(Value),
    /// The name of an ONNX value and its shape.
    Symbol(Symbol),
}

/// A candle tensor, and where the tape has it (`None` where nothing needs its gradient).
#[derive(Clone)]
pub struct Value {
    /// `[tokens, …]` or `[sequences, …]`, f32, contiguous.
    pub data: Data,
    pub(super) tape: Option<Tape>,
    pub(super) slot: Option<usize>,
}

/// A value of the graph being captured.
#[derive(Clone)]
pub struct Symbol {
    /// Its name in the graph.
    pub name: String,
    /// Its shape.
    pub shape: Shape,
    pub(super) graph: Rc<RefCell<Graph>>,
}

/// A symbolic shape.
pub type Shape = Vec<Dim>;

/// One axis of a symbolic shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// An axis known only at run time: `batch` or `sequence`.
    Symbol(&'static str),
    /// A fixed size.
    Fixed(usize),
}

impl Tensor {
    /// The numbers.
    ///
    /// # Errors
    /// A symbol has none.
    pub fn data(&self) -> Result<&Data> {
        match self {
            Self::Value(value) => Ok(&value.data),
            Self::Symbol(symbol) => Err(Error::Input(format!("{} is a symbol, not a value", symbol.name))),
        }
    }
}

/// Where an op without tensor inputs is applied.
#[derive(Clone)]
pub(super) enum Origin {
    Value(Option<Tape>),
    Symbol(Rc<RefCell<Graph>>),
}

impl From<&Tensor> for Origin {
    fn from(tensor: &Tensor) -> Self {
        match tensor {
            Tensor::Value(value) => Self::Value(value.tape.clone()),
            Tensor::Symbol(symbol) => Self::Symbol(symbol.graph.clone()),
        }
    }
}

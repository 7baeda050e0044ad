//! Value, symbol or plan.

use std::cell::RefCell;
use std::rc::Rc;

use super::plan::{Planned, Planner};
use super::{Data, Graph, Tape};
use crate::{Error, Result};

/// An activation: computed now, a node of the graph being captured, or planned.
#[derive(Clone)]
pub enum Tensor {
    /// Numbers, and their place on the tape.
    Value(Value),
    /// The name of an ONNX value and its shape.
    Symbol(Symbol),
    /// A shape and the memory that it would take.
    Planned(Planned),
}

/// A candle tensor, and where the tape has it (`None` where nothing needs its gradient).
#[derive(Clone)]
pub struct Value {
    /// `[tokens, …]` or `[sequences, …]`, contiguous; f32, or on a GPU bf16.
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
            Self::Planned(planned) => Err(Error::Input(format!("{:?} is planned, not a value", planned.dims))),
        }
    }

    /// How many rows it has: its first axis.
    ///
    /// # Errors
    /// A symbol's is not known.
    pub(super) fn rows(&self) -> Result<usize> {
        match self {
            Self::Planned(planned) => Ok(planned.dims[0]),
            _ => Ok(self.data()?.dims()[0]),
        }
    }

    /// Its place on the tape.
    pub(super) fn slot(&self) -> Option<usize> {
        match self {
            Self::Value(value) => value.slot,
            Self::Symbol(_) => None,
            Self::Planned(planned) => planned.slot,
        }
    }

    /// The same on the tape at `slot`.
    pub(super) fn recorded(mut self, slot: usize) -> Self {
        match &mut self {
            Self::Value(value) => value.slot = Some(slot),
            Self::Symbol(_) => {}
            Self::Planned(planned) => planned.slot = Some(slot),
        }
        self
    }

    /// The same with the tape of `origin`, or without one.
    pub(super) fn at(&self, origin: &Origin) -> Self {
        match (self, origin) {
            (Self::Value(value), Origin::Value(tape)) => Self::Value(Value { tape: tape.clone(), ..value.clone() }),
            (Self::Planned(planned), Origin::Plan(planner)) => {
                Self::Planned(Planned { planner: planner.clone(), ..planned.clone() })
            }
            _ => self.clone(),
        }
    }
}

/// Where an op without tensor inputs is applied.
#[derive(Clone)]
pub(super) enum Origin {
    Value(Option<Tape>),
    Symbol(Rc<RefCell<Graph>>),
    Plan(Planner),
}

impl Origin {
    /// The same without a tape: what the tape itself keeps must not hold it.
    pub fn untaped(&self) -> Self {
        match self {
            Self::Value(_) => Self::Value(None),
            Self::Symbol(graph) => Self::Symbol(graph.clone()),
            Self::Plan(planner) => Self::Plan(Planner { tape: None, ..planner.clone() }),
        }
    }
}

impl From<&Tensor> for Origin {
    fn from(tensor: &Tensor) -> Self {
        match tensor {
            Tensor::Value(value) => Self::Value(value.tape.clone()),
            Tensor::Symbol(symbol) => Self::Symbol(symbol.graph.clone()),
            Tensor::Planned(planned) => Self::Plan(planned.planner.clone()),
        }
    }
}

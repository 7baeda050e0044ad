//! The graph that a forward on symbols writes: plain standard-opset nodes, for export to encode.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::{Dim, Inputs, Parameter, Tensor};
use crate::{Error, Result};

/// An ONNX graph (opset 12), with parameters by reference.
#[derive(Default)]
pub struct Graph {
    /// int64 inputs.
    pub inputs: Vec<Input>,
    /// Nodes in topological order.
    pub nodes: Vec<Node>,
    /// Constants and parameters.
    pub initializers: Vec<Initializer>,
    /// f32 outputs.
    pub outputs: Vec<Output>,
    counts: BTreeMap<&'static str, usize>,
}

/// An int64 input.
pub struct Input {
    /// Its name.
    pub name: String,
    /// Its axes.
    pub dims: Vec<Dim>,
}

/// An f32 output.
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its axes.
    pub dims: Vec<Dim>,
}

/// One node.
pub struct Node {
    /// The operator, in the default domain.
    pub op_type: &'static str,
    /// A unique name.
    pub name: String,
    /// Names of values.
    pub inputs: Vec<String>,
    /// Names of values.
    pub outputs: Vec<String>,
    /// Attributes.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A node's attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    /// INT
    Int(i64),
    /// INTS
    Ints(Vec<i64>),
    /// FLOAT
    Float(f32),
}

/// A constant or a parameter.
pub struct Initializer {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Its elements.
    pub data: InitializerData,
}

/// Where an initializer's elements come from.
pub enum InitializerData {
    /// int64 constants.
    I64(Vec<i64>),
    /// f32 constants.
    F32(Vec<f32>),
    /// int8 constants.
    I8(Vec<i8>),
    /// A parameter, read when asked for.
    Parameter {
        /// The parameter.
        parameter: Parameter,
        /// Whether a matrix `[out, in]` is written as `[in, out]`.
        transposed: bool,
    },
}

/// What an initializer's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// int64
    I64,
    /// f32
    F32,
    /// int8
    I8,
}

impl Initializer {
    /// What the elements are.
    pub fn element_type(&self) -> ElementType {
        match self.data {
            InitializerData::I64(_) => ElementType::I64,
            InitializerData::F32(_) | InitializerData::Parameter { .. } => ElementType::F32,
            InitializerData::I8(_) => ElementType::I8,
        }
    }

    /// The number of bytes that [`bytes`](Self::bytes) gives.
    pub fn byte_len(&self) -> usize {
        let size = match self.element_type() {
            ElementType::I64 => 8,
            ElementType::F32 => 4,
            ElementType::I8 => 1,
        };
        self.dims.iter().product::<usize>() * size
    }

    /// The elements, row-major, little-endian.
    ///
    /// # Errors
    /// What a GPU says that parameters lie on.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        Ok(match &self.data {
            InitializerData::I64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            InitializerData::I8(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => self.floats()?.iter().flatten().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }

    /// The elements, row-major, where they are f32.
    ///
    /// # Errors
    /// What a GPU says that parameters lie on.
    pub fn floats(&self) -> Result<Option<Vec<f32>>> {
        Ok(match &self.data {
            InitializerData::I64(_) | InitializerData::I8(_) => None,
            InitializerData::F32(values) => Some(values.clone()),
            InitializerData::Parameter { parameter, transposed: false } => Some(parameter.to_vec()?),
            InitializerData::Parameter { parameter, transposed: true } => {
                let (values, columns) = (parameter.to_vec()?, parameter.shape()[1]);
                Some((0..columns).flat_map(|c| values[c..].iter().step_by(columns)).copied().collect())
            }
        })
    }
}

impl Graph {
    /// Adds a node with one output and returns that output's name.
    pub fn node(&mut self, op_type: &'static str, inputs: &[&str], attributes: &[(&'static str, Attribute)]) -> String {
        let count = self.counts.entry(op_type).or_default();
        let name = format!("{op_type}_{count}");
        *count += 1;
        self.nodes.push(Node {
            op_type,
            name: name.clone(),
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: vec![name.clone()],
            attributes: attributes.to_vec(),
        });
        name
    }

    /// Adds an initializer, once for each name.
    pub fn initializer(&mut self, name: &str, dims: Vec<usize>, data: InitializerData) -> String {
        if !self.initializers.iter().any(|i| i.name == name) {
            self.initializers.push(Initializer { name: name.to_owned(), dims, data });
        }
        name.to_owned()
    }

    /// A parameter as it is.
    pub fn parameter(&mut self, parameter: &Parameter) -> String {
        let data = InitializerData::Parameter { parameter: parameter.clone(), transposed: false };
        self.initializer(parameter.name(), parameter.shape().to_vec(), data)
    }

    /// A weight `[out, in]`, written as `[in, out]` for MatMul.
    pub fn transposed(&mut self, weight: &Parameter) -> String {
        let data = InitializerData::Parameter { parameter: weight.clone(), transposed: true };
        let dims = weight.shape().iter().rev().copied().collect();
        self.initializer(&format!("{}.transposed", weight.name()), dims, data)
    }

    /// An int64 vector, named by what it is and holds.
    pub fn ints(&mut self, what: &str, values: &[i64]) -> String {
        let name = values.iter().fold(what.to_owned(), |name, v| format!("{name}_{v}"));
        self.initializer(&name, vec![values.len()], InitializerData::I64(values.to_vec()))
    }

    /// An f32 scalar, named by what it is and holds.
    pub fn scalar(&mut self, what: &str, value: f32) -> String {
        self.initializer(&format!("{what}_{value}"), Vec::new(), InitializerData::F32(vec![value]))
    }
}

/// Reads `forward` on symbols: inputs `names`, `[batch, sequence]` each, and the output `logits`.
///
/// # Errors
/// What an op's ONNX form refuses.
pub fn capture(
    names: &'static [&'static str],
    max_positions: usize,
    forward: impl FnOnce(&Inputs) -> Result<Tensor>,
) -> Result<Graph> {
    let dims = || vec![Dim::Symbol("batch"), Dim::Symbol("sequence")];
    let graph = Rc::new(RefCell::new(Graph {
        inputs: names.iter().map(|&name| Input { name: name.to_owned(), dims: dims() }).collect(),
        ..Graph::default()
    }));
    let Tensor::Symbol(logits) = forward(&Inputs::symbolic(graph.clone(), names, max_positions))? else {
        return Err(Error::Input("the forward on symbols gave a value".into()));
    };
    let mut graph = graph.take();
    let name = logits.name;
    for output in graph.nodes.iter_mut().flat_map(|node| &mut node.outputs).filter(|output| **output == name) {
        *output = "logits".to_owned();
    }
    graph.outputs.push(Output { name: "logits".to_owned(), dims: logits.shape });
    Ok(graph)
}

//! A captured graph → the same graph on 8-bit integers.
//!
//! Weights are quantised here, symmetrically, with a scale for each output channel. Activations are
//! quantised as they come, by ONNX's `DynamicQuantizeLinear`: one scale and zero point for a whole
//! tensor, so what a row gets depends, a little, on the rows beside it in its batch.
//!
//! Everything is written in ONNX's own operators of opset 12, in the form that ONNX Runtime fuses, the
//! bias included, to `DynamicQuantizeMatMul` and, where several products share what they read, to
//! `MatMulIntegerToFloat`. fp32's time over each form's, measured with MiniLM-L6 on AVX-512 VNNI: this
//! 2.2, and no more where those fused operators are written outright; ONNX Runtime's own tool, which
//! comes to `QAttention`, 1.9; weights as uint8 1.4; `MatMulNBits` at 8 bits, whose logits are three
//! times nearer to fp32's, 1.2. `MultiHeadAttention` for what stands between the products would gain 3%.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;

use anyhow::{Context, Result, ensure};
use kiln_models::nn::{Attribute, Graph, Initializer, InitializerData, Node};

/// The largest weight as an integer: 7 bits of 8.
///
/// A CPU without VNNI adds two products of an activation (up to 255) and a weight in 16 bits, which
/// saturate without an error where weights go beyond 64. Of MiniLM-L6's sums on rows of BBC, 4 in a
/// million would with 8 bits; with 7 none can, so that integers multiply alike on every CPU. It costs
/// little, since most of what is lost is lost with the activations: there the mean difference of a
/// logit is 0.0108 on validation, after 0.0105 with 8 bits, and 4 of 426 predictions of the test part
/// change, after 2.
const WEIGHT: f32 = 63.0;

/// The largest element of a table as an integer: nothing multiplies those but their scale.
const TABLE: f32 = 127.0;

/// Tables, and weights for few rows, of fewer elements stay as they are: there is nothing to gain.
const TABLE_FROM: usize = 1 << 14;

/// The attribute of a `Cast` to f32: `TensorProto.FLOAT`.
const TO_F32: (&str, Attribute) = ("to", Attribute::Int(1));

/// Rewrites a graph so that each `MatMul` by a weight multiplies integers, and each large table that a
/// `Gather` reads holds them. So does each large weight of a `Gemm`, but its product stays in fp32: it
/// reads one row an example, takes no time to speak of, and decides most directly. All else stays as
/// it is.
///
/// # Errors
/// A weight that is not finite.
pub fn int8(mut graph: Graph) -> Result<Graph> {
    let mut activations = BTreeMap::new();
    for node in mem::take(&mut graph.nodes) {
        let matrix = |name: &String| graph.initializers.iter().find(|i| i.name == *name && i.dims.len() == 2);
        let large = |table: &&Initializer| table.dims.iter().product::<usize>() >= TABLE_FROM;
        let quantized = match (node.op_type, &node.inputs[..]) {
            ("MatMul", [_, weight]) => matrix(weight).map(Matrix::of_columns).transpose()?,
            ("Gather", [table, _]) | ("Gemm", [_, table, ..]) => {
                matrix(table).filter(large).map(Matrix::of_rows).transpose()?
            }
            _ => None,
        };
        match (quantized, node.op_type) {
            (None, _) => graph.nodes.push(node),
            (Some(weight), "MatMul") => product(&mut graph, node, weight, &mut activations),
            (Some(weight), "Gemm") => few_rows(&mut graph, node, weight),
            (Some(table), _) => gather(&mut graph, node, table),
        }
    }
    let used: BTreeSet<&String> = graph.nodes.iter().flat_map(|node| &node.inputs).collect();
    let initializers = mem::take(&mut graph.initializers);
    graph.initializers = initializers.into_iter().filter(|initializer| used.contains(&initializer.name)).collect();
    Ok(graph)
}

/// `x W` → `(q(x) − zero) W' · (scale of x · scales of W)`. Products of one `x` share what it became.
fn product(graph: &mut Graph, node: Node, weight: Matrix, activations: &mut BTreeMap<String, String>) {
    let x = &node.inputs[0];
    let q = activations.entry(x.clone()).or_insert_with(|| {
        let q = graph.node("DynamicQuantizeLinear", &[x], &[]);
        name_outputs(graph, [q.clone(), format!("{q}_scale"), format!("{q}_zero")]);
        q
    });
    let [values, scales] = weight.write(graph);
    let y = graph.node("MatMulInteger", &[q, &values, &format!("{q}_zero")], &[]);
    let y = graph.node("Cast", &[&y], &[TO_F32]);
    let scales = graph.node("Mul", &[&format!("{q}_scale"), &scales], &[]);
    graph.node("Mul", &[&y, &scales], &[]);
    name_outputs(graph, node.outputs);
}

/// `x W + b` → `x (W' · scales of W) + b`: ONNX Runtime multiplies the weight out when it opens the model.
fn few_rows(graph: &mut Graph, mut node: Node, weight: Matrix) {
    let [values, scales] = weight.write(graph);
    let values = graph.node("Cast", &[&values], &[TO_F32]);
    node.inputs[1] = graph.node("Mul", &[&values, &scales], &[]);
    graph.nodes.push(node);
}

/// `T[ids]` → `T'[ids] · scales of T[ids]`
fn gather(graph: &mut Graph, node: Node, table: Matrix) {
    let ids = &node.inputs[1];
    let [values, scales] = table.write(graph);
    let values = graph.node("Gather", &[&values, ids], &node.attributes);
    let values = graph.node("Cast", &[&values], &[TO_F32]);
    let scales = graph.node("Gather", &[&scales, ids], &node.attributes);
    graph.node("Mul", &[&values, &scales], &[]);
    name_outputs(graph, node.outputs);
}

/// Names the outputs of the node that was added last.
fn name_outputs(graph: &mut Graph, outputs: impl Into<Vec<String>>) {
    if let Some(node) = graph.nodes.last_mut() {
        node.outputs = outputs.into();
    }
}

/// A matrix `[rows, columns]` of integers, with a scale for each column, or for each row.
struct Matrix {
    name: String,
    dims: Vec<usize>,
    values: Vec<i8>,
    scales: Vec<f32>,
    scales_dims: Vec<usize>,
}

impl Matrix {
    /// A weight `[in, out]`, by output channel.
    fn of_columns(weight: &Initializer) -> Result<Matrix> {
        let columns = weight.dims[1];
        Self::new(weight, "int8", vec![columns], WEIGHT, |i| i % columns)
    }

    /// A table, by row.
    fn of_rows(table: &Initializer) -> Result<Matrix> {
        let (rows, columns) = (table.dims[0], table.dims[1]);
        Self::new(table, "rows.int8", vec![rows, 1], TABLE, |i| i / columns)
    }

    /// Quantises to integers up to `largest`, which stands for the largest element of each channel.
    fn new(
        matrix: &Initializer,
        suffix: &str,
        scales_dims: Vec<usize>,
        largest: f32,
        channel: impl Fn(usize) -> usize,
    ) -> Result<Matrix> {
        let name = format!("{}.{suffix}", matrix.name);
        let floats = matrix.floats()?.with_context(|| format!("{} is no matrix of numbers", matrix.name))?;
        ensure!(floats.iter().all(|v| v.is_finite()), "{} holds a number that is not finite", matrix.name);
        let mut scales = vec![0f32; scales_dims[0]];
        for (i, value) in floats.iter().enumerate() {
            let scale = &mut scales[channel(i)];
            *scale = scale.max(value.abs() / largest);
        }
        for scale in scales.iter_mut().filter(|scale| **scale == 0.0) {
            *scale = 1.0; // of zeros
        }
        let value = |(i, value): (usize, &f32)| (value / scales[channel(i)]).round().clamp(-largest, largest) as i8;
        let values = floats.iter().enumerate().map(value).collect();
        Ok(Matrix { name, dims: matrix.dims.clone(), values, scales, scales_dims })
    }

    /// Adds the integers and the scales to the graph's initializers, and returns their names.
    fn write(self, graph: &mut Graph) -> [String; 2] {
        let Matrix { name, dims, values, scales, scales_dims } = self;
        let scales = graph.initializer(&format!("{name}.scales"), scales_dims, InitializerData::F32(scales));
        [graph.initializer(&name, dims, InitializerData::I8(values)), scales]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_models::nn::{Dim, Input, Output};

    fn matrix(name: &str, dims: [usize; 2], data: Vec<f32>) -> Initializer {
        Initializer { name: name.into(), dims: dims.to_vec(), data: InitializerData::F32(data) }
    }

    /// Numbers from -1 to 1, in no order.
    fn noise(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn each_output_channel_has_its_scale() {
        let weight = matrix("w", [3, 3], vec![63.0, 0.5, 0.0, -126.0, -0.125, 0.0, 1.0, 0.1, 0.0]);
        let Matrix { values, scales, scales_dims, .. } = Matrix::of_columns(&weight).unwrap();
        assert_eq!((scales, scales_dims), (vec![2.0, 0.5 / 63.0, 1.0], vec![3]));
        assert_eq!(values, [32, 63, 0, -63, -16, 0, 1, 13, 0], "a channel of zeros stays one");

        let table = matrix("t", [2, 2], vec![-1.27, 0.01, 0.0, 0.0]);
        let Matrix { values, scales, scales_dims, .. } = Matrix::of_rows(&table).unwrap();
        assert_eq!((values, scales_dims), (vec![-127, 1, 0, 0], vec![2, 1]));
        assert!((scales[0] - 0.01).abs() < 1e-9 && scales[1] == 1.0);
    }

    #[test]
    fn the_way_there_and_back_loses_half_a_step_at_most() {
        let (rows, columns) = (64, 48);
        // Channels of very different sizes, down to where f32 has no more digits to give.
        let size = |column: usize| 10f32.powi(column as i32 - 44);
        let floats: Vec<f32> = noise(rows * columns).iter().zip(0..).map(|(v, i)| v * size(i % columns)).collect();
        let weight = matrix("w", [rows, columns], floats.clone());
        let Matrix { values, scales, .. } = Matrix::of_columns(&weight).unwrap();
        for (i, (&float, &value)) in floats.iter().zip(&values).enumerate() {
            let scale = f64::from(scales[i % columns]);
            let error = (f64::from(value) * scale - f64::from(float)).abs();
            assert!(value.unsigned_abs() <= 63);
            // A step below f32's smallest normal number is itself rounded.
            let bound = scale * 0.5001 + 63.0 * f64::from(f32::from_bits(1));
            assert!(error <= bound, "{float:e} became {value} steps of {scale:e}");
        }
        let largest = |column: usize| values[column..].iter().step_by(columns).map(|v| v.unsigned_abs()).max();
        assert!((8..columns).all(|column| largest(column) == Some(63)), "every channel uses the whole range");
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        for broken in [f32::NAN, f32::INFINITY] {
            let error = Matrix::of_columns(&matrix("w", [2, 1], vec![0.0, broken])).err().unwrap();
            assert_eq!(error.to_string(), "w holds a number that is not finite");
        }
    }

    /// Two products of one embedding, one of both, and what has no weight.
    fn graph() -> Graph {
        let mut g = Graph::default();
        let dims = || vec![Dim::Symbol("batch"), Dim::Symbol("sequence")];
        g.inputs.push(Input { name: "ids".into(), dims: dims() });
        let f32s = |g: &mut Graph, name: &str, dims: [usize; 2]| {
            g.initializer(name, dims.to_vec(), InitializerData::F32(noise(dims[0] * dims[1])))
        };
        let (words, few) = (f32s(&mut g, "words", [512, 32]), f32s(&mut g, "few", [512, 2]));
        let (a, b, c) = (f32s(&mut g, "a", [32, 16]), f32s(&mut g, "b", [32, 16]), f32s(&mut g, "c", [16, 2]));
        let axis = [("axis", Attribute::Int(0))];
        let x = g.node("Gather", &[&words, "ids"], &axis);
        let (a, b) = (g.node("MatMul", &[&x, &a], &[]), g.node("MatMul", &[&x, &b], &[]));
        let product = g.node("Mul", &[&a, &b], &[]);
        let y = g.node("MatMul", &[&product, &c], &[]);
        let rows = g.node("Gather", &[&few, "ids"], &axis);
        g.node("Add", &[&y, &rows], &[]);
        name_outputs(&mut g, ["y".to_owned()]);
        g.outputs.push(Output { name: "y".into(), dims: [dims(), vec![Dim::Fixed(2)]].concat() });
        g
    }

    #[test]
    fn products_by_weights_and_large_tables_hold_integers() {
        let quantized = int8(graph()).unwrap();
        let count = |op: &str| quantized.nodes.iter().filter(|node| node.op_type == op).count();
        assert_eq!(
            (count("MatMul"), count("MatMulInteger"), count("DynamicQuantizeLinear")),
            (0, 3, 2),
            "one is shared"
        );
        assert_eq!((count("Gather"), count("Add")), (3, 1));

        let mut names = BTreeSet::new();
        for output in quantized.nodes.iter().flat_map(|node| &node.outputs) {
            assert!(names.insert(output), "two nodes give {output}");
        }
        let initializers: Vec<_> = quantized.initializers.iter().map(|i| (i.name.as_str(), &i.dims[..])).collect();
        let expected: [(&str, &[usize]); 9] = [
            ("few", &[512, 2]), // too small
            ("words.rows.int8.scales", &[512, 1]),
            ("words.rows.int8", &[512, 32]),
            ("a.int8.scales", &[16]),
            ("a.int8", &[32, 16]),
            ("b.int8.scales", &[16]),
            ("b.int8", &[32, 16]),
            ("c.int8.scales", &[2]),
            ("c.int8", &[16, 2]),
        ];
        assert_eq!(initializers, expected);
        assert_eq!(quantized.initializers[2].byte_len(), 512 * 32);
    }
}

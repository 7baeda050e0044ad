//! A captured graph → an ONNX file.
//!
//! Opset 12 with the mask written as two `Unsqueeze`, and no `value_info`: the form in which ONNX
//! Runtime fuses each layer's attention into one node on CPU, and the fastest of those measured.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kiln_models::nn::{Attribute, Dim, ElementType, Graph, Initializer, Node};
use prost::Message;

use super::proto::*;

/// Of tensors' bytes, what goes into the file itself: a protobuf message ends at 2 GiB, and the
/// nodes need room too.
pub const EXTERNAL_ABOVE: u64 = 2_000_000_000;

/// Tensors below this size stay in the file, so that readers see shapes without the data beside.
const EXTERNAL_FROM: usize = 1024;

/// Where readers may map external tensors.
const ALIGNMENT: u64 = 64;

/// The IR version that came with an opset: what the oldest reader of that opset knows.
fn ir_version(opset: u32) -> Result<i64> {
    match opset {
        12 => Ok(7),
        _ => anyhow::bail!("export.opset = {opset}: kiln writes opset 12"),
    }
}

/// Writes `graph` to `path` as an ONNX model with `metadata` (key, value) beside it, one
/// initializer at a time, and syncs it.
///
/// Where the initializers take more than `external_above` bytes ([`EXTERNAL_ABOVE`], but for tests)
/// they go to `<path>.data`. The model names that file by its name alone, so both may be moved.
/// Neither appears atomically: the caller writes into a folder of its own and renames.
pub fn write(
    graph: &Graph,
    name: &str,
    opset: u32,
    metadata: &[(&str, String)],
    path: &Path,
    external_above: u64,
) -> Result<()> {
    let total: u64 = graph.initializers.iter().map(|i| i.byte_len() as u64).sum();
    let tensors = if total > external_above {
        write_external(&graph.initializers, &path.with_added_extension("data"))?
    } else {
        graph.initializers.iter().map(tensor).collect()
    };

    let model = ModelProto {
        ir_version: ir_version(opset)?,
        producer_name: "kiln".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: None,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: opset.into() }],
        metadata_props: metadata.iter().map(|(key, value)| entry(key, value)).collect(),
    };
    let graph_proto = GraphProto {
        node: graph.nodes.iter().map(node).collect(),
        name: name.into(),
        initializer: Vec::new(),
        input: graph.inputs.iter().map(|i| value_info(&i.name, DataType::Int64, &i.dims)).collect(),
        output: graph.outputs.iter().map(|o| value_info(&o.name, DataType::Float, &o.dims)).collect(),
    };

    // A message is its fields one after another, so the large ones are written by hand: the model,
    // then its graph, then the graph's initializers, each with its raw_data last.
    let raw = |tensor: &TensorProto, initializer: &Initializer| match tensor.data_location {
        0 => Some(initializer.byte_len()),
        _ => None,
    };
    let tensor_len = |tensor: &TensorProto, raw: Option<usize>| {
        tensor.encoded_len() + raw.map_or(0, |len| 1 + prost::length_delimiter_len(len) + len)
    };
    let initializers = || tensors.iter().zip(&graph.initializers);
    let graph_len = graph_proto.encoded_len()
        + initializers()
            .map(|(tensor, initializer)| tensor_len(tensor, raw(tensor, initializer)))
            .map(|len| 1 + prost::length_delimiter_len(len) + len)
            .sum::<usize>();

    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&model.encode_to_vec())?;
        write_key(&mut file, 7, graph_len)?;
        file.write_all(&graph_proto.encode_to_vec())?;
        for (tensor, initializer) in initializers() {
            let raw = raw(tensor, initializer);
            write_key(&mut file, 5, tensor_len(tensor, raw))?;
            file.write_all(&tensor.encode_to_vec())?;
            if let Some(len) = raw {
                write_key(&mut file, 9, len)?;
                file.write_all(&bytes(initializer)?)?;
            }
        }
        Ok(file.into_inner()?.sync_all()?)
    };
    write().with_context(|| format!("could not write {}", path.display()))
}

/// Reads the ONNX file at `path` whole.
///
/// # Errors
/// Where the file cannot be read or is no ONNX model.
pub fn read(path: &Path) -> Result<ModelProto> {
    let bytes = std::fs::read(path).with_context(|| format!("could not read {}", path.display()))?;
    ModelProto::decode(bytes.as_slice()).with_context(|| format!("{} is not an ONNX model", path.display()))
}

/// Key of a length-delimited field with a number below 16, and its length.
fn write_key(file: &mut impl Write, field: u8, len: usize) -> Result<()> {
    let mut head = vec![field << 3 | 2];
    prost::encode_length_delimiter(len, &mut head)?;
    Ok(file.write_all(&head)?)
}

/// Writes the larger tensors to `path`, and returns all of them as the model names them.
fn write_external(initializers: &[Initializer], path: &Path) -> Result<Vec<TensorProto>> {
    let location = path.file_name().and_then(|name| name.to_str()).context("an ONNX file's name is not UTF-8")?;
    let write = || -> Result<_> {
        let mut file = BufWriter::new(File::create(path)?);
        let mut offset = 0;
        let mut tensors = Vec::with_capacity(initializers.len());
        for initializer in initializers {
            let mut tensor = tensor(initializer);
            if initializer.byte_len() >= EXTERNAL_FROM {
                let start = u64::next_multiple_of(offset, ALIGNMENT);
                file.write_all(&[0; ALIGNMENT as usize][..(start - offset) as usize])?;
                let bytes = bytes(initializer)?;
                file.write_all(&bytes)?;
                offset = start + bytes.len() as u64;
                tensor.data_location = DataLocation::External.into();
                tensor.external_data = vec![
                    entry("location", location),
                    entry("offset", &start.to_string()),
                    entry("length", &bytes.len().to_string()),
                ];
            }
            tensors.push(tensor);
        }
        file.into_inner()?.sync_all()?;
        Ok(tensors)
    };
    write().with_context(|| format!("could not write {}", path.display()))
}

/// The bytes of an initializer, as many as its lengths were counted with.
fn bytes(initializer: &Initializer) -> Result<Vec<u8>> {
    let Initializer { name, dims, .. } = initializer;
    let (bytes, expected) = (initializer.bytes()?, initializer.byte_len());
    ensure!(bytes.len() == expected, "initializer {name} {dims:?} has {} bytes, needs {expected}", bytes.len());
    Ok(bytes)
}

/// An initializer without its data.
fn tensor(initializer: &Initializer) -> TensorProto {
    let data_type = match initializer.element_type() {
        ElementType::I64 => DataType::Int64,
        ElementType::F32 => DataType::Float,
        ElementType::I8 => DataType::Int8,
    };
    TensorProto {
        dims: initializer.dims.iter().map(|&dim| dim as i64).collect(),
        data_type: data_type.into(),
        name: initializer.name.clone(),
        ..Default::default()
    }
}

fn node(node: &Node) -> NodeProto {
    NodeProto {
        input: node.inputs.clone(),
        output: node.outputs.clone(),
        name: node.name.clone(),
        op_type: node.op_type.into(),
        attribute: node.attributes.iter().map(|(name, value)| attribute(name, value)).collect(),
        domain: String::new(),
    }
}

fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    let mut proto = AttributeProto { name: name.into(), ..Default::default() };
    let r#type = match value {
        Attribute::Int(i) => {
            proto.i = Some(*i);
            AttributeType::Int
        }
        Attribute::Ints(ints) => {
            proto.ints = ints.clone();
            AttributeType::Ints
        }
        Attribute::Float(f) => {
            proto.f = Some(*f);
            AttributeType::Float
        }
    };
    proto.set_type(r#type);
    proto
}

fn value_info(name: &str, elem_type: DataType, dims: &[Dim]) -> ValueInfoProto {
    let dim = dims.iter().map(|dim| DimensionProto {
        value: Some(match dim {
            Dim::Symbol(name) => DimensionValue::DimParam(name.to_string()),
            Dim::Fixed(size) => DimensionValue::DimValue(*size as i64),
        }),
    });
    let tensor_type =
        TensorTypeProto { elem_type: elem_type.into(), shape: Some(TensorShapeProto { dim: dim.collect() }) };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}

fn entry(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto { key: key.into(), value: value.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use crate::infer::predictor::{Options, Predictor};
    use crate::infer::runtime;
    use crate::progress::Progress;
    use kiln_models::nn::{InitializerData, Input, Output};

    const HIDDEN: usize = 20;
    const LABELS: usize = 3;

    /// logits = (sum over the sequence of words[input_ids] + types[token_type_ids]) · W + b
    fn sum_of_embeddings(vocabulary: usize) -> Graph {
        let mut graph = Graph::default();
        let f32s = |graph: &mut Graph, name: &str, dims: &[usize]| {
            let data = (0..dims.iter().product()).map(|i: usize| (i % 17) as f32 / 8.0 - 1.0).collect();
            graph.initializer(name, dims.to_vec(), InitializerData::F32(data))
        };
        let words = f32s(&mut graph, "words", &[vocabulary, HIDDEN]);
        let types = f32s(&mut graph, "types", &[2, HIDDEN]);
        let w = f32s(&mut graph, "w", &[HIDDEN, LABELS]);
        let b = f32s(&mut graph, "b", &[LABELS]);
        let shape = graph.ints("shape", &[-1, HIDDEN as i64]);

        let batch = Dim::Symbol("batch");
        for name in ["input_ids", "attention_mask", "token_type_ids"] {
            graph.inputs.push(Input { name: name.into(), dims: vec![batch, Dim::Symbol("sequence")] });
        }
        let words = graph.node("Gather", &[&words, "input_ids"], &[("axis", Attribute::Int(0))]);
        let types = graph.node("Gather", &[&types, "token_type_ids"], &[("axis", Attribute::Int(0))]);
        let x = graph.node("Add", &[&words, &types], &[]); // [batch, sequence, hidden]
        let mask = graph.node("Cast", &["attention_mask"], &[("to", Attribute::Int(1))]);
        let mask = graph.node("Unsqueeze", &[&mask], &[("axes", Attribute::Ints(vec![2]))]);
        let x = graph.node("Mul", &[&x, &mask], &[]);
        let axes = [("axes", Attribute::Ints(vec![1])), ("keepdims", Attribute::Int(0))];
        let x = graph.node("ReduceSum", &[&x], &axes); // [batch, hidden]
        let x = graph.node("Reshape", &[&x, &shape], &[]);
        graph.node("Gemm", &[&x, &w, &b], &[("alpha", Attribute::Float(0.5))]);
        graph.nodes.last_mut().unwrap().outputs = vec!["logits".into()];
        graph.outputs.push(Output { name: "logits".into(), dims: vec![batch, Dim::Fixed(LABELS)] });
        graph
    }

    /// The same in plain Rust.
    fn expected(ids: &[i32], types: &[i8]) -> Vec<f32> {
        let value = |i: usize| (i % 17) as f32 / 8.0 - 1.0;
        let sum = |h: usize| -> f32 {
            let x = |(&id, &r#type): (&i32, &i8)| value(id as usize * HIDDEN + h) + value(r#type as usize * HIDDEN + h);
            ids.iter().zip(types).map(x).sum()
        };
        let logit = |l: usize| (0..HIDDEN).map(|h| sum(h) * value(h * LABELS + l)).sum::<f32>() * 0.5 + value(l);
        (0..LABELS).map(logit).collect()
    }

    #[test]
    fn onnx_runtime_runs_what_is_written() {
        let runtime = runtime::ensure(false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ids: Vec<Vec<i32>> =
            (0..50).map(|i| (0..1 + i * 7 % 23).map(|j| (i * 31 + j * 5) % 40).collect()).collect();
        let types: Vec<Vec<i8>> = ids.iter().map(|ids| ids.iter().map(|id| (id % 2) as i8).collect()).collect();
        let examples: Vec<Example> = ids
            .iter()
            .zip(&types)
            .map(|(ids, types)| Example { input_ids: ids, token_type_ids: Some(types) })
            .collect();

        // In the file itself, and beside it.
        for (name, external_above) in [("inline.onnx", EXTERNAL_ABOVE), ("external.onnx", 0)] {
            let path = folder.path().join(name);
            let metadata = [("id2label", r#"{"0":"a","1":"b","2":"c"}"#.to_string()), ("kiln.model", "m".into())];
            write(&sum_of_embeddings(40), "m", 12, &metadata, &path, external_above).unwrap();
            assert_eq!(path.with_added_extension("data").exists(), external_above == 0);

            let options = Options { workers: 3, max_tokens: 64, pad_id: 39 };
            let predictor = Predictor::open(runtime, &path, options).unwrap();
            assert_eq!(predictor.id2label().unwrap(), ["a", "b", "c"]);
            let predict = |examples: &[Example]| predictor.predict(examples, &Progress::new("", 0, "", true));
            for ((logits, ids), types) in predict(&examples).unwrap().logits.iter().zip(&ids).zip(&types) {
                for (got, expected) in logits.iter().zip(expected(ids, types)) {
                    assert!((got - expected).abs() < 1e-4, "{got} is not {expected}");
                }
            }
            let unknown = [Example { input_ids: &[40], token_type_ids: None }];
            let error = format!("{:#}", predict(&unknown).unwrap_err());
            assert!(error.contains("indices element out of data bounds"), "{error}");
        }

        let model = read(&folder.path().join("external.onnx")).unwrap();
        let tensors = model.graph.unwrap().initializer;
        let offset = |tensor: &TensorProto| tensor.external_data[1].value.parse::<u64>().unwrap();
        let external: Vec<_> = tensors.iter().filter(|t| t.data_location == 1).collect();
        assert_eq!(external.len(), 1, "only `words` is large enough");
        assert!(external.iter().all(|tensor| offset(tensor).is_multiple_of(ALIGNMENT)));
    }

    #[test]
    fn an_initializer_of_another_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut graph = sum_of_embeddings(40);
        graph.initializers[0].dims[0] += 1;
        let error = write(&graph, "m", 12, &[], &folder.path().join("m.onnx"), EXTERNAL_ABOVE).unwrap_err();
        assert!(format!("{error:#}").contains("initializer words"), "{error:#}");
    }

    /// onnx's own checker, which also infers every shape.
    #[test]
    fn onnx_checker_accepts_what_is_written() {
        let Some(python) = crate::testing::python() else { return };
        let folder = tempfile::tempdir().unwrap();
        for (name, external_above) in [("inline.onnx", EXTERNAL_ABOVE), ("external.onnx", 0)] {
            let path = folder.path().join(name);
            write(&sum_of_embeddings(400), "m", 12, &[("a", "b".into())], &path, external_above).unwrap();
            let script = "import sys, onnx; onnx.checker.check_model(sys.argv[1], full_check=True); \
                          m = onnx.load(sys.argv[1]); print(m.ir_version, m.opset_import[0].version)";
            let output = std::process::Command::new(&python).args(["-c", script]).arg(&path).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "7 12");
        }
    }
}

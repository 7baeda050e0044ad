//! Hugging Face folders: config.json and model.safetensors, read into a model and written back so
//! that transformers loads them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use kiln_kernels::DType;
use kiln_models::nn::{Graph, Inputs, LoadReport, Mode, NamedTensor, Packing, Parameter, Tensor};
use kiln_models::{Architecture, Built, Config as ModelConfig};
use serde_json::{Map, Value as Json, json};

use crate::config::available_memory;
pub use crate::data::Example;
use crate::error::UserError;
use crate::store;
use crate::tensors::{self, Stored, TensorFile};
use crate::user_error;
use crate::weights::Weights;

/// A sequence classifier with its labels.
pub struct Classifier {
    built: Built,
    config: ModelConfig,
    id2label: Vec<String>,
}

impl Classifier {
    /// Reads a folder that a training wrote: every parameter must be there.
    ///
    /// # Errors
    /// Files that are missing or do not fit the model, named.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = read_config(folder)?;
        let id2label = id2label(&config).with_context(|| folder.join("config.json").display().to_string())?;
        let classifier = Self::build(config, id2label, 0)?;
        let report = classifier.load_weights(&folder.join("model.safetensors"))?;
        if !report.new.is_empty() || !report.reshaped.is_empty() {
            bail!(
                "{}: lacks {}; it needs to be a folder that a training wrote",
                folder.join("model.safetensors").display(),
                report
                    .new
                    .iter()
                    .chain(report.reshaped.iter().map(|(name, _)| name))
                    .cloned()
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
        Ok(classifier)
    }

    /// Starts a fine-tuning from a folder: its weights where it has them, fresh ones from `seed`
    /// elsewhere, and a head for `labels`.
    ///
    /// # Errors
    /// Files that are missing or do not fit the model, named.
    pub fn pretrained(folder: &Path, labels: &[String], dropout: Option<f64>, seed: u64) -> Result<(Self, LoadReport)> {
        let config = read_config(folder)?;
        let classifier = Self::fresh(config, labels, dropout, seed)
            .with_context(|| folder.join("config.json").display().to_string())?;
        let weights = || {
            let weights = Weights::open(folder)?;
            classifier.load_named(&weights.names(), |name| weights.read(name))
        };
        let report = weights().with_context(|| folder.display().to_string()).map_err(UserError)?;
        Ok((classifier, report))
    }

    /// A new model from the keys of a config.json.
    ///
    /// # Errors
    /// A config that the architecture cannot follow.
    pub fn scratch(
        architecture: &str,
        config: &Map<String, Json>,
        vocab_size: usize,
        pad_token_id: u32,
        labels: &[String],
        dropout: Option<f64>,
        seed: u64,
    ) -> Result<Self> {
        let mut config = config.clone();
        config.insert("model_type".into(), architecture.into());
        config.insert("vocab_size".into(), vocab_size.into());
        config.insert("pad_token_id".into(), pad_token_id.into());
        Self::fresh(config, labels, dropout, seed)
    }

    fn fresh(config: ModelConfig, labels: &[String], dropout: Option<f64>, seed: u64) -> Result<Self> {
        Self::build(fine_tuned(config, labels, dropout)?, labels.to_vec(), seed)
    }

    fn build(config: ModelConfig, id2label: Vec<String>, seed: u64) -> Result<Self> {
        let declared = kiln_models::declare(&config).map_err(|e| UserError(e.into()))?.parameters.elements();
        // Values alone; memory that is not there ends the process.
        let bytes = (size_of::<f32>() * declared) as u64;
        if let Some(memory) = available_memory().filter(|&memory| bytes > memory) {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            return Err(user_error!(
                "its sizes make a model of {declared} parameters, {:.1} GB, and this machine has {:.1} GB of memory",
                gigabytes(bytes),
                gigabytes(memory)
            ));
        }
        let built = kiln_models::build(&config, seed).map_err(|e| UserError(e.into()))?;
        Ok(Self { built, config, id2label })
    }

    /// Reads the weights of a model.safetensors.
    ///
    /// # Errors
    /// A file that is not safetensors, or a tensor whose shape does not fit.
    pub fn load_weights(&self, file: &Path) -> Result<LoadReport> {
        let read = || {
            let tensors = TensorFile::open(file)?;
            self.load_named(&tensors.names(), |name| tensors.tensor(name))
        };
        read().with_context(|| file.display().to_string()).map_err(|e| UserError(e).into())
    }

    fn load_named(&self, names: &[String], get: impl FnMut(&str) -> Result<NamedTensor>) -> Result<LoadReport> {
        self.built.parameters.load(self.built.architecture.base_prefix, names, get)
    }

    /// Writes config.json and model.safetensors; the tokenizer's files are the tokenizer's to write.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, folder: &Path) -> Result<()> {
        store::write_json(&folder.join("config.json"), &self.config)?;
        self.save_weights(&folder.join("model.safetensors"))
    }

    /// Writes model.safetensors.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save_weights(&self, file: &Path) -> Result<()> {
        let parameters = &self.built.parameters;
        let values = parameters.values();
        let stored =
            |p| Stored { name: Parameter::name(p), shape: p.shape().to_vec(), buffer: &values, range: p.range() };
        tensors::write(file, parameters.iter().map(stored).collect())
    }

    /// The forward, and the parameters it reads.
    pub fn built(&self) -> &Built {
        &self.built
    }

    /// The labels, by id.
    pub fn id2label(&self) -> &[String] {
        &self.id2label
    }

    /// The input columns that the model reads, in order.
    pub fn input_names(&self) -> &'static [&'static str] {
        self.built.architecture.inputs
    }

    /// The rows of its table of embeddings, where config.json says so.
    pub fn vocab_size(&self) -> Option<u64> {
        self.config.get("vocab_size")?.as_u64()
    }

    /// The longest sequence that the model can read.
    ///
    /// # Errors
    /// A config that the architecture cannot follow.
    pub fn max_positions(&self) -> Result<usize> {
        Ok((self.built.architecture.max_positions)(&self.config)?)
    }

    /// The model as an ONNX graph.
    ///
    /// # Errors
    /// What an op's ONNX form refuses.
    pub fn graph(&self) -> Result<Graph> {
        Ok(kiln_models::capture(&self.built, &self.config)?)
    }

    /// A packed batch of `examples`, keyed by `example_ids`, as the forward reads it.
    ///
    /// # Errors
    /// An empty example.
    pub fn inputs(&self, examples: &[Example<'_>], example_ids: Vec<u64>, mode: Mode) -> Result<Inputs> {
        let mut offsets = vec![0u32];
        let (mut ids, mut types) = (Vec::new(), Vec::new());
        for example in examples {
            ids.extend(example.input_ids.iter().map(|&id| id as u32));
            match example.token_type_ids {
                Some(segments) => types.extend(segments.iter().map(|&id| id as u32)),
                None => types.resize(ids.len(), 0),
            }
            offsets.push(ids.len() as u32);
        }
        let packing = Packing::new(offsets, example_ids)?;
        let mut columns = vec![("input_ids", ids), ("token_type_ids", types)];
        columns.retain(|(name, _)| self.input_names().contains(name));
        Ok(Inputs::packed(packing, columns, mode)?)
    }

    /// The logits of `examples`, in order, by the packed fp32 forward without dropout.
    ///
    /// # Errors
    /// An id that the vocabulary does not have, or an example longer than the model can read.
    pub fn logits(&self, examples: &[Example<'_>]) -> Result<Vec<Vec<f32>>> {
        let inputs = self.inputs(examples, (0..examples.len() as u64).collect(), Mode::Evaluate)?;
        rows(&self.built.model.forward(&inputs)?)
    }
}

/// The architecture of a `model_type`.
///
/// # Errors
/// The user's: none has it.
pub fn architecture(model_type: &str) -> Result<&'static Architecture> {
    kiln_models::architecture(model_type).map_err(|e| UserError(e.into()).into())
}

/// A model as a training of it has it, without values: for what shows without them.
///
/// # Errors
/// A config that the architecture cannot follow.
pub fn declare(config: &ModelConfig, labels: &[String], dropout: Option<f64>) -> Result<Built> {
    let config = fine_tuned(config.clone(), labels, dropout)?;
    kiln_models::declare(&config).map_err(|e| UserError(e.into()).into())
}

/// The config.json of a model with these labels and this dropout.
fn fine_tuned(mut config: ModelConfig, labels: &[String], dropout: Option<f64>) -> Result<ModelConfig> {
    let model_type = config.get("model_type").and_then(Json::as_str).unwrap_or_default();
    let architecture = architecture(model_type)?;
    for key in dropout.iter().flat_map(|_| architecture.dropout_keys) {
        config.insert((*key).into(), dropout.into());
    }
    let ids = labels.iter().enumerate();
    config.insert("architectures".into(), json!([architecture.class_name]));
    config.insert(
        "id2label".into(),
        ids.clone().map(|(i, label)| (i.to_string(), json!(label))).collect::<Map<_, _>>().into(),
    );
    config.insert("label2id".into(), ids.map(|(i, label)| (label.clone(), json!(i))).collect::<Map<_, _>>().into());
    config.insert("problem_type".into(), "single_label_classification".into());
    config.remove("num_labels");
    config.remove("torch_dtype"); // transformers 4's name
    config.insert("dtype".into(), "float32".into());
    Ok(config)
}

/// The rows of a `[rows, columns]` value.
///
/// # Errors
/// A symbol has none.
pub fn rows(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(tensor.data()?.to_dtype(DType::F32)?.to_vec2::<f32>()?)
}

fn read_config(folder: &Path) -> Result<ModelConfig> {
    let file = folder.join("config.json");
    if !folder.is_dir() {
        return Err(user_error!(
            "{}: is no folder; a model's path needs config.json and model.safetensors in it",
            folder.display()
        ));
    }
    store::read_json(&file).map_err(|e| UserError(e).into())
}

/// The labels of a config.json, by id.
fn id2label(config: &ModelConfig) -> Result<Vec<String>> {
    let table = config.get("id2label").and_then(Json::as_object).context("id2label is missing")?;
    let label = |i: usize| table.get(&i.to_string()).and_then(Json::as_str).map(str::to_owned);
    (0..table.len()).map(|i| label(i).with_context(|| format!("id2label has no label for {i}"))).collect()
}

//! A checkpoint's weights, in whichever files it has them: one safetensors file, several with an index, or
//! PyTorch's pickles.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::pickle::PthTensors;
use kiln_kernels::DType;
use kiln_models::nn::NamedTensor;
use serde::Deserialize;

use crate::error::warn;
use crate::store;
use crate::tensors::TensorFile;
use crate::user_error;

/// The files that hold a checkpoint's weights or their index, those first that are taken first.
pub const WEIGHTS: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The weights of a folder.
pub struct Weights {
    files: Vec<Part>,
    /// Each tensor's file.
    places: BTreeMap<String, usize>,
}

enum Part {
    Safetensors(TensorFile),
    Pickle(PathBuf, PthTensors),
}

/// A `*.index.json`: which file each tensor is in.
#[derive(Deserialize)]
pub struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads one.
    ///
    /// # Errors
    /// The user's: it cannot be read, or names a file that is not beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let index: Self = store::read_json(path).map_err(crate::error::UserError)?;
        let is_name =
            |file: &str| matches!(Path::new(file).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
        if let Some(file) = index.files().find(|file| !is_name(file)) {
            return Err(user_error!("{} names {file:?}: needs the name of a file beside it", path.display()));
        }
        Ok(index)
    }

    /// The files, each once.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.weight_map.values().map(String::as_str).collect::<BTreeSet<_>>().into_iter()
    }
}

/// The files that hold a folder's weights, with their index, if there is one.
///
/// # Errors
/// The user's: there are none, or one that the index names is missing.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(first) = WEIGHTS.into_iter().map(|file| folder.join(file)).find(|file| file.is_file()) else {
        return Err(user_error!("{} has none of {}", folder.display(), WEIGHTS.join(", ")));
    };
    let mut files = vec![first.clone()];
    if first.extension().is_some_and(|extension| extension == "json") {
        files.extend(Index::read(&first)?.files().map(|file| folder.join(file)));
    }
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => Err(user_error!("{} is not there, and {} names it", missing.display(), first.display())),
        None => Ok(files),
    }
}

impl Weights {
    /// Opens the weights of `folder`, and says so where they are pickles.
    ///
    /// # Errors
    /// As [`files`], or a file that is none of its kind.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut weights = Self { files: Vec::new(), places: BTreeMap::new() };
        let paths = files(folder)?;
        for path in paths.iter().filter(|path| path.extension().is_none_or(|extension| extension != "json")) {
            let part = Part::open(path).with_context(|| path.display().to_string())?;
            weights.places.extend(part.names().into_iter().map(|name| (name, weights.files.len())));
            weights.files.push(part);
        }
        if let Some(Part::Pickle(path, _)) = weights.files.first() {
            warn(format_args!(
                "warning: {} is a pickle, which holds code: its tensors are read, nothing of it is run. The model \
                 that is trained from it is safetensors",
                path.display()
            ));
        }
        Ok(weights)
    }

    /// The tensors' names.
    pub fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    /// A tensor.
    ///
    /// # Errors
    /// There is none of this name, its dtype is no float's, or the file cannot be read.
    pub fn read(&self, name: &str) -> Result<NamedTensor> {
        let part = self.places.get(name).and_then(|&place| self.files.get(place));
        part.with_context(|| format!("there is no tensor {name:?}"))?.read(name)
    }
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Ok(Self::Safetensors(TensorFile::open(path)?));
        }
        let key = None; // the tensors are the file's own
        let tensors =
            guarded(|| PthTensors::new(path, key)).context("it is no pickle of tensors, as torch.save writes it")?;
        ensure!(!tensors.tensor_infos().is_empty(), "it holds no tensors by name");
        Ok(Self::Pickle(path.into(), tensors))
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(file) => file.names(),
            Self::Pickle(_, tensors) => tensors.tensor_infos().keys().cloned().collect(),
        }
    }

    fn read(&self, name: &str) -> Result<NamedTensor> {
        match self {
            Self::Safetensors(file) => file.tensor(name),
            Self::Pickle(path, tensors) => {
                let info = tensors.tensor_infos().get(name).with_context(|| format!("there is no tensor {name:?}"))?;
                let (shape, dtype) = (info.layout.shape().clone(), info.dtype);
                let bytes = shape.dims().iter().try_fold(dtype.size_in_bytes(), |bytes, &dim| bytes.checked_mul(dim));
                let size = std::fs::metadata(path)?.len();
                // torch does not compress.
                ensure!(
                    bytes.is_some_and(|bytes| bytes as u64 <= size),
                    "tensor {name:?} has shape {shape:?}, and the file {size} bytes: it is broken"
                );
                let read = || {
                    tensors.get(name)?.map(|tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()).transpose()
                };
                let data = guarded(read).with_context(|| format!("tensor {name:?}"))?;
                Ok(NamedTensor {
                    shape: shape.into_dims(),
                    data: data.with_context(|| format!("there is no tensor {name:?}"))?,
                })
            }
        }
    }
}

/// candle's reader takes a pickle for one that torch wrote: with another it may panic.
fn guarded<T>(read: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
    match crate::error::guarded(read) {
        Some(read) => Ok(read?),
        None => bail!("it is broken"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    /// Shapes and elements, by name.
    type Named = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

    fn read(folder: &Path) -> Result<Named> {
        let weights = Weights::open(folder)?;
        let read = |name: String| {
            let tensor = weights.read(&name)?;
            Ok((name, (tensor.shape, tensor.data)))
        };
        weights.names().into_iter().map(read).collect()
    }

    /// What torch and safetensors' own writer save, in every kind of file, is the same; and what is broken is an
    /// error, wherever it is broken.
    #[test]
    fn every_kind_of_file_holds_the_same() {
        let Some(python) = crate::testing::python() else { return };
        let folder = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/save_weights.py");
        let output = Command::new(python).arg(script).arg(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

        let one = read(&folder.path().join("one")).unwrap();
        assert_eq!(one.len(), 7);
        assert_eq!((&one["scalar"].0, &one["scalar"].1), (&vec![], &vec![3.5]));
        assert_eq!(read(&folder.path().join("shards")).unwrap(), one);
        assert_eq!(read(&folder.path().join("pickles")).unwrap(), one);
        let mut pickle = read(&folder.path().join("pickle")).unwrap();
        let (shape, transposed) = pickle.remove("transposed").unwrap();
        assert_eq!((shape, transposed.len()), (vec![8, 3], 24));
        assert_eq!(pickle, one);

        let path = folder.path().join("pickle/pytorch_model.bin");
        let whole = fs::read(&path).unwrap();
        let mut errors = 0;
        for at in (0..whole.len()).step_by(whole.len() / 400) {
            for cut in [true, false] {
                let mut bytes = whole.clone();
                if cut {
                    bytes.truncate(at)
                } else {
                    bytes[at] = !bytes[at]
                }
                fs::write(&path, bytes).unwrap();
                errors += usize::from(read(&folder.path().join("pickle")).is_err()); // a number may be another
            }
        }
        assert!(errors > 400, "{errors}");
    }

    #[test]
    fn an_index_that_names_what_is_not_there_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = || format!("{:#}", Weights::open(folder.path()).err().unwrap());
        assert!(error().contains("has none of model.safetensors, "), "{}", error());
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(&index, r#"{"weight_map": {"a": "a.safetensors"}}"#).unwrap();
        assert!(error().contains("a.safetensors is not there, and "), "{}", error());
        for file in ["../a.safetensors", "/a", "a/b", "..", ""] {
            fs::write(&index, format!(r#"{{"weight_map": {{"a": "{file}"}}}}"#)).unwrap();
            assert!(error().contains(&format!("names {file:?}: needs the name of a file beside it")), "{}", error());
        }
        fs::write(&index, "{}").unwrap();
        assert!(error().contains("weight_map"), "{}", error());
    }
}

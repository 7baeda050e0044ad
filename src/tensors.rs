//! safetensors files, read and written piece by piece: a copy of a whole one, or its mapping, would be
//! the most that a training takes of memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kiln_kernels::Buffer;
use kiln_models::nn::NamedTensor;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::store;

/// Bytes of a piece; a multiple of any element's size.
const PIECE: usize = 1 << 18;

/// A safetensors file that is read.
pub struct TensorFile {
    file: File,
    metadata: Metadata,
    /// Where the data starts, in bytes.
    start: usize,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// It is not there, or no safetensors file, or cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len() as usize;
        let mut length = [0; size_of::<u64>()];
        file.read_exact(&mut length).context("it is no safetensors file: it has no header")?;
        let header = u64::from_le_bytes(length) as usize;
        let start = header.saturating_add(length.len());
        ensure!(start <= size, "it is no safetensors file, or cut off: its header goes past its end");
        let mut json = vec![0; header];
        file.read_exact(&mut json)?;
        let metadata: Metadata = serde_json::from_slice(&json).context("its header is no safetensors header")?;
        let end = start.saturating_add(metadata.data_len());
        ensure!(end == size, "it has {size} bytes, but its header says {end}: it is cut off, or not what was written");
        Ok(Self { file, metadata, start })
    }

    /// The tensors' names, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// A tensor's dtype and shape.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).with_context(|| format!("it has no tensor {name:?}"))
    }

    /// A whole tensor.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn tensor(&self, name: &str) -> Result<NamedTensor> {
        let shape = self.info(name)?.shape.clone();
        let mut data = Vec::with_capacity(shape.iter().product());
        self.read(name, |piece| data.extend_from_slice(piece))?;
        Ok(NamedTensor { shape, data })
    }

    /// Hands a tensor's elements, as f32, to `take`, some at a time.
    ///
    /// # Errors
    /// There is none of this name, its dtype is no float's, or the file cannot be read.
    pub fn read(&self, name: &str, mut take: impl FnMut(&[f32])) -> Result<()> {
        let TensorInfo { dtype, data_offsets: (start, end), .. } = *self.info(name)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start((self.start + start) as u64))?;
        for piece in (start..end).step_by(PIECE) {
            let mut bytes = vec![0; PIECE.min(end - piece)];
            file.read_exact(&mut bytes)?;
            take(&to_f32(dtype, &bytes).with_context(|| format!("tensor {name:?}"))?);
        }
        Ok(())
    }
}

/// Elements as f32.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16); // bf16 is the upper half of an f32
    Ok(match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| wide(u16::from_le_bytes([b[0], b[1]]))).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
            .collect(),
        other => bail!("dtype {other:?} is not supported; F32, F16, BF16 and F64 are"),
    })
}

/// A tensor of a safetensors file that is written.
pub struct Stored<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What its elements lie in.
    pub buffer: &'a Buffer,
    /// And where.
    pub range: Range<usize>,
}

/// Writes a safetensors file by temporary name, fsync and rename, in the order of names.
///
/// # Errors
/// What the file system says.
pub fn write(path: &Path, mut tensors: Vec<Stored<'_>>) -> Result<()> {
    tensors.sort_by_key(|tensor| tensor.name);
    let mut end = 0;
    let info = tensors.iter().map(|tensor| {
        let start = end;
        end += size_of::<f32>() * tensor.range.len();
        let info = TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.to_owned(), info)
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]); // transformers asks for it
    let metadata = Metadata::new(Some(format), info.collect()).with_context(|| path.display().to_string())?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    store::write(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for Stored { buffer, range, .. } in &tensors {
            let piece = PIECE / size_of::<f32>();
            for start in range.clone().step_by(piece) {
                let values = buffer.read(start..range.end.min(start + piece)).map_err(std::io::Error::other)?;
                file.write_all(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kiln_kernels::Device;
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn others_read_what_is_written_and_so_is_it_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let values: Vec<f32> = (0..200_000).map(|i| (i as f32).sin()).collect();
        let buffer = Buffer::from_vec(values.clone(), &Device::Cpu).unwrap();
        let stored = |name, shape, range| Stored { name, shape, buffer: &buffer, range };
        let tensors = vec![stored("b", vec![3, 5], 7..22), stored("a", vec![150_000], 40_000..190_000)];
        write(&path, tensors).unwrap();

        let bytes = fs::read(&path).unwrap();
        let others = SafeTensors::deserialize(&bytes).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.names(), ["a", "b"]);
        for (name, shape, range) in [("a", vec![150_000], 40_000..190_000), ("b", vec![3, 5], 7..22)] {
            let other = others.tensor(name).unwrap();
            let expected: Vec<u8> = values[range.clone()].iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!((other.dtype(), other.shape(), other.data()), (Dtype::F32, &shape[..], &expected[..]));
            let mut read = Vec::new();
            file.read(name, |piece| read.extend_from_slice(piece)).unwrap();
            assert_eq!((&file.info(name).unwrap().shape, &read[..]), (&shape, &values[range]));
        }
        assert!(file.read("c", |_| ()).unwrap_err().to_string().contains("no tensor \"c\""));
    }

    #[test]
    fn files_that_are_broken_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let buffer = Buffer::from_vec(vec![1.0; 10], &Device::Cpu).unwrap();
        write(&path, vec![Stored { name: "a", shape: vec![10], buffer: &buffer, range: 0..10 }]).unwrap();
        let whole = fs::read(&path).unwrap();
        let error = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            TensorFile::open(&path).err().unwrap().to_string()
        };
        assert!(error(&whole[..whole.len() - 1]).contains("cut off"));
        assert!(error(&whole[..20]).contains("its header goes past its end"));
        assert!(error(&[255; 100]).contains("its header goes past its end"));
        assert!(error(b"{}").contains("it has no header"));
        let mut other = whole.clone();
        other[10] = b'!';
        assert!(error(&other).contains("no safetensors header"));
    }
}

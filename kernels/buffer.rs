//! Flat memory for parameters, their gradients and the optimizer's moments.
use crate::{
    lending::{Lendable, Lent},
    threads,
    view::{Part, PartMut, View, ViewMut},
};
use candle_core::{Device, Result, bail};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(feature = "cuda")]
use crate::gpu::{self, cuda::Slice};

/// Elements of one task.
const CHUNK: usize = 32768;

/// A flat array of `f32` on one device.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    device: Device,
}

#[derive(Debug)]
enum Memory {
    /// The copy in bf16 is for tests, in which the emulator takes the host's memory for a GPU's.
    Host { values: Lendable, bf16: Option<Vec<u16>> },
    /// The copy in bf16 is what products read; whoever writes the values writes it too.
    #[cfg(feature = "cuda")]
    Cuda { values: Slice<f32>, bf16: Option<Box<Slice<u16>>> },
}

impl Default for Buffer {
    /// An empty one on the CPU.
    fn default() -> Self {
        Self { memory: Memory::Host { values: Lendable::default(), bf16: None }, device: Device::Cpu }
    }
}

impl Buffer {
    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// A device that is neither the CPU nor of [`cuda_device`](crate::cuda_device), or memory that it does
    /// not have.
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        let memory = match device {
            Device::Cpu => Memory::Host { values: vec![0.0; len].into(), bf16: None },
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => Memory::Cuda { values: Slice::zeros(len, cuda)?, bf16: None },
            other => return Err(no_memory(other)),
        };
        Ok(Self { memory, device: device.clone() })
    }

    /// A buffer that holds `data`.
    ///
    /// # Errors
    /// As [`zeros`](Self::zeros).
    pub fn from_vec(data: Vec<f32>, device: &Device) -> Result<Self> {
        let memory = match device {
            Device::Cpu => Memory::Host { values: data.into(), bf16: None },
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => Memory::Cuda { values: Slice::upload(&data, cuda)?, bf16: None },
            other => return Err(no_memory(other)),
        };
        Ok(Self { memory, device: device.clone() })
    }

    /// Keeps a copy in bf16 beside the values from now on: then activations are bf16, and products read
    /// the copy.
    ///
    /// # Errors
    /// On the CPU, which computes in f32.
    pub fn keep_bf16(&mut self) -> Result<()> {
        match &mut self.memory {
            Memory::Host { values, bf16 } if cfg!(test) => *bf16 = Some(vec![0; values.len()]),
            Memory::Host { .. } => bail!("a copy in bf16 was asked for on the CPU, which computes in f32"),
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, bf16 } => *bf16 = Some(Box::new(values.zeros_like()?)),
        }
        self.refresh_bf16()
    }

    /// Writes the copy in bf16 anew, if one is kept: for values that somebody else wrote, who had them on
    /// [loan](Self::lend).
    ///
    /// # Errors
    /// What a GPU says.
    pub fn refresh_bf16(&mut self) -> Result<()> {
        match &mut self.memory {
            Memory::Host { values, bf16 } => {
                for (copy, &value) in bf16.iter_mut().flatten().zip(values.all()) {
                    *copy = round(value);
                }
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, bf16 } => {
                if let Some(copy) = bf16 {
                    let cuda = gpu::cuda::expect(&self.device)?;
                    gpu::buffer::to_bf16(&*cuda, copy.address(0), values.address(0), values.len())?;
                }
            }
        }
        Ok(())
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many elements it holds.
    pub fn len(&self) -> usize {
        match &self.memory {
            Memory::Host { values, .. } => values.len(),
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, .. } => values.len(),
        }
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part, to read.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        let part = match &self.memory {
            Memory::Host { values, bf16 } => {
                Part::Host { values: values.part(range.clone()), bf16: bf16.as_ref().map(|bf16| &bf16[range]) }
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, bf16 } => {
                self.check(&range);
                let bf16 = bf16.as_ref().map(|bf16| bf16.address(range.start));
                Part::Cuda { values: values.address(range.start), bf16, len: range.len() }
            }
        };
        View { part, device: &self.device }
    }

    /// A part, to write.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        #[cfg(feature = "cuda")]
        self.check(&range);
        let part = match &mut self.memory {
            Memory::Host { values, .. } => PartMut::Host(values.part_mut(range)),
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, .. } => PartMut::Cuda { values: values.address(range.start), len: range.len() },
        };
        ViewMut { part, device: &self.device }
    }

    /// Several parts at once, to write.
    ///
    /// # Errors
    /// Where two ranges overlap or one goes past the end.
    pub fn views_mut<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> Result<[ViewMut<'_>; N]> {
        #[cfg(feature = "cuda")]
        let len = self.len();
        let device = &self.device;
        match &mut self.memory {
            Memory::Host { values, .. } => {
                Ok(values.parts_mut(ranges)?.map(|values| ViewMut { part: PartMut::Host(values), device }))
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, .. } => {
                let apart = |a: &Range<usize>, b: &Range<usize>| a.end <= b.start || b.end <= a.start;
                for (i, a) in ranges.iter().enumerate() {
                    if a.start > a.end || a.end > len || !ranges[..i].iter().all(|b| apart(a, b)) {
                        bail!("views {ranges:?} of a buffer of {len}: they overlap or go past its end");
                    }
                }
                let part =
                    |range: Range<usize>| PartMut::Cuda { values: values.address(range.start), len: range.len() };
                Ok(ranges.map(|range| ViewMut { part: part(range), device }))
            }
        }
    }

    /// Lends a part to another thread, until it drops it. Until then whoever reaches for it here panics; on a
    /// GPU nobody looks, and what is launched meanwhile is in no order with what the other launches.
    ///
    /// # Errors
    /// Where the range goes past the end, or some of it is lent.
    pub fn lend(&mut self, range: Range<usize>) -> Result<Lent> {
        match &mut self.memory {
            Memory::Host { values, .. } => values.lend(range).map(Lent::Host),
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, .. } => values.lend(range).map(Lent::Cuda),
        }
    }

    /// Adds another buffer's elements to these.
    ///
    /// # Errors
    /// Where it has another length or lies elsewhere.
    pub fn add(&mut self, other: &Buffer) -> Result<()> {
        if self.len() != other.len() {
            bail!("a buffer of {} is to be added to one of {}", other.len(), self.len());
        }
        #[cfg(feature = "cuda")]
        if let (Memory::Cuda { values: sum, .. }, Memory::Cuda { values, .. }) = (&self.memory, &other.memory) {
            let cuda = gpu::cuda::expect(&self.device)?;
            return gpu::elementwise::add_f32(&*cuda, sum.address(0), values.address(0), sum.len());
        }
        let (sum, other) = (self.host_mut("Buffer::add", "the sum")?, other.host("Buffer::add", "the other")?);
        threads::install(|| {
            let chunks = sum.par_chunks_mut(CHUNK).zip(other.par_chunks(CHUNK));
            chunks.for_each(|(sum, other)| sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x));
        });
        Ok(())
    }

    /// A copy of a part, on the host. A GPU is waited for.
    ///
    /// # Errors
    /// What a GPU says, now or of any kernel before.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<f32>> {
        match &self.memory {
            Memory::Host { values, .. } => Ok(values.part(range).to_vec()),
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, .. } => {
                self.check(&range);
                values.download(range)
            }
        }
    }

    /// Copies `values` in, from element `offset` on.
    ///
    /// # Errors
    /// What a GPU says.
    ///
    /// # Panics
    /// Where the values go past the end, as indexing a slice does.
    pub fn write(&mut self, offset: usize, values: &[f32]) -> Result<()> {
        let range = offset..offset + values.len();
        #[cfg(feature = "cuda")]
        self.check(&range);
        match &mut self.memory {
            Memory::Host { values: all, bf16 } => {
                all.part_mut(range.clone()).copy_from_slice(values);
                for (copy, &value) in bf16.iter_mut().flat_map(|bf16| &mut bf16[range.clone()]).zip(values) {
                    *copy = round(value);
                }
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda { values: all, bf16 } => {
                all.write(offset, values)?;
                if let Some(bf16) = bf16 {
                    let cuda = gpu::cuda::expect(&self.device)?;
                    gpu::buffer::to_bf16(&*cuda, bf16.address(offset), all.address(offset), values.len())?;
                }
            }
        }
        Ok(())
    }

    /// Sets every element to `value`.
    ///
    /// # Errors
    /// What a GPU says.
    pub fn fill(&mut self, value: f32) -> Result<()> {
        match &mut self.memory {
            Memory::Host { values, bf16 } => {
                values.all_mut().fill(value);
                bf16.iter_mut().for_each(|bf16| bf16.fill(round(value)));
            }
            #[cfg(feature = "cuda")]
            Memory::Cuda { values, bf16 } => {
                let cuda = gpu::cuda::expect(&self.device)?;
                let copy = bf16.as_ref().map_or(0, |bf16| bf16.address(0));
                gpu::buffer::fill(&*cuda, values.address(0), copy, values.len(), value)?;
            }
        }
        Ok(())
    }

    /// All elements, for a kernel on the CPU.
    ///
    /// # Errors
    /// Where it is on a GPU.
    pub(crate) fn host(&self, kernel: &str, name: &str) -> Result<&[f32]> {
        self.view(0..self.len()).host(kernel, name)
    }

    /// The same, to write.
    ///
    /// # Errors
    /// Where it is on a GPU.
    pub(crate) fn host_mut(&mut self, kernel: &str, name: &str) -> Result<&mut [f32]> {
        let len = self.len();
        self.view_mut(0..len).into_host(kernel, name)
    }

    #[cfg(test)]
    pub(crate) fn bf16_bits(&self) -> Result<Vec<u16>> {
        match &self.memory {
            Memory::Host { bf16, .. } => Ok(bf16.clone().unwrap_or_default()),
            #[cfg(feature = "cuda")]
            Memory::Cuda { bf16, .. } => bf16.as_ref().map_or(Ok(Vec::new()), |bf16| bf16.download(0..bf16.len())),
        }
    }

    #[cfg(feature = "cuda")]
    fn check(&self, range: &Range<usize>) {
        let len = self.len();
        assert!(range.start <= range.end && range.end <= len, "range {range:?} of a buffer of {len}");
    }
}

fn no_memory(device: &Device) -> candle_core::Error {
    candle_core::Error::Msg(format!("a buffer was asked for on {device:?}: kernels run on the CPU and on CUDA only"))
}

/// An f32 as bf16, its upper half: to nearest, ties to even.
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fff } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_disjoint_and_in_bounds() -> Result<()> {
        let mut buffer = Buffer::from_vec((0..10).map(|i| i as f32).collect(), &Device::Cpu)?;
        let [a, b] = buffer.views_mut([6..8, 0..2])?;
        a.into_host("", "")?.copy_from_slice(b.into_host("", "")?);
        assert_eq!(buffer.read(5..9)?, [5., 0., 1., 8.]);
        assert!(buffer.views_mut([0..3, 2..4]).is_err());
        assert!(buffer.views_mut([0..3, 8..11]).is_err());
        Ok(())
    }

    #[test]
    fn the_copy_in_bf16_follows_what_is_written() -> Result<()> {
        let bits = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect::<Vec<_>>();
        let mut x = vec![1.0, -1.0 - 3.0 / 256.0, 1e-40, 3.4e38, f32::INFINITY];
        let mut buffer = Buffer::from_vec(x.clone(), &Device::Cpu)?;
        buffer.keep_bf16()?;
        assert_eq!(buffer.bf16_bits()?, bits(&x));
        buffer.write(1, &[0.1, 0.2])?;
        x[1..3].copy_from_slice(&[0.1, 0.2]);
        assert_eq!(buffer.bf16_bits()?, bits(&x));
        buffer.fill(0.3)?;
        assert_eq!(buffer.bf16_bits()?, bits(&[0.3; 5]));
        match buffer.lend(1..3)? {
            Lent::Host(mut lent) => lent.fill(0.7),
            #[cfg(feature = "cuda")]
            Lent::Cuda(_) => unreachable!("it is on the CPU"),
        }
        assert_eq!(buffer.bf16_bits()?, bits(&[0.3; 5]));
        buffer.refresh_bf16()?;
        assert_eq!(buffer.bf16_bits()?, bits(&[0.3, 0.7, 0.7, 0.3, 0.3]));
        Ok(())
    }
}

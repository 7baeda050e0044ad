//! Parts of a [`Buffer`](crate::Buffer), as kernels take them.
use candle_core::{Device, Result};

static CPU: Device = Device::Cpu;

/// A contiguous part of a [`Buffer`](crate::Buffer), to read: a parameter.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) part: Part<'a>,
    pub(crate) device: &'a Device,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    Host {
        values: &'a [f32],
        #[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code))] // nobody asks on the CPU
        bf16: Option<&'a [u16]>,
    },
    #[cfg(feature = "cuda")]
    Cuda { values: u64, bf16: Option<u64>, len: usize },
}

/// A contiguous part of a [`Buffer`](crate::Buffer), to write: a parameter's gradient.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub(crate) part: PartMut<'a>,
    pub(crate) device: &'a Device,
}

#[derive(Debug)]
pub(crate) enum PartMut<'a> {
    Host(&'a mut [f32]),
    #[cfg(feature = "cuda")]
    Cuda {
        values: u64,
        len: usize,
    },
}

impl<'a> View<'a> {
    /// How many elements it spans.
    pub fn len(&self) -> usize {
        match self.part {
            Part::Host { values, .. } => values.len(),
            #[cfg(feature = "cuda")]
            Part::Cuda { len, .. } => len,
        }
    }

    /// Whether it spans no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Its elements, for a kernel on the CPU.
    ///
    /// # Errors
    /// Where it is on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub(crate) fn host(&self, kernel: &str, name: &str) -> Result<&'a [f32]> {
        match self.part {
            Part::Host { values, .. } => Ok(values),
            #[cfg(feature = "cuda")]
            Part::Cuda { .. } => Err(elsewhere(kernel, name, self.device)),
        }
    }

    /// Its first element, for a kernel on a GPU.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn address(&self) -> u64 {
        match self.part {
            Part::Host { values, .. } => values.as_ptr() as u64,
            #[cfg(feature = "cuda")]
            Part::Cuda { values, .. } => values,
        }
    }

    /// Its copy in bf16, where there is one.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn bf16_address(&self) -> Option<u64> {
        match self.part {
            Part::Host { bf16, .. } => bf16.map(|bf16| bf16.as_ptr() as u64),
            #[cfg(feature = "cuda")]
            Part::Cuda { bf16, .. } => bf16,
        }
    }
}

impl<'a> From<&'a [f32]> for View<'a> {
    /// A parameter on the CPU.
    fn from(values: &'a [f32]) -> Self {
        View { part: Part::Host { values, bf16: None }, device: &CPU }
    }
}

impl<'a> ViewMut<'a> {
    /// How many elements it spans.
    pub fn len(&self) -> usize {
        match &self.part {
            PartMut::Host(values) => values.len(),
            #[cfg(feature = "cuda")]
            PartMut::Cuda { len, .. } => *len,
        }
    }

    /// Whether it spans no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Its elements, for a kernel on the CPU.
    ///
    /// # Errors
    /// Where it is on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub(crate) fn into_host(self, kernel: &str, name: &str) -> Result<&'a mut [f32]> {
        match self.part {
            PartMut::Host(values) => Ok(values),
            #[cfg(feature = "cuda")]
            PartMut::Cuda { .. } => Err(elsewhere(kernel, name, self.device)),
        }
    }

    /// Its first element, for a kernel on a GPU.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn address(&mut self) -> u64 {
        match &mut self.part {
            PartMut::Host(values) => values.as_mut_ptr() as u64,
            #[cfg(feature = "cuda")]
            PartMut::Cuda { values, .. } => *values,
        }
    }
}

#[cfg(feature = "cuda")]
fn elsewhere(kernel: &str, name: &str, device: &Device) -> candle_core::Error {
    candle_core::Error::Msg(format!("{kernel}: {name} is on {device:?}: needs the CPU, as the activations are"))
}

//! Launching kernels on a GPU: what is the same for CUDA and for the emulator that runs the same
//! sources on the CPU in tests.
//!
//! `kernels/X.cu` holds the kernels beside their CPU twins of `X.rs`, and `gpu/X.rs` the code that
//! launches them: grid, block, shared memory and arguments, over [`Gpu`].
use crate::{Dropout, random};
use candle_core::Result;

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod columns;
pub(crate) mod cross_entropy;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod embedding;
#[cfg(test)]
pub(crate) mod emulated;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod operands;
pub(crate) mod pooling;
mod segments;
#[cfg(test)]
mod testing;

/// The headers of the kernels: `device.cuh` is all kernels' first.
const HEADERS: [(&str, &str); 4] = [
    ("#include \"gpu/attention.cuh\"", include_str!("attention.cuh")),
    ("#include \"gpu/tiles.cuh\"", include_str!("tiles.cuh")),
    ("#include \"gpu/device.cuh\"", include_str!("device.cuh")),
    ("#include \"gpu/elements.cuh\"", include_str!("elements.cuh")),
];

/// One source of kernels, which are compiled together. It begins with `#include "gpu/device.cuh"`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    pub name: &'static str,
    pub source: &'static str,
}

impl Module {
    /// The source with the headers in it: a compiler needs no other file.
    pub fn text(&self) -> String {
        HEADERS.iter().fold(self.source.to_owned(), |text, (include, header)| text.replacen(include, header, 1))
    }
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of each.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory for each block. More than 48 KiB a [`Gpu`] asks for by the
    /// kernel's attribute; 99 KiB is what all devices since sm_80 have.
    pub shared_bytes: u32,
}

impl Launch {
    /// Threads of a block, where kernels do not care.
    const THREADS: usize = 256;
    /// Blocks, at most, of kernels whose threads go on to the next elements.
    const BLOCKS: usize = 4096;

    /// A thread for each of `n` items, which take more than one where they are many.
    pub fn each(n: usize) -> Self {
        let blocks = n.div_ceil(Self::THREADS).clamp(1, Self::BLOCKS);
        Self { grid: [blocks as u32, 1, 1], block: [Self::THREADS as u32, 1, 1], shared_bytes: 0 }
    }

    /// A warp for each of `n` rows.
    pub fn warps(n: usize) -> Self {
        let blocks = n.div_ceil(Self::THREADS / 32);
        Self { grid: [blocks as u32, 1, 1], block: [Self::THREADS as u32, 1, 1], shared_bytes: 0 }
    }
}

/// A kernel's argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg {
    /// An address on the device. Zero is null: an optional operand that is absent.
    Pointer(u64),
    I32(i32),
    U32(u32),
    U64(u64),
    F32(f32),
}

/// What launches kernels, one after another in the order of the calls.
pub(crate) trait Gpu {
    /// Starts `kernel` of `module`, compiling it at first use. It does not wait for its end.
    ///
    /// # Errors
    /// Where it does not compile, does not have that kernel, or the launch is refused.
    fn launch(&self, module: &Module, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()>;
}

/// `device.cuh`'s `Mask` without its example id: `(u64 key, u32 site, u32 threshold, float scale)`.
pub(crate) fn dropout_args(dropout: Option<&Dropout>) -> [Arg; 4] {
    let (key, site, threshold, scale) = dropout.map_or((0, 0, 0, 1.0), |d| {
        let (threshold, scale) = d.threshold_and_scale();
        (random::key(&[d.seed, d.step]), d.site, threshold, scale)
    });
    [Arg::U64(key), Arg::U32(site), Arg::U32(threshold), Arg::F32(scale)]
}

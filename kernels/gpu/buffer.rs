//! Launches for [`Buffer`](crate::Buffer).
use super::{Arg, Gpu, Launch, Module};
use candle_core::Result;

const MODULE: Module = Module { name: "buffer", source: include_str!("../buffer.cu") };

/// Sets `len` elements, and their copy in bf16 where its address is not 0.
pub(crate) fn fill(gpu: &impl Gpu, values: u64, copy: u64, len: usize, value: f32) -> Result<()> {
    let args = [Arg::Pointer(values), Arg::Pointer(copy), Arg::F32(value), Arg::U64(len as u64)];
    gpu.launch(&MODULE, "fill", Launch::each(len), &args)
}

/// Rounds `len` elements to their copy in bf16.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // the emulator's buffers are the host's, which round by themselves
pub(crate) fn to_bf16(gpu: &impl Gpu, copy: u64, values: u64, len: usize) -> Result<()> {
    let args = [Arg::Pointer(copy), Arg::Pointer(values), Arg::U64(len as u64)];
    gpu.launch(&MODULE, "to_bf16", Launch::each(len), &args)
}

#[cfg(test)]
mod tests {
    use super::super::emulated::{Emulator, Memory};
    use super::*;
    use crate::{init, testing::*};
    use half::bf16;

    #[test]
    fn fills_and_rounds() -> Result<()> {
        let Some(gpu) = Emulator::new() else { return Ok(()) };
        let address = |arg| if let Arg::Pointer(address) = arg { address } else { 0 };
        let x = init::normal(1, 1, 777, 1.0);
        let (values, copy) = (Memory::new(&x), Memory::<bf16>::uninit(x.len()));
        to_bf16(&gpu, address(copy.pointer()), address(values.pointer()), x.len())?;
        assert_eq!(copy.read(), x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        fill(&gpu, address(values.pointer()), address(copy.pointer()), x.len(), 1.5)?;
        assert_eq!((values.read()[776], copy.read()[776]), (1.5, bf16::from_f32(1.5)));
        fill(&gpu, address(values.pointer()), 0, x.len(), 2.5)?;
        assert_close("values", values.read(), &[2.5; 777], 0.0);
        Ok(())
    }
}

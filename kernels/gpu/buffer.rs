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
    use super::super::{emulated::Memory, linear::Blas, testing::*};
    use super::*;
    use crate::{Buffer, DType, init, testing::*};
    use half::bf16;

    gpu_tests!(is_filled_written_and_rounded);

    /// On a GPU by these launches; the emulator's buffers are the host's.
    fn is_filled_written_and_rounded(case: &Case<impl Blas>) -> Result<()> {
        let x = buffer(1, 777);
        let mut on_device = case.parameters(&x)?;
        on_device.write(700, &[0.1; 70])?;
        let mut want = all(&x);
        want[700..770].fill(0.1);
        assert_eq!(all(&on_device), want);
        assert_eq!(on_device.read(699..701)?, want[699..701]);
        let bits = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>();
        let copied = case.dtype == DType::BF16;
        assert_eq!(on_device.bf16_bits()?, if copied { bits(&want) } else { vec![] });
        on_device.fill(0.3)?;
        assert_eq!(all(&on_device), [0.3; 777]);
        assert_eq!(on_device.bf16_bits()?, if copied { bits(&[0.3; 777]) } else { vec![] });
        assert!(Buffer::zeros(0, case.device)?.read(0..0)?.is_empty());
        Ok(())
    }

    #[test]
    fn fills_and_rounds() -> Result<()> {
        super::super::testing::emulated(|case| {
            let address = |arg| if let Arg::Pointer(address) = arg { address } else { 0 };
            let x = init::normal(1, 1, 777, 1.0);
            let (values, copy) = (Memory::new(&x), Memory::<bf16>::uninit(x.len()));
            to_bf16(case.gpu, address(copy.pointer()), address(values.pointer()), x.len())?;
            assert_eq!(copy.read(), x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
            fill(case.gpu, address(values.pointer()), address(copy.pointer()), x.len(), 1.5)?;
            assert_eq!((values.read()[776], copy.read()[776]), (1.5, bf16::from_f32(1.5)));
            fill(case.gpu, address(values.pointer()), 0, x.len(), 2.5)?;
            assert_eq!(values.read(), [2.5; 777]);
            Ok(())
        })
    }
}

//! The launch of [`cross_entropy`](crate::cross_entropy).
use super::{Arg, Gpu, Launch, Module, operands::*};
use candle_core::{DType, Result, Tensor};

const MODULE: Module = Module { name: "cross_entropy", source: include_str!("../cross_entropy.cu") };

/// All operands were checked but for the logits' memory.
pub(crate) fn forward(
    gpu: &impl Gpu,
    logits: &Tensor,
    labels: &[u32],
    class_weights: Option<&[f32]>,
    label_smoothing: f32,
    normalizer: f64,
) -> Result<(Tensor, Tensor)> {
    let operands = Operands::like("cross_entropy::forward", "logits", logits)?;
    let (examples, classes) = logits.dims2()?;
    let (losses, gradient) = (operands.empty_of(&[examples], DType::F32)?, operands.empty(logits.dims())?);
    let labels = operands.upload(labels)?;
    let total = class_weights.map_or(classes as f64, |weights| weights.iter().map(|&w| f64::from(w)).sum());
    let weights = class_weights.map(|weights| Tensor::from_slice(weights, classes, logits.device())).transpose()?;
    let args = [
        operands.tensor("losses", &losses, DType::F32)?,
        operands.activation("gradient", &gradient)?,
        operands.activation("logits", logits)?,
        operands.tensor("labels", &labels, DType::U32)?,
        weights.as_ref().map_or(Ok(Arg::Pointer(0)), |weights| operands.tensor("weights", weights, DType::F32))?,
        Arg::U32(examples as u32),
        Arg::U32(classes as u32),
        Arg::F32(label_smoothing),
        Arg::F32(total as f32),
        Arg::F32(normalizer as f32),
    ];
    gpu.launch(&MODULE, &operands.entry("forward"), Launch::warps(examples), &args)?;
    Ok((losses, gradient))
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::testing::*;

    gpu_tests!(is_the_cpus, confident_logits_stay_finite);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (examples, classes) in [(1, 2), (6, 5), (19, 70)] {
            let labels: Vec<u32> = (0..examples as u32).map(|i| i * 7 % classes as u32).collect();
            let weights: Vec<f32> = (0..classes).map(|i| (i % 4) as f32 * 0.75).collect();
            for (weights, smoothing) in [(None, 0.0), (None, 0.1), (Some(&weights[..]), 0.0), (Some(&weights[..]), 0.3)]
            {
                let logits = case.inputs(&tensor(1, &[examples, classes]).affine(3.0, 0.0)?)?;
                let (losses, gradient) = forward(case.gpu, &logits.device, &labels, weights, smoothing, 8.0)?;
                let (want_losses, want) =
                    crate::cross_entropy::forward(&logits.host, &labels, weights, smoothing, 8.0)?;
                // the CPU sums in f64; only the gradient is rounded to bf16
                assert_close("losses", &values(&losses), &values(&want_losses), 2e-6);
                case.close("dlogits", &gradient, &want, case.tolerance(2e-6, 1.0 / 256.0));
            }
        }
        Ok(())
    }

    fn confident_logits_stay_finite(case: &Case<impl Blas>) -> Result<()> {
        let logits = Tensor::new(&[[1e4f32, 0.0, -1e4], [-1e30, 1e30, 0.0]], &crate::Device::Cpu)?;
        let logits = case.inputs(&logits)?;
        let (losses, gradient) = forward(case.gpu, &logits.device, &[0, 1], None, 0.0, 2.0)?;
        assert_eq!(values(&losses), [0.0, 0.0]);
        assert!(values(&gradient.to_dtype(DType::F32)?).iter().all(|x| x.abs() < 1e-6));
        Ok(())
    }
}

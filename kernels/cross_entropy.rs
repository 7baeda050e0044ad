//! Cross-entropy with class weights and label smoothing, as `torch.nn.CrossEntropyLoss` defines
//! it: the loss and its gradient in one pass over the logits. There are few of them, so sums are
//! `f64`.
use crate::cpu;
use crate::device::on_gpu;
use candle_core::{Result, Tensor, bail};

/// `logits` `[examples, classes]`, one label for each example → each example's loss, weighted but
/// not divided, `[examples]` in `f32`, and the logits' gradient `[examples, classes]` of the losses' sum
/// divided by `normalizer` (the sum of the labels' weights over the global batch, for torch's mean).
///
/// The losses lie where the logits do: reading them waits for a GPU, which can be left to a step's end.
///
/// # Errors
/// Where shapes do not fit, a label is no class, or smoothing is not in `[0, 1]`.
pub fn forward(
    logits: &Tensor,
    labels: &[u32],
    class_weights: Option<&[f32]>,
    label_smoothing: f32,
    normalizer: f64,
) -> Result<(Tensor, Tensor)> {
    const KERNEL: &str = "cross_entropy::forward";
    let (examples, classes) = cpu::matrix(KERNEL, "logits", logits)?;
    if labels.len() != examples {
        bail!("{KERNEL}: logits have {examples} rows, but there are {} labels", labels.len());
    }
    if let Some(i) = labels.iter().position(|&label| label as usize >= classes) {
        bail!("{KERNEL}: logits have {classes} classes, but the label of example {i} is {}", labels[i]);
    }
    if let Some(weights) = class_weights {
        cpu::check_len(KERNEL, "class_weights", weights.len(), &[classes])?;
    }
    if !(0.0..=1.0).contains(&label_smoothing) {
        bail!("{KERNEL}: label_smoothing = {label_smoothing}: needs to be from 0 to 1");
    }
    on_gpu!(logits.device(), |gpu| {
        crate::gpu::cross_entropy::forward(&*gpu, logits, labels, class_weights, label_smoothing, normalizer)
    });
    let weight = |class: usize| class_weights.map_or(1.0, |weights| f64::from(weights[class]));
    let smoothing = f64::from(label_smoothing);
    let uniform = smoothing / classes as f64;
    let total: f64 = (0..classes).map(weight).sum();

    let data = cpu::read(KERNEL, "logits", logits)?;
    let mut losses = Vec::with_capacity(examples);
    let mut gradient = Vec::with_capacity(examples * classes);
    for (row, &label) in data.chunks_exact(classes).zip(labels) {
        let label = label as usize;
        let max = row.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(f64::from(x)));
        let log_sum = max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
        // The target is (1 - smoothing) on the label and smoothing / classes on each class, each
        // times the class's weight.
        let on_label = (1.0 - smoothing) * weight(label);
        let mut loss = 0.0;
        for (class, &x) in row.iter().enumerate() {
            let log_probability = f64::from(x) - log_sum;
            let target = uniform * weight(class) + if class == label { on_label } else { 0.0 };
            // A class that counts for nothing may have an infinite loss: 0 × ∞ must be 0.
            if target != 0.0 {
                loss -= target * log_probability;
            }
            let d = (on_label + uniform * total) * log_probability.exp() - target;
            gradient.push((d / normalizer) as f32);
        }
        losses.push(loss as f32);
    }
    let losses = Tensor::from_vec(losses, examples, logits.device())?;
    Ok((losses, Tensor::from_vec(gradient, (examples, classes), logits.device())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};
    use candle_core::{D, Var};

    const LABELS: [u32; 6] = [0, 3, 1, 1, 4, 2];
    const WEIGHTS: [f32; 5] = [0.5, 2.0, 1.0, 0.0, 3.0];

    /// torch's definition, written out: one-hot targets, smoothed, against log-probabilities.
    fn twin(logits: &Tensor, weights: Option<&[f32]>, smoothing: f64) -> Result<Tensor> {
        let ones = [1.0f32; 5];
        let weights = Tensor::from_slice(weights.unwrap_or(&ones), (1, 5), &Device::Cpu)?;
        let mut one_hot = [0.0f32; 30];
        LABELS.iter().enumerate().for_each(|(i, &label)| one_hot[i * 5 + label as usize] = 1.0);
        let one_hot = Tensor::from_slice(&one_hot, (6, 5), &Device::Cpu)?;
        let target = one_hot.affine(1.0 - smoothing, smoothing / 5.0)?.broadcast_mul(&weights)?;
        (candle_nn::ops::log_softmax(logits, D::Minus1)? * target)?.neg()?.sum(D::Minus1)
    }

    #[test]
    fn is_its_twin_and_finite_differences() -> Result<()> {
        let logits = tensor(1, &[6, 5]);
        for (weights, smoothing) in [(None, 0.0), (None, 0.1), (Some(WEIGHTS.as_slice()), 0.0), (Some(&WEIGHTS), 0.3)] {
            let var = Var::from_tensor(&logits)?;
            let want = twin(&var, weights, f64::from(smoothing))?;
            let (losses, gradient) = forward(&logits, &LABELS, weights, smoothing, 8.0)?;
            assert_close("losses", &values(&losses), &values(&want), 1e-6);
            let gradients = (want.sum_all()? / 8.0)?.backward()?;
            assert_close("dlogits", &values(&gradient), &values(gradients.get(&var).unwrap()), 1e-6);
            check_gradient("dlogits", &values(&logits), &values(&gradient), |x| {
                let x = Tensor::from_slice(x, (6, 5), &Device::Cpu)?;
                let losses = values(&forward(&x, &LABELS, weights, smoothing, 8.0)?.0);
                Ok(losses.iter().map(|&l| f64::from(l)).sum::<f64>() / 8.0)
            });
        }
        Ok(())
    }

    #[test]
    fn confident_logits_stay_finite() -> Result<()> {
        let logits = Tensor::new(&[[1e4f32, 0.0, -1e4], [-1e30, 1e30, 0.0]], &Device::Cpu)?;
        let (losses, gradient) = forward(&logits, &[0, 1], None, 0.0, 2.0)?;
        assert_eq!(values(&losses), [0.0, 0.0]);
        assert!(values(&gradient).iter().all(|x| x.abs() < 1e-6));
        Ok(())
    }

    #[test]
    fn refuses_a_label_that_is_no_class() {
        let logits = tensor(1, &[2, 3]);
        let error = forward(&logits, &[0, 3], None, 0.0, 1.0).unwrap_err().to_string();
        assert!(error.contains("3 classes, but the label of example 1 is 3"), "{error}");
        assert!(forward(&logits, &[0], None, 0.0, 1.0).is_err());
        assert!(forward(&logits, &[0, 1], Some(&[1.0; 2]), 0.0, 1.0).is_err());
        assert!(forward(&logits, &[0, 1], None, 1.5, 1.0).is_err());
    }
}

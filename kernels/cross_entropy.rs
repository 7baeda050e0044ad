//! Cross-entropy with class weights and label smoothing, as `torch.nn.CrossEntropyLoss` defines
//! it: the loss and its gradient in one pass over the logits. There are few of them, so sums are
//! `f64`.
use crate::cpu;
use candle_core::{Result, Tensor, bail};

/// `logits` `[examples, classes]`, one label for each example → each example's loss, weighted but
/// not divided, and the logits' gradient `[examples, classes]` of the losses' sum divided by
/// `normalizer` (the sum of the labels' weights over the global batch, for torch's mean).
///
/// # Errors
/// Where shapes do not fit, a label is no class, or smoothing is not in `[0, 1]`.
pub fn forward(
    logits: &Tensor,
    labels: &[u32],
    class_weights: Option<&[f32]>,
    label_smoothing: f32,
    normalizer: f64,
) -> Result<(Vec<f32>, Tensor)> {
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
    Ok((losses, Tensor::from_vec(gradient, (examples, classes), logits.device())?))
}

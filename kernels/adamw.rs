//! AdamW (Loshchilov and Hutter 2019), as `torch.optim.AdamW` computes it: parameters, moments and
//! gradients in one pass, which also clips the gradients and sets them to zero.
use crate::{Buffer, simd, threads};
use candle_core::{Result, bail};
use rayon::prelude::*;
use std::ops::Range;

/// Parameters that share a learning rate and a weight decay.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Where they lie in the buffers.
    pub range: Range<usize>,
    /// This step's learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// What all groups share.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// The first moment's decay.
    pub beta1: f64,
    /// The second moment's decay.
    pub beta2: f64,
    /// Added to the second moment's root.
    pub epsilon: f64,
    /// The optimizer step, from 1.
    pub step: u64,
    /// What gradients are multiplied by first: the clipping factor.
    pub gradient_scale: f64,
}

/// Elements of one task.
const CHUNK: usize = 32768;

/// One step. Elements outside the groups stay as they are; all gradients become zero.
///
/// # Errors
/// Where buffers differ in length, groups overlap or go past the end, or the step is 0.
pub fn step(
    parameters: &mut Buffer,
    gradients: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
    groups: &[Group],
    adamw: &AdamW,
) -> Result<()> {
    const KERNEL: &str = "adamw::step";
    let len = parameters.len();
    for (name, buffer) in [("gradients", &*gradients), ("m", &*m), ("v", &*v)] {
        if buffer.len() != len {
            bail!("{KERNEL}: {name} has {} elements, parameters {len}", buffer.len());
        }
    }
    if adamw.step == 0 {
        bail!("{KERNEL}: step = 0: steps count from 1");
    }
    let mut groups: Vec<&Group> = groups.iter().filter(|g| !g.range.is_empty()).collect();
    groups.sort_by_key(|g| g.range.start);
    for pair in groups.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            bail!("{KERNEL}: groups {:?} and {:?} overlap", pair[0].range, pair[1].range);
        }
    }
    if let Some(last) = groups.last().filter(|g| g.range.end > len) {
        bail!("{KERNEL}: group {:?} of buffers of {len}", last.range);
    }

    let bias1 = 1.0 - adamw.beta1.powf(adamw.step as f64);
    let bias2 = 1.0 - adamw.beta2.powf(adamw.step as f64);
    let shared = Factors {
        beta1: adamw.beta1 as f32,
        one_minus_beta1: (1.0 - adamw.beta1) as f32,
        beta2: adamw.beta2 as f32,
        one_minus_beta2: (1.0 - adamw.beta2) as f32,
        rsqrt_bias2: (1.0 / bias2.sqrt()) as f32,
        epsilon: adamw.epsilon as f32,
        gradient_scale: adamw.gradient_scale as f32,
        ..Factors::default()
    };
    let mut rest = [parameters.data_mut(), gradients.data_mut(), m.data_mut(), v.data_mut()];
    let mut tasks = Vec::new();
    let mut at = 0;
    for group in groups {
        let [_, gradients, ..] = take(&mut rest, group.range.start - at);
        gradients.fill(0.0);
        let mut parts = take(&mut rest, group.range.len());
        let factors = Factors {
            decay: (1.0 - group.learning_rate * group.weight_decay) as f32,
            step_size: (group.learning_rate / bias1) as f32,
            ..shared
        };
        while !parts[0].is_empty() {
            let len = parts[0].len().min(CHUNK);
            tasks.push((take(&mut parts, len), factors));
        }
        at = group.range.end;
    }
    rest[1].fill(0.0);
    threads::install(|| {
        tasks.into_par_iter().for_each(|([p, g, m, v], factors)| update(p, g, m, v, factors));
    });
    Ok(())
}

/// Cuts `len` elements off the front of each slice.
fn take<'a>(slices: &mut [&'a mut [f32]; 4], len: usize) -> [&'a mut [f32]; 4] {
    slices.each_mut().map(|slice| {
        let (front, back) = std::mem::take(slice).split_at_mut(len);
        *slice = back;
        front
    })
}

#[derive(Clone, Copy, Default)]
struct Factors {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    rsqrt_bias2: f32,
    epsilon: f32,
    gradient_scale: f32,
    decay: f32,
    step_size: f32,
}

simd::vectorized! {
    fn update(p: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32], f: Factors) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let gradient = *g * f.gradient_scale;
            *g = 0.0;
            *m = m.mul_add(f.beta1, gradient * f.one_minus_beta1);
            *v = v.mul_add(f.beta2, gradient * gradient * f.one_minus_beta2);
            let root = v.sqrt().mul_add(f.rsqrt_bias2, f.epsilon);
            *p = p.mul_add(f.decay, -f.step_size * *m / root);
        }
    }
}

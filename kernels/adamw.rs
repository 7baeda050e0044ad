//! AdamW (Loshchilov and Hutter 2019), as `torch.optim.AdamW` computes it: parameters, moments and
//! gradients in one pass, which also clips the gradients and sets them to zero.
use crate::device::on_gpu;
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

const KERNEL: &str = "adamw::step";

/// Elements of one task.
const CHUNK: usize = 32768;

/// One step. Elements outside the groups stay as they are; all gradients become zero. On a GPU the
/// parameters' copy in bf16 is written in the same pass.
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
    let len = parameters.len();
    for (name, buffer) in [("gradients", &*gradients), ("m", &*m), ("v", &*v)] {
        if buffer.len() != len {
            bail!("{KERNEL}: {name} has {} elements, parameters {len}", buffer.len());
        }
    }
    let groups = plan(groups, adamw, len)?;
    on_gpu!(parameters.device(), |gpu| crate::gpu::adamw::step(&*gpu, parameters, gradients, m, v, &groups));

    let mut rest = [
        parameters.host_mut(KERNEL, "parameters")?,
        gradients.host_mut(KERNEL, "gradients")?,
        m.host_mut(KERNEL, "m")?,
        v.host_mut(KERNEL, "v")?,
    ];
    let mut tasks = Vec::new();
    let mut at = 0;
    for (group, factors) in groups {
        let [_, gradients, ..] = take(&mut rest, group.range.start - at);
        gradients.fill(0.0);
        let mut parts = take(&mut rest, group.range.len());
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

/// The groups in order, with what they multiply by at this step.
pub(crate) fn plan<'a>(groups: &'a [Group], adamw: &AdamW, len: usize) -> Result<Vec<(&'a Group, Factors)>> {
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
    let factors = |group: &Group| Factors {
        decay: (1.0 - group.learning_rate * group.weight_decay) as f32,
        step_size: (group.learning_rate / bias1) as f32,
        ..shared
    };
    Ok(groups.into_iter().map(|group| (group, factors(group))).collect())
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
pub(crate) struct Factors {
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub rsqrt_bias2: f32,
    pub epsilon: f32,
    pub gradient_scale: f32,
    pub decay: f32,
    pub step_size: f32,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};
    use candle_core::Var;
    use candle_nn::Optimizer;

    const LEN: usize = 70_000;
    const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, step: 1, gradient_scale: 1.0 };

    fn zeros(len: usize) -> Buffer {
        Buffer::zeros(len, &Device::Cpu).unwrap()
    }

    #[test]
    fn is_its_twin() -> Result<()> {
        let (mut p, mut m, mut v) = (buffer(0, LEN), zeros(LEN), zeros(LEN));
        let twin = Var::from_tensor(&as_tensor(&p, &[LEN]))?;
        let mut optimizer = candle_nn::AdamW::new(
            vec![twin.clone()],
            candle_nn::ParamsAdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 },
        )?;
        for step in 1..=5 {
            let mut g = buffer(step, LEN);
            optimizer.backward_step(&(twin.as_tensor() * (as_tensor(&g, &[LEN]) * 0.5)?)?.sum_all()?)?;
            let groups = [Group { range: 0..LEN, learning_rate: 0.01, weight_decay: 0.1 }];
            super::step(&mut p, &mut g, &mut m, &mut v, &groups, &AdamW { step, gradient_scale: 0.5, ..ADAMW })?;
            assert_close("parameters", &all(&p), &values(&twin), 1e-6);
            assert_eq!(all(&g), vec![0.0; LEN]);
        }
        Ok(())
    }

    /// Against the formula in `f64`, with several groups and holes between them.
    #[test]
    fn groups_have_their_own_rates_and_the_rest_stays() -> Result<()> {
        let (mut p, mut g, mut m, mut v) = (buffer(0, LEN), buffer(1, LEN), zeros(LEN), zeros(LEN));
        m.fill(0.3)?;
        v.fill(0.2)?;
        let (p0, g0) = (all(&p), all(&g));
        let group = |range, learning_rate, weight_decay| Group { range, learning_rate, weight_decay };
        let groups = [group(40_000..69_999, 0.1, 0.0), group(5..20, 0.02, 0.5), group(20..33_000, 0.0, 0.5)];
        step(&mut p, &mut g, &mut m, &mut v, &groups, &AdamW { step: 3, ..ADAMW })?;
        let (mut want_p, mut want_m, mut want_v) = (p0.clone(), vec![0.3f32; LEN], vec![0.2f32; LEN]);
        for group in &groups {
            for i in group.range.clone() {
                let (gradient, p) = (f64::from(g0[i]), f64::from(p0[i]));
                let m = 0.9 * 0.3 + 0.1 * gradient;
                let v = 0.999 * 0.2 + 0.001 * gradient * gradient;
                let step = m / (1.0 - 0.9f64.powi(3)) / ((v / (1.0 - 0.999f64.powi(3))).sqrt() + 1e-8);
                want_p[i] = (p * (1.0 - group.learning_rate * group.weight_decay) - group.learning_rate * step) as f32;
                (want_m[i], want_v[i]) = (m as f32, v as f32);
            }
        }
        assert_close("parameters", &all(&p), &want_p, 1e-6);
        assert_close("m", &all(&m), &want_m, 1e-6);
        assert_close("v", &all(&v), &want_v, 1e-6);
        for hole in [0..5, 33_000..40_000, 69_999..LEN] {
            assert_eq!(p.read(hole.clone())?, p0[hole]);
        }
        assert_eq!(all(&g), vec![0.0; LEN]);
        Ok(())
    }

    #[test]
    fn refuses_groups_that_overlap_or_do_not_fit() {
        let run = |ranges: &[Range<usize>], len, step| {
            let groups: Vec<_> =
                ranges.iter().map(|r| Group { range: r.clone(), learning_rate: 0.1, weight_decay: 0.0 }).collect();
            let adamw = AdamW { step, ..ADAMW };
            super::step(&mut zeros(10), &mut zeros(10), &mut zeros(len), &mut zeros(10), &groups, &adamw)
        };
        assert!(run(&[0..5, 5..10], 10, 1).is_ok());
        assert!(run(&[0..6, 5..10], 10, 1).is_err());
        assert!(run(&[0..5, 5..11], 10, 1).is_err());
        assert!(run(&[0..5, 5..10], 9, 1).is_err());
        assert!(run(&[0..5, 5..10], 10, 0).is_err());
    }
}

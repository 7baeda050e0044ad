//! The launch of [`adamw`](crate::adamw).
use super::{Arg, Gpu, Module, buffer, operands::Operands, segments::Segments};
use crate::{
    Buffer,
    adamw::{Factors, Group},
};
use candle_core::{DType, Result, Tensor};

const MODULE: Module = Module { name: "adamw", source: include_str!("../adamw.cu") };

/// `groups` are in order, apart and not empty; each has its own factors.
pub(crate) fn step(
    gpu: &impl Gpu,
    parameters: &mut Buffer,
    gradients: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
    groups: &[(&Group, Factors)],
) -> Result<()> {
    let device = parameters.device().clone();
    let operands = Operands::new("adamw::step", &device, DType::F32)?;
    let len = parameters.len();
    let pointers = [
        operands.parameter("parameters", parameters.view(0..len))?,
        operands.parameter("gradients", gradients.view(0..len))?,
        operands.parameter("m", m.view(0..len))?,
        operands.parameter("v", v.view(0..len))?,
        Arg::Pointer(parameters.view(0..len).bf16_address().unwrap_or(0)),
    ];
    let Arg::Pointer(gradient) = pointers[1] else { unreachable!("it is an address") };
    let mut at = 0; // gradients of no group become zero too
    for end in groups.iter().map(|(group, _)| group.range.start).chain([len]) {
        if at < end {
            buffer::fill(gpu, gradient + (size_of::<f32>() * at) as u64, 0, end - at, 0.0)?;
        }
        at = groups.iter().find(|(group, _)| group.range.start == end).map_or(len, |(group, _)| group.range.end);
    }
    let Some((_, shared)) = groups.first() else { return Ok(()) };
    let segments = Segments::new(&groups.iter().map(|(group, _)| group.range.clone()).collect::<Vec<_>>(), &device)?;
    let factors: Vec<f32> = groups.iter().flat_map(|(_, factors)| [factors.decay, factors.step_size]).collect();
    let factors = Tensor::from_vec(factors, 2 * groups.len(), &device)?;
    let (arrays, count) = segments.args(&operands)?;
    let mut args = pointers.to_vec();
    args.extend(arrays);
    args.extend([operands.tensor("factors", &factors, DType::F32)?, count]);
    args.extend(
        [
            shared.beta1,
            shared.one_minus_beta1,
            shared.beta2,
            shared.one_minus_beta2,
            shared.rsqrt_bias2,
            shared.epsilon,
            shared.gradient_scale,
        ]
        .map(Arg::F32),
    );
    gpu.launch(&MODULE, "adamw", segments.launch(), &args)
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::{
        Device,
        adamw::{AdamW, plan},
        testing::*,
    };

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        const LEN: usize = 20_000;
        let group = |range, learning_rate, weight_decay| Group { range, learning_rate, weight_decay };
        let groups = [group(10_000..19_999, 0.1, 0.0), group(5..20, 0.02, 0.5), group(20..9_000, 0.01, 0.5)];
        let (mut want_p, mut want_m) = (buffer(0, LEN), Buffer::zeros(LEN, &Device::Cpu)?);
        let mut want_v = Buffer::from_vec(vec![0.2; LEN], &Device::Cpu)?;
        let (mut p, mut m, mut v) = (case.parameters(&want_p)?, case.buffer(&want_m)?, case.buffer(&want_v)?);
        for step in 1..=3 {
            let mut want_g = buffer(step, LEN);
            let mut g = case.buffer(&want_g)?;
            let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, step, gradient_scale: 0.7 };
            super::step(case.gpu, &mut p, &mut g, &mut m, &mut v, &plan(&groups, &adamw, LEN)?)?;
            crate::adamw::step(&mut want_p, &mut want_g, &mut want_m, &mut want_v, &groups, &adamw)?;
            for (name, got, want) in [("p", &p, &want_p), ("g", &g, &want_g), ("m", &m, &want_m), ("v", &v, &want_v)] {
                assert_close(name, &all(got), &all(want), 1e-6);
            }
        }
        if case.dtype == DType::BF16 {
            let rounded: Vec<u16> = all(&p).iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
            assert_eq!(p.bf16_bits()?, rounded, "the copy was not written");
        }
        Ok(())
    }
}

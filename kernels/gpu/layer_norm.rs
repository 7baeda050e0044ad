//! Launches of [`layer_norm`](crate::layer_norm).
use super::{Arg, Gpu, Launch, Module, columns, operands::*};
use crate::{Dropout, Packing, View, ViewMut, cpu, layer_norm::Saved};
use candle_core::{DType, Result, Tensor, bail};

const MODULE: Module = Module { name: "layer_norm", source: include_str!("../layer_norm.cu") };

/// Warps of a block, where rows fit in shared memory.
const WARPS: usize = 4;
/// Blocks of backward, at most: partial sums of gamma's and beta's gradients. No property of the device,
/// so that the bits are the same on all.
const PARTS: usize = 512;
/// What a block may have of shared memory without asking for more.
const SHARED_BYTES: usize = 48 << 10;

pub(crate) fn forward(
    gpu: &impl Gpu,
    x: &Tensor,
    residual: Option<&Tensor>,
    dropout: Option<(&Dropout, &Packing)>,
    gamma: View,
    beta: View,
    eps: f64,
) -> Result<(Tensor, Saved)> {
    const KERNEL: &str = "layer_norm::forward";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    let operands = Operands::like(KERNEL, "x", x)?;
    let warps = warps(KERNEL, hidden, size_of::<f32>() * hidden)?;
    let y = operands.empty(x.dims())?;
    let sum = if residual.is_some() || dropout.is_some() { Some(operands.empty(x.dims())?) } else { None };
    let [mean, rstd] = [operands.empty_of(&[rows], DType::F32)?, operands.empty_of(&[rows], DType::F32)?];
    let pointers = [
        operands.activation("y", &y)?,
        operands.optional("sum", sum.as_ref())?,
        operands.activation("x", x)?,
        operands.optional("residual", residual)?,
        operands.parameter("gamma", gamma)?,
        operands.parameter("beta", beta)?,
    ];
    let mut args = pointers.to_vec();
    args.extend([operands.tensor("mean", &mean, DType::F32)?, operands.tensor("rstd", &rstd, DType::F32)?]);
    args.extend([Arg::U32(rows as u32), Arg::U32(hidden as u32), Arg::F32(eps as f32)]);
    args.push(vectors(&pointers, hidden, operands.vector()));
    args.extend(operands.dropout(dropout)?);
    let launch = Launch {
        grid: [rows.div_ceil(warps) as u32, 1, 1],
        block: [32 * warps as u32, 1, 1],
        shared_bytes: (size_of::<f32>() * warps * hidden) as u32,
    };
    gpu.launch(&MODULE, &operands.entry("forward"), launch, &args)?;
    Ok((y, Saved { sum: sum.unwrap_or_else(|| x.clone()), mean, rstd }))
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    gpu: &impl Gpu,
    saved: &Saved,
    dropout: Option<(&Dropout, &Packing)>,
    dy: Tensor,
    gamma: View,
    mut dgamma: Option<ViewMut>,
    mut dbeta: Option<ViewMut>,
    has_residual: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    const KERNEL: &str = "layer_norm::backward";
    let (rows, hidden) = cpu::matrix(KERNEL, "sum", &saved.sum)?;
    let operands = Operands::like(KERNEL, "sum", &saved.sum)?;
    let warps = warps(KERNEL, hidden, 2 * size_of::<f32>() * hidden)?;
    let parts = rows.div_ceil(warps).min(PARTS);
    let dsum = operands.own(dy, &[&saved.sum])?;
    let dx = if has_residual { Some(operands.empty(&[rows, hidden])?) } else { None };
    let partial = operands.empty_of(&[parts, 2 * hidden], DType::F32)?;
    let activations = [
        operands.activation("dy", &dsum)?,
        operands.optional("dx", dx.as_ref())?,
        operands.activation("sum", &saved.sum)?,
    ];
    let gamma = operands.parameter("gamma", gamma)?;
    let mut args = activations.to_vec();
    args.extend([operands.tensor("mean", &saved.mean, DType::F32)?, operands.tensor("rstd", &saved.rstd, DType::F32)?]);
    args.extend([gamma, operands.tensor("partial", &partial, DType::F32)?]);
    args.extend([Arg::U32(rows as u32), Arg::U32(hidden as u32)]);
    args.push(vectors(&[&activations[..], &[gamma]].concat(), hidden, operands.vector()));
    args.extend(operands.dropout(dropout)?);
    let launch = Launch {
        grid: [parts as u32, 1, 1],
        block: [32 * warps as u32, 1, 1],
        shared_bytes: (2 * size_of::<f32>() * warps * hidden) as u32,
    };
    gpu.launch(&MODULE, &operands.entry("backward"), launch, &args)?;
    let totals = [operands.gradient("dgamma", dgamma.as_mut())?, operands.gradient("dbeta", dbeta.as_mut())?];
    if dgamma.is_some() || dbeta.is_some() {
        columns::add_total(gpu, &operands, totals, &partial, hidden)?;
    }
    Ok(match dx {
        Some(dx) => (dx, Some(dsum)),
        None => (dsum, None),
    })
}

/// How many rows of `bytes` a block has room for.
fn warps(kernel: &str, hidden: usize, bytes: usize) -> Result<usize> {
    match SHARED_BYTES / bytes.max(1) {
        0 => {
            bail!("{kernel}: hidden = {hidden}: a GPU's shared memory holds {} at most", SHARED_BYTES * hidden / bytes)
        }
        rows => Ok(rows.min(WARPS)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::{Buffer, Device, testing::*};

    const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 1, step: 2, site: 3 };

    /// The sum is rounded to bf16 here and not on the CPU, and so are the results: two roundings of 2⁻⁸,
    /// of which the first is multiplied by rstd.
    const BF16: f32 = 1.0 / 100.0;

    gpu_tests!(is_the_cpus, takes_more_rows_than_a_launch_has_warps, refuses_a_row_that_shared_memory_does_not_hold);

    fn compare(case: &Case<impl Blas>, lengths: &[u32], hidden: usize, residual: bool, dropout: bool) -> Result<()> {
        let (packing, parameters) = (packing(lengths), buffer(3, 2 * hidden));
        let (dims, tolerance) = ([packing.tokens(), hidden], case.tolerance(TWIN, BF16));
        let on_device = case.buffer(&parameters)?;
        let [gamma, beta] = [0..hidden, hidden..2 * hidden].map(|range| on_device.view(range));
        let [host_gamma, host_beta] = [0..hidden, hidden..2 * hidden].map(|range| parameters.view(range));
        let masked = dropout.then_some((&DROPOUT, &packing));
        let x = case.inputs(&tensor(1, &dims))?;
        let r = residual.then(|| case.inputs(&tensor(2, &dims).affine(2.0, 0.5)?)).transpose()?;
        let dy = case.inputs(&tensor(4, &dims))?;
        let (y, saved) = forward(case.gpu, &x.device, r.as_ref().map(|r| &r.device), masked, gamma, beta, 1e-12)?;
        let r = r.as_ref().map(|r| &r.host);
        let (want, host) = crate::layer_norm::forward(&x.host, r, masked, host_gamma, host_beta, 1e-12)?;
        case.close("y", &y, &want, tolerance);
        case.close("sum", &saved.sum, &host.sum, tolerance);

        let threes = |device: &Device| Buffer::from_vec(vec![3.0; 2 * hidden], device);
        let (mut got, mut want) = (threes(case.device)?, threes(&Device::Cpu)?);
        let [dgamma, dbeta] = got.views_mut([0..hidden, hidden..2 * hidden])?;
        let copy = case.copy(&dy)?;
        let (dx, dr) = backward(case.gpu, &saved, masked, copy, gamma, Some(dgamma), Some(dbeta), residual)?;
        let [dgamma, dbeta] = want.views_mut([0..hidden, hidden..2 * hidden])?;
        let copy = dy.host.copy()?;
        let (want_dx, want_dr) =
            crate::layer_norm::backward(&host, masked, copy, host_gamma, Some(dgamma), Some(dbeta), residual)?;
        case.close("dx", &dx, &want_dx, tolerance);
        assert_eq!(dr.is_some(), want_dr.is_some());
        if let (Some(got), Some(want)) = (dr, want_dr) {
            case.close("dresidual", &got, &want, tolerance);
        }
        assert_close("dgamma, dbeta", &all(&got), &all(&want), tolerance);
        // frozen parameters ask for nothing
        backward(case.gpu, &saved, masked, case.copy(&dy)?, gamma, None, None, residual)?;
        Ok(())
    }

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (residual, dropout) in [(false, false), (true, false), (false, true), (true, true)] {
            compare(case, &[1, 3, 2], 9, residual, dropout)?;
            compare(case, &[5, 1, 60], 64, residual, dropout)?;
            compare(case, &[2, 7], 776, residual, dropout)?;
        }
        Ok(())
    }

    fn takes_more_rows_than_a_launch_has_warps(case: &Case<impl Blas>) -> Result<()> {
        compare(case, &[2200], 8, true, true)
    }

    fn refuses_a_row_that_shared_memory_does_not_hold(case: &Case<impl Blas>) -> Result<()> {
        let (x, p) = (case.inputs(&tensor(1, &[1, 13000]))?, case.buffer(&buffer(1, 13000))?);
        let view = p.view(0..13000);
        let error = forward(case.gpu, &x.device, None, None, view, view, 0.0).unwrap_err().to_string();
        assert!(error.contains("hidden = 13000: a GPU's shared memory holds 12288 at most"), "{error}");
        Ok(())
    }
}

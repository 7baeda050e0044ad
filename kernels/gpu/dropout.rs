//! Launches of [`dropout`](mod@crate::dropout).
use super::{Arg, Gpu, Launch, Module, operands::*};
use crate::{Dropout, Packing, cpu};
use candle_core::{Result, Tensor};

const MODULE: Module = Module { name: "dropout", source: include_str!("../dropout.cu") };

pub(crate) fn forward(gpu: &impl Gpu, x: &Tensor, dropout: &Dropout, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "dropout::forward";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    packing.check(KERNEL, rows)?;
    dropout.check(KERNEL)?;
    let operands = Operands::like(KERNEL, "x", x)?;
    let y = operands.empty(x.dims())?;
    let pointers = [operands.activation("y", &y)?, operands.activation("x", x)?];
    let mut args = pointers.to_vec();
    args.extend([Arg::U32(rows as u32), Arg::U32(hidden as u32), vectors(&pointers, hidden, operands.vector())]);
    args.extend(operands.dropout(Some((dropout, packing)))?);
    gpu.launch(&MODULE, &operands.entry("forward"), Launch::warps(rows), &args)?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use crate::{Dropout, Result, testing::*};

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (lengths, hidden) in [(&[1, 4, 2][..], 5), (&[3, 1, 130], 64), (&[17], 264)] {
            let packing = packing(lengths);
            for probability in [0.0, 0.3] {
                let dropout = Dropout { probability, seed: 42, step: 5, site: 2 };
                let x = case.inputs(&tensor(1, &[packing.tokens(), hidden]))?;
                let got = super::forward(case.gpu, &x.device, &dropout, &packing)?;
                let want = crate::dropout::forward(&x.host, &dropout, &packing)?;
                case.close("y", &got, &want, case.tolerance(0.0, 1.0 / 256.0)); // one rounding
            }
        }
        Ok(())
    }
}

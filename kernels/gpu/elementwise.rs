//! Launches of [`gelu`](crate::gelu), [`relu`](crate::relu), [`tanh`](mod@crate::tanh) and [`add`](crate::add()).
use super::{Arg, Gpu, Launch, Module, operands::*};
use crate::cpu;
use candle_core::{Result, Tensor};

const GELU: Module = Module { name: "gelu", source: include_str!("../gelu.cu") };
const RELU: Module = Module { name: "relu", source: include_str!("../relu.cu") };
const TANH: Module = Module { name: "tanh", source: include_str!("../tanh.cu") };
const ADD: Module = Module { name: "add", source: include_str!("../add.cu") };

pub(crate) fn gelu(gpu: &impl Gpu, x: &Tensor) -> Result<Tensor> {
    map(gpu, &GELU, "gelu::forward", x)
}

pub(crate) fn gelu_backward(gpu: &impl Gpu, x: &Tensor, dy: Tensor) -> Result<Tensor> {
    update(gpu, &GELU, "gelu::backward", "backward", ["dy", "x"], dy, x)
}

pub(crate) fn relu(gpu: &impl Gpu, x: &Tensor) -> Result<Tensor> {
    map(gpu, &RELU, "relu::forward", x)
}

pub(crate) fn relu_backward(gpu: &impl Gpu, y: &Tensor, dy: Tensor) -> Result<Tensor> {
    update(gpu, &RELU, "relu::backward", "backward", ["dy", "y"], dy, y)
}

pub(crate) fn tanh(gpu: &impl Gpu, x: &Tensor) -> Result<Tensor> {
    map(gpu, &TANH, "tanh::forward", x)
}

pub(crate) fn tanh_backward(gpu: &impl Gpu, y: &Tensor, dy: Tensor) -> Result<Tensor> {
    update(gpu, &TANH, "tanh::backward", "backward", ["dy", "y"], dy, y)
}

pub(crate) fn add(gpu: &impl Gpu, destination: Tensor, source: &Tensor) -> Result<Tensor> {
    update(gpu, &ADD, "add", "add", ["destination", "source"], destination, source)
}

/// Adds `len` f32 to others, in place.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // the emulator's buffers are the host's
pub(crate) fn add_f32(gpu: &impl Gpu, to: u64, from: u64, len: usize) -> Result<()> {
    launch(gpu, &ADD, "add_f32", &[Arg::Pointer(to), Arg::Pointer(from)], len, 4)
}

/// y = f(x).
fn map(gpu: &impl Gpu, module: &Module, kernel: &'static str, x: &Tensor) -> Result<Tensor> {
    let operands = Operands::like(kernel, "x", x)?;
    let y = operands.empty(x.dims())?;
    let pointers = [operands.activation("y", &y)?, operands.activation("x", x)?];
    launch(gpu, module, &operands.entry("forward"), &pointers, x.elem_count(), operands.vector())?;
    Ok(y)
}

/// to = f(to, from), in its place.
fn update(
    gpu: &impl Gpu,
    module: &Module,
    kernel: &'static str,
    entry: &str,
    [to_name, from_name]: [&str; 2],
    to: Tensor,
    from: &Tensor,
) -> Result<Tensor> {
    let operands = Operands::like(kernel, from_name, from)?;
    cpu::check_dims(kernel, to_name, &to, from.dims(), from_name)?;
    let to = operands.own(to, &[from])?;
    let pointers = [operands.activation(to_name, &to)?, operands.activation(from_name, from)?];
    launch(gpu, module, &operands.entry(entry), &pointers, from.elem_count(), operands.vector())?;
    Ok(to)
}

fn launch(gpu: &impl Gpu, module: &Module, kernel: &str, pointers: &[Arg; 2], n: usize, vector: usize) -> Result<()> {
    let args = [pointers[0], pointers[1], Arg::U64(n as u64), vectors(pointers, 0, vector)];
    gpu.launch(module, kernel, Launch::each(n.div_ceil(vector)), &args)
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use crate::{Result, Tensor, testing::*};

    /// One rounding to bf16: 2⁻⁸ of an element at most.
    const BF16: f32 = 1.0 / 256.0;

    gpu_tests!(are_the_cpus);

    fn are_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for dims in [[1, 1], [3, 17], [33, 64], [700, 130]] {
            let (x, dy) = (tensor(1, &dims).affine(2.0, 0.0)?, tensor(2, &dims));
            let (x, dy) = (case.inputs(&x)?, case.inputs(&dy)?);
            let close = |name: &str, got: &Tensor, want: Tensor| {
                case.close(name, got, &want, case.tolerance(1e-6, BF16));
            };
            close("gelu", &super::gelu(case.gpu, &x.device)?, crate::gelu::forward(&x.host)?);
            let dx = super::gelu_backward(case.gpu, &x.device, case.copy(&dy)?)?;
            close("gelu dx", &dx, crate::gelu::backward(&x.host, dy.host.copy()?)?);
            let y = crate::relu::forward(&x.host)?;
            close("relu", &super::relu(case.gpu, &x.device)?, y.clone());
            let y = case.inputs(&y)?;
            let dx = super::relu_backward(case.gpu, &y.device, case.copy(&dy)?)?;
            close("relu dx", &dx, crate::relu::backward(&y.host, dy.host.copy()?)?);
            let y = crate::tanh::forward(&x.host)?;
            close("tanh", &super::tanh(case.gpu, &x.device)?, y.clone());
            let y = case.inputs(&y)?;
            let dx = super::tanh_backward(case.gpu, &y.device, case.copy(&dy)?)?;
            close("tanh dx", &dx, crate::tanh::backward(&y.host, dy.host.copy()?)?);
            let sum = super::add(case.gpu, case.copy(&dy)?, &x.device)?;
            close("add", &sum, crate::add(dy.host.copy()?, &x.host)?);
            // what is read is unharmed where it is also written
            close("x + x", &super::add(case.gpu, x.device.clone(), &x.device)?, (&x.host * 2.0)?);
            close("x", &x.device, x.host.clone());
        }
        Ok(())
    }
}

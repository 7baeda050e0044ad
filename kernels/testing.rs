//! What the kernels' tests share: random inputs, comparisons and finite differences.
use crate::{Buffer, Device, Packing, Result, Tensor, init};

/// Relative to the largest element, what a kernel may differ from its twin: both are `f32`, with
/// sums in different orders.
pub const TWIN: f32 = 1e-5;

pub fn tensor(stream: u64, dims: &[usize]) -> Tensor {
    Tensor::from_vec(init::normal(1, stream, dims.iter().product(), 1.0), dims, &Device::Cpu).unwrap()
}

pub fn buffer(stream: u64, len: usize) -> Buffer {
    Buffer::from_vec(init::normal(2, stream, len, 1.0), &Device::Cpu).unwrap()
}

pub fn all(buffer: &Buffer) -> Vec<f32> {
    buffer.read(0..buffer.len()).unwrap()
}

/// A buffer as a tensor for the twin.
pub fn as_tensor(buffer: &Buffer, dims: &[usize]) -> Tensor {
    Tensor::from_vec(all(buffer), dims, &Device::Cpu).unwrap()
}

/// Sequences of these lengths; their example ids are not their places.
pub fn packing(lengths: &[u32]) -> Packing {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length);
    }
    Packing::new(offsets, (0..lengths.len() as u64).map(|i| 1000 - 7 * i).collect()).unwrap()
}

/// The first GPU, opened once; says where there is none.
#[cfg(feature = "cuda")]
pub fn cuda() -> Option<Device> {
    static DEVICE: std::sync::LazyLock<Option<Device>> = std::sync::LazyLock::new(|| match crate::cuda_device(0) {
        Ok(device) => Some(device),
        Err(e) if e.to_string().contains("looking for GPUs") || e.to_string().contains("but there are 0") => None,
        Err(e) => panic!("{e}"),
    });
    if DEVICE.is_none() {
        eprintln!("skipped: no CUDA device");
    }
    DEVICE.clone()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless the largest difference is at most `tolerance` times the largest expected element.
#[track_caller]
pub fn assert_close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    let largest = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        // also fails on NaN
        assert!((g - w).abs() <= tolerance * largest, "{name}[{i}]: got {g}, want {w}; largest {largest}");
    }
}

/// `Σ y·weight`, in `f64`: its gradient with respect to `y` is `weight`.
pub fn loss(y: &Tensor, weight: &Tensor) -> f64 {
    values(y).iter().zip(values(weight)).map(|(&y, w)| f64::from(y) * f64::from(w)).sum()
}

/// Compares `gradient` with central differences of `f` around `x`. With a step of 2⁻⁶ the formula's
/// error and the rounding of an `f32` forward are both some 1e-4; the tolerance is 2e-3 of the
/// largest element.
#[track_caller]
pub fn check_gradient(name: &str, x: &[f32], gradient: &[f32], f: impl Fn(&[f32]) -> Result<f64>) {
    const STEP: f32 = 1.0 / 64.0;
    let mut x = x.to_vec();
    // every element where they are few, else some 200 of them
    let stride = x.len().div_ceil(200);
    let mut want = Vec::new();
    for i in (0..x.len()).step_by(stride) {
        let centre = x[i];
        let mut at = |x_i: f32| {
            x[i] = x_i;
            f(&x).unwrap()
        };
        let (above, below) = (centre + STEP, centre - STEP);
        want.push(((at(above) - at(below)) / f64::from(above - below)) as f32);
        x[i] = centre;
    }
    let got: Vec<f32> = gradient.iter().step_by(stride).copied().collect();
    assert_close(name, &got, &want, 2e-3);
}

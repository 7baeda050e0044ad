//! The device that a process trains on, and what its memory holds.

use anyhow::{Context as _, Result};
use kiln_kernels::{DType, Device};
use kiln_models::nn::Parameters;

use super::{Largest, Memory};
use crate::config::{self, Dtype};
use crate::pretrained::Classifier;
use crate::user_error;

/// Whether a training with these settings is on GPUs.
///
/// # Errors
/// The user's: a GPU that this build or machine does not have, or a dtype that needs one.
pub fn on_gpus(settings: &config::Train) -> Result<bool> {
    let there = kiln_kernels::cuda_devices();
    let lacks = if cfg!(feature = "cuda") {
        "this machine has none"
    } else {
        "this build of kiln is without the feature `cuda`"
    };
    match (settings.device, settings.dtype) {
        (config::Device::Cuda, _) if there == 0 => {
            Err(user_error!("train.device = \"cuda\" needs a GPU: {lacks}; take \"cpu\" or \"auto\""))
        }
        (config::Device::Auto, Dtype::Tf32 | Dtype::Bf16) if there == 0 => {
            Err(user_error!("train.dtype needs a GPU: {lacks}; take \"f32\""))
        }
        (config::Device::Cpu, _) => Ok(false),
        (config::Device::Auto | config::Device::Cuda, _) => Ok(there > 0),
    }
}

/// Moves parameters to where this process, one of `local_rank` on its machine, computes, in the dtype
/// asked for.
///
/// # Errors
/// As [`on_gpus`], or memory that a GPU does not have.
pub fn place(parameters: &Parameters, settings: &config::Train, local_rank: usize) -> Result<()> {
    if !on_gpus(settings)? {
        return Ok(());
    }
    // More processes than GPUs share them, where NCCL lets them.
    let device = open(local_rank % kiln_kernels::cuda_devices().max(1))?;
    kiln_kernels::allow_tf32(&device, settings.dtype == Dtype::Tf32)?;
    let dtype = if settings.dtype == Dtype::Bf16 { DType::BF16 } else { DType::F32 };
    parameters.move_to(&device, dtype).context("moving the weights to the GPU")?;
    Ok(())
}

/// One GPU, opened once: models that are trained one after another share it.
fn open(ordinal: usize) -> Result<Device> {
    static OPEN: std::sync::Mutex<Option<(usize, Device)>> = std::sync::Mutex::new(None);
    let mut open = OPEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match &*open {
        Some((there, device)) if *there == ordinal => Ok(device.clone()),
        _ => {
            let device = kiln_kernels::cuda_device(ordinal)?;
            *open = Some((ordinal, device.clone()));
            Ok(device)
        }
    }
}

/// The most tokens of a micro-batch that are ever tried: beyond them a GPU is busy as it is.
const MOST_TOKENS: usize = 1 << 16;

/// The tokens of a micro-batch for which the model's plan leaves a tenth of a GPU's free memory.
pub(super) fn planned_tokens(classifier: &Classifier, settings: &config::Train, longest: usize) -> Result<usize> {
    let parameters = &classifier.built().parameters;
    let (free, _) = kiln_kernels::cuda_memory(&parameters.device())?;
    let mut tokens = MOST_TOKENS.max(longest);
    loop {
        let lengths = vec![longest as u32; tokens / longest];
        let largest = Largest { evaluation: lengths.clone(), step: lengths, from_data: false };
        let plan = Memory::plan(classifier.built(), settings, &largest)?;
        // Activations in bf16 take half of what is planned.
        let halves = if settings.dtype == Dtype::Bf16 { 2 } else { 1 };
        if plan.step_bytes / halves <= free / 10 * 9 || tokens <= longest {
            return Ok(tokens);
        }
        tokens = (tokens / 2).max(longest);
    }
}

/// Whether a kernel or an allocation found no memory on a GPU.
pub(super) fn is_out_of_memory(error: &anyhow::Error) -> bool {
    format!("{error:#}").contains("OUT_OF_MEMORY")
}

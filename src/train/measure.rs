//! Steps that are timed, and nothing else: no evaluation, no run, no checkpoint.

use std::time::Instant;

use anyhow::{Context, Result};
use kiln_kernels::{Buffer, DType, Device, Tensor, linear, threads};
use kiln_models::nn::{Mode, Packing};

use super::{Job, Marks, Start, Trainer, place};
use crate::allocator::KeptPages;
use crate::config::{Dtype, Duration, available_threads};
use crate::data::Part;
use crate::dist::Communicator;
use crate::metrics::scaling::{Bucket, Measured, Profile, Step};
use crate::pretrained::Classifier;

/// How often the peak is measured; the best counts.
const PEAKS: usize = 5;
/// Seconds of products in each, on every rank: longer than a turn of the system's scheduler.
const PEAK_SECONDS: f64 = 0.15;
/// A product that takes less is made larger: what it takes to start one is not what is measured.
const PRODUCT_SECONDS: f64 = 5e-3;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Steps that are made first, until memory and caches are as they stay.
    pub warmup: u64,
    /// Steps that count.
    pub steps: u64,
    /// `batch_size` is that of all ranks together; else each rank has as much.
    pub strong: bool,
}

/// Makes steps of a job's model with all `ranks` and times them. Every rank returns the same.
///
/// # Errors
/// As those of [`Job::train`].
pub fn measure(ranks: &Communicator, job: &Job<'_>, load: Load) -> Result<Measured> {
    let _kept = KeptPages::new(); // as in training
    let mut settings = job.model.train.clone();
    settings.batch_size *= if load.strong { 1 } else { ranks.world_size() };
    settings.duration = Duration::Steps(load.warmup + load.steps);
    threads::set(settings.threads)?;
    let Start { classifier, encoding, .. } = ranks.in_turn(|| job.start(&[Part::Train, Part::Validation]))?;
    place(&classifier.built().parameters, &settings, ranks.local_rank())?;
    let (train, validation) = (encoding.dataset(Part::Train)?, encoding.dataset(Part::Validation)?);
    let (parts, objective) = ((&train, &validation), job.config.objective);
    let bucket_bytes = job.config.distributed.bucket_mb as usize * 1_000_000;
    let mut trainer = Trainer::new(ranks, &classifier, parts, &settings, objective, bucket_bytes, None)?;
    trainer.fit_memory(|message| crate::error::warn(message))?;

    let device = classifier.built().parameters.device();
    let peak_flops = peak(ranks, &device, settings.dtype)?;
    let (mut mine, mut profiles) = (Vec::new(), Vec::new());
    for step in 0..load.warmup + load.steps {
        let micro_batches = trainer.next_micro_batches().concat();
        let lengths = |batch: &Vec<u32>| batch.iter().map(|&i| train.length(i as usize)).collect::<Vec<_>>();
        let lengths: Vec<_> = micro_batches.iter().map(lengths).collect();
        let flops = lengths.iter().map(|lengths| flops(&classifier, lengths)).sum::<Result<u64>>()?;
        ranks.barrier()?;
        let (busy, waited, started) = (ranks.busy(), ranks.waited(), Instant::now());
        trainer.step(None)?;
        device.synchronize()?;
        let ended = Instant::now();
        if step >= load.warmup {
            mine.push(Step {
                tokens: lengths.iter().flatten().sum::<usize>() as u64,
                sequences: micro_batches.concat().len() as u64,
                flops,
                seconds: (ended - started).as_secs_f64(),
                communication: (ranks.busy() - busy).as_secs_f64(),
                waiting: (ranks.waited() - waited).as_secs_f64(),
            });
            let course = |marks| course(marks, trainer.reducer().bucket_bytes(), started, ended);
            profiles.extend(trainer.marks().map(course));
        }
    }
    let all = ranks.all_gather(&mine)?;
    let together = |step| Step::of_all(&all.iter().map(|steps| steps[step]).collect::<Vec<_>>());
    let (world_size, threads) = (ranks.world_size(), settings.threads);
    let cores = (world_size * threads).min(available_threads());
    let (name, units) = if device.is_cpu() { ("cpu", cores) } else { ("cuda", world_size) };
    Ok(Measured {
        world_size,
        device: name.into(),
        threads,
        units,
        batch_size: settings.batch_size,
        peak_flops,
        steps: (0..mine.len()).map(together).collect(),
        profile: Profile::of_steps(&profiles),
    })
}

/// Operations that training on sequences of these lengths takes, by the model's own graph.
fn flops(classifier: &Classifier, lengths: &[usize]) -> Result<u64> {
    let ends = lengths.iter().scan(0, |end, &length| {
        *end += length as u32;
        Some(*end)
    });
    let packing = Packing::new(std::iter::once(0).chain(ends).collect(), (0..lengths.len() as u64).collect())?;
    let plan = kiln_models::plan(classifier.built(), packing, Mode::Train { seed: 0, step: 0 }, false)?;
    Ok(plan.forward_flops + plan.backward_flops)
}

fn course(marks: &Marks, bytes: impl Iterator<Item = usize>, started: Instant, ended: Instant) -> Profile {
    let since = |moment: Instant| (moment - started).as_secs_f64();
    let bucket = |(bytes, complete): (usize, &Instant)| Bucket { bytes: bytes as u64, complete: since(*complete) };
    Profile {
        buckets: bytes.zip(&marks.complete).map(bucket).collect(),
        backward_end: since(marks.backward),
        step: since(ended),
    }
}

/// Operations a second in products of large square matrices by the library's own kernel, in the dtype that
/// training computes in, on all ranks at once.
fn peak(ranks: &Communicator, device: &Device, dtype: Dtype) -> Result<f64> {
    let mut size = 1024;
    let (x, w) = loop {
        let numbers: Vec<f32> = (0..size * size).map(|i| (i * 7919 % 1999) as f32 / 1999.0 - 0.5).collect();
        let mut w = Buffer::from_vec(numbers.clone(), device)?;
        let mut x = Tensor::from_vec(numbers, (size, size), device)?;
        if dtype == Dtype::Bf16 {
            w.keep_bf16()?;
            x = x.to_dtype(DType::BF16)?;
        }
        product(&x, &w)?; // what a first call prepares
        let started = Instant::now();
        product(&x, &w)?;
        device.synchronize()?;
        if started.elapsed().as_secs_f64() > PRODUCT_SECONDS {
            break (x, w);
        }
        size *= 2;
    };
    let mut best = 0.0f64;
    for _ in 0..PEAKS {
        ranks.barrier()?;
        let (started, mut products) = (Instant::now(), 0);
        while started.elapsed().as_secs_f64() < PEAK_SECONDS {
            product(&x, &w)?;
            device.synchronize()?;
            products += 1;
        }
        let rate = f64::from(products) * 2.0 * (size as f64).powi(3) / started.elapsed().as_secs_f64();
        best = best.max(ranks.all_gather(&rate)?.iter().sum());
    }
    Ok(best)
}

fn product(x: &Tensor, w: &Buffer) -> Result<Tensor> {
    linear::forward(x, w.view(0..w.len()), None).context("the product that the peak is measured by")
}

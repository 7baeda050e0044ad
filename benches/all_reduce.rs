//! Sums over loopback TCP by 2 and 4 processes, beside what copying alone would take.
//!
//! ```sh
//! cargo bench --bench all_reduce
//! cargo bench --bench all_reduce -- --world-sizes 2 --megabytes 90 --json
//! ```
//! The bound: an all-reduce of `n` bytes over `W` ranks has each rank send `2(W − 1)/W · n` bytes and
//! receive as many, and each byte is copied once by its sender, into the kernel, and once by its receiver,
//! out of it. So in the bound each rank copies twice that many bytes, all ranks at once: half of them from
//! the array of `n` bytes that is summed, half into it. `memory` has a second array of `n` bytes on the
//! other side, as memcpy is measured; `cache` has a piece of 256 kB there, which is the least that any
//! sockets could do. The kernel's own work and the additions are in neither.
//!
//! A round measures all sizes and their bounds, one after another; times are medians over rounds, of the
//! rank that takes longest. Bus bandwidth is `2(W − 1)/W · n` by the time, as nccl-tests has it.

use std::ffi::OsString;
use std::hint::black_box;
use std::ops::Range;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use kiln::dist::{Launch, Numbers, Order, ProcessGroup, Tcp, Timing, World, spawn};
use kiln::metrics::scaling::median;
use serde_json::json;

/// The other side of a copy that stays in a core's cache, in numbers.
const PIECE: usize = 64 << 10;

/// Times sums over loopback TCP
#[derive(Parser)]
struct Options {
    /// Processes that sum
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    world_sizes: Vec<usize>,
    /// What is summed, in MB
    #[arg(long, value_delimiter = ',', default_value = "0.001,0.01,0.1,1,10,90")]
    megabytes: Vec<f64>,
    /// How often each size is timed
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Prints a line of JSON for each size
    #[arg(long)]
    json: bool,
    /// cargo bench adds it
    #[arg(long = "bench", hide = true)]
    _bench: bool,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(world) = World::from_launcher(|name| std::env::var(name).ok())? {
        rank(&options, &world)?;
        return Ok(ExitCode::SUCCESS);
    }
    let program = std::env::current_exe()?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    for &world_size in &options.world_sizes {
        let command = || {
            let mut command = Command::new(&program);
            command.args(&arguments);
            command
        };
        let code = spawn(&Launch::local(world_size), command, || None)?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds of one size in each round.
#[derive(Default, Clone)]
struct Seconds {
    sum: Vec<f64>,
    memory: Vec<f64>,
    cache: Vec<f64>,
}

fn rank(options: &Options, world: &World) -> Result<()> {
    let mut group = Tcp::join(world, "benches/all_reduce.rs", Timing::new(Duration::from_secs(60)))?;
    let lengths: Vec<usize> = options.megabytes.iter().map(|megabytes| (megabytes * 250_000.0) as usize).collect();
    let longest = lengths.iter().copied().max().context("no size is given")?;
    let (mut numbers, mut other) = (vec![1.0f32; longest], vec![2.0f32; longest]);
    let mut seconds = vec![Seconds::default(); lengths.len()];
    for round in 0..=options.rounds {
        for (&length, seconds) in lengths.iter().zip(&mut seconds) {
            let (numbers, other) = (&mut numbers[..length], &mut other[..length]);
            numbers.fill(1.0);
            // Sizes that take little are done more often.
            let times = (250_000 / length.max(1)).clamp(1, 100);
            let one_way = 2 * (world.world_size - 1) * length / world.world_size;
            let sum = timed(&mut group, times, |group| {
                numbers[0] = 1.0; // that sums of sums stay finite is not measured
                group.all_reduce(Numbers::F32(numbers), Order::Fastest)
            })?;
            let memory = timed(&mut group, times, |_| {
                copy(numbers, other, one_way);
                Ok(())
            })?;
            let piece = length.min(PIECE);
            let cache = timed(&mut group, times, |_| {
                copy(numbers, &mut other[..piece], one_way);
                Ok(())
            })?;
            if round > 0 {
                seconds.sum.push(sum);
                seconds.memory.push(memory);
                seconds.cache.push(cache);
            }
        }
    }
    if group.rank() == 0 {
        print(options, world.world_size, &lengths, seconds);
    }
    Ok(())
}

/// Copies `one_way` numbers from `numbers` to `other`, then as many back, in pieces.
fn copy(numbers: &mut [f32], other: &mut [f32], one_way: usize) {
    let (len, there) = (numbers.len(), other.len());
    let pieces = |copy: &mut dyn FnMut(Range<usize>, Range<usize>)| {
        for done in (0..one_way).step_by(len) {
            for start in (0..len.min(one_way - done)).step_by(PIECE) {
                let range = start..(start + PIECE).min(len).min(one_way - done);
                let at = start % there;
                copy(range.clone(), at..at + range.len());
            }
        }
    };
    pieces(&mut |here, there| black_box(&mut *other)[there].copy_from_slice(&numbers[here]));
    pieces(&mut |here, there| black_box(&mut *numbers)[here].copy_from_slice(&other[there]));
}

/// Seconds of one `work` on the rank that takes longest; all begin together.
fn timed(group: &mut Tcp, times: usize, mut work: impl FnMut(&mut Tcp) -> Result<()>) -> Result<f64> {
    group.barrier()?;
    let started = Instant::now();
    for _ in 0..times {
        work(group)?;
    }
    let mine = started.elapsed().as_secs_f64() / times as f64;
    let all = group.all_gather(&mine.to_le_bytes())?;
    let seconds = all.iter().filter_map(|bytes| Some(f64::from_le_bytes(bytes.as_slice().try_into().ok()?)));
    Ok(seconds.fold(0.0, f64::max))
}

fn print(options: &Options, world_size: usize, lengths: &[usize], seconds: Vec<Seconds>) {
    if !options.json {
        println!("\n{world_size} processes, medians of {} rounds\n", options.rounds);
        println!("| bytes | time | bus bandwidth | memory bound | of it | cache bound | of it |");
        println!("|---:|---:|---:|---:|---:|---:|---:|");
    }
    for (&length, Seconds { sum, memory, cache }) in lengths.iter().zip(seconds) {
        let [sum, memory, cache] = [sum, memory, cache].map(median);
        let bytes = 4 * length;
        let bandwidth = 2.0 * (world_size - 1) as f64 / world_size as f64 * bytes as f64 / sum;
        if options.json {
            let line = json!({
                "world_size": world_size, "bytes": bytes, "seconds": sum, "bus_bandwidth": bandwidth,
                "memory_bound_seconds": memory, "of_memory_bound": memory / sum,
                "cache_bound_seconds": cache, "of_cache_bound": cache / sum,
            });
            println!("{line}");
        } else {
            println!(
                "| {bytes} | {:.3} ms | {:.2} GB/s | {:.3} ms | {:.0} % | {:.3} ms | {:.0} % |",
                1e3 * sum,
                bandwidth / 1e9,
                1e3 * memory,
                100.0 * memory / sum,
                1e3 * cache,
                100.0 * cache / sum,
            );
        }
    }
}

//! Training: [`Trainer::fit`] is the loop, read it first.
//!
//! | file | what |
//! |---|---|
//! | `job` | one model: its origin, its training, its folder |
//! | `device` | the CPU or a GPU |
//! | `trainer` | the loop: micro-batches, the guard against NaN, evaluation, checkpoints |
//! | `gate` | every trainable parameter has a gradient |
//! | `agree` | one state on all ranks, and the same rows |
//! | `reducer` | gradients summed over the ranks, beside the backward |
//! | `optimizer` | AdamW's groups and moments |
//! | `schedule` | learning-rate factors |
//! | `loss` | class weights |
//! | `evaluate` | a pass over a part without gradients |
//! | `checkpoint` | folders that a run resumes from to the same bits |
//! | `signals` | SIGINT and SIGTERM |
//! | `measure` | steps that are timed, and nothing else |
//! | `profile` | trace.json: where the time of some steps went |
//! | `memory` | what a training will need, before it starts |

mod agree;
mod checkpoint;
mod device;
mod evaluate;
mod gate;
mod job;
mod loss;
mod measure;
mod memory;
mod optimizer;
mod profile;
mod reducer;
mod schedule;
mod signals;
#[cfg(test)]
mod tests;
mod trainer;

pub use checkpoint::{Best, Checkpoints, State};
pub use device::{on_gpus, place};
pub use evaluate::{Evaluated, evaluate, logits};
pub use gate::gradient_coverage;
pub use job::{Job, Start};
pub use loss::class_weights;
pub use measure::{Load, measure};
pub use memory::{Largest, Memory};
pub use optimizer::{Optimizer, freeze};
pub use profile::Profile;
pub use reducer::{Reducer, Sums, Tree};
pub use schedule::Schedule;
pub use signals::{Signal, Signals};
pub use trainer::{Marks, Outcome, Output, Trainer};

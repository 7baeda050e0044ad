//! kiln fine-tunes transformer classifiers in pure Rust: text in, a tested ONNX classifier out.
//!
//! One command goes the whole way, and this is the way it goes:
//!
//! 1. [`config`] reads the experiment file into one resolved [`Config`](config::Config).
//! 2. [`data`] reads rows, removes duplicates, cuts the parts and writes them as a
//!    [`Snapshot`](data::Snapshot); a tokenizer turns each part into a memory-mapped
//!    [`Dataset`](data::Dataset).
//! 3. [`pretrained`] reads a Hugging Face folder into a [`Classifier`](pretrained::Classifier): a model
//!    of [`kiln_models`], whose one `forward` trains on packed batches and is captured as an ONNX graph.
//! 4. [`train`] is the loop, [`Trainer::fit`](train::Trainer::fit): micro-batches on a tape over the
//!    kernels of [`kiln_kernels`], AdamW, evaluations, checkpoints that resume to the same bits.
//! 5. [`export`] writes the graph and certifies it, example by example, against the trained model; on
//!    8-bit integers too, where that is asked for.
//! 6. [`infer`] runs ONNX Runtime on the unseen test part, or on new rows.
//! 7. [`report::compare`] puts models that were tested on the same rows side by side, and
//!    [`report::write_report`] makes a page of a run.
//!
//! [`dist`] makes many processes train one model. Beside them: [`store`] is the run tree and files that appear
//! whole, [`metrics`] pure functions, [`track`] the events of a training and who hears of them, [`report`] tables,
//! pictures and pages made from a run's files alone, [`cli`] and [`commands`] the verbs, [`progress`] and
//! [`dashboard`] how far they are, [`mod@error`] whose fault an error is. Arrows point down only:
//! commands → train, export, infer, report → data, dist, metrics, track, store → config.
#![warn(missing_docs)]

pub mod allocator;
pub mod cli;
pub mod commands;
pub mod config;
pub mod dashboard;
pub mod data;
pub mod dist;
pub mod error;
pub mod export;
pub mod hub;
pub mod infer;
pub mod metrics;
pub mod pretrained;
pub mod progress;
pub mod report;
pub mod store;
pub mod tensors;
pub mod track;
pub mod train;
pub mod weights;

#[cfg(test)]
mod testing {
    use std::io::Write as _;

    /// The Python of ci/python-env.sh, or `None` after saying aloud that the test is skipped.
    pub(crate) fn python() -> Option<std::ffi::OsString> {
        let python = std::env::var_os("KILN_PYTHON");
        if python.is_none() {
            // Past the test runner, which keeps to itself what a passing test prints.
            let _ = writeln!(std::io::stderr(), "skipped: KILN_PYTHON is not set; ci/python-env.sh prints it");
        }
        python
    }
}

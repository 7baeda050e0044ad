//! One gradient, however the work is divided.

use std::thread;

use anyhow::Result;
use kiln_models::nn::Parameter;

use super::*;
use crate::config::{self, Config, Overrides};
use crate::data::{self, Part, Snapshot};
use crate::dist::{Communicator, Tcp, Timing, World};
use crate::store::Experiment;

/// A step of the embedded sample: 23 examples, weights by class, dropout.
struct Case {
    config: Config,
    snapshot: Snapshot,
    _folder: tempfile::TempDir,
}

/// Every parameter's gradient, by name.
type Named = Vec<(String, Vec<f32>)>;

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sets =
            ["train.batch_size=23", "train.class_weights=balanced", "train.dropout=0.1", "model.0.max_length=96"];
        let sets = sets.map(String::from).into();
        let overrides = Overrides { sets, root: Some(folder.path().into()), threads: Some(1), ..Overrides::default() };
        let config = Config::load(None, &overrides).unwrap();
        let snapshot = data::prepare(&config.data, &Experiment::new(folder.path(), "x").data_dir()).unwrap();
        Self { config, snapshot, _folder: folder }
    }

    /// The gradient of a step as one of `ranks` has it at the end of the sums.
    fn gradient(&self, ranks: &Communicator, settings: &config::Train) -> Result<Named> {
        let mut model = self.config.models[0].clone();
        model.train = settings.clone();
        let job = Job {
            config: &self.config,
            model: &model,
            snapshot: &self.snapshot,
            files: None,
            quiet: true,
            profile: None,
            tui: false,
        };
        let parts = [Part::Train, Part::Validation];
        let Start { classifier, encoding, .. } = ranks.in_turn(|| job.start(&parts)).unwrap();
        let (train, validation) = (encoding.dataset(parts[0]).unwrap(), encoding.dataset(parts[1]).unwrap());
        let data = (&train, &validation);
        let bucket_bytes = 100_000;
        let objective = self.config.objective;
        let mut trainer = Trainer::new(ranks, &classifier, data, settings, objective, bucket_bytes, None)?;
        trainer.gradients_of_the_next_step()?;
        let gradients = classifier.built().parameters.gradients();
        let named = |p: &Parameter| (p.name().to_owned(), gradients.read(p.range()).unwrap());
        Ok(classifier.built().parameters.iter().map(named).collect())
    }

    /// The gradient made by a world of `world_size`, in which all ranks have to have the same bits.
    fn by(&self, world_size: usize, micro_batch_tokens: usize, accumulation: usize, deterministic: bool) -> Named {
        let settings = config::Train {
            micro_batch_tokens,
            gradient_accumulation_steps: accumulation,
            deterministic,
            ..self.config.models[0].train.clone()
        };
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let rank = |rank| {
            let ranks = join(world_size, rank, port);
            self.gradient(&ranks, &settings).unwrap()
        };
        let rank = &rank;
        let all: Vec<Named> = thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size).map(|r| scope.spawn(move || rank(r))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(all.iter().all(|other| bits(other) == bits(&all[0])), "ranks differ");
        all.into_iter().next().unwrap()
    }
}

fn join(world_size: usize, rank: usize, master_port: u16) -> Communicator {
    let world =
        World { rank, world_size, local_rank: rank, local_world_size: world_size, master_port, ..World::solo() };
    let timing = Timing::new(std::time::Duration::from_secs(60));
    Communicator::new(move || Tcp::join(&world, "test", timing)).unwrap()
}

fn bits(gradient: &Named) -> Vec<u32> {
    gradient.iter().flat_map(|(_, g)| g.iter().map(|x| x.to_bits())).collect()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn the_gradient_is_one_however_the_work_is_divided() {
    let case = Case::new();
    let whole = case.by(1, 100_000, 1, false);
    let all = norm(whole.iter().flat_map(|(_, g)| g.iter().map(|&x| f64::from(x))));
    for (world_size, tokens, accumulation) in
        [(1, 100, 1), (1, 100_000, 5), (2, 100_000, 1), (3, 150, 1), (4, 100_000, 3)]
    {
        let divided = case.by(world_size, tokens, accumulation, false);
        for ((name, a), (_, b)) in divided.iter().zip(&whole) {
            let difference = norm(a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
            let size = norm(b.iter().map(|&b| f64::from(b)));
            // What is zero but for rounding, as the keys' bias, is held against the whole gradient.
            assert!(
                difference <= 1e-6 * size || difference <= 1e-9 * all,
                "{world_size} × {tokens} × {accumulation}: {name} differs by {:.1e}",
                difference / size
            );
        }
    }
}

#[test]
fn ranks_that_would_do_something_else_are_refused() {
    let case = Case::new();
    let settings = &case.config.models[0].train;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let rank = |rank| {
        let ranks = join(2, rank, port);
        let settings = config::Train { micro_batch_auto: false, micro_batch_tokens: 100 + rank, ..settings.clone() };
        case.gradient(&ranks, &settings).map(drop).unwrap_err().to_string()
    };
    let rank = &rank;
    let said = thread::scope(|scope| [0, 1].map(|r| scope.spawn(move || rank(r))).map(|rank| rank.join().unwrap()));
    let expected = "rank 1 has train.micro_batch_tokens of 101, rank 0 of 100: give all ranks the same kiln, files \
                    and settings";
    assert_eq!(said, [expected; 2]);
}

#[test]
fn deterministic_gradients_have_the_same_bits_in_every_world() {
    let case = Case::new();
    let alone = case.by(1, 100_000, 1, true);
    for world_size in [2, 4, 8] {
        assert!(bits(&case.by(world_size, 100_000, 1, true)) == bits(&alone), "{world_size}");
    }
}

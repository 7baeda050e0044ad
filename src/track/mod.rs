//! Who hears of a training: typed [`Event`]s go to `metrics.jsonl` in the model's folder of the run, and
//! from there to TensorBoard, Weights & Biases and MLflow.
//!
//! What is a file is written as it happens, and on resume cut back to the checkpoint's step. What is a
//! server follows `metrics.jsonl` on a thread of its own. A tracker that fails says so once, and the
//! training goes on; only `metrics.jsonl` itself has to be written. A tracker is one file here and one line
//! in [`Tracking::tracker`].

mod delivery;
mod event;
mod log;
mod mlflow;
mod records;
mod tensorboard;
mod wandb;
mod wandb_proto;

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

pub use event::{End, Evaluation, Event, Start, Step, Test, now};
pub use log::read;

use self::delivery::{Delivery, Route};
use self::log::MetricsLog;
use self::mlflow::Mlflow;
use self::tensorboard::TensorBoard;
use self::wandb::Wandb;
use crate::config::{self, Config, Track, WandbMode};
use crate::error::say;
use crate::metrics::Statistics;
use crate::store::{ModelDir, RunDir, Status, read_json};
use crate::user_error;

/// How long a run's end waits for servers.
const FLUSH: Duration = Duration::from_secs(10);

/// A file that is told of a training as it goes on.
trait Sink {
    /// Opens it and drops what is after `step`, and how the run ended: that is told again.
    fn cut_back(&mut self, step: u64) -> Result<()>;

    /// Tells it of an event. What it cuts back later is told by whole records.
    fn append(&mut self, event: &Event) -> Result<()>;
}

/// The trackers that are asked for, with what the environment says of them; none by default.
#[derive(Default)]
pub struct Plan {
    tensorboard: bool,
    wandb: Option<wandb::Settings>,
    mlflow: Option<mlflow::Settings>,
}

impl Plan {
    /// What `[track]` asks for; what it leaves out is in the variables of W&B and MLflow themselves.
    ///
    /// # Errors
    /// The user's: something is in neither, or cannot be had.
    pub fn new(track: &Track, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let wandb = track.wandb.as_ref().map(|wandb| plan_wandb(wandb, variable)).transpose()?.flatten();
        let mlflow = track.mlflow.as_ref().map(|mlflow| plan_mlflow(mlflow, variable)).transpose()?;
        Ok(Self { tensorboard: track.tensorboard, wandb, mlflow })
    }
}

fn plan_wandb(wandb: &config::Wandb, variable: impl Fn(&str) -> Option<String>) -> Result<Option<wandb::Settings>> {
    let mode = match (wandb.mode, variable("WANDB_MODE")) {
        (Some(mode), _) => mode,
        (None, None) => WandbMode::Online,
        (None, Some(name)) => match WandbMode::NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, mode)) => *mode,
            None => return Err(user_error!("WANDB_MODE is {name:?}: needs online, offline or disabled")),
        },
    };
    match mode {
        WandbMode::Disabled => Ok(None),
        WandbMode::Offline => Ok(Some(wandb::Settings {
            project: wandb.project.clone().or_else(|| variable("WANDB_PROJECT")),
            entity: wandb.entity.clone().or_else(|| variable("WANDB_ENTITY")),
        })),
        WandbMode::Online => Err(user_error!(
            "track.wandb: kiln writes runs for W&B and does not upload them itself; set WANDB_MODE=offline or \
             track.wandb.mode = \"offline\", and upload them with `wandb sync`"
        )),
    }
}

fn plan_mlflow(mlflow: &config::Mlflow, variable: impl Fn(&str) -> Option<String>) -> Result<mlflow::Settings> {
    let uri = mlflow.uri.clone().or_else(|| variable("MLFLOW_TRACKING_URI")).ok_or_else(|| {
        user_error!("track.mlflow names no server: set track.mlflow.uri or MLFLOW_TRACKING_URI to its address")
    })?;
    if !config::Mlflow::is_server(&uri) {
        return Err(user_error!("MLFLOW_TRACKING_URI: needs {}", config::Mlflow::URI));
    }
    let user = variable("MLFLOW_TRACKING_USERNAME").zip(variable("MLFLOW_TRACKING_PASSWORD"));
    Ok(mlflow::Settings {
        uri: uri.trim_end_matches('/').into(),
        experiment: mlflow.experiment.clone().or_else(|| variable("MLFLOW_EXPERIMENT_NAME")),
        authorization: mlflow::Settings::authorization(variable("MLFLOW_TRACKING_TOKEN"), user),
    })
}

/// The trackers of a run, in its main process.
pub struct Tracking<'a> {
    plan: &'a Plan,
    config: &'a Config,
    run: &'a RunDir,
    delivery: OnceCell<Delivery>,
    /// The models whose metrics.jsonl is followed.
    followed: RefCell<HashSet<String>>,
}

/// The trackers of one model's training.
pub struct Tracker<'a> {
    tracking: &'a Tracking<'a>,
    model: &'a config::Model,
    files: ModelDir,
    log: MetricsLog,
    sinks: Vec<(&'static str, Box<dyn Sink>)>,
}

impl<'a> Tracking<'a> {
    /// Nothing is written or sent yet.
    pub fn new(plan: &'a Plan, config: &'a Config, run: &'a RunDir) -> Self {
        Self { plan, config, run, delivery: OnceCell::new(), followed: RefCell::default() }
    }

    /// The trackers of a model. They hear nothing before [`Tracker::resume`].
    ///
    /// # Errors
    /// metrics.jsonl cannot be opened.
    pub fn tracker(&'a self, model: &'a config::Model) -> Result<Tracker<'a>> {
        let files = self.run.model(&model.name);
        let mut sinks: Vec<(&'static str, Box<dyn Sink>)> = Vec::new();
        if self.plan.tensorboard {
            sinks.push(("TensorBoard", Box::new(TensorBoard::new(files.dir()))));
        }
        if let Some(settings) = &self.plan.wandb {
            sinks.push(("W&B", Box::new(Wandb::new(files.dir(), settings.clone()))));
        }
        let log = MetricsLog::open(&files.metrics_jsonl())?;
        Ok(Tracker { tracking: self, model, files, log, sinks })
    }

    /// Tells every model's trackers how the run ended, and waits a little for servers to have heard all.
    /// What fails is said on stderr.
    pub fn end(mut self, status: Status) {
        for model in &self.config.models {
            if self.run.model(&model.name).metrics_jsonl().exists() {
                let ended = self.tracker(model).and_then(|mut tracker| tracker.end(status));
                ended.unwrap_or_else(|error| say(format_args!("warning: {}: {error:#}", model.name)));
            }
        }
        if let Some(delivery) = self.delivery.take() {
            delivery.finish(FLUSH).iter().for_each(|what| say(format_args!("warning: {what}")));
        }
    }

    /// Has a server follow a model's metrics.jsonl.
    fn follow(&self, model: &str, files: &ModelDir) {
        let Some(settings) = &self.plan.mlflow else { return };
        if !self.followed.borrow_mut().insert(model.into()) {
            return;
        }
        let server = Mlflow::new(settings.clone(), files.dir().join("mlflow.json"));
        if self.delivery.get().is_none() {
            match Delivery::start(server.name()) {
                Ok(delivery) => drop(self.delivery.set(delivery)),
                Err(error) => say(format_args!("warning: {error:#}")),
            }
        }
        if let Some(delivery) = self.delivery.get() {
            let name = format!("{}/{model}", self.run.reference());
            delivery.follow(Route::new(name, files.metrics_jsonl(), server));
        }
    }
}

impl Tracker<'_> {
    /// Drops what was told after `step`, the checkpoint's, and tells that the training goes on from there.
    ///
    /// # Errors
    /// metrics.jsonl cannot be read or written, or holds something else.
    pub fn resume(&mut self, step: u64) -> Result<()> {
        self.cut_back(step)?;
        let start = Start {
            step,
            time: now(),
            experiment: self.tracking.config.name.clone(),
            run_num: self.tracking.run.run_num(),
            model: self.model.name.clone(),
            config: resolved(self.tracking.config, self.model)?,
        };
        self.append(&Event::Start(start))?;
        self.tracking.follow(&self.model.name, &self.files);
        Ok(())
    }

    /// Tells of an event.
    ///
    /// # Errors
    /// metrics.jsonl cannot be written.
    pub fn append(&mut self, event: &Event) -> Result<()> {
        self.log.append(event)?;
        self.tell(|sink| sink.append(event));
        Ok(())
    }

    fn cut_back(&mut self, step: u64) -> Result<()> {
        self.log.cut_back(step)?;
        self.tell(|sink| sink.cut_back(step));
        Ok(())
    }

    /// One that fails says so and is told no more.
    fn tell(&mut self, what: impl Fn(&mut dyn Sink) -> Result<()>) {
        let (model, log) = (&self.model.name, self.files.metrics_jsonl());
        self.sinks.retain_mut(|(name, sink)| {
            let told = what(sink.as_mut());
            if let Err(error) = &told {
                let log = log.display();
                say(format_args!("warning: {name} hears no more of {model}: {error:#}; {log} has all"));
            }
            told.is_ok()
        });
    }

    fn end(&mut self, status: Status) -> Result<()> {
        let events = read(&self.files.metrics_jsonl())?;
        let Some(step) = events.iter().map(Event::step).max() else { return Ok(()) };
        self.cut_back(u64::MAX)?;
        self.tracking.follow(&self.model.name, &self.files); // it may have been trained by an earlier process
        let statistics = self.files.test().join("statistics.json");
        if statistics.is_file() {
            self.append(&Event::Test(Test::new(step, &read_json::<Statistics>(&statistics)?)))?;
        }
        self.append(&Event::End(End { step, time: now(), status }))
    }
}

/// What a tracker shows as the configuration: one model's.
fn resolved(config: &Config, model: &config::Model) -> Result<serde_json::Value> {
    #[derive(Serialize)]
    struct Resolved<'a> {
        objective: config::Objective,
        data: &'a config::Data,
        model: &'a config::Model,
        distributed: config::Distributed,
        export: config::Export,
        infer: config::Infer,
    }
    let Config { objective, data, distributed, export, infer, .. } = config;
    let (objective, distributed, export, infer) = (*objective, *distributed, *export, *infer);
    Ok(serde_json::to_value(Resolved { objective, data, model, distributed, export, infer })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_goes_before_the_environment() {
        let environment = |name: &str| {
            let value = match name {
                "WANDB_MODE" => "offline",
                "WANDB_PROJECT" => "theirs",
                "WANDB_ENTITY" => "team",
                "MLFLOW_TRACKING_URI" => "https://host/mlflow/",
                "MLFLOW_EXPERIMENT_NAME" => "",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let file =
            |project: Option<&str>, mode| Some(config::Wandb { project: project.map(Into::into), entity: None, mode });
        let mlflow = |uri: Option<&str>| Some(config::Mlflow { uri: uri.map(Into::into), experiment: None });
        let plan = |wandb, mlflow| Plan::new(&Track { tensorboard: false, wandb, mlflow }, environment).unwrap();

        let Plan { wandb: Some(wandb), mlflow: Some(server), .. } = plan(file(None, None), mlflow(None)) else {
            panic!("both are asked for")
        };
        assert_eq!((wandb.project.as_deref(), wandb.entity.as_deref()), (Some("theirs"), Some("team")));
        assert_eq!((server.uri.as_str(), server.experiment), ("https://host/mlflow", None), "an empty one is none");

        let Plan { wandb: Some(wandb), mlflow: Some(server), .. } =
            plan(file(Some("ours"), None), mlflow(Some("http://ours")))
        else {
            panic!("both are asked for")
        };
        assert_eq!((wandb.project.as_deref(), server.uri.as_str()), (Some("ours"), "http://ours"));
        assert!(plan(file(None, Some(WandbMode::Disabled)), None).wandb.is_none());
        assert!(plan(None, None).mlflow.is_none(), "a variable alone asks for nothing");
    }
}

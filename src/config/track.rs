//! `[track]`: who hears of a training.

use serde::{Deserialize, Serialize};

use super::table::{Field, Table};

/// Who hears of a training, beside its metrics.jsonl.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Track {
    /// An event file for TensorBoard in each model's folder.
    pub tensorboard: bool,
    /// Weights & Biases.
    pub wandb: Option<Wandb>,
    /// An MLflow server.
    pub mlflow: Option<Mlflow>,
}

/// What the file says of Weights & Biases; the environment says the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wandb {
    /// The project; else WANDB_PROJECT's, else the experiment's name.
    pub project: Option<String>,
    /// The user or team; else WANDB_ENTITY's, else that of who syncs the run.
    pub entity: Option<String>,
    /// Whether it is written; else WANDB_MODE says so.
    pub mode: Option<WandbMode>,
}

/// How a run reaches Weights & Biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WandbMode {
    /// While it is trained.
    Online,
    /// By `wandb sync`, from a folder in the run.
    Offline,
    /// Not at all.
    Disabled,
}

/// What the file says of an MLflow server; the environment says the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mlflow {
    /// The server's address; else MLFLOW_TRACKING_URI's.
    pub uri: Option<String>,
    /// The experiment there; else MLFLOW_EXPERIMENT_NAME's, else the experiment's name.
    pub experiment: Option<String>,
}

impl Default for Track {
    fn default() -> Self {
        Self { tensorboard: true, wandb: None, mlflow: None }
    }
}

impl WandbMode {
    /// By the names that WANDB_MODE takes.
    pub const NAMES: [(&str, Self); 3] =
        [("online", Self::Online), ("offline", Self::Offline), ("disabled", Self::Disabled)];
}

pub(super) fn track(table: Table<'_>) -> Track {
    let track = Track {
        tensorboard: table.boolean("tensorboard", Track::default().tensorboard),
        wandb: table.get("wandb").and_then(|field| field.table()).map(wandb),
        mlflow: table.get("mlflow").and_then(|field| field.table()).map(mlflow),
    };
    table.finish();
    track
}

fn wandb(table: Table<'_>) -> Wandb {
    let wandb = Wandb {
        project: table.string("project"),
        entity: table.string("entity"),
        mode: table.get("mode").and_then(|field| field.choice(&WandbMode::NAMES)),
    };
    table.finish();
    wandb
}

fn mlflow(table: Table<'_>) -> Mlflow {
    let uri = table.get("uri").and_then(|field: Field<'_>| {
        let uri = field.string(Mlflow::URI)?;
        if Mlflow::is_server(&uri) { Some(uri) } else { field.reject(Mlflow::URI) }
    });
    let mlflow = Mlflow { uri, experiment: table.string("experiment") };
    table.finish();
    mlflow
}

impl Mlflow {
    /// What an address has to be.
    pub const URI: &str = "a server's address, as \"http://host:5000\", with no user or password in it: \
                           MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are for them";

    /// Whether `uri` is the address of a server, without credentials, which would end up in the run's files.
    pub fn is_server(uri: &str) -> bool {
        let host = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://"));
        host.is_some_and(|host| !host.is_empty() && !host.contains('@') && !host.contains(char::is_whitespace))
    }
}

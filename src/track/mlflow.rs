//! MLflow, by its REST API: <https://mlflow.org/docs/latest/rest-api.html>.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::Agent;

use super::event::{Event, Start};
use crate::store::{self, Status};

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Metrics that one request may hold; params are at most 100.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Characters of a param's value that every server takes.
const PARAM_LENGTH: usize = 500;

/// A server and what it is told to keep runs under, resolved.
#[derive(Clone)]
pub(super) struct Settings {
    /// Its address, without a slash at the end.
    pub uri: String,
    /// The experiment; `None` is kiln's.
    pub experiment: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
}

impl Settings {
    /// The header for MLFLOW_TRACKING_TOKEN, else for MLFLOW_TRACKING_USERNAME and _PASSWORD.
    pub fn authorization(token: Option<String>, user: Option<(String, String)>) -> Option<String> {
        let basic = |(name, password): (String, String)| {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}")))
        };
        token.map(|token| format!("Bearer {token}")).or_else(|| user.map(basic))
    }
}

/// A model's run on a server.
pub(super) struct Mlflow {
    settings: Settings,
    agent: Agent,
    /// Says which run it is: a training that goes on finds it there.
    record: PathBuf,
    start: Option<Start>,
    time: f64,
    /// What the server has; `None` until it is asked, and after an answer that did not come.
    run: Option<Run>,
}

/// mlflow.json, in the model's folder.
#[derive(Serialize, Deserialize)]
struct Record {
    uri: String,
    experiment_id: String,
    run_id: String,
}

struct Run {
    id: String,
    running: bool,
    /// The newest step of each metric.
    newest: HashMap<String, u64>,
    params: Vec<String>,
}

impl Mlflow {
    /// The run that `record` names, or will name.
    pub fn new(settings: Settings, record: PathBuf) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")));
        Self { settings, agent: config.build().into(), record, start: None, time: 0.0, run: None }
    }

    /// How messages name it.
    pub fn name(&self) -> String {
        format!("MLflow at {}", self.settings.uri)
    }

    /// Tells the server what it has not of `events`, which come in order from the first on. Where that
    /// fails they can be told again.
    pub fn deliver(&mut self, events: &[Event]) -> Result<()> {
        let told = self.tell(events);
        if told.is_err() {
            self.run = None; // a request whose answer is lost may have arrived
        }
        told
    }

    fn tell(&mut self, events: &[Event]) -> Result<()> {
        if let Some(Event::Start(start)) = events.iter().rfind(|event| matches!(event, Event::Start(_))) {
            self.start = Some(start.clone());
        }
        let Some(start) = &self.start else { return Ok(()) };
        let mut run = match self.run.take() {
            Some(run) => run,
            None => self.open(start)?,
        };
        self.log_params(&mut run, &start.config)?;
        let mut metrics = Vec::new();
        for event in events {
            self.time = event.time().unwrap_or(self.time);
            for (key, value) in event.figures() {
                if run.newest.get(key).is_none_or(|&newest| newest < event.step()) {
                    run.newest.insert(key.into(), event.step());
                    metrics.push(
                        json!({ "key": key, "value": value, "step": event.step(), "timestamp": milliseconds(self.time) }),
                    );
                }
            }
        }
        for metrics in metrics.chunks(METRICS) {
            self.post::<Value>("runs/log-batch", &json!({ "run_id": run.id, "metrics": metrics }))?;
        }
        match events.iter().rfind(|event| matches!(event, Event::Start(_) | Event::End(_))) {
            Some(Event::End(end)) => {
                let status = match end.status {
                    Status::Finished | Status::Stopped => "FINISHED",
                    Status::Interrupted => "KILLED",
                    Status::Failed => "FAILED",
                    Status::Training => "RUNNING",
                };
                let update = json!({ "run_id": run.id, "status": status, "end_time": milliseconds(end.time) });
                self.post::<Value>("runs/update", &update)?;
                run.running = false;
            }
            Some(_) if !run.running => {
                self.post::<Value>("runs/update", &json!({ "run_id": run.id, "status": "RUNNING" }))?;
                run.running = true;
            }
            _ => {}
        }
        self.run = Some(run);
        Ok(())
    }

    /// The run of the record, or a new one.
    fn open(&self, start: &Start) -> Result<Run> {
        #[derive(Deserialize)]
        struct Found {
            run: Body,
        }
        #[derive(Deserialize)]
        struct Body {
            info: Info,
            #[serde(default)]
            data: Data,
        }
        #[derive(Deserialize)]
        struct Info {
            status: String,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Data {
            metrics: Vec<Metric>,
            params: Vec<Param>,
        }
        #[derive(Deserialize)]
        struct Metric {
            key: String,
            #[serde(default)] // protobuf's JSON may leave a 0 out
            step: Step,
        }
        #[derive(Deserialize)]
        struct Param {
            key: String,
        }
        /// A 64-bit integer is a string in protobuf's JSON, and a number in MLflow's.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Step {
            Number(u64),
            Text(String),
        }
        impl Default for Step {
            fn default() -> Self {
                Self::Number(0)
            }
        }

        let record = store::read_json::<Record>(&self.record).ok().filter(|record| record.uri == self.settings.uri);
        if let Some(Record { run_id, .. }) = record
            && let Some(Found { run }) = self.get("runs/get", "run_id", &run_id)?
        {
            let step = |step| match step {
                Step::Number(step) => Some(step),
                Step::Text(step) => step.parse().ok(),
            };
            return Ok(Run {
                id: run_id,
                running: run.info.status == "RUNNING",
                newest: run
                    .data
                    .metrics
                    .into_iter()
                    .filter_map(|metric| Some((metric.key, step(metric.step)?)))
                    .collect(),
                params: run.data.params.into_iter().map(|param| param.key).collect(),
            });
        }
        self.create(start)
    }

    fn create(&self, start: &Start) -> Result<Run> {
        #[derive(Deserialize)]
        struct Created {
            run: Body,
        }
        #[derive(Deserialize)]
        struct Body {
            info: Info,
        }
        #[derive(Deserialize)]
        struct Info {
            run_id: String,
        }
        let experiment_id = self.experiment(self.settings.experiment.as_deref().unwrap_or(&start.experiment))?;
        let tag = |key: &str, value: String| json!({ "key": key, "value": value });
        let run = json!({
            "experiment_id": experiment_id,
            "run_name": format!("{}/{}", start.run_num, start.model),
            "start_time": milliseconds(start.time),
            "tags": [
                tag("kiln.experiment", start.experiment.clone()),
                tag("kiln.run_num", start.run_num.to_string()),
                tag("kiln.model", start.model.clone()),
                tag("kiln.job_type", "training".into()),
                tag("mlflow.source.name", format!("kiln {}", env!("CARGO_PKG_VERSION"))),
            ],
        });
        let Created { run: Body { info: Info { run_id } } } = self.post("runs/create", &run)?;
        let record = Record { uri: self.settings.uri.clone(), experiment_id, run_id: run_id.clone() };
        store::write_json(&self.record, &record)?;
        Ok(Run { id: run_id, running: true, newest: HashMap::new(), params: Vec::new() })
    }

    /// The id of the experiment of this name, which is made where there is none.
    fn experiment(&self, name: &str) -> Result<String> {
        #[derive(Deserialize)]
        struct Found {
            experiment: Experiment,
        }
        #[derive(Deserialize)]
        struct Experiment {
            experiment_id: String,
        }
        let find = || self.get("experiments/get-by-name", "experiment_name", name);
        if let Some(Found { experiment }) = find()? {
            return Ok(experiment.experiment_id);
        }
        match self.post::<Experiment>("experiments/create", &json!({ "name": name })) {
            Ok(created) => Ok(created.experiment_id),
            // Another process may have been faster.
            Err(error) => match find()? {
                Some(Found { experiment }) => Ok(experiment.experiment_id),
                None => Err(error),
            },
        }
    }

    /// The configuration as params, which cannot be changed: those that are there stay.
    fn log_params(&self, run: &mut Run, config: &Value) -> Result<()> {
        let mut params = Vec::new();
        flatten("", config, &mut params);
        let mut known: HashSet<_> = run.params.iter().cloned().collect();
        params.retain(|(key, _)| known.insert(key.clone()));
        for params in params.chunks(PARAMS) {
            let list: Vec<_> = params.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect();
            self.post::<Value>("runs/log-batch", &json!({ "run_id": run.id, "params": list }))?;
            run.params.extend(params.iter().map(|(key, _)| key.clone()));
        }
        Ok(())
    }

    /// `None` where the server says that there is no such thing.
    fn get<T: DeserializeOwned>(&self, method: &str, key: &str, value: &str) -> Result<Option<T>> {
        let mut request = self.agent.get(self.url(method)).query(key, value);
        if let Some(authorization) = &self.settings.authorization {
            request = request.header("Authorization", authorization);
        }
        let (status, body) = answer(request.call()).with_context(|| method.to_owned())?;
        if body["error_code"] == "RESOURCE_DOES_NOT_EXIST" {
            return Ok(None);
        }
        read(method, status, body).map(Some)
    }

    fn post<T: DeserializeOwned>(&self, method: &str, body: &Value) -> Result<T> {
        let mut request = self.agent.post(self.url(method));
        if let Some(authorization) = &self.settings.authorization {
            request = request.header("Authorization", authorization);
        }
        let (status, body) = answer(request.send_json(body)).with_context(|| method.to_owned())?;
        read(method, status, body)
    }

    fn url(&self, method: &str) -> String {
        format!("{}/api/2.0/mlflow/{method}", self.settings.uri)
    }
}

/// The status and what the body says: `null` where that is no JSON.
fn answer(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<(u16, Value)> {
    let mut response = response?;
    let text = response.body_mut().read_to_string()?;
    Ok((response.status().as_u16(), serde_json::from_str(&text).unwrap_or_default()))
}

fn read<T: DeserializeOwned>(method: &str, status: u16, body: Value) -> Result<T> {
    if status != 200 {
        let message: String = body["message"].as_str().unwrap_or("no message").chars().take(300).collect();
        let fix = match status {
            401 | 403 => "; MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN, say who you are",
            _ => "",
        };
        bail!("{method}: status {status}: {message}{fix}");
    }
    serde_json::from_value(body).map_err(|error| anyhow!("{method}: the answer is not MLflow's: {error}"))
}

/// A table's leaves as `train.learning_rate`; an empty list or table, and what is absent, is left out.
fn flatten(path: &str, value: &Value, params: &mut Vec<(String, String)>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Null => {}
        Value::Object(table) => table.iter().for_each(|(key, value)| flatten(&below(key), value, params)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| flatten(&below(&i.to_string()), value, params));
        }
        Value::String(text) => params.push((name(path), text.chars().take(PARAM_LENGTH).collect())),
        Value::Number(_) | Value::Bool(_) => params.push((name(path), value.to_string())),
    }
}

/// What a param may be named: letters, digits and `_-. /`, at most 250 of them.
fn name(path: &str) -> String {
    let allowed = |c: char| if c.is_alphanumeric() || "_-. /".contains(c) { c } else { '_' };
    path.chars().take(250).map(allowed).collect()
}

fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_becomes_params() {
        let mut params = Vec::new();
        let label = "x".repeat(600);
        flatten(
            "",
            &json!({ "train": { "learning_rate": 5e-5, "dropout": null, "freeze": ["a", "b"] }, "weights": { "a:b": label } }),
            &mut params,
        );
        let params: Vec<_> = params.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(
            params,
            [
                ("train.learning_rate", "0.00005"),
                ("train.freeze.0", "a"),
                ("train.freeze.1", "b"),
                ("weights.a_b", &label[..PARAM_LENGTH])
            ]
        );
    }

    #[test]
    fn a_token_goes_before_a_password() {
        let user = Some(("ada".to_owned(), "secret".to_owned()));
        assert_eq!(Settings::authorization(None, user.clone()).unwrap(), "Basic YWRhOnNlY3JldA==");
        assert_eq!(Settings::authorization(Some("t".into()), user).unwrap(), "Bearer t");
        assert_eq!(Settings::authorization(None, None), None);
    }
}

//! Trackers, seen from outside: by TensorBoard's own reader and W&B's own client, on a real MLflow server,
//! and on servers that fail.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::resume::{experiment, logged_step, model_dir, newest_checkpoint, train, wait, weights};
use crate::support::{kiln, repository, trackers_python};

/// A command that hears nothing of W&B and MLflow from the environment of the test.
fn quiet(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        if ["WANDB_", "MLFLOW_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

fn finished(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// The events of metrics.jsonl of this kind.
fn events(file: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(model_dir(file).join("metrics.jsonl")).unwrap();
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|event| event["event"] == kind).collect()
}

/// A real MLflow server, ended with its workers when it is dropped.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(python: &Path, folder: &Path) -> Self {
        use std::os::unix::process::CommandExt as _;
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = fs::File::create(folder.join("mlflow.log")).unwrap();
        let child = Command::new(python)
            .args(["-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1", "--port", &port.to_string()])
            .args(["--backend-store-uri", &format!("sqlite:///{}", folder.join("mlflow.db").display())])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        let mut server = Self { child, uri: format!("http://127.0.0.1:{port}") };
        let started = Instant::now();
        while ureq::get(format!("{}/health", server.uri)).call().is_err() {
            let ended = server.child.try_wait().unwrap();
            let late = started.elapsed() > Duration::from_secs(300);
            assert!(ended.is_none() && !late, "{}", fs::read_to_string(folder.join("mlflow.log")).unwrap());
            std::thread::sleep(Duration::from_millis(200));
        }
        server
    }

    fn get(&self, method: &str, query: &[(&str, &str)]) -> Value {
        let request = ureq::get(format!("{}/api/2.0/mlflow/{method}", self.uri)).query_pairs(query.iter().copied());
        request.call().unwrap().body_mut().read_json().unwrap()
    }

    /// The experiment's runs, once there are any.
    fn runs(&self, experiment: &str) -> Vec<Value> {
        let by_name = format!("{}/api/2.0/mlflow/experiments/get-by-name", self.uri);
        let Ok(mut found) = ureq::get(by_name).query("experiment_name", experiment).call() else { return Vec::new() };
        let found: Value = found.body_mut().read_json().unwrap();
        let body = json!({ "experiment_ids": [found["experiment"]["experiment_id"]] });
        let search = ureq::post(format!("{}/api/2.0/mlflow/runs/search", self.uri));
        let mut found: Value = search.send_json(body).unwrap().body_mut().read_json().unwrap();
        serde_json::from_value(found["runs"].take()).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: the group is the child's own, which has not been waited for.
        unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

fn steps_of(points: &Value, step: impl Fn(&Value) -> &Value) -> Vec<u64> {
    points.as_array().unwrap().iter().map(|point| step(point).as_u64().unwrap()).collect()
}

#[test]
fn a_killed_run_is_told_once_to_all_trackers() {
    const STEPS: u64 = 1500;
    let Some(python) = trackers_python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&python, folder.path());
    let file = experiment(folder.path());
    let options = [
        "--set=train.save_steps=50".into(),
        format!("--set=train.max_steps={STEPS}"),
        "--set=track.wandb.mode=offline".into(),
        "--set=track.wandb.entity=team".into(),
        format!("--set=track.mlflow.uri={}", server.uri),
    ];

    // Killed in the middle, when the server has heard of steps that will be made again.
    let mut child = quiet(train(&file)).args(&options).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Then it hears no step twice only because it is asked what it has.
    let heard = || {
        let runs = server.runs("killed");
        let metrics = runs.iter().filter_map(|run| run["data"]["metrics"].as_array()).flatten();
        metrics.filter_map(|metric| metric["step"].as_u64()).max()
    };
    while newest_checkpoint(&file).is_none() || heard() <= newest_checkpoint(&file) {
        assert!(child.try_wait().unwrap().is_none(), "kiln ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    wait(child);
    assert!(logged_step(&file) < STEPS);

    let mut command = kiln();
    command.args(["train", "--offline"]).arg(&file).args(&options);
    let stderr = finished(quiet(command).output().unwrap());
    assert!(stderr.contains("resuming killed/1 at step") && !stderr.contains("warning"), "{stderr}");
    let all: Vec<u64> = (1..=STEPS).collect();
    let losses: Vec<f64> = events(&file, "step").iter().map(|step| step["train_loss"].as_f64().unwrap()).collect();
    let evaluated: Vec<u64> = events(&file, "evaluation").iter().map(|event| event["step"].as_u64().unwrap()).collect();
    let [test] = &events(&file, "test")[..] else { panic!("one test") };
    assert_eq!(events(&file, "start").len(), 2);
    assert_eq!(events(&file, "end")[0]["status"], "finished");

    let script = |name: &str, path: &Path| -> Value {
        let mut command = Command::new(&python);
        command.arg(repository("tests/python").join(name)).arg(path).env("PYTHONDONTWRITEBYTECODE", "1");
        let output = quiet(command).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let read = script("read_trackers.py", &model_dir(&file));

    let scalars = &read["tensorboard"]["scalars"];
    assert_eq!(steps_of(&scalars["train/loss"], |point| &point[0]), all);
    assert_eq!(steps_of(&scalars["validation/macro_f1"], |point| &point[0]), evaluated);
    assert_eq!(steps_of(&scalars["test/macro_f1"], |point| &point[0]), [STEPS]);
    for (point, loss) in scalars["train/loss"].as_array().unwrap().iter().zip(&losses) {
        assert_eq!(point[1].as_f64().unwrap() as f32, *loss as f32);
    }
    assert!(read["tensorboard"]["config"][0].as_str().unwrap().contains("\"learning_rate\": 0.001"));

    let wandb = &read["wandb"];
    let run = &wandb["run"];
    let of = |key: &str| run[key].as_str().unwrap();
    assert_eq!(
        [of("project"), of("entity"), of("run_group"), of("display_name"), of("job_type")],
        ["killed", "team", "1", "tiny", "training"]
    );
    assert_eq!(run["config"]["model"]["train"]["learning_rate"], 1e-3);
    assert_eq!(steps_of(&wandb["history"], |row| &row["step"]), all, "one row a step");
    let rows = wandb["history"].as_array().unwrap();
    assert!(rows.iter().map(|row| row["train/loss"].as_f64().unwrap()).eq(losses.iter().copied()));
    let with_f1 = rows.iter().filter(|row| row.get("validation/macro_f1").is_some());
    assert!(with_f1.map(|row| row["step"].as_u64().unwrap()).eq(evaluated.iter().copied()));
    assert_eq!(wandb["summary"]["test/macro_f1"], test["test_macro_f1"]);
    assert_eq!(wandb["exit"], 0);
    let numbers = wandb["numbers"].as_array().unwrap();
    assert!(numbers.iter().map(|number| number.as_u64().unwrap()).eq(1..=numbers.len() as u64));

    let offline_run = fs::read_dir(model_dir(&file).join("wandb")).unwrap().next().unwrap().unwrap().path();
    let synced = script("sync_wandb.py", &offline_run);
    let of = |key: &str| synced["run"][key].as_str().unwrap();
    assert_eq!(
        [of("project"), of("entity"), of("groupName"), of("displayName"), of("jobType")],
        ["killed", "team", "1", "tiny", "training"]
    );
    assert_eq!(steps_of(&synced["history"], |row| &row["_step"]), all);
    assert_eq!(synced["summary"]["test/macro_f1"], test["test_macro_f1"]);
    assert_eq!(synced["exitcode"], 0);

    let [run] = &server.runs("killed")[..] else { panic!("one run on the server") };
    let id = run["info"]["run_id"].as_str().unwrap();
    assert_eq!((&run["info"]["status"], &run["info"]["run_name"]), (&json!("FINISHED"), &json!("1/tiny")));
    let params = run["data"]["params"].as_array().unwrap();
    assert!(params.contains(&json!({ "key": "model.train.learning_rate", "value": "0.001" })), "{params:?}");
    let history = |key: &str| {
        let page = server.get("metrics/get-history", &[("run_id", id), ("metric_key", key), ("max_results", "5000")]);
        let mut points = page["metrics"].as_array().unwrap().clone();
        points.sort_by_key(|point| point["step"].as_u64());
        Value::from(points)
    };
    let points = history("train/loss");
    assert_eq!(steps_of(&points, |point| &point["step"]), all, "no step is there twice");
    assert!(points.as_array().unwrap().iter().map(|point| point["value"].as_f64().unwrap()).eq(losses));
    assert_eq!(steps_of(&history("validation/macro_f1"), |point| &point["step"]), evaluated);
    assert_eq!(history("test/macro_f1")[0]["value"], test["test_macro_f1"]);
}

/// A server that answers the first requests with 500, and the others as MLflow does; what it was told.
fn recovering(failures: usize) -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    std::thread::spawn(move || {
        let mut failures = failures;
        for stream in listener.incoming().map_while(Result::ok) {
            answer(stream, &mut failures, &heard);
        }
    });
    (uri, told)
}

fn answer(mut stream: TcpStream, failures: &mut usize, told: &Mutex<Vec<Value>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut length) = (String::new(), 0);
    reader.read_line(&mut head).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let method = head.split([' ', '?']).nth(1).unwrap().trim_start_matches("/api/2.0/mlflow/").to_owned();
    let (status, reply) = match method.as_str() {
        _ if *failures > 0 => (500, json!({ "message": "the database is locked" })),
        "experiments/get-by-name" => (404, json!({ "error_code": "RESOURCE_DOES_NOT_EXIST" })),
        "experiments/create" => (200, json!({ "experiment_id": "1" })),
        "runs/create" => (200, json!({ "run": { "info": { "run_id": "r" } } })),
        _ => (200, json!({})),
    };
    *failures = failures.saturating_sub(1);
    if status == 200 {
        told.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
    }
    let reply = reply.to_string();
    let _ = write!(
        stream,
        "HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{reply}",
        reply.len()
    );
}

/// Trains with an MLflow server; what was said, and the weights' hash.
fn trained(uri: Option<&str>) -> (tempfile::TempDir, PathBuf, String, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    let mut command = quiet(train(&file));
    command.args(uri.map(|uri| format!("--set=track.mlflow.uri={uri}")));
    let started = Instant::now();
    let stderr = finished(command.output().unwrap());
    (folder, file, stderr, started.elapsed())
}

#[test]
fn a_server_that_fails_costs_a_training_nothing() {
    let (_folder, alone, _, _) = trained(None);
    let closed = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let hangs = format!("http://{}", hanging.local_addr().unwrap());
    for (uri, why) in [(closed, "Connection refused"), (hangs, "has not answered for 10 s")] {
        let (_folder, file, stderr, took) = trained(Some(&uri));
        assert_eq!(weights(&file), weights(&alone));
        let warnings: Vec<_> = stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
        assert!(warnings.last().unwrap().contains(why), "{stderr}");
        assert!(warnings.last().unwrap().contains("metrics.jsonl"), "{stderr}");
        assert!(
            warnings.len() <= 2 && warnings.iter().all(|line| line.contains(&uri)),
            "once, and at the end: {stderr}"
        );
        // A request waits for 10 s; no step does.
        let times: Vec<f64> = events(&file, "step").iter().map(|step| step["time"].as_f64().unwrap()).collect();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        assert!(longest < 5.0, "{uri}: a step took {longest} s");
        assert!(took < Duration::from_secs(60), "{uri}: {took:?}");
    }
    drop(hanging);
}

#[test]
fn a_server_that_recovers_hears_all() {
    let (uri, told) = recovering(2);
    let (_folder, file, stderr, _) = trained(Some(&uri));
    assert_eq!(stderr.matches("status 500: the database is locked").count(), 1, "said once: {stderr}");
    assert!(stderr.contains(&format!("MLflow at {uri} has killed/1/tiny again")), "{stderr}");
    let told = told.lock().unwrap();
    let metrics = told.iter().filter_map(|body| body["metrics"].as_array()).flatten();
    let losses: Vec<_> = metrics.filter(|metric| metric["key"] == "train/loss").collect();
    let expected: Vec<Value> = events(&file, "step");
    assert_eq!(losses.len(), expected.len());
    for (metric, step) in losses.iter().zip(&expected) {
        assert_eq!((&metric["step"], &metric["value"]), (&step["step"], &step["train_loss"]));
    }
    assert_eq!(told.last().unwrap()["status"], "FINISHED");
}

#[test]
fn what_is_not_said_is_the_users_to_say() {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    let refused = |set: &str, variables: &[(&str, &str)]| {
        let output = quiet(train(&file)).args(["--set", set]).envs(variables.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("track.mlflow={}", &[]).contains("set track.mlflow.uri or MLFLOW_TRACKING_URI"));
    let with_password = [("MLFLOW_TRACKING_URI", "http://ada:secret@host")];
    let error = refused("track.mlflow={}", &with_password);
    assert!(error.contains("MLFLOW_TRACKING_USERNAME") && !error.contains("secret"), "{error}");
    assert!(refused("track.wandb={}", &[]).contains("WANDB_MODE=offline"));
    assert!(refused("track.wandb={}", &[("WANDB_MODE", "of")]).contains("needs online, offline or disabled"));
    assert!(!file.with_file_name("runs").join("killed/runs").exists(), "no run is made");
}

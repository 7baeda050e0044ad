//! The command line as its users and their scripts see it: stdout, stderr, exit codes, colours, completions,
//! manual pages and profiles, by the real binary.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use serde_json::Value;

use crate::resume::{logged_step, wait};
use crate::support::{kiln, skipped};

/// Two models of few steps, trained, exported, tested and compared, with a profile, as JSON.
struct Run {
    folder: tempfile::TempDir,
    output: Output,
}

const EXPERIMENT: &str = r#"
name = "said"
[data]
source = "sample"
max_length = 48
[[model]]
name = "small"
architecture = "bert"
config = { hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 64 }
tokenizer = { vocab_size = 1000 }
[[model]]
name = "other"
architecture = "distilbert"
config = { dim = 32, n_layers = 1, n_heads = 2, hidden_dim = 64 }
tokenizer = { vocab_size = 1000 }
[train]
max_steps = 24
batch_size = 16
eval_steps = 12
learning_rate = 2e-3
"#;

static RUN: LazyLock<Run> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("said.toml"), EXPERIMENT).unwrap();
    let output = call(folder.path(), &["train", "said.toml", "--json", "--profile=3..9"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    Run { folder, output }
});

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = kiln();
    command.args(arguments).args(["--root", "runs"]).current_dir(folder);
    command
}

fn call(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn train_prints_a_line_of_json_for_each_event() {
    let lines: Vec<Value> = text(&RUN.output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let events: Vec<String> =
        lines.iter().map(|line| format!("{} {}", line["event"], line["model"]).replace('"', "")).collect();
    let expected = "evaluation small, evaluation small, evaluation other, evaluation other, export small, export other, \
                    test small, test other, comparison null";
    assert_eq!(events.join(", "), expected);
    assert_eq!((&lines[1]["step"], &lines[4]["argmax_flips"]), (&24.into(), &0.into()));
    assert!(lines[6]["macro_f1"].is_f64() && lines[8]["pairs"].is_array(), "{}", lines[8]);
}

#[test]
fn every_other_command_prints_one_value_and_exits_with_a_stable_code() {
    let folder = RUN.folder.path();
    fs::write(folder.join("rows.jsonl"), "{\"text\": \"an audit report\"}\n").unwrap();
    fs::write(folder.join("broken.toml"), "name = 'broken'\n").unwrap();
    fs::write(folder.join("empty.json"), "{}").unwrap();
    // What the command prints has this key; its exit code.
    let table: [(&[&str], Option<&str>, i32); 18] = [
        (&["prepare", "said.toml"], Some("snapshot"), 0),
        (&["train", "said.toml", "--new", "--stop-after", "prepare"], Some("event"), 0),
        (&["check", "said.toml"], Some("memory"), 0),
        (&["models"], Some("model_type"), 0),
        (&["sample", "--output", "some.jsonl", "--count", "12"], Some("documents"), 0),
        (&["export", "said/1", "--model", "small"], Some("argmax_flips"), 0),
        (&["infer", "said/1"], Some("small"), 0),
        (
            &["infer", "said/1", "--model", "small", "--input", "rows.jsonl", "--output", "p.parquet"],
            Some("examples_per_second"),
            0,
        ),
        (&["compare", "said/1"], Some("pairs"), 0),
        (&["repro", "said/1"], Some("identical"), 0),
        (&["bench", "said.toml", "--world-sizes", "1", "--steps", "2", "--warmup", "1"], Some("worlds"), 0),
        (&["man", "--output", "man"], Some("man/kiln.1"), 0),
        // The user's mistakes: the file's, the command line's, clap's.
        (&["check", "broken.toml"], None, 2),
        (&["infer", "said/9"], None, 2),
        (&["train", "--nonsense"], None, 2),
        (&["completions", "bash"], None, 2),
        (&["man"], None, 2),
        // Not the user's.
        (&["bench", "--from", "empty.json"], None, 1),
    ];
    for (arguments, key, code) in table {
        let output = command(folder, arguments).args(["--json", "-q"]).output().unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        match key {
            Some(key) => {
                let value: Value =
                    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{arguments:?} {error}: {stdout}"));
                let has = match &value {
                    Value::Array(items) => items.iter().any(|item| item == key || item.get(key).is_some()),
                    value => value.get(key).is_some(),
                };
                assert!(has, "{arguments:?} has no {key}: {stdout}");
                assert_eq!(stderr, "", "{arguments:?} -q");
            }
            None => {
                assert_eq!(stdout, "", "{arguments:?}");
                assert!(stderr.contains("error: "), "{arguments:?}: {stderr}");
            }
        }
    }
    // What cannot be written is the machine's fault.
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = command(folder, &["models"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
}

#[test]
fn a_signal_ends_a_training_with_its_own_code() {
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143)] {
        let folder = tempfile::tempdir().unwrap();
        let file = crate::resume::experiment(folder.path());
        let mut child = crate::resume::train(&file);
        let child =
            child.args(["--json", "--set", "train.max_steps=100000"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        let started = std::time::Instant::now();
        while logged_step(&file) == 0 {
            assert!(started.elapsed() < std::time::Duration::from_secs(60), "no step was made");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        let output = wait(child);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        for line in text(&output.stdout).lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["event"], "evaluation");
        }
    }
}

#[test]
fn what_is_no_terminal_gets_no_escape_codes() {
    let folder = RUN.folder.path();
    let others: [&[&str]; 4] =
        [&["--help"], &["train", "--help"], &["check", "broken"], &["bench", "--from", "nothing"]];
    let others = others.map(|arguments| kiln().args(arguments).current_dir(folder).output().unwrap());
    for output in others.iter().chain([&RUN.output]) {
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b), "{}", text(&output.stderr));
    }
}

/// What `kiln …` writes to a terminal.
fn in_a_terminal(folder: &Path, arguments: &str, no_color: bool) -> Option<String> {
    if Command::new("script").arg("--version").output().is_err() {
        skipped("script of util-linux, which makes a terminal, is not there");
        return None;
    }
    let mut command = Command::new("script");
    command
        .args(["-qec", &format!("stty cols 80 rows 24; {} {arguments}", env!("CARGO_BIN_EXE_kiln")), "/dev/null"])
        .current_dir(folder);
    command.env("TERM", "xterm-256color").env_remove("NO_COLOR").stdin(Stdio::null());
    if no_color {
        command.env("NO_COLOR", "1");
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stdout));
    Some(text(&output.stdout))
}

/// Codes that choose a colour or a weight.
fn colours(said: &str) -> usize {
    let codes = said.split("\x1b[").skip(1);
    codes.filter(|code| code.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m')).count()
}

/// Whether a code chooses a colour; those that take one back do not.
fn colour_is_chosen(said: &str) -> bool {
    let codes = said.split("\x1b[").skip(1).filter_map(|code| code.split_once('m'));
    let mut numbers = codes.flat_map(|(code, _)| code.split(';')).filter_map(|number| number.parse::<u8>().ok());
    numbers.any(|number| matches!(number, 30..=38 | 40..=48 | 90..=97 | 100..=107))
}

#[test]
fn no_color_is_honoured_in_a_terminal() {
    let folder = RUN.folder.path();
    let Some(coloured) = in_a_terminal(folder, "--help", false) else { return };
    assert!(colours(&coloured) > 0, "the control has no colour: {coloured:?}");
    let training = "train said.toml --new --root elsewhere --stop-after train";
    for arguments in ["--help", "models", training] {
        let said = in_a_terminal(folder, arguments, true).unwrap();
        assert!(!said.is_empty() && colours(&said) == 0, "{arguments}: {said:?}");
    }
}

#[test]
fn a_dashboard_gives_the_terminal_back() {
    let folder = RUN.folder.path();
    let arguments = "train said.toml --new --root shown --stop-after train --tui";
    let Some(said) = in_a_terminal(folder, arguments, true) else { return };
    let after = |code: &str, undone: &str| {
        let (last, back) = (said.rfind(code).unwrap_or_else(|| panic!("no {code:?}")), said.rfind(undone));
        assert!(back.is_some_and(|back| back > last), "{undone:?} does not come after {code:?}");
    };
    after("\x1b[?1049h", "\x1b[?1049l"); // the alternate screen
    after("\x1b[?25l", "\x1b[?25h"); // the cursor
    // Evaluations lie on the screen beneath.
    let beneath: String =
        said.split("\x1b[?1049l").skip(1).map(|part| part.split("\x1b[?1049h").next().unwrap()).collect();
    assert_eq!(beneath.matches("epoch=").count(), 4, "{beneath:?}");
    assert!(said.contains("tokens/s"), "{said:?}");
    assert!(!colour_is_chosen(&said), "{said:?}");

    // Without a terminal there are lines, and that is said once.
    let output = call(folder, &["train", "said.toml", "--new", "--tui", "--stop-after", "train"]);
    let stderr = text(&output.stderr);
    assert!(output.status.success() && stderr.matches("--tui needs a terminal").count() == 1, "{stderr}");
}

#[test]
fn q_ends_a_training_as_ctrl_c_does() {
    for key in ["q", "\x03"] {
        let folder = tempfile::tempdir().unwrap();
        let file = crate::resume::experiment(folder.path());
        let kiln = env!("CARGO_BIN_EXE_kiln");
        let line = format!(
            "stty cols 80 rows 24; {kiln} train {} --offline --tui --set train.max_steps=100000",
            file.display()
        );
        let mut script = Command::new("script");
        script.args(["-qefc", &line, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut child) = script.spawn() else {
            skipped("script of util-linux, which makes a terminal, is not there");
            return;
        };
        let mut said = child.stdout.take().unwrap();
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut said, &mut all).unwrap();
            all
        });
        let started = std::time::Instant::now();
        while logged_step(&file) == 0 {
            assert!(started.elapsed() < std::time::Duration::from_secs(60), "no step was made");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let keys = child.stdin.as_mut().unwrap();
        std::io::Write::write_all(keys, key.as_bytes()).unwrap();
        let code = child.wait().unwrap().code();
        let said = String::from_utf8_lossy(&read.join().unwrap()).into_owned();
        assert_eq!(code, Some(130), "{key:?}: {said}");
        assert!(said.contains("SIGINT: checkpoint of step"), "{key:?}: {said}");
        assert!(said.rfind("\x1b[?1049l") > said.rfind("\x1b[?1049h") && said.contains("\x1b[?1049h"), "{key:?}");
    }
}

#[test]
fn shells_read_their_completions() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = kiln().args(["completions", shell]).output().unwrap();
        let script = text(&output.stdout);
        assert!(
            output.status.success() && script.contains("stop-after") && script.contains("kiln"),
            "{shell}: {script}"
        );
        let file = folder.path().join(shell);
        fs::write(&file, script).unwrap();
        let (program, options): (_, &[&str]) = match shell {
            "bash" => ("bash", &["-n"]),
            "zsh" => ("zsh", &["-n"]),
            "fish" => ("fish", &["--no-execute"]),
            _ => continue, // these have no such option
        };
        match Command::new(program).args(options).arg(&file).output() {
            Ok(read) => assert!(read.status.success(), "{shell}: {}", text(&read.stderr)),
            Err(_) => skipped(&format!("{shell} is not there to read its completions")),
        }
    }
    let complete = "source ./bash; COMP_WORDS=(kiln tr); COMP_CWORD=1; _kiln kiln tr kiln; echo ${COMPREPLY[@]}";
    let output = Command::new("bash").args(["-c", complete]).current_dir(folder.path()).output().unwrap();
    assert_eq!(text(&output.stdout), "train\n", "{}", text(&output.stderr));
}

#[test]
fn manual_pages_render() {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln().args(["man", "--output"]).arg(folder.path()).output().unwrap();
    let pages: Vec<PathBuf> = text(&output.stdout).lines().map(PathBuf::from).collect();
    assert!(pages.contains(&folder.path().join("kiln.1")) && pages.contains(&folder.path().join("kiln-train.1")));
    let top = kiln().arg("man").output().unwrap();
    assert_eq!(text(&top.stdout).trim_end(), fs::read_to_string(folder.path().join("kiln.1")).unwrap().trim_end());
    for page in &pages {
        let Ok(rendered) = Command::new("groff").args(["-Kutf8", "-man", "-Tutf8", "-ww"]).arg(page).output() else {
            skipped("groff is not there to render manual pages");
            return;
        };
        assert!(rendered.status.success() && rendered.stderr.is_empty(), "{page:?}: {}", text(&rendered.stderr));
        let name = page.file_stem().unwrap().to_str().unwrap();
        assert!(text(&rendered.stdout).contains(name), "{name}: {}", text(&rendered.stdout));
    }
}

#[test]
fn a_profile_nests_and_names_the_models_ops() {
    for (model, of) in [("small", "bert.encoder.layer.0"), ("other", "distilbert.transformer.layer.0")] {
        let file = RUN.folder.path().join("runs/said/runs/1").join(model).join("trace.json");
        let trace: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let threads: BTreeSet<&str> = events
            .iter()
            .filter(|event| event["name"] == "thread_name")
            .map(|event| event["args"]["name"].as_str().unwrap())
            .collect();
        assert!(threads.contains("main"), "{threads:?}");

        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").map(span).collect();
        let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
        assert_eq!((named("step").len(), named("evaluation").len(), named("optimizer").len()), (6, 2, 6));
        assert!(named("checkpoint").len() >= 2);
        for name in
            ["batch", "forward", "backward", "cross_entropy", "gradient_norm", "Embed", "Attend", "Norm", "Gelu"]
        {
            assert!(!named(name).is_empty(), "{name} is not there");
        }
        let kinds: BTreeSet<&str> =
            named("Linear").iter().filter(|span| span.of.starts_with(of)).map(|span| span.kind).collect();
        assert_eq!(kinds, BTreeSet::from(["backward", "forward"]));

        // On one thread, two are apart or one is within the other; and what is in a step takes no longer than it.
        let mut open: Vec<&Span> = Vec::new();
        for span in spans.iter().filter(|span| span.thread == named("step")[0].thread) {
            assert!(span.ts >= 0.0 && span.dur >= 0.0);
            while open.last().is_some_and(|last| last.ts + last.dur <= span.ts + 1e-3) {
                open.pop();
            }
            if let Some(around) = open.last() {
                assert!(span.ts + span.dur <= around.ts + around.dur + 1e-3, "{} overlaps {}", span.name, around.name);
            }
            open.push(span);
        }
        let share = named("step").into_iter().map(|step| {
            let within = |span: &&Span| span.ts >= step.ts && span.ts + span.dur <= step.ts + step.dur + 1e-3;
            let waits = ["wait for all_reduce", "wait for all ranks' losses"];
            let parts = ["sample", "batch", "forward", "backward", "gradient_norm", "optimizer"];
            let is_part = |span: &&Span| parts.contains(&span.name) || waits.contains(&span.name);
            let sum: f64 = spans.iter().filter(within).filter(is_part).map(|span| span.dur).sum();
            assert!(sum <= step.dur + 1e-3, "{sum} of {}", step.dur);
            sum / step.dur
        });
        // A busy machine may put any one step aside between two spans.
        assert!(share.clone().reduce(f64::max) > Some(0.5), "{:?}", share.collect::<Vec<_>>());
    }
}

struct Span<'a> {
    name: &'a str,
    kind: &'a str,
    of: &'a str,
    thread: u64,
    ts: f64,
    dur: f64,
}

fn span(event: &Value) -> Span<'_> {
    assert_eq!(event["pid"], 0);
    Span {
        name: event["name"].as_str().unwrap(),
        kind: event["cat"].as_str().unwrap(),
        of: event["args"]["of"].as_str().unwrap_or_default(),
        thread: event["tid"].as_u64().unwrap(),
        ts: event["ts"].as_f64().unwrap(),
        dur: event["dur"].as_f64().unwrap(),
    }
}

#[test]
fn a_profile_sees_the_ranks_sum() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("said.toml"), EXPERIMENT).unwrap();
    let arguments = ["train", "said.toml", "--profile=2..4", "--stop-after", "train", "--nproc-per-node", "2"];
    let output = call(folder.path(), &[&arguments[..], &["--set", "train.max_steps=6", "-q"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let file = folder.path().join("runs/said/runs/1/small/trace.json");
    let trace: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let thread = events.iter().find(|event| event["args"]["name"] == "communicator").expect("the thread is named");
    let sums: Vec<_> = events.iter().filter(|event| event["name"] == "all_reduce").collect();
    assert!(!sums.is_empty() && sums.iter().all(|sum| sum["tid"] == thread["tid"] && sum["cat"] == "communication"));
    let waits = events.iter().filter(|event| event["name"] == "wait for all_reduce").count();
    assert_eq!(waits, 2, "one for each step");
}

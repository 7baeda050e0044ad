//! A run's page and the list of runs, by the real binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::LazyLock;

use serde_json::{Value, json};

use crate::support::kiln;

/// Labels and ids that a page must not take for markup, and a text of each kind.
const HOSTILE: &str = "</td><script>alert(\"1\")</script>";

/// A short run of two models on rows that are hostile to a page, in pairs, and its root.
struct Run {
    folder: tempfile::TempDir,
    stderr: String,
}

static RUN: LazyLock<Run> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let labels = [HOSTILE, "שלום \u{202e}עולם", "a & b"];
    let rows: String = (0..240)
        .map(|i| {
            let text = match i % 4 {
                0 => format!("<img src=x onerror=alert({i})> 'quoted' \"{i}\""),
                1 => format!("\u{202e}row {i}\u{0000}\u{001b}[2J\u{0085}<!-- -->"),
                2 => format!("{}{i}", "é🙂 ".repeat(20_000)),
                _ => format!("]]>&lt;b&gt; row {i}"),
            };
            let row = json!({
                "name": format!("<i>{i}</i>"), "text": text, "other": format!("</p><style>{i}"),
                "label": labels[i * 7 % 5 % 3]
            });
            format!("{row}\n")
        })
        .collect();
    fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let model = |name: &str, size: usize| {
        format!(
            "[[model]]\nname = \"{name}\"\narchitecture = \"bert\"\ntokenizer = {{ vocab_size = 300 }}\nconfig = \
             {{ hidden_size = {size}, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 32 }}\n"
        )
    };
    let experiment = format!(
        "name = \"hostile\"\n[data]\nsource = \"rows.jsonl\"\nid = \"name\"\ntext_pair = \"other\"\nmax_length = 32\n\
         {}{}[train]\nmax_steps = 12\neval_steps = 6\nbatch_size = 8\n",
        model("small", 16),
        model("wider", 32)
    );
    fs::write(folder.path().join("hostile.toml"), experiment).unwrap();
    let mut train = kiln();
    train.arg("train").arg(folder.path().join("hostile.toml")).arg("--root").arg(folder.path().join("runs"));
    let output = train.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    Run { folder, stderr }
});

fn root() -> PathBuf {
    RUN.folder.path().join("runs")
}

fn call(root: &Path, arguments: &[&str]) -> Output {
    kiln().args(arguments).arg("--root").arg(root).output().unwrap()
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json_of(output: &Output) -> Value {
    serde_json::from_str(&succeeded(output)).unwrap()
}

/// A root with a copy of the run, to add to it or to spoil it.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp").arg("-r").arg(root().join("hostile")).arg(folder.path()).status();
    assert!(copied.unwrap().success());
    folder
}

/// The start tags of a page, after holding against HTML's grammar what kiln writes of it: each element is
/// closed where it should be, attributes are quoted, `&` begins a reference, and no character is a control.
fn tags(page: &str) -> Vec<String> {
    const VOID: [&str; 1] = ["meta"];
    let rest = page.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    let (mut rest, mut open, mut tags) = (rest, Vec::<String>::new(), Vec::new());
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        if !matches!(open.last().map(String::as_str), Some("style" | "script")) {
            for (i, _) in text.match_indices('&') {
                assert!(["&lt;", "&gt;", "&amp;", "&quot;"].iter().any(|r| text[i..].starts_with(r)), "{}", &text[i..]);
            }
        }
        if let Some(raw @ ("style" | "script")) = open.last().map(String::as_str) {
            let end = rest.find(&format!("</{raw}>")).expect("raw text ends");
            rest = &rest[end + raw.len() + 3..];
            open.pop();
            continue;
        }
        // A quoted attribute may hold ">".
        let mut quoted = false;
        let end = rest[at..].find(|c| {
            quoted ^= c == '"';
            c == '>' && !quoted
        });
        let tag = &rest[at + 1..at + end.expect("a tag ends")];
        rest = &rest[at + tag.len() + 2..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "</{name}> closes another element; open: {open:?}");
            continue;
        }
        let name: String = tag.chars().take_while(char::is_ascii_alphanumeric).collect();
        assert!(!name.is_empty(), "<{tag}> is no tag");
        let outside: Vec<&str> = tag.split('"').step_by(2).collect();
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        let unquoted = outside.iter().any(|part| part.contains('=') && !part.ends_with('='));
        assert!(!unquoted && !tag.contains('<'), "<{tag}>");
        if !VOID.contains(&name.as_str()) {
            open.push(name);
        }
        tags.push(tag.to_owned());
    }
    assert_eq!(open, Vec::<String>::new(), "unclosed");
    assert!(!page.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "a control character");
    tags
}

#[test]
fn a_training_leaves_a_page_of_all_there_is() {
    let run = root().join("hostile/runs/1");
    assert!(RUN.stderr.contains(&format!("report: {}", run.join("report.html").display())), "{}", RUN.stderr);
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    let tags = tags(&page);
    for heading in [
        "<h1>hostile/1</h1>",
        "<h2>Comparison</h2>",
        "<h3>Disagreements</h3>",
        "<h2><bdi>small</bdi></h2>",
        "<h2><bdi>wider</bdi></h2>",
        "<h3>Curves</h3>",
        "<h3>Confusion</h3>",
        "<h3>Labels</h3>",
        "<h3>Calibration</h3>",
        "<h3>Hardest mistakes</h3>",
        "<h3>Certificate</h3>",
        "<h2>Data</h2>",
        "<h3>Tokens</h3>",
        "<h2>Configuration</h2>",
        "badge good\">finished<",
    ] {
        assert!(page.contains(heading), "{heading}");
    }
    assert!(!page.contains("class=\"absent\""), "all is there");
    for label in ["&lt;/td&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;", "שלום", "a &amp; b"] {
        assert!(page.matches(label).count() > 8, "{label}");
    }
    for escaped in ["&lt;i&gt;", "&lt;/p&gt;&lt;style&gt;"] {
        assert!(page.contains(escaped), "{escaped}");
    }
    let named = |name: &str| tags.iter().filter(|tag| tag.split(' ').next() == Some(name)).count();
    assert_eq!((named("script"), named("style"), named("img"), named("i"), named("link")), (1, 1, 0, 0, 0));
    assert!(named("svg") >= 9 && named("table") >= 8);

    // Nothing is loaded: there is no attribute that could, but links within.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:";
    assert!(page.contains(policy));
    for tag in &tags {
        assert!(!tag.contains(" src=") && !tag.contains("http:") && !tag.contains("https:"), "<{tag}>");
        assert!(!tag.starts_with("a ") || tag.contains("href=\"#"), "<{tag}>");
    }
    assert!(page.len() < 300_000, "{} bytes: long texts are cut", page.len());
}

#[test]
fn a_page_is_made_again_from_what_there_is() {
    let copied = copy();
    let run = copied.path().join("hostile/runs/1");
    let first = fs::read(run.join("report.html")).unwrap();
    fs::remove_file(run.join("report.html")).unwrap();
    let path = run.join("report.html").display().to_string();
    assert_eq!(succeeded(&call(copied.path(), &["report"])).trim_end(), path);
    assert_eq!(fs::read(run.join("report.html")).unwrap(), first, "the same files make the same page");
    assert_eq!(json_of(&call(copied.path(), &["report", "hostile/1", "--json"])), json!({ "report": path }));

    let elsewhere = copied.path().join("pages/one.html");
    succeeded(&call(copied.path(), &["report", "hostile/1", "--output", elsewhere.to_str().unwrap()]));
    assert_eq!(fs::read(&elsewhere).unwrap(), first);

    // Without the test and the data, as where only the models were brought along.
    fs::remove_dir_all(run.join("small/test")).unwrap();
    fs::remove_dir_all(copied.path().join("hostile/data")).unwrap();
    fs::remove_file(run.join("comparison.json")).unwrap();
    succeeded(&call(copied.path(), &["report", "hostile/1"]));
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    tags(&page);
    for said in [
        "test/statistics.json is not there: the model is not tested.",
        "comparison.json is not there: ",
        "is no prepared snapshot",
        "texts are left out",
    ] {
        assert!(page.contains(said), "{said}");
    }

    let missing = call(copied.path(), &["report", "hostile/9"]);
    assert_eq!(missing.status.code(), Some(2));
}

#[test]
fn runs_are_listed_newest_first_with_what_is_broken() {
    let copied = copy();
    let runs = copied.path().join("hostile/runs");
    let output = call(copied.path(), &["compare", "hostile/1", "--model", "small", "--model", "wider"]);
    succeeded(&output);
    // Of one run's models there is a comparison in its folder; of two runs', a run with a page of its own.
    let copied_run = std::process::Command::new("cp").arg("-r").arg(runs.join("1")).arg(runs.join("2")).status();
    assert!(copied_run.unwrap().success());
    let record = fs::read_to_string(runs.join("2/run.json")).unwrap();
    fs::write(runs.join("2/run.json"), record.replace("\"run_num\": 1", "\"run_num\": 2")).unwrap();
    succeeded(&call(copied.path(), &["compare", "hostile/1", "hostile/2"]));
    let page = fs::read_to_string(runs.join("3/report.html")).unwrap();
    let links: Vec<String> = tags(&page).into_iter().filter(|tag| tag.starts_with("a ")).collect();
    for link in ["a href=\"../../../hostile/runs/1/report.html\"", "a href=\"../../../hostile/runs/2/report.html\""] {
        assert!(links.iter().any(|tag| tag == link), "{link} is not in {links:?}");
    }

    fs::create_dir_all(runs.join("4")).unwrap();
    fs::create_dir_all(runs.join("5")).unwrap();
    fs::write(runs.join("5/run.json"), "{").unwrap();
    let listed = json_of(&call(copied.path(), &["runs", "--json"]));
    let of = |i: usize, key: &str| listed[i][key].clone();
    let names: Vec<Value> = (0..5).map(|i| of(i, "run")).collect();
    assert_eq!(names, ["hostile/3", "hostile/2", "hostile/1", "hostile/5", "hostile/4"]);
    assert_eq!((of(0, "job_type"), of(0, "problem")), (json!("comparison"), Value::Null));
    assert!(of(3, "problem").as_str().unwrap().contains("5/run.json does not hold what it should"));
    assert!(of(4, "problem").as_str().unwrap().contains("cannot read") && of(4, "status") == Value::Null);
    let statistics: Value =
        serde_json::from_slice(&fs::read(runs.join("1/wider/test/statistics.json")).unwrap()).unwrap();
    let comparison: Value = serde_json::from_slice(&fs::read(runs.join("1/comparison.json")).unwrap()).unwrap();
    let best = &listed[2]["best"];
    assert_eq!(best["model"], comparison["best"]);
    assert_eq!(best["validation"], comparison["models"][comparison["best"].as_str().unwrap()]["validation"]);
    if best["model"] == "wider" {
        assert_eq!(best["test"]["macro_f1"], statistics["macro_f1"]);
    }

    let text = succeeded(&call(copied.path(), &["runs", "hostile"]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 6, "{text}");
    assert!(
        lines[0].starts_with("run        type        status    started") && lines[5].contains("broken: cannot read")
    );
    let place = copied.path().to_str().unwrap();
    let elsewhere = kiln().args(["runs", place]).output().unwrap();
    assert_eq!(succeeded(&elsewhere), text, "a folder is another root");
    let nowhere = call(&copied.path().join("nowhere"), &["runs"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nowhere.stderr).starts_with("error: no run under"));
    let unknown = call(copied.path(), &["runs", "nothing"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there are hostile"));
}

#[test]
fn a_page_that_cannot_be_written_costs_no_training() {
    let copied = copy();
    let run = copied.path().join("hostile/runs/1");
    // A folder stands where the page should.
    fs::remove_file(run.join("report.html")).unwrap();
    fs::create_dir_all(run.join("report.html/in-the-way")).unwrap();
    let output = call(copied.path(), &["compare", "hostile/1"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("warning: ") && stderr.contains("kiln report"), "{stderr}");
    assert_eq!(call(copied.path(), &["report", "hostile/1"]).status.code(), Some(1));
}

use serde_json::{Value, json};

use super::*;
use crate::metrics::statistics;
use crate::store::{Experiment, write_bytes, write_json};

/// A run of one model that has nothing but its run.json and what `fill` adds.
fn page(fill: impl FnOnce(&RunDir)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let run = Experiment::new(dir.path(), "x").run(1);
    let record = json!({
        "job_type": "training", "experiment": "x", "run_num": 1, "models": ["m"], "snapshot": "s",
        "status": "interrupted", "start": 1_764_000_000
    });
    write_json(&run.dir().join("run.json"), &record).unwrap();
    fill(&run);
    write_report(&run, &run.report_html()).unwrap();
    let page = fs::read_to_string(run.report_html()).unwrap();
    write_report(&run, &run.report_html()).unwrap();
    assert_eq!(fs::read_to_string(run.report_html()).unwrap(), page, "the same files make the same bytes");
    page
}

#[test]
fn what_is_missing_is_said_and_no_error() {
    let page = page(|_| ());
    for said in [
        "metrics.jsonl is not there: ",
        "test/statistics.json is not there: the model is not tested.",
        "<h3>Validation</h3><p class=\"absent\">statistics.json is not there: ",
        "export.json is not there: ",
        "is no prepared snapshot",
        "experiment.toml is not there: ",
        "lock.json is not there: ",
        "2025-11-24 16:00 UTC",
        "<span class=\"badge plain\">interrupted</span>",
    ] {
        assert!(page.contains(said), "{said} is not in {page}");
    }
    assert!(!page.contains("<svg") && !page.contains("id=\"comparison\""), "one model is compared with nothing");
}

#[test]
fn what_is_broken_is_said_where_it_would_stand() {
    let page = page(|run| {
        let files = run.model("m");
        write_bytes(&files.metrics_jsonl(), b"{}\n").unwrap();
        write_bytes(&files.test().join("predictions.parquet"), b"PAR1").unwrap();
        write_bytes(&files.export_json(), b"{}").unwrap();
        let labels = ["no", "yes"].map(String::from);
        write_json(&files.test().join("statistics.json"), &statistics(&labels, &[0, 1], &[0, 0], None)).unwrap();
    });
    for said in [
        "metrics.jsonl is broken: ",
        "test/predictions.parquet is broken: ",
        "export.json is broken: ",
        "statistics.json has no probabilities to judge.",
        "2 labels on the test part.",
    ] {
        assert!(page.contains(said), "{said} is not in {page}");
    }
}

#[test]
fn nothing_but_the_page_itself_may_load_or_run() {
    let page = page(|run| {
        let toml = "# </pre></script><script src=http://evil.example/x.js></script>\0\x1b[31m\u{85}\r\nname = \"x\"\n";
        write_bytes(&run.experiment_toml(), toml.as_bytes()).unwrap();
    });
    assert!(page.contains("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "));
    assert_eq!((page.matches("<script").count(), page.matches("</script>").count()), (1, 1), "ours alone");
    assert!(page.contains("&lt;/script&gt;&lt;script src=http://evil.example/x.js&gt;"), "{page}");
    assert!(page.contains("␀␛[31m\u{fffd}\nname"), "control characters are seen: {page}");
    assert!(!page.contains(|c: char| c.is_control() && !"\n\t".contains(c)));
    assert!(page.contains("<html lang=\"en\">"));
}

/// The script's own strings must not end it, nor the style's.
#[test]
fn style_and_script_stay_in_their_elements() {
    assert!(!STYLE.contains("</") && !SCRIPT.contains("</") && !SCRIPT.contains("<!--"));
    assert!(!format!("{STYLE}{SCRIPT}").contains("http"));
}

#[test]
fn many_labels_and_rows_stay_below_a_megabyte() {
    let labels: Vec<String> = (0..52).map(|i| format!("label-{i:02}")).collect();
    let truth: Vec<u32> = (0..2500).map(|i| i % 52).collect();
    let predicted: Vec<u32> = (0..2500).map(|i| (i * i + i / 52) % 52).collect();
    let page = page(|run| {
        let files = run.model("m");
        write_json(&files.test().join("statistics.json"), &statistics(&labels, &truth, &predicted, None)).unwrap();
        let step = |n: u64| {
            json!({
                "event": "step", "step": n, "epoch": 0.1, "train_loss": 1.0 / n as f64, "learning_rate": 1e-5,
                "grad_norm": Value::Null, "tokens_per_second": 1.0
            })
        };
        let events: String = (1..20_000).map(|n| format!("{}\n", step(n))).collect();
        write_bytes(&files.metrics_jsonl(), events.as_bytes()).unwrap();
    });
    let predictions =
        truth.iter().zip(&predicted).enumerate().map(|(i, (&truth, &predicted))| super::super::Predicted {
            id: i.to_string(),
            label: Some(labels[truth as usize].clone()),
            prediction: labels[predicted as usize].clone(),
            probabilities: vec![1.0 / 52.0; 52],
        });
    let predictions = Ok(predictions.collect());
    let rows = Ok((0..2500).map(|i| Row { id: i.to_string(), text: "word ".repeat(5000), ..Row::default() }).collect());
    let more = [confusion::section(&predictions), texts::mistakes(&predictions, &rows, Some(&labels))];
    let size = page.len() + more.iter().map(|markup| markup.0.len()).sum::<usize>();
    assert!(size < 1_000_000, "{size} bytes");
}

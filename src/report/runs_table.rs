use unicode_width::UnicodeWidthStr;

use super::comparison_table::{duration, name};
use super::{Summary, date, shorten};

/// The widest that the models of a run are printed, in columns.
const MODELS_COLUMNS: usize = 40;

/// Runs as text, a line each, in the order given. It has no last newline.
pub fn runs_table(runs: &[Summary]) -> String {
    let head = ["run", "type", "status", "started", "trained", "best model", "validation", "test F1", "accuracy"];
    let mut lines = vec![(head.map(String::from), String::from("models"))];
    lines.extend(runs.iter().map(|run| (cells(run), rest(run))));
    let widths: [usize; 9] =
        std::array::from_fn(|i| lines.iter().map(|(cells, _)| cells[i].width()).max().unwrap_or(0));
    let line = |(cells, rest): &(_, String)| {
        let cells: &[String; 9] = cells;
        let padded =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.width())));
        let line = format!("{}  {rest}", padded.collect::<Vec<_>>().join("  "));
        line.trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn cells(run: &Summary) -> [String; 9] {
    let best = run.best.as_ref();
    let test = best.and_then(|best| best.test);
    [
        Some(run.run.clone()),
        run.job_type.map(|job_type| job_type.name().into()),
        run.status.map(|status| status.name().into()),
        run.start.map(|start| date(start, "%Y-%m-%d %H:%M")),
        run.training_seconds.map(duration),
        best.map(|best| best.model.clone()),
        best.map(|best| format!("{} {:.4}", name(best.metric), best.validation)),
        test.map(|test| format!("{:.4}", test.macro_f1)),
        test.map(|test| format!("{:.4}", test.accuracy)),
    ]
    .map(|cell| cell.unwrap_or_else(|| "–".into()))
}

fn rest(run: &Summary) -> String {
    let problem = run.problem.as_ref().map(|problem| format!("broken: {problem}"));
    let models = (!run.models.is_empty()).then(|| shorten(&run.models.join(", "), MODELS_COLUMNS));
    [models, problem].into_iter().flatten().collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Metric;
    use crate::report::summary::{Best, Test};
    use crate::store::{JobType, Status};

    #[test]
    fn columns_stand_under_their_names() {
        let whole = Summary {
            run: "quickstart/12".into(),
            path: "x".into(),
            job_type: Some(JobType::Training),
            status: Some(Status::Finished),
            start: Some(1_764_000_000),
            training_seconds: Some(75.0),
            models: vec!["small".into(), "日本".into()],
            best: Some(Best {
                model: "日本".into(),
                metric: Metric::MacroF1,
                validation: 0.91234,
                test: Some(Test { macro_f1: 0.5, accuracy: 0.75 }),
            }),
            problem: None,
        };
        let broken = Summary {
            run: "x/1".into(),
            job_type: None,
            status: None,
            start: None,
            training_seconds: None,
            models: vec![],
            best: None,
            problem: Some("cannot read run.json".into()),
            ..whole.clone()
        };
        assert_eq!(
            format!("\n{}", runs_table(&[whole, broken])),
            "
run            type      status    started           trained  best model  validation       test F1  accuracy  models
quickstart/12  training  finished  2025-11-24 16:00  75.0s    日本        macro F1 0.9123  0.5000   0.7500    small, 日本
x/1            –         –         –                 –        –           –                –        –         broken: cannot read run.json"
        );
    }
}

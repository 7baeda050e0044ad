use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::{Predicted, read_predictions};
use crate::config::{Goal, Objective};
use crate::data::{Part, Row, Snapshot};
use crate::metrics::{self, CONFIDENCE, Paired, RESAMPLES, Statistics, mcnemar, paired_bootstrap};
use crate::store::{self, RunDir};
use crate::user_error;

/// What resamples are drawn by: the same rows give the same intervals.
const SEED: u64 = 42;

/// The content of a comparison.json: models that were tested on the same rows, side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The snapshot whose test part it is.
    pub snapshot: String,
    /// What `best` is chosen by: the objective of the first model's run.
    pub objective: Objective,
    /// The models by name.
    #[serde(with = "by_name")]
    pub models: Vec<(String, Compared)>,
    /// The model with the best `validation`, the first of equal ones. It is chosen on validation, never on
    /// test, so that its figures on test are those of a model that test had no part in choosing: another
    /// model may well have better ones.
    pub best: String,
    /// Every two models.
    pub pairs: Vec<Pair>,
    /// Resamples behind each interval.
    pub resamples: u32,
    /// The share of them inside.
    pub confidence: f64,
    /// What they were drawn by.
    pub seed: u64,
    /// The rows that not all models predict alike, in the test part's order.
    pub disagreements: Vec<Disagreement>,
}

/// One model of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Its run, as `experiment/run_num`.
    pub run: String,
    /// Its name there.
    pub model: String,
    /// The objective's figure on the validation part, at the best checkpoint.
    pub validation: f64,
    /// What test/statistics.json says, and how long the model was trained, where that is known.
    #[serde(flatten)]
    pub statistics: Statistics,
    /// The size of model.onnx, its tensors included.
    pub bytes: u64,
}

/// Two models of a comparison, on the test part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The first model.
    pub a: String,
    /// The second model.
    pub b: String,
    /// Macro F1 of `a` minus that of `b`.
    pub f1_difference: f64,
    /// Where that lies, had other rows been drawn: the 95 % percentile interval of paired bootstrap
    /// resamples.
    pub interval: [f64; 2],
    /// The two-sided p-value of McNemar's exact test: would two equally accurate models be right on rows
    /// that the other is wrong on as unevenly as these?
    pub mcnemar_p: f64,
    /// What of it is more than chance.
    pub verdict: Verdict,
    /// Rows that `a` alone has right.
    pub only_a_correct: u64,
    /// Rows that `b` alone has right.
    pub only_b_correct: u64,
    /// Rows that the two predict otherwise.
    pub disagreements: u64,
}

/// Which of two models is better on the test part, by macro F1: the one that the whole interval of the
/// difference speaks for, and neither where 0 is in the interval or an end of it. McNemar's test is of
/// accuracy and has no say in this. Of many pairs, some intervals miss 0 by chance: each is of its pair
/// alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The interval lies above 0.
    #[serde(rename = "a is better")]
    A,
    /// The interval lies below 0.
    #[serde(rename = "b is better")]
    B,
    /// The interval holds 0.
    #[serde(rename = "tie")]
    Tie,
}

/// A row that not all models predict alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disagreement {
    /// The row's id.
    pub id: String,
    /// Its text.
    pub text: String,
    /// Its second text, where rows are pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
    /// Its label.
    pub label: String,
    /// What each model says, by name.
    #[serde(with = "by_name")]
    pub predictions: Vec<(String, Said)>,
}

/// What one model says of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// The label it predicts.
    pub prediction: String,
    /// How probable it says that is, as its predictions.parquet has it.
    pub probability: f32,
}

/// A model that is to be compared.
#[derive(Clone, Debug)]
pub struct Contestant {
    /// Its name in the comparison.
    pub name: String,
    /// Its run.
    pub run: RunDir,
    /// Its name there.
    pub model: String,
}

/// A model's part of a comparison, read.
struct Tested {
    model: Compared,
    rows: Vec<Predicted>,
    ids: Vec<u32>, // [rows]: predictions
}

/// Compares models by what their runs' files say of the test part.
///
/// # Errors
/// The user's, where runs are on different snapshots or a model is not tested; files that cannot be read or
/// do not belong together.
pub fn compare(contestants: &[Contestant]) -> Result<Comparison> {
    let Some(first) = contestants.first() else { return Err(user_error!("there is no model to compare")) };
    let record = first.run.record()?;
    for Contestant { run, .. } in contestants {
        let other = run.record()?.snapshot;
        if other != record.snapshot {
            return Err(user_error!(
                "{} and {} cannot be compared: {0} is on snapshot {}, {1} on snapshot {other}; models compare on the \
                 same rows: train both on the same data and split",
                first.run.reference(),
                run.reference(),
                record.snapshot
            ));
        }
    }
    let objective = first.run.pins()?.config.objective;
    contestants.iter().try_for_each(check_tested)?;
    let snapshot = Snapshot::open(&first.run.snapshot_dir()?)?;
    let rows = snapshot.rows(Part::Test)?;
    let truth = rows.iter().map(|row| label_id(&snapshot, row.label.as_deref())).collect::<Result<Vec<u32>>>()?;
    let read = |contestant| read(contestant, &snapshot, (&rows, &truth), objective);
    let tested = contestants.iter().map(read).collect::<Result<Vec<_>>>()?;

    let mut pairs = Vec::new();
    for (i, (a, a_tested)) in contestants.iter().zip(&tested).enumerate() {
        for (b, b_tested) in contestants.iter().zip(&tested).skip(i + 1) {
            let paired = Paired { classes: snapshot.labels().len(), truth: &truth, a: &a_tested.ids, b: &b_tested.ids };
            let difference = a_tested.model.statistics.macro_f1 - b_tested.model.statistics.macro_f1;
            pairs.push(pair(&a.name, &b.name, difference, paired));
        }
    }
    let disagreements = rows.iter().enumerate().filter(|(i, _)| tested.iter().any(|t| t.ids[*i] != tested[0].ids[*i]));
    Ok(Comparison {
        snapshot: record.snapshot,
        objective,
        best: best(contestants, &tested, objective.goal),
        pairs,
        resamples: RESAMPLES,
        confidence: CONFIDENCE,
        seed: SEED,
        disagreements: disagreements.map(|(i, row)| disagreement(i, row, contestants, &tested)).collect(),
        models: contestants.iter().map(|c| c.name.clone()).zip(tested.into_iter().map(|t| t.model)).collect(),
    })
}

/// Refuses a model without a test.
fn check_tested(contestant: &Contestant) -> Result<()> {
    let Contestant { run, model, .. } = contestant;
    let test = run.model(model).test();
    if test.join("statistics.json").is_file() && test.join("predictions.parquet").is_file() {
        return Ok(());
    }
    Err(user_error!(
        "model {model:?} of {} is not tested yet: kiln infer {} tests it",
        run.reference(),
        run.dir().display()
    ))
}

/// Reads what a model's run says of it, and holds it against the rows.
fn read(
    contestant: &Contestant,
    snapshot: &Snapshot,
    (rows, truth): (&[Row], &[u32]),
    objective: Objective,
) -> Result<Tested> {
    let Contestant { run, model, .. } = contestant;
    let files = run.model(model);
    let (test, validation) = (files.test(), files.statistics_json());
    let (mut statistics, validated): (Statistics, Statistics) =
        (store::read_json(&test.join("statistics.json"))?, store::read_json(&validation)?);
    let predicted = read_predictions(&test.join("predictions.parquet"))?;
    let ids = predicted.iter().map(|row| label_id(snapshot, Some(&row.prediction))).collect::<Result<Vec<u32>>>();
    let ids = ids.with_context(|| test.display().to_string())?;
    let labels = snapshot.labels();
    let same = |(row, predicted): (&Row, &Predicted)| {
        row.id == predicted.id && row.label == predicted.label && predicted.probabilities.len() == labels.len()
    };
    ensure!(
        rows.len() == predicted.len() && rows.iter().zip(&predicted).all(same) && {
            let again = metrics::statistics(labels, truth, &ids, None);
            (again.macro_f1 - statistics.macro_f1).abs() < 1e-9 && again.examples == statistics.examples
        },
        "statistics.json and predictions.parquet in {} are not of one test on snapshot {}: kiln infer {} makes them again",
        test.display(),
        snapshot.hash(),
        run.dir().display()
    );
    let figure = validated.get(objective.metric);
    ensure!(figure.is_finite(), "{} does not have the objective's figure", validation.display());
    statistics.training_seconds = validated.training_seconds;
    let (run, bytes) = (run.reference(), store::onnx_len(&files.onnx())?);
    Ok(Tested {
        model: Compared { run, model: model.clone(), validation: figure, statistics, bytes },
        rows: predicted,
        ids,
    })
}

fn label_id(snapshot: &Snapshot, label: Option<&str>) -> Result<u32> {
    let id = label.and_then(|label| snapshot.label_id(label));
    id.with_context(|| format!("{label:?} is no label of snapshot {}", snapshot.hash()))
}

fn best(contestants: &[Contestant], tested: &[Tested], goal: Goal) -> String {
    let figure = |i: usize| match goal {
        Goal::Max => tested[i].model.validation,
        Goal::Min => -tested[i].model.validation,
    };
    let best = (1..tested.len()).fold(0, |best, i| if figure(i) > figure(best) { i } else { best });
    contestants[best].name.clone()
}

fn pair(a: &str, b: &str, f1_difference: f64, rows: Paired<'_>) -> Pair {
    let Paired { truth, .. } = rows;
    let count = |which: &dyn Fn(usize) -> bool| (0..truth.len()).filter(|&i| which(i)).count() as u64;
    let (a_right, b_right) = (|i: usize| rows.a[i] == truth[i], |i: usize| rows.b[i] == truth[i]);
    let only_a_correct = count(&|i| a_right(i) && !b_right(i));
    let only_b_correct = count(&|i| b_right(i) && !a_right(i));
    let interval = paired_bootstrap(rows, RESAMPLES, SEED);
    Pair {
        a: a.into(),
        b: b.into(),
        f1_difference,
        interval,
        mcnemar_p: mcnemar(only_a_correct, only_b_correct),
        verdict: Verdict::of(interval),
        only_a_correct,
        only_b_correct,
        disagreements: count(&|i| rows.a[i] != rows.b[i]),
    }
}

impl Verdict {
    /// What an interval of the difference `a` − `b` says.
    pub fn of([low, high]: [f64; 2]) -> Self {
        if low > 0.0 {
            Verdict::A
        } else if high < 0.0 {
            Verdict::B
        } else {
            Verdict::Tie
        }
    }
}

fn disagreement(i: usize, row: &Row, contestants: &[Contestant], tested: &[Tested]) -> Disagreement {
    let said = |t: &Tested| Said {
        prediction: t.rows[i].prediction.clone(),
        probability: t.rows[i].probabilities[t.ids[i] as usize],
    };
    Disagreement {
        id: row.id.clone(),
        text: row.text.clone(),
        text_pair: row.text_pair.clone(),
        label: row.label.clone().unwrap_or_default(),
        predictions: contestants.iter().zip(tested).map(|(c, t)| (c.name.clone(), said(t))).collect(),
    }
}

/// The names of models that are to be compared: their own, or `experiment/run_num/model` where one of them
/// would stand for two.
///
/// # Errors
/// The user's, where the same model is named twice.
pub(crate) fn named(models: Vec<(RunDir, String)>) -> Result<Vec<Contestant>> {
    let short: BTreeSet<&String> = models.iter().map(|(_, model)| model).collect();
    let ambiguous = short.len() < models.len();
    let mut seen = BTreeSet::new();
    models
        .iter()
        .map(|(run, model)| {
            let name = if ambiguous { format!("{}/{model}", run.reference()) } else { model.clone() };
            if !seen.insert(name.clone()) {
                return Err(user_error!("{name} is there twice: name each run once"));
            }
            Ok(Contestant { name, run: run.clone(), model: model.clone() })
        })
        .collect()
}

/// Pairs of a name and a value as a JSON object in their order.
mod by_name {
    use super::*;

    pub fn serialize<T: Serialize, S: Serializer>(list: &[(String, T)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(list.iter().map(|(name, value)| (name, value)))
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<(String, T)>, D::Error>
    where
        T: DeserializeOwned,
        D: Deserializer<'de>,
    {
        let object = Map::<String, Value>::deserialize(deserializer)?;
        let value = |value| serde_json::from_value(value).map_err(D::Error::custom);
        object.into_iter().map(|(name, of)| Ok((name, value(of)?))).collect()
    }
}

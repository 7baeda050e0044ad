//! Keys to values: every key of the experiment file with its type, range and default.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::document::At;
use super::table::{Bounds, Field, Table};
use super::{
    ClassWeights, Config, Data, Device, Distributed, Dtype, Duration, Export, Format, Goal, Infer, Interval, Metric,
    Model, Objective, Origin, Processes, Quantize, ROOT, RunNum, Schedule, Source, Split, Train, Warmup,
    available_threads, track,
};

const ANY: i64 = i64::MAX;
/// Far above any length a model here takes; a typing error is above it.
const MAX_LENGTH: i64 = 1 << 20;
const MAX_THREADS: i64 = 1024;
/// A week.
const MAX_TIMEOUT_S: i64 = 7 * 24 * 3600;
/// More than any model here has.
const MAX_BUCKET_MB: i64 = 1 << 20;

const POSITIVE: Bounds = Bounds { holds: |x| x > 0.0, says: "a number above 0" };
const NOT_NEGATIVE: Bounds = Bounds { holds: |x| x >= 0.0, says: "a number from 0" };
const LEARNING_RATE: Bounds = Bounds { holds: |x| x > 0.0 && x <= 1.0, says: "a number above 0, at most 1" };
const SHARE: Bounds = Bounds { holds: |x| (0.0..1.0).contains(&x), says: "a number from 0, below 1" };
const SHARE_OR_ALL: Bounds = Bounds { holds: |x| (0.0..=1.0).contains(&x), says: "a number from 0 to 1" };
const DECAY: Bounds = Bounds { holds: |x| x > 0.0 && x <= 1.0, says: "a number above 0, at most 1" };

/// Reads the whole file. What could not be read was noted in the table's notes; then the value
/// here is not to be used.
pub(super) fn config(root: &Table<'_>) -> Option<Config> {
    let name = root.required("name", "the experiment's name, as `name = \"bbc\"`").and_then(|field| slug(&field, 32));
    let run_num = root.get("run_num").and_then(|field| run_num(&field)).unwrap_or(RunNum::Next);
    let root_dir = root.get("root").and_then(|field| root_dir(&field)).unwrap_or_else(|| PathBuf::from(ROOT));
    let objective = objective(root.table("objective"));

    let data_table = root.required("data", "a table with the `source` of the rows").and_then(|field| field.table());
    let (data, max_length) = match data_table {
        Some(table) => data(table),
        None => (None, 256),
    };

    let train_table = root.table("train");
    // Read once for itself: with overrides over it in each model, its own mistakes could hide.
    train(&train_table);
    let distributed = distributed(train_table.table("distributed"));
    let models = root
        .required("model", "one or more [[model]] tables")
        .and_then(|field| models(&field, &train_table, max_length))
        .unwrap_or_default();
    train_table.finish();

    let export_table = root.table("export");
    let export = Export {
        opset: export_table.integer("opset", 12..=12, 12) as u32,
        quantize: export_table.choice(
            "quantize",
            &[("none", Quantize::None), ("int8", Quantize::Int8)],
            Quantize::None,
        ),
    };
    export_table.finish();

    let infer_table = root.table("infer");
    let infer = Infer {
        workers: threads(&infer_table, "workers", 1),
        max_tokens: infer_table.integer("max_tokens", 1..=ANY, 4096) as usize,
    };
    infer_table.finish();
    let track = track::track(root.table("track"));

    Some(Config {
        name: name?,
        run_num,
        root: root_dir,
        objective,
        data: data?,
        models,
        distributed,
        export,
        infer,
        track,
        text: String::new(),
        sets: Vec::new(),
    })
}

fn run_num(field: &Field<'_>) -> Option<RunNum> {
    match field.json() {
        serde_json::Value::String(text) if text == "next" => Some(RunNum::Next),
        _ => field.integer(1..=i64::from(u32::MAX), Some("next")).map(|number| RunNum::Number(number as u32)),
    }
}

fn root_dir(field: &Field<'_>) -> Option<PathBuf> {
    if field.string("a folder").is_some_and(|text| text.starts_with("s3://")) {
        return field.reject("a folder: this build of kiln has no `aws` feature");
    }
    field.path("a folder")
}

fn objective(table: Table<'_>) -> Objective {
    const METRICS: [(&str, Metric); 5] = [
        ("macro_f1", Metric::MacroF1),
        ("accuracy", Metric::Accuracy),
        ("micro_f1", Metric::MicroF1),
        ("weighted_f1", Metric::WeightedF1),
        ("loss", Metric::Loss),
    ];
    let metric = table.choice("metric", &METRICS, Metric::MacroF1);
    let sensible = if metric == Metric::Loss { Goal::Min } else { Goal::Max };
    let goal = table.choice("goal", &[("max", Goal::Max), ("min", Goal::Min)], sensible);
    if goal != sensible
        && let Some(field) = table.get("goal")
    {
        field.reject::<()>("\"min\" for the metric loss, \"max\" for all others");
    }
    table.finish();
    Objective { metric, goal }
}

fn data(table: Table<'_>) -> (Option<Data>, u64) {
    const FORMATS: [(&str, Format); 7] = [
        ("auto", Format::Auto),
        ("csv", Format::Csv),
        ("tsv", Format::Tsv),
        ("jsonl", Format::Jsonl),
        ("parquet", Format::Parquet),
        ("arrow", Format::Arrow),
        ("folders", Format::Folders),
    ];
    let source = table
        .required("source", "a file, a folder, { train = …, validation = …, test = … } or \"sample\"")
        .and_then(|field| source(&field));
    let split = split(&table, source.as_ref());
    let data = |source| Data {
        source,
        format: table.choice("format", &FORMATS, Format::Auto),
        text: table.string("text").unwrap_or_else(|| "text".into()),
        text_pair: table.string("text_pair"),
        label: table.string("label").unwrap_or_else(|| "label".into()),
        id: table.string("id"),
        split,
    };
    // The other keys are read even where `source` is not to be used.
    let read = data(source.clone().unwrap_or(Source::Sample));
    let max_length = table.integer("max_length", 1..=MAX_LENGTH, 256);
    table.finish();
    (source.map(|_| read), max_length)
}

fn source(field: &Field<'_>) -> Option<Source> {
    const NEEDS: &str = "a file, a folder, { train = …, validation = …, test = … } or \"sample\"";
    match field.json() {
        serde_json::Value::String(text) if text == "sample" => Some(Source::Sample),
        serde_json::Value::Object(_) => {
            let table = field.table()?;
            let part = |key| table.get(key).and_then(|field: Field<'_>| field.path("a file or a folder"));
            let train =
                table.required("train", "the rows to train on").and_then(|field| field.path("a file or a folder"));
            let (validation, test) = (part("validation"), part("test"));
            table.finish();
            Some(Source::Parts { train: train?, validation, test })
        }
        _ => field.path(NEEDS).map(Source::Path),
    }
}

fn split(data: &Table<'_>, source: Option<&Source>) -> Split {
    let table = data.table("split");
    let split = Split {
        validation: table.number("validation", SHARE, 0.1),
        test: table.number("test", SHARE, 0.2),
        seed: table.integer("seed", 0..=ANY, 42),
    };
    let (gives_validation, gives_test) = match source {
        Some(Source::Parts { validation, test, .. }) => (validation.is_some(), test.is_some()),
        _ => (false, false),
    };
    let cut = if gives_validation { 0.0 } else { split.validation } + if gives_test { 0.0 } else { split.test };
    if let Some(field) = data.get("split") {
        if cut >= 1.0 {
            field.note(format!(
                "`{}` takes {cut} of the rows for validation and test: needs less than 1, to leave rows to train on",
                field.path
            ));
        }
        if split.validation == 0.0 && !gives_validation {
            field.note(format!(
                "`{}.validation` is 0: needs a number above 0 where `source` gives no validation part",
                field.path
            ));
        }
    }
    table.finish();
    split
}

fn models(field: &Field<'_>, train: &Table<'_>, max_length: u64) -> Option<Vec<Model>> {
    let items = field.items("one or more [[model]] tables")?;
    if items.is_empty() {
        return field.reject("one or more [[model]] tables");
    }
    let mut names = BTreeSet::new();
    let mut models = Vec::new();
    for item in &items {
        let Some(table) = item.table() else { continue };
        let name = table.required("name", "the model's name, as `name = \"minilm\"`").and_then(|field| {
            let name = slug(&field, 20)?;
            if name == "trials" {
                return field.reject("another name: \"trials\" is reserved");
            }
            if !names.insert(name.clone()) {
                return field.reject("a name that no other model has");
            }
            Some(name)
        });
        let origin = origin(&table);
        let max_length = table.integer("max_length", 1..=MAX_LENGTH, max_length as i64) as usize;
        let layered = table.table("train").over(train);
        let train = self::train(&layered);
        if let Some(field) = layered.get("distributed").filter(|field| field.path.starts_with("model")) {
            field.note(format!("`{}` goes under [train]: all models are trained by the same processes", field.path));
        }
        layered.finish();
        table.finish();
        if let (Some(name), Some(origin)) = (name, origin) {
            models.push(Model { name, origin, max_length, train });
        }
    }
    Some(models)
}

/// `org/name@revision`, or `org/name` for its main branch.
fn hub(reference: &str) -> Option<Origin> {
    let (repository, revision) = reference.split_once('@').unwrap_or((reference, "main"));
    // What they are made of on the Hub; they become addresses and folders.
    let is_word = |word: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !word.is_empty() && word.bytes().all(plain) && !word.starts_with('.') && !word.contains("..")
    };
    let parts = |text: &str| text.split('/').all(is_word);
    let valid = parts(repository) && repository.split('/').count() <= 2 && parts(revision);
    valid.then(|| Origin::Hub { repository: repository.into(), revision: revision.into(), folder: PathBuf::new() })
}

fn origin(table: &Table<'_>) -> Option<Origin> {
    let chosen = table.first_of(["path", "architecture"]);
    let config = table.get("config");
    let tokenizer = table.table("tokenizer");
    let vocab_size = tokenizer.integer("vocab_size", 100..=1_000_000, 4000) as usize;
    tokenizer.finish();
    match chosen {
        Some(("path", field)) => {
            // What stands in the file beside a --set path is what the path replaces.
            if matches!(field.node.at, At::File(_)) {
                for other in [table.get("config"), table.get("tokenizer")].into_iter().flatten() {
                    other.note(format!(
                        "`{}` goes with `architecture`, from scratch: `path` brings its own",
                        other.path
                    ));
                }
            }
            match field.string("a folder")?.strip_prefix("hf:") {
                Some(reference) => hub(reference).or_else(|| field.reject("a folder, or hf:org/name@revision")),
                None => field.path("a folder").map(Origin::Folder),
            }
        }
        Some((_, field)) => {
            let architecture = field.string("an architecture's name, as \"bert\"");
            let config = config.map(|field| (field.table(), field.json()));
            let config = match config {
                None => serde_json::Map::new(),
                Some((Some(_), serde_json::Value::Object(map))) => map,
                Some(_) => return None,
            };
            Some(Origin::Scratch { architecture: architecture?, config, vocab_size })
        }
        None => {
            table.required("path", "a folder with a checkpoint, or `architecture` to train from scratch");
            None
        }
    }
}

fn train(table: &Table<'_>) -> Train {
    let duration = match table.first_of(["epochs", "max_steps"]) {
        Some(("max_steps", field)) => Duration::Steps(count(&field, 1)),
        Some((_, field)) => Duration::Epochs(count(&field, 1)),
        None => Duration::Epochs(3),
    };
    let warmup = match table.first_of(["warmup_ratio", "warmup_steps"]) {
        Some(("warmup_steps", field)) => Warmup::Steps(count(&field, 0)),
        Some((_, field)) => Warmup::Ratio(field.number(SHARE_OR_ALL).unwrap_or(0.1)),
        None => Warmup::Ratio(0.1),
    };
    let every = |key| table.integer_or(key, 1..=ANY, "epoch").map_or(Interval::Epoch, Interval::Steps);
    table.get("distributed"); // read apart: it is of all models
    let micro_batch_tokens = table.integer_or("micro_batch_tokens", 1..=ANY, "auto");
    let device =
        table.choice("device", &[("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda)], Device::Auto);
    let dtype = table.choice("dtype", &[("f32", Dtype::F32), ("tf32", Dtype::Tf32), ("bf16", Dtype::Bf16)], Dtype::F32);
    if let (Device::Cpu, Dtype::Tf32 | Dtype::Bf16, Some(field)) = (device, dtype, table.get("dtype")) {
        field.note(format!("`{}` is for a GPU: `device = \"cpu\"` computes in \"f32\"", field.path));
    }
    Train {
        seed: table.integer("seed", 0..=ANY, 42),
        duration,
        batch_size: table.integer("batch_size", 1..=ANY, 16) as usize,
        micro_batch_tokens: micro_batch_tokens.unwrap_or(4096) as usize,
        micro_batch_auto: micro_batch_tokens.is_none(),
        gradient_accumulation_steps: table.integer("gradient_accumulation_steps", 1..=ANY, 1) as usize,
        learning_rate: table.number("learning_rate", LEARNING_RATE, 5e-5),
        weight_decay: table.number("weight_decay", NOT_NEGATIVE, 0.01),
        adam_beta1: table.number("adam_beta1", SHARE, 0.9),
        adam_beta2: table.number("adam_beta2", SHARE, 0.999),
        adam_epsilon: table.number("adam_epsilon", POSITIVE, 1e-8),
        max_grad_norm: table.number("max_grad_norm", NOT_NEGATIVE, 1.0),
        schedule: table.choice(
            "schedule",
            &[("linear", Schedule::Linear), ("cosine", Schedule::Cosine), ("constant", Schedule::Constant)],
            Schedule::Linear,
        ),
        warmup,
        label_smoothing: table.number("label_smoothing", SHARE, 0.0),
        class_weights: table.get("class_weights").and_then(|field| class_weights(&field)).unwrap_or(ClassWeights::None),
        dropout: table.get("dropout").and_then(|field| field.number(SHARE)),
        freeze: table.get("freeze").and_then(|field| freeze(&field)).unwrap_or_default(),
        layer_lr_decay: table.number("layer_lr_decay", DECAY, 1.0),
        eval: every("eval_steps"),
        save: every("save_steps"),
        keep_checkpoints: table.integer("keep_checkpoints", 1..=ANY, 2) as usize,
        early_stopping_patience: table.integer("early_stopping_patience", 0..=ANY, 0) as usize,
        threads: threads(table, "threads", table.ranks()),
        device,
        dtype,
        deterministic: table.boolean("deterministic", false),
        recompute: table.boolean("recompute", false),
        init_from: table.get("init_from").and_then(|field| init_from(&field)),
    }
}

fn distributed(table: Table<'_>) -> Distributed {
    let otherwise = Distributed::default();
    let enabled = table.boolean("enabled", false);
    let nproc_per_node = match table.get("nproc_per_node") {
        None => otherwise.nproc_per_node,
        Some(field) => match field.json() {
            serde_json::Value::String(text) if text == "gpu" => Processes::Gpu,
            _ => Processes::Count(field.integer(1..=MAX_THREADS, Some("gpu")).unwrap_or(1) as usize),
        },
    };
    let distributed = Distributed {
        nproc_per_node: if enabled { nproc_per_node } else { otherwise.nproc_per_node },
        timeout_s: table.integer("timeout_s", 1..=MAX_TIMEOUT_S, otherwise.timeout_s as i64),
        bucket_mb: table.integer("bucket_mb", 1..=MAX_BUCKET_MB, otherwise.bucket_mb as i64),
    };
    table.finish();
    distributed
}

fn count(field: &Field<'_>, from: i64) -> u64 {
    field.integer(from..=ANY, None).unwrap_or(1) as u64
}

/// `auto` is all that there are, or this rank's part of them.
fn threads(table: &Table<'_>, key: &'static str, ranks: usize) -> usize {
    let auto = || (available_threads() / ranks).max(1);
    table.integer_or(key, 1..=MAX_THREADS, "auto").map_or_else(auto, |threads| threads as usize)
}

fn class_weights(field: &Field<'_>) -> Option<ClassWeights> {
    match field.json() {
        serde_json::Value::Object(_) => Some(ClassWeights::Given(
            field
                .entries()
                .filter_map(|(label, weight)| Some((label.to_owned(), weight.number(NOT_NEGATIVE)?)))
                .collect(),
        )),
        serde_json::Value::String(text) if text == "none" => Some(ClassWeights::None),
        serde_json::Value::String(text) if text == "balanced" => Some(ClassWeights::Balanced),
        _ => field.reject("\"none\", \"balanced\" or a table from label to weight"),
    }
}

fn freeze(field: &Field<'_>) -> Option<Vec<String>> {
    let items = field.items("a list of prefixes of parameter names")?;
    Some(items.iter().filter_map(|item| item.string("a prefix of parameter names")).collect())
}

fn init_from(field: &Field<'_>) -> Option<String> {
    const NEEDS: &str = "an earlier run's model, as \"experiment/3/minilm\"";
    let text = field.string(NEEDS)?;
    match text.split('/').collect::<Vec<_>>()[..] {
        [experiment, run_num, model]
            if !experiment.is_empty() && run_num.parse::<u32>().is_ok() && !model.is_empty() =>
        {
            Some(text)
        }
        _ => field.reject(NEEDS),
    }
}

/// A name that is safe as a folder's, an S3 key's and a job's.
fn slug(field: &Field<'_>, longest: usize) -> Option<String> {
    let needs = format!("1 to {longest} of a-z, 0-9 and -, with no - first");
    let text = field.string(&needs)?;
    let fits = text.len() <= longest
        && !text.starts_with('-')
        && text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'));
    if fits { Some(text) } else { field.reject(&needs) }
}

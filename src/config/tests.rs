use std::path::Path;

use super::*;
use crate::error::UserError;

/// Lines 1 to 3, and 4 to 6, of most files below.
const HEAD: &str = "name = \"x\"\n[data]\nsource = \"a.csv\"\n";
const MODEL: &str = "[[model]]\nname = \"m\"\npath = \"base\"\n";

fn parse(text: &str, sets: &[&str]) -> Result<Config, ConfigError> {
    let overrides = Overrides { sets: sets.iter().map(|set| set.to_string()).collect(), ..Overrides::default() };
    let text = text.replace("<HEAD>", HEAD).replace("<MODEL>", MODEL);
    Config::parse(&text, "dir/x.toml", Path::new("dir"), &overrides)
}

fn valid(text: &str, sets: &[&str]) -> Config {
    parse(text, sets).unwrap_or_else(|error| panic!("{error}"))
}

fn error(text: &str, sets: &[&str]) -> String {
    match parse(text, sets) {
        Ok(_) => panic!("accepted {text}"),
        Err(error) => error.to_string(),
    }
}

/// A file, options, and for each error its first line (`dir/x.toml:` left out).
const BAD: &[(&str, &[&str], &[&str])] = &[
    // Unknown keys.
    (
        "<HEAD><MODEL>[train]\nlearning_rat = 1e-5",
        &[],
        &["8:1: unknown key `train.learning_rat`: did you mean `learning_rate`?"],
    ),
    ("nam = 1\n<HEAD><MODEL>", &[], &["1:1: unknown key `nam`: did you mean `name`?"]),
    ("<HEAD><MODEL>[trian]\nepochs = 1", &[], &["7:2: unknown key `trian`: did you mean `train`?"]),
    ("<HEAD><MODEL>[tune]\nmax_jobs = 2", &[], &["7:2: unknown key `tune`"]),
    (
        "<HEAD><MODEL>[track]\ntensorbord = true\nwandb = { projekt = \"x\" }\nmlflow = { url = \"http://a\" }",
        &[],
        &[
            "8:1: unknown key `track.tensorbord`: did you mean `tensorboard`?",
            "9:11: unknown key `track.wandb.projekt`: did you mean `project`?",
            "10:12: unknown key `track.mlflow.url`: did you mean `uri`?",
        ],
    ),
    ("<HEAD><MODEL>\texport = 1", &[], &["7:2: unknown key `model.0.export`"]),
    (
        "<HEAD><MODEL>train = { adam-beta1 = 1 }",
        &[],
        &["7:11: unknown key `model.0.train.adam-beta1`: did you mean `adam_beta1`?"],
    ),
    // Wrong types and values.
    ("<HEAD><MODEL>[train]\nepochs = \"three\"", &[], &["8:10: `train.epochs` is \"three\": needs an integer from 1"]),
    (
        "<HEAD><MODEL>[train]\nepochs = 0\nbatch_size = -1\nadam_beta1 = 1.0",
        &[],
        &[
            "8:10: `train.epochs` is 0: needs an integer from 1",
            "9:14: `train.batch_size` is -1: needs an integer from 1",
            "10:14: `train.adam_beta1` is 1.0: needs a number from 0, below 1",
        ],
    ),
    (
        "<HEAD><MODEL>[train]\nlearning_rate = 5",
        &[],
        &["8:17: `train.learning_rate` is 5: needs a number above 0, at most 1"],
    ),
    ("<HEAD><MODEL>[train]\nweight_decay = nan", &[], &["8:16: `train.weight_decay` is NaN: needs a number from 0"]),
    (
        "<HEAD><MODEL>[train]\nseed = 99999999999999999999",
        &[],
        &["8:8: the integer 99999999999999999999 does not fit 64 bits"],
    ),
    (
        "<HEAD><MODEL>[train]\nschedule = \"lineer\"",
        &[],
        &[
            "8:12: `train.schedule` is \"lineer\": needs \"linear\", \"cosine\" or \"constant\"; did you mean \"linear\"?",
        ],
    ),
    (
        "<HEAD><MODEL>train = { dropout = 1.5, seed = 1.0 }",
        &[],
        &[
            "7:21: `model.0.train.dropout` is 1.5: needs a number from 0, below 1",
            "7:33: `model.0.train.seed` is 1.0: needs an integer from 0",
        ],
    ),
    (
        "<HEAD><MODEL>[train]\nclass_weights = { \"a.b\" = -1, c = \"x\" }",
        &[],
        &[
            "8:27: `train.class_weights.a.b` is -1: needs a number from 0",
            "8:35: `train.class_weights.c` is \"x\": needs a number from 0",
        ],
    ),
    (
        "<HEAD><MODEL>[train]\nclass_weights = \"even\"\nfreeze = \"bert\"\neval_steps = 0\nthreads = \"all\"\ninit_from = \"a/b\"\nrecompute = 1",
        &[],
        &[
            "8:17: `train.class_weights` is \"even\": needs \"none\", \"balanced\" or a table from label to weight",
            "9:10: `train.freeze` is \"bert\": needs a list of prefixes of parameter names",
            "10:14: `train.eval_steps` is 0: needs an integer from 1 or \"epoch\"",
            "11:11: `train.threads` is \"all\": needs an integer from 1 to 1024 or \"auto\"",
            "12:13: `train.init_from` is \"a/b\": needs an earlier run's model, as \"experiment/3/minilm\"",
            "13:13: `train.recompute` is 1: needs true or false",
        ],
    ),
    (
        "<HEAD>format = \"arow\"\nlabel = 3\n<MODEL>",
        &[],
        &[
            "4:10: `data.format` is \"arow\": needs \"auto\", \"csv\", \"tsv\", \"jsonl\", \"parquet\", \"arrow\" or \"folders\"; did you mean \"arrow\"?",
            "5:9: `data.label` is 3: needs a string",
        ],
    ),
    (
        "<HEAD><MODEL>[export]\nopset = 17\n[infer]\nworkers = 0",
        &[],
        &[
            "8:9: `export.opset` is 17: needs 12",
            "10:11: `infer.workers` is 0: needs an integer from 1 to 1024 or \"auto\"",
        ],
    ),
    (
        "<HEAD><MODEL>[model.train.distributed]\nenabled = true\n[train]\ndeterministic = 1\n[train.distributed]\nenabled = 1\nnproc_per_node = \"all\"\ntimeout_s = 0\nbuckets = 2",
        &[],
        &[
            "7:1: `model.0.train.distributed` goes under [train]: all models are trained by the same processes",
            "10:17: `train.deterministic` is 1: needs true or false",
            "12:11: `train.distributed.enabled` is 1: needs true or false",
            "13:18: `train.distributed.nproc_per_node` is \"all\": needs an integer from 1 to 1024 or \"gpu\"",
            "14:13: `train.distributed.timeout_s` is 0: needs an integer from 1 to 604800",
            "15:1: unknown key `train.distributed.buckets`: did you mean `bucket_mb`?",
        ],
    ),
    (
        "<HEAD><MODEL>[train]\ndevice = \"gpu\"\ndtype = \"fp16\"",
        &[],
        &[
            "8:10: `train.device` is \"gpu\": needs \"auto\", \"cpu\" or \"cuda\"; did you mean \"cpu\"?",
            "9:9: `train.dtype` is \"fp16\": needs \"f32\", \"tf32\" or \"bf16\"",
        ],
    ),
    (
        "<HEAD><MODEL>[train]\ndevice = \"cpu\"\ndtype = \"bf16\"",
        &[],
        &["9:9: `train.dtype` is for a GPU: `device = \"cpu\"` computes in \"f32\""],
    ),
    (
        "<HEAD><MODEL>[export]\nquantize = \"int4\"\nquantise = \"int8\"",
        &[],
        &[
            "8:12: `export.quantize` is \"int4\": needs \"none\" or \"int8\"; did you mean \"int8\"?",
            "9:1: unknown key `export.quantise`: did you mean `quantize`?",
        ],
    ),
    (
        "<HEAD><MODEL>[track]\ntensorboard = \"yes\"\nwandb = true\nmlflow = { uri = \"sqlite:///m.db\", experiment = 1 }",
        &[],
        &[
            "8:15: `track.tensorboard` is \"yes\": needs true or false",
            "9:9: `track.wandb` is true: needs a table",
            "10:18: `track.mlflow.uri` is \"sqlite:///m.db\": needs a server's address, as \"http://host:5000\", with no user or password in it: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are for them",
            "10:49: `track.mlflow.experiment` is 1: needs a string",
        ],
    ),
    (
        "<HEAD><MODEL>[track]\nwandb = { project = 1, entity = \"\", mode = \"of\" }",
        &[],
        &[
            "8:21: `track.wandb.project` is 1: needs a string",
            "8:33: `track.wandb.entity` is \"\": needs a string",
            "8:44: `track.wandb.mode` is \"of\": needs \"online\", \"offline\" or \"disabled\"",
        ],
    ),
    ("<HEAD><MODEL>[export]\nquantize = 8", &[], &["8:12: `export.quantize` is 8: needs \"none\" or \"int8\""]),
    ("run_num = 0\n<HEAD><MODEL>", &[], &["1:11: `run_num` is 0: needs an integer from 1 to 4294967295 or \"next\""]),
    (
        "run_num = \"last\"\n<HEAD><MODEL>",
        &[],
        &["1:11: `run_num` is \"last\": needs an integer from 1 to 4294967295 or \"next\""],
    ),
    (
        "root = \"s3://b/p\"\n<HEAD><MODEL>",
        &[],
        &["1:8: `root` is \"s3://b/p\": needs a folder: this build of kiln has no `aws` feature"],
    ),
    (
        "objective = { metric = \"loss\", goal = \"max\" }\n<HEAD><MODEL>",
        &[],
        &["1:39: `objective.goal` is \"max\": needs \"min\" for the metric loss, \"max\" for all others"],
    ),
    // Keys against each other.
    (
        "<HEAD><MODEL>[train]\nepochs = 3\nmax_steps = 7",
        &[],
        &["9:1: `train.max_steps` stands beside `epochs`: give one of `epochs` and `max_steps`"],
    ),
    (
        "<HEAD>split = { validation = 0.5, test = 0.5 }\n<MODEL>",
        &[],
        &[
            "4:9: `data.split` takes 1 of the rows for validation and test: needs less than 1, to leave rows to train on",
        ],
    ),
    (
        "<HEAD>split = { validation = 0 }\n<MODEL>",
        &[],
        &["4:9: `data.split.validation` is 0: needs a number above 0 where `source` gives no validation part"],
    ),
    ("<HEAD><MODEL><MODEL>", &[], &["8:8: `model.1.name` is \"m\": needs a name that no other model has"]),
    (
        "<HEAD><MODEL>config = {}",
        &[],
        &["7:10: `model.0.config` goes with `architecture`, from scratch: `path` brings its own"],
    ),
    (
        "<HEAD>[[model]]\nname = \"m\"\narchitecture = \"bert\"\ntokenizer = { vocab_size = 10 }",
        &[],
        &["7:28: `model.0.tokenizer.vocab_size` is 10: needs an integer from 100 to 1000000"],
    ),
    // Names and paths.
    (
        "<HEAD>[[model]]\nname = \"trials\"\npath = \"hf:a/b/c@d\"",
        &[],
        &[
            "5:8: `model.0.name` is \"trials\": needs another name: \"trials\" is reserved",
            "6:8: `model.0.path` is \"hf:a/b/c@d\": needs a folder, or hf:org/name@revision",
        ],
    ),
    (
        "<HEAD>[[model]]\nname = \"Mini_LM\"",
        &[],
        &[
            "4:1: missing key `model.0.path`: a folder with a checkpoint, or `architecture` to train from scratch",
            "5:8: `model.0.name` is \"Mini_LM\": needs 1 to 20 of a-z, 0-9 and -, with no - first",
        ],
    ),
    ("<HEAD>[model]\nname = \"m\"", &[], &["4:1: `model` is a table: needs one or more [[model]] tables"]),
    (
        "name = \"x\"\n[data]\ntext = \"a\"",
        &[],
        &[
            "1:1: missing key `model`: one or more [[model]] tables",
            "2:2: missing key `data.source`: a file, a folder, { train = …, validation = …, test = … } or \"sample\"",
        ],
    ),
    (
        "name = \"x\"\ndata.source = { test = \"t\" }\n<MODEL>",
        &[],
        &["2:6: missing key `data.source.train`: the rows to train on"],
    ),
    // What is no TOML.
    ("name = \"x\n[data]", &[], &["1:10: invalid basic string, expected `\"`"]),
    ("name = \"x\"\nname = \"y\"", &[], &["2:1: duplicate key"]),
];

#[test]
fn a_mistake_is_shown_where_it_is() {
    for (text, sets, expected) in BAD {
        let shown = error(text, sets);
        let first_lines: Vec<_> = shown.lines().filter_map(|line| line.strip_prefix("dir/x.toml:")).collect();
        assert_eq!(first_lines, *expected, "{text}");
    }
}

#[test]
fn a_mistake_in_an_option_names_the_option() {
    let sets = [
        "train.epochs=0",
        "train.epoch=1",
        "model.1.name=a",
        "epochs",
        "=3",
        "train.freeze=[1]",
        "name=Ä",
        "name.a=[2, {b.c = 3}",
    ];
    let shown = error("<HEAD><MODEL>", &sets);
    let first_lines: Vec<_> =
        shown.lines().filter(|line| !line.starts_with("  = allowed: epochs, max_steps, ")).collect();
    assert_eq!(
        first_lines,
        [
            "--set model.1.name=a: `model` is a list of 1: needs an index from 0 to 0, got `1`",
            "--set epochs: needs KEY=VALUE, as `train.epochs=3`",
            "--set =3: \"\" is no key: needs names with dots between them, as `model.0.name`",
            "--set name.a=[2, {b.c = 3}: `name` is a table: needs 1 to 32 of a-z, 0-9 and -, with no - first",
            "--set train.epochs=0: `train.epochs` is 0: needs an integer from 1",
            "--set train.freeze=[1]: `train.freeze.0` is 1: needs a prefix of parameter names",
            "--set train.epoch=1: unknown key `train.epoch`: did you mean `epochs`?",
        ]
    );
}

#[test]
fn a_mistake_is_shown_with_its_line_and_what_is_allowed() {
    assert_eq!(
        error(
            "# größer\nobjective = { goal = \"max\", 'größe' = 1, matric = \"loss\" }\n<HEAD><MODEL>[infer]\nworker\t= 1",
            &[]
        ),
        "\
dir/x.toml:2:29: unknown key `objective.größe`
  |
2 | objective = { goal = \"max\", 'größe' = 1, matric = \"loss\" }
  |                             ^^^^^^^
  = allowed: metric, goal
dir/x.toml:2:42: unknown key `objective.matric`: did you mean `metric`?
  |
2 | objective = { goal = \"max\", 'größe' = 1, matric = \"loss\" }
  |                                          ^^^^^^
  = allowed: metric, goal
dir/x.toml:10:1: unknown key `infer.worker`: did you mean `workers`?
   |
10 | worker\t= 1
   | ^^^^^^
  = allowed: workers, max_tokens"
    );
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = valid("<HEAD><MODEL>", &[]);
    let threads = available_threads();
    let train = Train {
        seed: 42,
        duration: Duration::Epochs(3),
        batch_size: 16,
        micro_batch_tokens: 4096,
        micro_batch_auto: true,
        gradient_accumulation_steps: 1,
        learning_rate: 5e-5,
        weight_decay: 0.01,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        max_grad_norm: 1.0,
        schedule: Schedule::Linear,
        warmup: Warmup::Ratio(0.1),
        label_smoothing: 0.0,
        class_weights: ClassWeights::None,
        dropout: None,
        freeze: vec![],
        layer_lr_decay: 1.0,
        eval: Interval::Epoch,
        save: Interval::Epoch,
        keep_checkpoints: 2,
        early_stopping_patience: 0,
        threads,
        device: Device::Auto,
        dtype: Dtype::F32,
        deterministic: false,
        recompute: false,
        init_from: None,
    };
    let expected = Config {
        name: "x".into(),
        run_num: RunNum::Next,
        root: ROOT.into(),
        objective: Objective { metric: Metric::MacroF1, goal: Goal::Max },
        data: Data {
            source: Source::Path("dir/a.csv".into()),
            format: Format::Auto,
            text: "text".into(),
            text_pair: None,
            label: "label".into(),
            id: None,
            split: Split { validation: 0.1, test: 0.2, seed: 42 },
        },
        models: vec![Model { name: "m".into(), origin: Origin::Folder("dir/base".into()), max_length: 256, train }],
        distributed: Distributed::default(),
        export: Export { opset: 12, quantize: Quantize::None },
        infer: Infer { workers: threads, max_tokens: 4096 },
        track: Track { tensorboard: true, wandb: None, mlflow: None },
        text: format!("{HEAD}{MODEL}"),
        sets: Vec::new(),
    };
    assert_eq!(config, expected);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), Config { text: String::new(), ..expected });
}

#[test]
fn a_model_overrides_train() {
    let text = "<HEAD><MODEL>max_length = 64\n[model.train]\nmax_steps = 9\nseed = 7\nrecompute = true\n[[model]]\nname = \"n\"\narchitecture = \"bert\"\nconfig = { hidden_size = 8, a = [1.5] }\n[train]\nepochs = 2\nwarmup_steps = 5\nseed = 1\nclass_weights = { \"a.b\" = 2 }";
    let [m, n] = <[Model; 2]>::try_from(valid(text, &[]).models).unwrap();
    assert_eq!(
        (m.max_length, m.train.duration, m.train.seed, m.train.warmup),
        (64, Duration::Steps(9), 7, Warmup::Steps(5))
    );
    assert_eq!((n.max_length, n.train.duration, n.train.seed), (256, Duration::Epochs(2), 1));
    assert_eq!((m.train.recompute, n.train.recompute), (true, false));
    assert_eq!(n.train.class_weights, ClassWeights::Given([("a.b".to_owned(), 2.0)].into()));
    let Origin::Scratch { architecture, config, vocab_size } = n.origin else { panic!("{:?}", n.origin) };
    assert_eq!((architecture.as_str(), vocab_size), ("bert", 4000));
    assert_eq!(serde_json::Value::from(config), serde_json::json!({ "hidden_size": 8, "a": [1.5] }));
}

#[test]
fn options_are_laid_over_the_file() {
    let sets = [
        "train.max_steps=20",
        "train.learning_rate=1e-3",
        "train.class_weights.\"a.b\"=2",
        "model.0.path=other",
        "model.0.train.freeze=[\"bert.embeddings\"]",
        "data.source.train=a.csv",
        "data.text = the text",
        "run_num=3",
    ];
    let text = "<HEAD>[[model]]\nname = \"m\"\narchitecture = \"bert\"\nconfig = { hidden_size = 8 }\n[train]\nepochs = 2\nclass_weights = \"none\"";
    let config = valid(text, &sets);
    let Model { origin, train, .. } = &config.models[0];
    assert_eq!(*origin, Origin::Folder("other".into()));
    for (path, expected) in [
        ("hf:org/name", Some(("org/name", "main"))),
        ("hf:bert-base-uncased@v1.0", Some(("bert-base-uncased", "v1.0"))),
        ("hf:org/name@refs/pr/7", Some(("org/name", "refs/pr/7"))),
        ("hf:", None),
        ("hf:org/name@", None),
        ("hf:../name", None),
        ("hf:org/name@a..b", None),
        ("hf:org/na me", None),
    ] {
        let config = parse("<HEAD><MODEL>", &[&format!("model.0.path={path}")]);
        let hub = |(repository, revision): (&str, &str)| Origin::Hub {
            repository: repository.into(),
            revision: revision.into(),
            folder: Default::default(),
        };
        assert_eq!(config.ok().map(|config| config.models[0].origin.clone()), expected.map(hub), "{path}");
    }
    assert_eq!((train.duration, train.learning_rate), (Duration::Steps(20), 1e-3));
    assert_eq!(train.freeze, ["bert.embeddings"]);
    assert_eq!(train.class_weights, ClassWeights::Given([("a.b".to_owned(), 2.0)].into()));
    assert_eq!(config.data.source, Source::Parts { train: "a.csv".into(), validation: None, test: None });
    assert_eq!((config.data.text.as_str(), config.run_num), ("the text", RunNum::Number(3)));
    assert!(config.text.starts_with("# --set train.max_steps=20\n"), "{}", config.text);

    let overrides = Overrides { root: Some("r".into()), threads: Some(7), ..Overrides::default() };
    let text = format!("root = \"here\"\n{HEAD}{MODEL}train = {{ threads = 2 }}");
    let config = Config::parse(&text, "x.toml", Path::new("dir"), &overrides).unwrap();
    assert_eq!((config.root, config.models[0].train.threads, config.infer.workers), ("r".into(), 7, 7));
}

#[test]
fn the_hash_is_of_what_decides_the_models() {
    let hash = |sets: &[&str]| valid("<HEAD><MODEL>", sets).hash();
    for same in
        ["train.threads=1", "infer.workers=1", "root=b", "run_num=4", "data.source=b.csv", "export.quantize=int8"]
    {
        assert_eq!(hash(&[same]), hash(&[]), "{same}");
    }
    for other in
        ["train.seed=1", "model.0.path=c", "objective.metric=accuracy", "data.max_length=9", "train.recompute=true"]
    {
        assert_ne!(hash(&[other]), hash(&[]), "{other}");
    }
    for same in [
        "train.device=cpu",
        "train.distributed.bucket_mb=1",
        "train.micro_batch_tokens=4096",
        "track.tensorboard=false",
        "track.mlflow.uri=\"http://a\"",
    ] {
        assert_eq!(hash(&[same]), hash(&[]), "{same}");
    }
    for other in ["train.dtype=bf16", "train.deterministic=true"] {
        assert_ne!(hash(&[other]), hash(&[]), "{other}");
    }
    let anywhere = |set: &str| valid("<HEAD><MODEL>", &[set]).hash_anywhere();
    assert_eq!(anywhere("model.0.path=c"), anywhere("model.0.path=/elsewhere"));
    assert_ne!(anywhere("train.seed=1"), anywhere("train.seed=2"));
}

#[test]
#[cfg(target_os = "linux")]
fn memory_is_the_machines_or_less() {
    let machine = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kilobytes: u64 = machine.split_whitespace().nth(1).unwrap().parse().unwrap();
    let available = available_memory().unwrap();
    assert!((1 << 20..=1024 * kilobytes).contains(&available), "{available}");
}

#[test]
fn the_quickstart_is_valid() {
    let config = Config::load(None, &Overrides::default()).unwrap();
    assert_eq!((config.name.as_str(), config.data.source), ("quickstart", Source::Sample));
}

#[test]
fn a_file_that_is_not_there_is_the_users_mistake() {
    let error = Config::load(Some(Path::new("no/such.toml")), &Overrides::default()).unwrap_err();
    assert!(error.chain().any(|cause| cause.is::<UserError>()));
    assert_eq!(error.to_string(), "cannot read the experiment file no/such.toml");
}

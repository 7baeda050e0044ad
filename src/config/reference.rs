//! docs/experiment-file.md: every key that the file takes, found by asking for one that it does not, with
//! what the doc comments of [`Config`](super::Config) say of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::{Config, Overrides};

/// Set, the page is written anew.
const AGAIN: &str = "KILN_REFERENCE";

/// The least that a file holds.
const LEAST: &str = "name = 'a'\n[data]\nsource = 'a.csv'\n[[model]]\nname = 'a'\npath = 'a'\n";

/// Keys that are not a field's name: the type and the field or variant that say what they are, and what they
/// are where they are left out.
const OTHERWISE: [(&str, &str, &str, &str); 18] = [
    ("data.max_length", "Model", "max_length", "256"),
    ("model.0.max_length", "Model", "max_length", "`data.max_length`"),
    ("model.0.path", "Origin", "Folder", ""),
    ("model.0.architecture", "Origin", "architecture", ""),
    ("model.0.config", "Origin", "config", "{}"),
    ("model.0.tokenizer.vocab_size", "Origin", "vocab_size", "4000"),
    ("train.epochs", "Duration", "Epochs", "3"),
    ("train.max_steps", "Duration", "Steps", ""),
    ("train.warmup_ratio", "Warmup", "Ratio", "0.1"),
    ("train.warmup_steps", "Warmup", "Steps", ""),
    ("train.eval_steps", "Train", "eval", "\"epoch\""),
    ("train.save_steps", "Train", "save", "\"epoch\""),
    ("train.micro_batch_tokens", "Train", "micro_batch_tokens", "\"auto\""),
    ("train.threads", "Train", "threads", "\"auto\""),
    ("infer.workers", "Infer", "workers", "\"auto\""),
    ("data.source", "Data", "source", ""),
    ("train.distributed.nproc_per_node", "Distributed", "nproc_per_node", "1"),
    ("run_num", "Config", "run_num", "\"next\""),
];

/// Keys that no field keeps.
const ALONE: [(&str, &str, &str); 1] =
    [("train.distributed.enabled", "false", "Whether `nproc_per_node` counts; the command line's always does.")];

#[test]
fn the_reference_of_keys_is_not_stale() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/experiment-file.md");
    let page = page();
    if std::env::var_os(AGAIN).is_some() {
        crate::store::write_bytes(&file, page.as_bytes()).unwrap();
    }
    let there = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = page.lines().zip(there.lines()).find(|(now, then)| now != then);
    assert!(page == there, "{AGAIN}=1 writes {} anew; {differs:?}", file.display());
}

fn page() -> String {
    let docs = Docs::read();
    let defaults = Config::parse(LEAST, "least.toml", Path::new(""), &Overrides::default()).unwrap();
    let defaults = serde_json::to_value(defaults).unwrap();
    let mut text = String::from(
        "# The experiment file\n\nEvery key of the TOML file, made from the doc comments of `src/config.rs` by a test. An \
         unknown key, and a value out of its range, is an error that says where it stands and what is allowed. Paths \
         are relative to the file. `--set KEY=VALUE` lays any key over the file, lists by index: `--set model.0.name=b`.\n",
    );
    let mut tables = vec![String::new()];
    while !tables.is_empty() {
        let table = tables.remove(0);
        let heading = match table.as_str() {
            "" => "Top level".into(),
            "model.0" => "`[[model]]`, one or more".into(),
            table => format!("`[{}]`", table.replace(".0", "")),
        };
        let _ = write!(text, "\n## {heading}\n\n| key | left out | what |\n|---|---|---|\n");
        for key in allowed(&table).unwrap() {
            let path = join(&table, &key);
            let within = if path == "model" { "model.0".into() } else { path.clone() };
            let (default, what) = if path == "model.0.train" {
                (String::new(), "Any key of `[train]` but `distributed`, for this model.".into())
            } else if allowed(&within).is_some() && path != "data.source" {
                tables.push(within.clone());
                (String::new(), format!("The table `{}`.", within.replace(".0", "")))
            } else {
                if path == "data.source" {
                    tables.push(path.clone());
                }
                key_of(&docs, &defaults, &table, &key)
            };
            let default = if default.is_empty() { default } else { format!("`{}`", default.trim_matches('`')) };
            let _ = writeln!(text, "| `{key}` | {default} | {what} |");
        }
    }
    text
}

/// The keys that a table takes, or `None` of what is no table.
fn allowed(table: &str) -> Option<Vec<String>> {
    let unknown = join(table, "not-a-key");
    let overrides = Overrides { sets: vec![format!("{unknown}=1")], ..Overrides::default() };
    let error = Config::parse(LEAST, "least.toml", Path::new(""), &overrides).err()?.to_string();
    let said = error.split(&format!("unknown key `{unknown}`")).nth(1)?;
    let keys = said.split("= allowed: ").nth(1)?.lines().next()?;
    Some(keys.split(", ").map(str::to_owned).collect())
}

fn key_of(docs: &Docs, defaults: &Value, table: &str, key: &str) -> (String, String) {
    let path = join(table, key);
    if let Some((_, default, what)) = ALONE.iter().find(|(alone, ..)| *alone == path) {
        return ((*default).into(), (*what).into());
    }
    if let Some((_, kind, field, default)) = OTHERWISE.iter().find(|(otherwise, ..)| *otherwise == path) {
        return ((*default).into(), docs.of(&path, kind, field));
    }
    let last = table.rsplit('.').find(|part| *part != "0").unwrap_or_default();
    let kind = if last.is_empty() { "Config".into() } else { last[..1].to_uppercase() + &last[1..] };
    let place = match path.strip_prefix("train.distributed.") {
        Some(rest) => format!("/distributed/{rest}"),
        None if path.starts_with("train.") => format!("/models/0/{}", path.replace('.', "/")),
        None => format!("/{}", path.replace("model.0", "models/0").replace('.', "/")),
    };
    let default = match defaults.pointer(&place) {
        _ if LEAST.contains(&format!("{key} =")) => String::new(), // it has to be there
        Some(value @ (Value::String(_) | Value::Number(_) | Value::Bool(_) | Value::Array(_))) => value.to_string(),
        _ => docs.default(&kind, key),
    };
    (default, docs.of(&path, &kind, key))
}

fn join(table: &str, key: &str) -> String {
    if table.is_empty() { key.into() } else { format!("{table}.{key}") }
}

/// What the doc comments say, by type and by field or variant.
struct Docs {
    said: BTreeMap<(String, String), String>,
    /// The variants of a type that are names alone, in order.
    words: BTreeMap<String, Vec<String>>,
    types: BTreeMap<(String, String), String>,
}

impl Docs {
    fn read() -> Self {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files: Vec<_> =
            std::fs::read_dir(src.join("config")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.insert(0, src.join("config.rs"));
        let mut docs = Self { said: BTreeMap::new(), words: BTreeMap::new(), types: BTreeMap::new() };
        for file in files {
            docs.read_file(&std::fs::read_to_string(file).unwrap());
        }
        docs
    }

    fn read_file(&mut self, text: &str) {
        let (mut kind, mut doc) = (None::<String>, String::new());
        for line in text.lines() {
            let code = line.trim();
            let declared = code.strip_prefix("pub struct ").or_else(|| code.strip_prefix("pub enum "));
            if let Some(said) = code.strip_prefix("/// ") {
                doc = format!("{doc} {said}");
            } else if let Some(declared) = declared {
                kind = declared.split([' ', '<', '(']).next().map(str::to_owned);
                doc.clear();
            } else if line == "}" {
                kind = None;
                doc.clear();
            } else if let (Some(kind), false) = (&kind, code.starts_with("#[") || doc.is_empty()) {
                let code = code.strip_prefix("pub ").unwrap_or(code);
                let name: String = code.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let key = (kind.clone(), name.clone());
                if let Some(of) = code.strip_prefix(&format!("{name}: ")) {
                    self.types.insert(key.clone(), of.trim_end_matches(',').into());
                } else {
                    // A variant that holds something is no word.
                    let word = if code == format!("{name},") { snake(&name) } else { String::new() };
                    self.words.entry(kind.clone()).or_default().push(word);
                }
                self.said.insert(key, plain(&std::mem::take(&mut doc)));
            }
        }
    }

    /// What is said of a key, and the words that it takes.
    fn of(&self, path: &str, kind: &str, field: &str) -> String {
        let key = (kind.to_owned(), field.to_owned());
        let said = self.said.get(&key);
        let said = said.unwrap_or_else(|| panic!("no doc comment says what `{path}` is: {kind}::{field} has none"));
        match self.types.get(&key).and_then(|of| self.words.get(of)) {
            Some(words) if words.iter().all(|word| !word.is_empty()) => {
                let words: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
                format!("{said} One of {}.", words.join(", "))
            }
            _ => said.clone(),
        }
    }

    /// The first of the words of a key that a default leaves out of a file.
    fn default(&self, kind: &str, field: &str) -> String {
        let of = self.types.get(&(kind.to_owned(), field.to_owned()));
        match of.map(String::as_str) {
            Some("bool") => "false".into(),
            Some(of) => self.words.get(of).map(|words| format!("\"{}\"", words[0])).unwrap_or_default(),
            None => String::new(),
        }
    }
}

/// `MacroF1` as `macro_f1`
fn snake(name: &str) -> String {
    let mut snake = String::new();
    for (i, c) in name.char_indices() {
        if c.is_uppercase() && i > 0 {
            snake.push('_');
        }
        snake.extend(c.to_lowercase());
    }
    snake
}

/// Without links, as one cell of a table.
fn plain(doc: &str) -> String {
    doc.trim().replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

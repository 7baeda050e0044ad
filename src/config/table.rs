//! Typed reading of the tree. A value that is not as it should be is noted, the default stands in
//! for it, and reading goes on, so that one go finds every mistake.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::document::{At, Entry, Node, Value};
use super::problem::{Problem, SHOWN};

/// What all tables of one file share.
pub(super) struct Notes<'a> {
    /// The folder that the file's relative paths start from.
    pub base: &'a Path,
    /// Processes that share this machine's threads.
    pub ranks: usize,
    pub problems: RefCell<Vec<Problem>>,
}

impl Notes<'_> {
    pub fn note(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }
}

/// A table, or several laid over each other, the first on top.
pub(super) struct Table<'a> {
    notes: &'a Notes<'a>,
    layers: Vec<Layer<'a>>,
    asked: RefCell<Vec<&'static str>>,
}

#[derive(Clone)]
struct Layer<'a> {
    path: String,
    at: At,
    entries: &'a [Entry],
}

/// A value found under a key.
#[derive(Clone)]
pub(super) struct Field<'a> {
    notes: &'a Notes<'a>,
    pub path: String,
    pub key_at: At,
    pub node: &'a Node,
}

/// Numbers that a key takes, and how the error says so.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub holds: fn(f64) -> bool,
    pub says: &'static str,
}

impl<'a> Table<'a> {
    pub fn root(notes: &'a Notes<'a>, node: &'a Node) -> Self {
        Self::new(notes, String::new(), node.at.clone(), node)
    }

    fn new(notes: &'a Notes<'a>, path: String, at: At, node: &'a Node) -> Self {
        let entries: &[Entry] = if let Value::Table(entries) = &node.value { entries } else { &[] };
        Self { notes, layers: vec![Layer { path, at, entries }], asked: RefCell::default() }
    }

    /// Processes that share this machine's threads.
    pub fn ranks(&self) -> usize {
        self.notes.ranks
    }

    /// A table without keys, for one that is left out.
    pub fn empty(notes: &'a Notes<'a>) -> Self {
        Self { notes, layers: Vec::new(), asked: RefCell::default() }
    }

    /// This table, and where it has no key, `below`.
    pub fn over(mut self, below: &Table<'a>) -> Self {
        self.layers.extend(below.layers.iter().cloned());
        self
    }

    /// The value of `key` in the topmost layer that has it.
    pub fn get(&self, key: &'static str) -> Option<Field<'a>> {
        self.first_of([key]).map(|(_, field)| field)
    }

    /// The value of the one of `keys` that the topmost layer has. Two in one layer are a mistake,
    /// unless one of them was set on the command line: then it is meant.
    pub fn first_of<const N: usize>(&self, keys: [&'static str; N]) -> Option<(&'static str, Field<'a>)> {
        let mut asked = self.asked.borrow_mut();
        for key in keys {
            if !asked.contains(&key) {
                asked.push(key);
            }
        }
        self.layers.iter().find_map(|layer| {
            let found = keys.iter().filter_map(|key| layer.field(self.notes, key).map(|field| (*key, field)));
            let (flags, file): (Vec<_>, Vec<_>) = found.partition(|(_, field)| matches!(field.node.at, At::Flag(_)));
            let mut found = if flags.is_empty() { file } else { flags };
            if let [(first, _), (second, field), ..] = &found[..] {
                self.notes.note(Problem::new(
                    field.key_at.clone(),
                    format!("`{}` stands beside `{first}`: give one of `{first}` and `{second}`", field.path),
                ));
            }
            found.drain(..).next()
        })
    }

    /// The value of a key that must be there.
    pub fn required(&self, key: &'static str, fix: &str) -> Option<Field<'a>> {
        let field = self.get(key);
        if let (None, Some(layer)) = (&field, self.layers.first()) {
            let missing = join(&layer.path, key);
            self.notes.note(Problem::new(layer.at.clone(), format!("missing key `{missing}`: {fix}")));
        }
        field
    }

    /// A table within, empty where it is left out.
    pub fn table(&self, key: &'static str) -> Table<'a> {
        self.get(key).and_then(|field| field.table()).unwrap_or_else(|| Table::empty(self.notes))
    }

    pub fn integer(&self, key: &'static str, range: RangeInclusive<i64>, default: i64) -> u64 {
        let value = self.get(key).and_then(|field| field.integer(range, None)).unwrap_or(default);
        value as u64 // Ranges start at 0 or above.
    }

    /// An integer, or the word that stands for `other`.
    pub fn integer_or(&self, key: &'static str, range: RangeInclusive<i64>, word: &'static str) -> Option<u64> {
        let field = self.get(key)?;
        if matches!(&field.node.value, Value::String(text) if text == word) {
            return None;
        }
        field.integer(range, Some(word)).map(|value| value as u64)
    }

    pub fn number(&self, key: &'static str, bounds: Bounds, default: f64) -> f64 {
        self.get(key).and_then(|field| field.number(bounds)).unwrap_or(default)
    }

    pub fn boolean(&self, key: &'static str, default: bool) -> bool {
        let boolean = |field: Field<'_>| match field.node.value {
            Value::Boolean(value) => Some(value),
            _ => field.reject("true or false"),
        };
        self.get(key).and_then(boolean).unwrap_or(default)
    }

    pub fn string(&self, key: &'static str) -> Option<String> {
        self.get(key).and_then(|field| field.string("a string"))
    }

    pub fn choice<T: Copy>(&self, key: &'static str, choices: &[(&'static str, T)], default: T) -> T {
        self.get(key).and_then(|field| field.choice(choices)).unwrap_or(default)
    }

    /// Notes the keys that nobody asked for.
    pub fn finish(self) {
        let asked = self.asked.into_inner();
        for layer in &self.layers {
            let unknown = layer.entries.iter().filter(|entry| !asked.contains(&entry.key.as_str()));
            for entry in unknown.take(SHOWN + 1) {
                let path = join(&layer.path, &entry.key);
                let near =
                    nearest(&entry.key, &asked).map_or(String::new(), |near| format!(": did you mean `{near}`?"));
                self.notes
                    .note(Problem::new(entry.key_at.clone(), format!("unknown key `{path}`{near}")).allowed(&asked));
            }
        }
    }
}

impl<'a> Layer<'a> {
    fn field(&self, notes: &'a Notes<'a>, key: &str) -> Option<Field<'a>> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some(Field { notes, path: join(&self.path, key), key_at: entry.key_at.clone(), node: &entry.node })
    }
}

impl<'a> Field<'a> {
    /// Notes a mistake in this value.
    pub fn note(&self, message: impl Into<String>) {
        self.notes.note(Problem::new(self.node.at.clone(), message));
    }

    /// Notes that this value is not what `needs` says.
    pub fn reject<T>(&self, needs: &str) -> Option<T> {
        self.note(format!("`{}` is {}: needs {needs}", self.path, describe(&self.node.value)));
        None
    }

    pub fn integer(&self, range: RangeInclusive<i64>, word: Option<&str>) -> Option<i64> {
        match self.node.value {
            Value::Integer(value) if range.contains(&value) => Some(value),
            _ => {
                let or = word.map_or(String::new(), |word| format!(" or {word:?}"));
                match (*range.start(), *range.end()) {
                    (from, i64::MAX) => self.reject(&format!("an integer from {from}{or}")),
                    (from, to) if from == to => self.reject(&format!("{from}{or}")),
                    (from, to) => self.reject(&format!("an integer from {from} to {to}{or}")),
                }
            }
        }
    }

    pub fn number(&self, bounds: Bounds) -> Option<f64> {
        let value = match self.node.value {
            Value::Integer(value) => value as f64,
            Value::Float(value) => value,
            _ => f64::NAN,
        };
        if value.is_finite() && (bounds.holds)(value) { Some(value) } else { self.reject(bounds.says) }
    }

    pub fn string(&self, needs: &str) -> Option<String> {
        match &self.node.value {
            Value::String(text) if !text.is_empty() => Some(text.clone()),
            _ => self.reject(needs),
        }
    }

    pub fn choice<T: Copy>(&self, choices: &[(&'static str, T)]) -> Option<T> {
        let Value::String(text) = &self.node.value else { return self.reject(&one_of(choices, None)) };
        match choices.iter().find(|(name, _)| name == text) {
            Some((_, value)) => Some(*value),
            None => self.reject(&one_of(choices, Some(text))),
        }
    }

    /// A path, relative to the file that names it or to where the command runs.
    pub fn path(&self, needs: &str) -> Option<PathBuf> {
        let path = self.string(needs)?;
        Some(match self.node.at {
            At::File(_) => self.notes.base.join(path),
            At::Flag(_) => PathBuf::from(path),
        })
    }

    pub fn table(&self) -> Option<Table<'a>> {
        match self.node.value {
            Value::Table(_) => Some(Table::new(self.notes, self.path.clone(), self.key_at.clone(), self.node)),
            _ => self.reject("a table"),
        }
    }

    /// The keys of a table, where they are the user's own, and their values.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, Field<'a>)> {
        let entries: &[Entry] = if let Value::Table(entries) = &self.node.value { entries } else { &[] };
        let (notes, path) = (self.notes, self.path.clone());
        entries.iter().map(move |entry| {
            let field = Field { notes, path: join(&path, &entry.key), key_at: entry.key_at.clone(), node: &entry.node };
            (entry.key.as_str(), field)
        })
    }

    /// The items of a list.
    pub fn items(&self, needs: &str) -> Option<Vec<Field<'a>>> {
        let Value::Array(items) = &self.node.value else { return self.reject(needs) };
        let item = |(index, node): (usize, &'a Node)| Field {
            notes: self.notes,
            path: format!("{}.{index}", self.path),
            key_at: node.at.clone(),
            node,
        };
        Some(items.iter().enumerate().map(item).collect())
    }

    /// The value as JSON.
    pub fn json(&self) -> serde_json::Value {
        json(self.node)
    }
}

fn json(node: &Node) -> serde_json::Value {
    match &node.value {
        Value::String(text) | Value::Datetime(text) => text.clone().into(),
        Value::Integer(value) => (*value).into(),
        Value::Float(value) => (*value).into(),
        Value::Boolean(value) => (*value).into(),
        Value::Array(items) => items.iter().map(json).collect::<Vec<_>>().into(),
        Value::Table(entries) => {
            entries.iter().map(|entry| (entry.key.clone(), json(&entry.node))).collect::<serde_json::Map<_, _>>().into()
        }
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        Value::Integer(value) => value.to_string(),
        Value::Float(value) => format!("{value:?}"),
        Value::Boolean(value) => value.to_string(),
        Value::Datetime(text) => format!("the date {text}"),
        Value::Array(_) => "a list".into(),
        Value::Table(_) => "a table".into(),
    }
}

fn one_of<T>(choices: &[(&'static str, T)], got: Option<&str>) -> String {
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    let list = match &quoted[..] {
        [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    };
    let near =
        got.and_then(|got| nearest(got, &names)).map_or(String::new(), |near| format!("; did you mean {near:?}?"));
    list + &near
}

/// The name nearest to `got`, if one is near enough to be meant.
fn nearest<'n>(got: &str, names: &[&'n str]) -> Option<&'n str> {
    let got = got.to_lowercase().replace('-', "_");
    names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&got, name), *name))
        .min()
        .filter(|(distance, name)| *distance <= (name.len() / 3).max(1))
        .map(|(_, name)| name)
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

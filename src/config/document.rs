//! The experiment file as a tree in which each value knows where it was written, so that `--set`
//! can be laid over it and every error can point.

use std::ops::Range;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problem;

/// Where a key or a value was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum At {
    /// Bytes of the file.
    File(Range<usize>),
    /// A command-line option, as `--set train.epochs=3`.
    Flag(Arc<str>),
}

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: At,
    pub value: Value,
}

impl Node {
    /// How many items the list under `key` has.
    pub fn items(&self, key: &str) -> usize {
        let Value::Table(entries) = &self.value else { return 0 };
        entries
            .iter()
            .find(|entry| entry.key == key)
            .map_or(0, |entry| if let Value::Array(items) = &entry.node.value { items.len() } else { 0 })
    }
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Datetime(String),
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

/// A key of a table and its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: String,
    pub key_at: At,
    pub node: Node,
}

/// Parses a whole file.
pub(super) fn parse(text: &str) -> Result<Node, Vec<Problem>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(errors
            .iter()
            .map(|error| Problem::new(At::File(error.span().unwrap_or(0..0)), error.message()))
            .collect());
    }
    let mut problems = Vec::new();
    let value = from_table(table.get_ref(), None, &mut problems);
    if problems.is_empty() { Ok(Node { at: At::File(0..0), value }) } else { Err(problems) }
}

/// Lays one `--set KEY=VALUE` over the tree. VALUE is TOML, or else a string.
pub(super) fn set(root: &mut Node, assignment: &str) -> Result<(), Problem> {
    let flag: Arc<str> = format!("--set {assignment}").into();
    let fail = |message: String| Problem::new(At::Flag(flag.clone()), message);
    let (key, raw) = assignment.split_once('=').ok_or_else(|| fail("needs KEY=VALUE, as `train.epochs=3`".into()))?;
    let path = key_path(key)
        .ok_or_else(|| fail(format!("{key:?} is no key: needs names with dots between them, as `model.0.name`")))?;
    let mut problems = Vec::new();
    let value = match DeValue::parse(raw.trim()) {
        Ok(value) => from_value(value.get_ref(), Some(&flag), &mut problems, value.span()),
        Err(_) => Value::String(raw.trim().to_owned()),
    };
    if let Some(problem) = problems.pop() {
        return Err(problem);
    }

    lay(root, &path, value, &flag)
}

/// Puts `value`, given by the option `flag`, at `path`.
pub(super) fn lay<S: AsRef<str>>(root: &mut Node, path: &[S], value: Value, flag: &Arc<str>) -> Result<(), Problem> {
    let at = At::Flag(flag.clone());
    let walked = |depth: usize| path[..depth].iter().map(AsRef::as_ref).collect::<Vec<_>>().join(".");
    let mut node = root;
    for (depth, name) in path.iter().map(AsRef::as_ref).enumerate() {
        // A plain value on the way makes room: `--set data.source.train=…` over `source = "sample"`.
        if !matches!(node.value, Value::Array(_) | Value::Table(_)) {
            *node = Node { at: at.clone(), value: Value::Table(Vec::new()) };
        }
        node = match &mut node.value {
            Value::Array(items) => {
                let (count, list) = (items.len(), walked(depth));
                let item = name.parse::<usize>().ok().and_then(|index| items.get_mut(index));
                item.ok_or_else(|| {
                    let last = count.saturating_sub(1);
                    Problem::new(
                        at.clone(),
                        format!("`{list}` is a list of {count}: needs an index from 0 to {last}, got `{name}`"),
                    )
                })?
            }
            Value::Table(entries) => {
                let index = entries.iter().position(|entry| entry.key == name).unwrap_or_else(|| {
                    let node = Node { at: at.clone(), value: Value::Table(Vec::new()) };
                    entries.push(Entry { key: name.to_owned(), key_at: at.clone(), node });
                    entries.len() - 1
                });
                &mut entries[index].node
            }
            _ => unreachable!("any other value was made a table above"),
        };
    }
    *node = Node { at, value };
    Ok(())
}

/// The names in `train.class_weights."a.b"`.
fn key_path(key: &str) -> Option<Vec<String>> {
    // The parser of keys is the parser of files: quoting works as it does there.
    let text = format!("{} = 0", key.trim());
    let parsed = DeTable::parse(&text).ok()?;
    let mut table = parsed.get_ref();
    let mut path = Vec::new();
    loop {
        let (name, value) = table.iter().next()?;
        path.push(name.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return Some(path),
        }
    }
}

fn from_table(table: &DeTable<'_>, flag: Option<&Arc<str>>, problems: &mut Vec<Problem>) -> Value {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            key_at: place(flag, key.span()),
            node: from_spanned(value, flag, problems),
        })
        .collect();
    // The parser's map is sorted by name; the file's order is the reader's.
    entries.sort_by_key(|entry| match &entry.key_at {
        At::File(span) => span.start,
        At::Flag(_) => 0,
    });
    Value::Table(entries)
}

fn from_spanned(value: &Spanned<DeValue<'_>>, flag: Option<&Arc<str>>, problems: &mut Vec<Problem>) -> Node {
    let span = value.span();
    Node { at: place(flag, span.clone()), value: from_value(value.get_ref(), flag, problems, span) }
}

fn from_value(value: &DeValue<'_>, flag: Option<&Arc<str>>, problems: &mut Vec<Problem>, span: Range<usize>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(integer) => {
            Value::Integer(i64::from_str_radix(integer.as_str(), integer.radix()).unwrap_or_else(|_| {
                problems.push(Problem::new(
                    place(flag, span),
                    format!("the integer {} does not fit 64 bits", integer.as_str()),
                ));
                0
            }))
        }
        DeValue::Float(float) => Value::Float(float.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(boolean) => Value::Boolean(*boolean),
        DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| from_spanned(item, flag, problems)).collect()),
        DeValue::Table(table) => from_table(table, flag, problems),
    }
}

fn place(flag: Option<&Arc<str>>, span: Range<usize>) -> At {
    flag.map_or(At::File(span), |flag| At::Flag(flag.clone()))
}

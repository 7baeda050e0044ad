//! What a forward reads: input columns, and the sequences that they are cut into.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use kiln_kernels::Packing;

use super::graph::{Attribute, InitializerData};
use super::plan::Planner;
use super::tensor::Origin;
use super::{Dropout, Graph, Tape, Tensor};
use crate::{Error, Result};

/// How values are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// No tape, no dropout.
    Evaluate,
    /// A tape, and dropout keyed by seed and optimizer step.
    Train {
        /// The experiment's seed.
        seed: u64,
        /// The optimizer step, from 0.
        step: u64,
    },
}

/// Whole numbers for each token: packed values, or a graph input.
#[derive(Clone)]
pub struct Ids {
    pub(super) kind: IdsKind,
    pub(super) origin: Origin,
}

#[derive(Clone)]
pub(super) enum IdsKind {
    Value(Arc<[u32]>),
    /// The name of an int64 value of the graph, `[batch, sequence]`, `[sequence]` or `[1]`.
    Symbol {
        name: String,
    },
}

/// The batch's sequences: packed one after another, or `[batch, sequence]` with an `attention_mask`.
/// Attention, positions and pooling read them.
#[derive(Clone)]
pub struct Sequences {
    pub(super) kind: SequencesKind,
    pub(super) recompute: bool,
    mode: Mode,
    origin: Origin,
}

#[derive(Clone)]
pub(super) enum SequencesKind {
    /// The sequences' tokens, and their first tokens alone.
    Packed {
        packing: Packing,
        firsts: Packing,
    },
    Symbolic {
        attention_mask: RefCell<Option<String>>,
        max_positions: usize,
    },
}

impl Sequences {
    /// The position of each token in its sequence, the first token's being `first`.
    pub fn positions(&self, first: usize) -> Ids {
        let kind = match (&self.kind, &self.origin) {
            (SequencesKind::Packed { packing, .. }, _) => {
                let spans = packing.offsets().windows(2).map(|span| (0..span[1] - span[0]).map(|i| first as u32 + i));
                IdsKind::Value(spans.flatten().collect())
            }
            (SequencesKind::Symbolic { max_positions, .. }, Origin::Symbol(graph)) => {
                let mut g = graph.borrow_mut();
                let all = g.initializer(
                    &format!("positions_{first}"),
                    vec![*max_positions],
                    InitializerData::I64((first as i64..).take(*max_positions).collect()),
                );
                let shape = g.node("Shape", &["input_ids"], &[]);
                let (zero, one) = (g.ints("start", &[0]), g.ints("axis", &[1]));
                let length = g.node("Gather", &[&shape, &one], &[("axis", Attribute::Int(0))]);
                let name = g.node("Slice", &[&all, &zero, &length, &zero], &[]); // [sequence]
                IdsKind::Symbol { name }
            }
            // Symbolic sequences are only ever made with a graph as their origin.
            (SequencesKind::Symbolic { .. }, Origin::Value(_) | Origin::Plan(_)) => IdsKind::Value(Arc::new([])),
        };
        Ids { kind, origin: self.origin.clone() }
    }

    /// 0 for each token.
    pub fn zeros(&self) -> Ids {
        let kind = match (&self.kind, &self.origin) {
            (SequencesKind::Symbolic { .. }, Origin::Symbol(graph)) => {
                IdsKind::Symbol { name: graph.borrow_mut().ints("zeros", &[0]) } // one for all tokens
            }
            (SequencesKind::Packed { packing, .. }, _) => IdsKind::Value(vec![0; packing.tokens()].into()),
            (SequencesKind::Symbolic { .. }, Origin::Value(_) | Origin::Plan(_)) => IdsKind::Value(Arc::new([])),
        };
        Ids { kind, origin: self.origin.clone() }
    }

    /// The same with the tape of `origin`, or without one.
    pub(super) fn at(&self, origin: &Origin) -> Self {
        Self { origin: origin.clone(), ..self.clone() }
    }

    /// The kernel's dropout, where this forward drops anything.
    pub(super) fn dropout(&self, dropout: &Dropout) -> Option<kiln_kernels::Dropout> {
        match self.mode {
            Mode::Train { seed, step } if dropout.probability > 0.0 => {
                Some(kiln_kernels::Dropout { probability: dropout.probability, seed, step, site: dropout.site })
            }
            _ => None,
        }
    }

    /// The packing of a value of so many rows: one for each token, or for each sequence.
    ///
    /// # Errors
    /// Another number of rows; symbols have no packing.
    pub(super) fn packing(&self, rows: usize) -> Result<&Packing> {
        match &self.kind {
            SequencesKind::Packed { packing, .. } if rows == packing.tokens() => Ok(packing),
            SequencesKind::Packed { firsts, .. } if rows == firsts.tokens() => Ok(firsts),
            SequencesKind::Packed { packing, firsts } => Err(Error::Input(format!(
                "a value of {rows} rows for {} tokens of {} sequences",
                packing.tokens(),
                firsts.tokens()
            ))),
            SequencesKind::Symbolic { .. } => Err(Error::Input("symbolic sequences have no packing".into())),
        }
    }

    /// The name of the additive mask `[batch, 1, 1, sequence]`, written to the graph once. ONNX
    /// Runtime's attention fusion asks for just these nodes.
    pub(super) fn additive_mask(&self) -> Result<String> {
        let (SequencesKind::Symbolic { attention_mask, .. }, Origin::Symbol(graph)) = (&self.kind, &self.origin) else {
            return Err(Error::Input("packed sequences have no mask".into()));
        };
        let mut mask = attention_mask.borrow_mut();
        if let Some(name) = &*mask {
            return Ok(name.clone());
        }
        let mut g = graph.borrow_mut();
        let rows = g.node("Unsqueeze", &["attention_mask"], &[("axes", Attribute::Ints(vec![1]))]);
        let heads = g.node("Unsqueeze", &[&rows], &[("axes", Attribute::Ints(vec![2]))]);
        let float = g.node("Cast", &[&heads], &[("to", Attribute::Int(1))]); // TensorProto.FLOAT
        let one = g.scalar("one", 1.0);
        let dropped = g.node("Sub", &[&one, &float], &[]);
        let lowest = g.scalar("mask_value", -10000.0);
        let name = g.node("Mul", &[&dropped, &lowest], &[]);
        *mask = Some(name.clone());
        Ok(name)
    }
}

/// All that a forward reads.
pub struct Inputs {
    /// The batch's sequences.
    pub sequences: Sequences,
    columns: BTreeMap<&'static str, Ids>,
    hidden_states: Option<RefCell<Vec<Tensor>>>,
}

impl Inputs {
    /// A packed batch: each column holds one id for every token of `packing`.
    ///
    /// # Errors
    /// A column whose length is not the packing's.
    pub fn packed(packing: Packing, columns: Vec<(&'static str, Vec<u32>)>, mode: Mode) -> Result<Self> {
        let tape = matches!(mode, Mode::Train { .. }).then(Tape::default);
        let origin = Origin::Value(tape);
        let tokens = packing.tokens();
        let mut ids = BTreeMap::new();
        for (name, column) in columns {
            if column.len() != tokens {
                return Err(Error::Input(format!("{name} has {} ids for {tokens} tokens", column.len())));
            }
            ids.insert(name, Ids { kind: IdsKind::Value(column.into()), origin: origin.clone() });
        }
        let kind = SequencesKind::Packed { firsts: packing.firsts(), packing };
        let sequences = Sequences { kind, recompute: false, mode, origin };
        Ok(Self { sequences, columns: ids, hidden_states: None })
    }

    /// The graph's inputs, `[batch, sequence]` each.
    pub(super) fn symbolic(graph: Rc<RefCell<Graph>>, names: &'static [&'static str], max_positions: usize) -> Self {
        let origin = Origin::Symbol(graph);
        let column = |name: &'static str| {
            let kind = IdsKind::Symbol { name: name.to_owned() };
            (name, Ids { kind, origin: origin.clone() })
        };
        let kind = SequencesKind::Symbolic { attention_mask: RefCell::default(), max_positions };
        let columns = names.iter().map(|name| column(name)).collect();
        let sequences = Sequences { kind, recompute: false, mode: Mode::Evaluate, origin };
        Self { sequences, columns, hidden_states: None }
    }

    /// A batch of zeros that is planned.
    pub(super) fn planned(planner: Planner, names: &'static [&'static str], packing: Packing, mode: Mode) -> Self {
        let (origin, tokens) = (Origin::Plan(planner), packing.tokens());
        let zeros = Ids { kind: IdsKind::Value(vec![0; tokens].into()), origin: origin.clone() };
        let columns = names.iter().map(|&name| (name, zeros.clone())).collect();
        let kind = SequencesKind::Packed { firsts: packing.firsts(), packing };
        let sequences = Sequences { kind, recompute: false, mode, origin };
        Self { sequences, columns, hidden_states: None }
    }

    /// Whether layers that are called through [`recompute`](super::recompute()) keep their input alone
    /// for backward and are computed again there: less memory for about a third more time.
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.sequences.recompute = recompute;
        self
    }

    /// Keeps the hidden states that the forward shows, as `output_hidden_states` does in transformers.
    pub fn keep_hidden_states(mut self) -> Self {
        self.hidden_states = Some(RefCell::default());
        self
    }

    /// Whether hidden states are kept, for which a model has to make all that it can show.
    pub fn keeps_hidden_states(&self) -> bool {
        self.hidden_states.is_some()
    }

    /// The hidden states kept: the embeddings' output, then each layer's.
    pub fn into_hidden_states(self) -> Vec<Tensor> {
        self.hidden_states.map(RefCell::into_inner).unwrap_or_default()
    }

    /// Shows a hidden state, in order.
    pub fn hidden_state(&self, x: &Tensor) {
        if let Some(kept) = &self.hidden_states {
            kept.borrow_mut().push(x.clone());
        }
    }

    /// The tape that this forward records on, in training.
    pub fn tape(&self) -> Option<Tape> {
        match &self.sequences.origin {
            Origin::Value(tape) => tape.clone(),
            Origin::Symbol(_) | Origin::Plan(_) => None,
        }
    }

    /// A column of ids. `token_type_ids` that were not given are zeros, as in transformers.
    ///
    /// # Errors
    /// Any other column that was not given.
    pub fn ids(&self, name: &'static str) -> Result<Ids> {
        match (self.columns.get(name), &self.sequences.origin) {
            (Some(ids), _) => Ok(ids.clone()),
            (None, Origin::Value(_)) if name == "token_type_ids" => Ok(self.sequences.zeros()),
            _ => Err(Error::Input(format!("the model reads {name}, which was not given"))),
        }
    }
}

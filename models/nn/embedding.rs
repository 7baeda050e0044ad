//! Embeddings: the sum of several tables' rows in one pass, with a gradient that costs what the
//! batch costs.

use kiln_kernels::embedding;

use super::inputs::{Ids, IdsKind};
use super::op::apply_at;
use super::parameters::add_gradients;
use super::{Attribute, Builder, Cost, Data, Dim, Gradients, Graph, Init, Op, Parameter, Shape, Symbol, Tensor};
use crate::{Error, Result};

/// A table of rows.
#[derive(Clone)]
pub struct Embedding {
    weight: Parameter, // [rows, size]
}

impl Embedding {
    /// Declares `weight` `[rows, size]`.
    ///
    /// # Errors
    /// None today; layers share the form.
    pub fn new(rows: usize, size: usize, init: Init, b: &Builder) -> Result<Self> {
        Ok(Self { weight: b.parameter("weight", &[rows, size], init, true) })
    }
}

/// The sum over tables of the rows that their ids name: `[tokens, size]`.
///
/// # Errors
/// No table, or an id that its table does not have: names both and the position.
pub fn embed(tables: &[(&Embedding, &Ids)]) -> Result<Tensor> {
    let (_, first) = tables.first().ok_or_else(|| Error::Input("embed needs a table".into()))?;
    let pairs = tables.iter().map(|(table, ids)| (table.weight.clone(), ids.kind.clone())).collect();
    apply_at(&first.origin, Embed { tables: pairs }, &[])
}

struct Embed {
    tables: Vec<(Parameter, IdsKind)>,
}

impl Embed {
    fn values(&self) -> Result<Vec<(&Parameter, &[u32])>> {
        let ids = self.tables.iter().map(|(table, ids)| match ids {
            IdsKind::Value(ids) => Ok((table, &ids[..])),
            IdsKind::Symbol { .. } => Err(Error::Input(format!("{}: ids are symbols, not values", table.name()))),
        });
        ids.collect()
    }
}

impl Op for Embed {
    type Saved = ();

    fn parameters(&self) -> Vec<&Parameter> {
        self.tables.iter().map(|(table, _)| table).collect()
    }

    fn forward(&self, _: &[&Data]) -> Result<(Data, ())> {
        let (tables, size) = (self.values()?, self.tables[0].0.shape()[1]);
        let values = self.tables[0].0.values();
        let rows: Vec<_> = tables.iter().map(|(table, ids)| (values.view(table.range()), *ids)).collect();
        Ok((embedding::forward(&rows, size)?, ()))
    }

    fn backward(&self, (): (), dy: Data, _: &mut Gradients<'_>) -> Result<()> {
        for (table, ids) in self.values()? {
            add_gradients([table], |[gradient]| match gradient {
                Some(gradient) => embedding::backward(&dy, ids, gradient),
                None => Ok(()),
            })?;
        }
        Ok(())
    }

    fn shape(&self, _: &[&Shape]) -> Result<Shape> {
        let (table, ids) = &self.tables[0];
        let size = Dim::Fixed(table.shape()[1]);
        Ok(match ids {
            IdsKind::Value(ids) => vec![Dim::Fixed(ids.len()), size],
            IdsKind::Symbol { .. } => vec![Dim::Symbol("batch"), Dim::Symbol("sequence"), size],
        })
    }

    fn onnx(&self, g: &mut Graph, _: &[&Symbol]) -> Result<String> {
        let mut sum: Option<String> = None;
        for (table, ids) in &self.tables {
            let IdsKind::Symbol { name } = ids else {
                return Err(Error::Input(format!("{}: ids are values, not symbols", table.name())));
            };
            let weight = g.parameter(table);
            let rows = g.node("Gather", &[&weight, name], &[("axis", Attribute::Int(0))]);
            sum = Some(match sum {
                Some(sum) => g.node("Add", &[&sum, &rows], &[]),
                None => rows,
            });
        }
        sum.ok_or_else(|| Error::Input("embed needs a table".into()))
    }

    fn cost(&self, _: &[&[usize]]) -> Cost {
        Cost::default() // rows in and out
    }
}

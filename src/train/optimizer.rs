//! AdamW (Loshchilov and Hutter, 2019) over flat buffers, with its groups and moments.

use anyhow::Result;
use kiln_kernels::{Buffer, adamw, norm};
use kiln_models::nn::{Parameter, Parameters};

use crate::config;
use crate::user_error;

/// The optimizer's state and settings.
pub struct Optimizer {
    settings: config::Train,
    groups: Vec<Group>,
    /// First moments, `[elements]`.
    pub exp_avg: Buffer,
    /// Second moments, `[elements]`.
    pub exp_avg_sq: Buffer,
}

struct Group {
    range: std::ops::Range<usize>,
    factor: f64,
    weight_decay: f64,
}

impl Optimizer {
    /// Freezes what `train.freeze` names, allocates gradients and moments, and forms the groups: no
    /// decay for biases and norms, and layer-wise learning rates that fall by `layer_lr_decay` a
    /// layer from the head down.
    ///
    /// # Errors
    /// A prefix that no parameter's name begins with, or nothing left to train.
    pub fn new(parameters: &Parameters, settings: &config::Train) -> Result<Self> {
        freeze(parameters, settings)?;
        let top = parameters.iter().map(Parameter::depth).max().unwrap_or(0);
        let mut groups: Vec<Group> = Vec::new();
        for parameter in parameters.iter().filter(|p| p.is_trainable()) {
            let factor = settings.layer_lr_decay.powi((top - parameter.depth()) as i32);
            let weight_decay = if parameter.decays() { settings.weight_decay } else { 0.0 };
            let range = parameter.range();
            match groups.last_mut() {
                Some(last)
                    if last.range.end == range.start && last.factor == factor && last.weight_decay == weight_decay =>
                {
                    last.range.end = range.end;
                }
                _ => groups.push(Group { range, factor, weight_decay }),
            }
        }
        if groups.is_empty() {
            return Err(user_error!("train.freeze = {:?} leaves nothing to train", settings.freeze));
        }
        parameters.allocate_gradients()?;
        let zeros = || Buffer::zeros(parameters.elements(), &parameters.device());
        Ok(Self { settings: settings.clone(), groups, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }

    /// The global norm of the trainable parameters' gradients, in f64.
    ///
    /// # Errors
    /// A kernel's.
    pub fn gradient_norm(&self, parameters: &Parameters) -> Result<f64> {
        let ranges: Vec<_> = self.groups.iter().map(|group| group.range.clone()).collect();
        Ok(norm::global(&parameters.gradients(), &ranges)?)
    }

    /// One update with the learning rate given, gradients clipped to `max_grad_norm`; leaves the
    /// gradients at zero. `step` counts from 0.
    ///
    /// # Errors
    /// A kernel's.
    pub fn step(&mut self, parameters: &Parameters, step: u64, learning_rate: f64, gradient_norm: f64) -> Result<()> {
        let train = &self.settings;
        let clips = train.max_grad_norm > 0.0 && gradient_norm > train.max_grad_norm;
        // torch.nn.utils.clip_grad_norm_ has the same 1e-6.
        let gradient_scale = if clips { train.max_grad_norm / (gradient_norm + 1e-6) } else { 1.0 };
        let groups: Vec<_> = self
            .groups
            .iter()
            .map(|group| adamw::Group {
                range: group.range.clone(),
                learning_rate: learning_rate * group.factor,
                weight_decay: group.weight_decay,
            })
            .collect();
        let settings = adamw::AdamW {
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            epsilon: train.adam_epsilon,
            step: step + 1,
            gradient_scale,
        };
        let (mut values, mut gradients) = (parameters.values_mut(), parameters.gradients_mut());
        adamw::step(&mut values, &mut gradients, &mut self.exp_avg, &mut self.exp_avg_sq, &groups, &settings)?;
        Ok(())
    }
}

/// Freezes what `train.freeze` names.
///
/// # Errors
/// A prefix that no parameter's name begins with.
pub fn freeze(parameters: &Parameters, settings: &config::Train) -> Result<()> {
    for prefix in &settings.freeze {
        let mut frozen = parameters.iter().filter(|p| p.name().starts_with(prefix.as_str())).peekable();
        if frozen.peek().is_none() {
            let names: Vec<_> = parameters.iter().map(Parameter::name).collect();
            let nearest = names.iter().max_by(|a, b| strsim::jaro(a, prefix).total_cmp(&strsim::jaro(b, prefix)));
            return Err(user_error!(
                "train.freeze: no parameter's name begins with {prefix:?}; the nearest is {:?}",
                nearest.copied().unwrap_or_default()
            ));
        }
        frozen.for_each(|parameter| parameter.set_trainable(false));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};

    fn optimizer_of(sets: &[&str]) -> (Parameters, Result<Optimizer>) {
        let config = serde_json::json!({
            "model_type": "bert", "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 2,
            "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 8,
        });
        let parameters = kiln_models::build(config.as_object().unwrap(), 1).unwrap().parameters;
        let sets = sets.iter().map(|set| (*set).to_owned()).collect();
        let train = Config::load(None, &Overrides { sets, ..Overrides::default() }).unwrap().models[0].train.clone();
        let optimizer = Optimizer::new(&parameters, &train);
        (parameters, optimizer)
    }

    #[test]
    fn groups_follow_depth_and_leave_biases_and_norms_undecayed() {
        let (parameters, optimizer) = optimizer_of(&["train.layer_lr_decay=0.5", "train.weight_decay=0.25"]);
        let groups = optimizer.unwrap().groups;
        let group = |name: &str| {
            let range = parameters.iter().find(|p| p.name() == name).unwrap().range();
            groups
                .iter()
                .find(|g| g.range.start <= range.start && range.end <= g.range.end)
                .map(|g| (g.factor, g.weight_decay))
        };
        assert_eq!(group("classifier.weight"), Some((1.0, 0.25)));
        assert_eq!(group("bert.pooler.dense.bias"), Some((1.0, 0.0)));
        assert_eq!(group("bert.encoder.layer.1.attention.self.query.weight"), Some((0.5, 0.25)));
        assert_eq!(group("bert.encoder.layer.0.output.LayerNorm.weight"), Some((0.25, 0.0)));
        assert_eq!(group("bert.embeddings.word_embeddings.weight"), Some((0.125, 0.25)));
        let covered: usize = groups.iter().map(|g| g.range.len()).sum();
        assert_eq!(covered, parameters.elements());
    }

    #[test]
    fn frozen_prefixes_have_to_match_and_to_leave_something() {
        let (parameters, optimizer) = optimizer_of(&["train.freeze=['bert.']"]);
        assert_eq!(optimizer.unwrap().groups.iter().map(|g| g.range.len()).sum::<usize>(), 4 * 2 + 2);
        assert!(parameters.iter().all(|p| p.is_trainable() == p.name().starts_with("classifier")));
        let error = |set| optimizer_of(&[set]).1.err().unwrap().to_string();
        assert_eq!(
            error("train.freeze=['bert.embedings']"),
            "train.freeze: no parameter's name begins with \"bert.embedings\"; the nearest is \"bert.embeddings.LayerNorm.bias\""
        );
        assert_eq!(
            error("train.freeze=['bert.', 'classifier']"),
            "train.freeze = [\"bert.\", \"classifier\"] leaves nothing to train"
        );
    }
}

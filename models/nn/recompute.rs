//! Activation checkpointing (Chen et al., 2016): memory for one layer instead of all, at the price of
//! a second forward.

use std::sync::Arc;

use super::tensor::Origin;
use super::{Sequences, Tensor};
use crate::Result;

/// `forward(layer, x, sequences)`. Where a training recomputes ([`Inputs::recompute`](super::Inputs::recompute)),
/// the tape keeps `x` alone of it, and backward does it again first: to the same bits, for dropout is a
/// pure function of its place.
///
/// # Errors
/// `forward`'s.
pub fn recompute<L: 'static>(
    layer: &Arc<L>,
    x: &Tensor,
    sequences: &Sequences,
    forward: fn(&L, &Tensor, &Sequences) -> Result<Tensor>,
) -> Result<Tensor> {
    let origin = Origin::from(x);
    let again = {
        let (layer, origin) = (layer.clone(), origin.untaped());
        let (x, sequences) = (x.at(&origin), sequences.at(&origin));
        move |origin: &Origin| forward(&layer, &x.at(origin), &sequences.at(origin))
    };
    match origin {
        Origin::Value(Some(tape)) if sequences.recompute => {
            tape.recompute(move |tape| again(&Origin::Value(Some(tape.clone()))))
        }
        Origin::Plan(planner) if sequences.recompute && planner.tape.is_some() => planner.recompute(again),
        _ => forward(layer, x, sequences),
    }
}

#[cfg(test)]
mod tests {
    use kiln_kernels::Device;

    use super::*;
    use crate::nn::{Data, Inputs, Mode, Packing, Parameter};

    /// Logits and all gradients of one micro-batch.
    fn step(recompute: bool, frozen: &str) -> (Vec<f32>, Vec<f32>) {
        let config = serde_json::json!({
            "model_type": "bert", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3,
            "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3,
        });
        let bert = crate::build(config.as_object().unwrap(), 5).unwrap(); // dropout 0.1
        bert.parameters.allocate_gradients().unwrap();
        bert.parameters
            .iter()
            .filter(|p| p.name().starts_with(frozen))
            .for_each(|p| p.set_trainable(frozen.is_empty()));
        let packing = Packing::new(vec![0, 7, 8, 20], vec![4, 9, 2]).unwrap();
        let ids = vec![("input_ids", (0..20).map(|i| i * 7 % 30).collect())];
        let inputs = Inputs::packed(packing, ids, Mode::Train { seed: 3, step: 8 }).unwrap().recompute(recompute);
        let logits = bert.model.forward(&inputs).unwrap();
        let dy = Data::from_vec((0..9).map(|i| i as f32 - 4.0).collect(), (3, 3), &Device::Cpu).unwrap();
        inputs.tape().unwrap().backward(&logits, dy).unwrap();
        let trained = |p: &&Parameter| p.is_trainable();
        assert!(bert.parameters.iter().filter(trained).all(Parameter::is_written));
        assert!(bert.parameters.iter().filter(|p| !trained(p)).all(|p| !p.is_written()));
        let logits = logits.data().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (logits, bert.parameters.gradients().read(0..bert.parameters.elements()).unwrap())
    }

    #[test]
    fn every_gradient_has_the_same_bits() {
        for frozen in ["", "bert.embeddings", "bert.encoder.layer.0", "bert."] {
            let ((logits, gradients), (logits_again, gradients_again)) = (step(false, frozen), step(true, frozen));
            assert_eq!(logits, logits_again, "{frozen}");
            assert!(gradients.iter().any(|&g| g != 0.0));
            assert!(gradients.iter().zip(&gradients_again).all(|(a, b)| a.to_bits() == b.to_bits()), "{frozen}");
        }
    }

    #[test]
    fn a_tape_that_is_given_up_frees_what_it_held() {
        let layer = Arc::new(());
        let packing = Packing::new(vec![0, 2], vec![0]).unwrap();
        let b = crate::nn::Builder::new();
        let words = crate::nn::Embedding::new(4, 8, crate::nn::Init::Ones, &b).unwrap();
        b.finish(1).unwrap();
        let inputs =
            Inputs::packed(packing, vec![("input_ids", vec![1, 2])], Mode::Train { seed: 0, step: 0 }).unwrap();
        let inputs = inputs.recompute(true);
        let x = crate::nn::embed(&[(&words, &inputs.ids("input_ids").unwrap())]).unwrap();
        let y = recompute(&layer, &x, &inputs.sequences, |(), x, _| crate::nn::gelu(x)).unwrap();
        assert_eq!(Arc::strong_count(&layer), 2);
        drop((inputs, x, y));
        assert_eq!(Arc::strong_count(&layer), 1);
    }
}

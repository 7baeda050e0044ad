//! The gate that every training passes at its first step.

use anyhow::{Result, ensure};
use kiln_models::nn::{Parameter, Parameters};

/// Refuses to go on unless every trainable parameter has a finite gradient that something wrote:
/// a forward that leaves a parameter out would train on in silence.
///
/// # Errors
/// Names the parameters that have none.
pub fn gradient_coverage(parameters: &Parameters) -> Result<()> {
    let gradients = parameters.gradients();
    let names = |which: &dyn Fn(&Parameter) -> bool| {
        let trainable = parameters.iter().filter(|p| p.is_trainable());
        trainable.filter(|p| which(p)).map(Parameter::name).collect::<Vec<_>>().join(", ")
    };
    let unwritten = names(&|p| !p.is_written());
    ensure!(
        unwritten.is_empty(),
        "no gradient reaches {unwritten}: the forward does not use them; use them, or freeze them by train.freeze"
    );
    let mut values = Vec::new();
    for parameter in parameters.iter().filter(|p| p.is_trainable()) {
        values.push((parameter.name(), gradients.read(parameter.range())?.iter().all(|g| g.is_finite())));
    }
    let broken = values.iter().filter(|(_, finite)| !finite).map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    ensure!(broken.is_empty(), "the gradients of {broken} are not finite");
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use kiln_models::nn::{Builder, Embedding, Init, Inputs, Linear, Mode, Packing, embed};

    use super::*;

    #[test]
    fn a_parameter_that_the_forward_leaves_out_is_named() {
        let b = Builder::new();
        let words = Embedding::new(4, 8, Init::Normal(1.0), &b.scope("words")).unwrap();
        let used = Linear::new(8, 2, Init::Normal(1.0), &b.scope("used")).unwrap();
        Linear::new(8, 2, Init::Normal(1.0), &b.scope("forgotten")).unwrap();
        let parameters = b.finish(1).unwrap();
        parameters.allocate_gradients().unwrap();
        let backward = |scale: f32| {
            let packing = Packing::new(vec![0, 3], vec![0]).unwrap();
            let mode = Mode::Train { seed: 0, step: 0 };
            let inputs = Inputs::packed(packing, vec![("input_ids", vec![1, 2, 3])], mode).unwrap();
            let x = embed(&[(&words, &inputs.ids("input_ids").unwrap())]).unwrap();
            let y = used.forward(&x).unwrap();
            let dy = Tensor::full(scale, (3, 2), &Device::Cpu).unwrap();
            inputs.tape().unwrap().backward(&y, dy).unwrap();
        };
        backward(1.0);
        let error = gradient_coverage(&parameters).unwrap_err().to_string();
        assert!(error.starts_with("no gradient reaches forgotten.weight, forgotten.bias: "), "{error}");

        let freeze = |frozen: bool| {
            parameters.iter().filter(|p| p.name().starts_with("forgotten")).for_each(|p| p.set_trainable(!frozen));
        };
        freeze(true);
        gradient_coverage(&parameters).unwrap();
        backward(f32::NAN);
        let error = gradient_coverage(&parameters).unwrap_err().to_string();
        assert_eq!(error, "the gradients of words.weight, used.weight, used.bias are not finite");
    }
}

//! Models against the reference outputs of transformers in tests/golden, and against candle-transformers.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor, safetensors};
use kiln::pretrained::{Classifier, Example};
use kiln_kernels::{cross_entropy, cuda_device};
use kiln_models::nn::{Mode, Parameters};
use kiln_models::{ARCHITECTURES, Architecture};

use crate::support::{fetched, repository, skipped};

/// The folder of an architecture's reference outputs.
fn golden_folder(architecture: &Architecture) -> PathBuf {
    repository("tests/golden/architectures").join(architecture.model_type.replace('-', "_"))
}

/// In fp32: hidden states and logits to 1e-5, every gradient to 1e-4 of its norm. A GPU's sums round otherwise
/// than the reference's, which were made on a CPU: it may be off by more.
fn golden(architecture: &Architecture, device: &Device) {
    let folder = golden_folder(architecture);
    let classifier = Classifier::load(&folder).unwrap();
    assert_eq!(classifier.built().architecture.model_type, architecture.model_type);
    println!("{}", architecture.model_type);
    let (values, rounding) = if device.is_cpu() { (1e-5, 1e-8) } else { (2e-5, 1e-6) };
    if !device.is_cpu() {
        classifier.built().parameters.move_to(device, DType::F32).unwrap();
    }
    let golden = safetensors::load(folder.join("fixture.safetensors"), &Device::Cpu).unwrap();
    let ids = golden["in.input_ids"].to_vec2::<i64>().unwrap();
    let mask = golden["in.attention_mask"].to_vec2::<i64>().unwrap();
    let labels: Vec<u32> = golden["in.labels"].to_vec1::<i64>().unwrap().iter().map(|&l| l as u32).collect();
    let lengths: Vec<usize> = mask.iter().map(|row| row.iter().sum::<i64>() as usize).collect();
    let rows: Vec<Vec<i32>> =
        ids.iter().zip(&lengths).map(|(row, &n)| row[..n].iter().map(|&id| id as i32).collect()).collect();
    let examples: Vec<_> = rows.iter().map(|row| Example { input_ids: row, token_type_ids: None }).collect();

    let parameters = &classifier.built().parameters;
    let mode = Mode::Train { seed: 0, step: 0 }; // the golden model's dropout is 0
    // The whole model, and as it is trained, which makes no row that nothing reads.
    for shows_all in [true, false] {
        parameters.allocate_gradients().unwrap();
        let inputs = classifier.inputs(&examples, vec![0, 1, 2, 3], mode).unwrap();
        let inputs = if shows_all { inputs.keep_hidden_states() } else { inputs };
        let tape = inputs.tape().unwrap();
        let logits = classifier.built().model.forward(&inputs).unwrap();
        close("logits", logits.data().unwrap(), &golden["out.logits"], values);

        let hidden = inputs.into_hidden_states();
        assert!(
            !shows_all || !golden.contains_key(&format!("out.hidden.{}", hidden.len())),
            "a hidden state is not shown"
        );
        for (i, state) in hidden.iter().enumerate() {
            // Padded rows of the reference mean nothing: its tokens are those of the mask.
            let reference = &golden[&format!("out.hidden.{i}")];
            let tokens: Vec<Tensor> =
                lengths.iter().enumerate().map(|(b, &n)| reference.get(b).unwrap().narrow(0, 0, n).unwrap()).collect();
            close(&format!("hidden state {i}"), state.data().unwrap(), &Tensor::cat(&tokens, 0).unwrap(), values);
        }

        let (losses, dlogits) =
            cross_entropy::forward(logits.data().unwrap(), &labels, None, 0.0, labels.len() as f64).unwrap();
        let loss = losses.to_vec1::<f32>().unwrap().iter().sum::<f32>() / labels.len() as f32;
        assert!((loss - golden["out.loss"].to_vec1::<f32>().unwrap()[0]).abs() < 1e-6, "loss {loss}");
        tape.backward(&logits, dlogits).unwrap();
        gradients_are(parameters, &golden, rounding);
    }
}

/// Every gradient, to 1e-4 of its norm and what is `rounding` alone.
fn gradients_are(parameters: &Parameters, golden: &HashMap<String, Tensor>, rounding: f64) {
    let gradients = parameters.gradients();
    let mut compared = 0;
    for parameter in parameters.iter() {
        let reference = golden[&format!("grad.{}", parameter.name())].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let got = gradients.read(parameter.range()).unwrap();
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(&reference).map(|(a, b)| a - b));
        let size = norm(&mut reference.iter().copied());
        // A key's bias has no gradient but rounding: softmax does not see it.
        assert!(difference <= 1e-4 * size + rounding, "{}: off by {difference:e} of {size:e}", parameter.name());
        compared += 1;
    }
    assert_eq!(compared, golden.keys().filter(|name| name.starts_with("grad.")).count(), "every gradient is compared");
}

/// Rows that are left out change no bit of those that are made, dropout included.
#[test]
fn leaving_out_rows_changes_no_bit() {
    let labels: Vec<String> = (0..3).map(|i| i.to_string()).collect();
    let rows: Vec<Vec<i32>> = [9, 1, 30].iter().map(|&n| (0..n).map(|i| 5 + i).collect()).collect();
    let examples: Vec<_> = rows.iter().map(|row| Example { input_ids: row, token_type_ids: None }).collect();
    for architecture in ARCHITECTURES {
        let (classifier, _) = Classifier::pretrained(&golden_folder(architecture), &labels, Some(0.3), 1).unwrap();
        let inputs = || classifier.inputs(&examples, vec![7, 8, 9], Mode::Train { seed: 3, step: 4 }).unwrap();
        let logits = |inputs| {
            let logits = classifier.built().model.forward(&inputs).unwrap();
            logits.data().unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(logits(inputs()), logits(inputs().keep_hidden_states()), "{}", architecture.model_type);
        assert_ne!(logits(inputs()), classifier.logits(&examples).unwrap(), "dropout does nothing");
    }
}

/// A base model's checkpoint has the encoder alone, without its prefix.
#[test]
fn a_base_models_checkpoint_is_read() {
    let labels: Vec<String> = (0..5).map(|i| i.to_string()).collect();
    for architecture in ARCHITECTURES {
        let (folder, base) = (golden_folder(architecture), tempfile::tempdir().unwrap());
        let whole = safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let (encoder, head): (Vec<_>, Vec<_>) =
            whole.iter().partition(|(name, _)| name.starts_with(architecture.base_prefix));
        let encoder: HashMap<String, Tensor> = encoder
            .into_iter()
            .map(|(name, tensor)| (name[architecture.base_prefix.len()..].to_owned(), tensor.clone()))
            .collect();
        safetensors::save(&encoder, base.path().join("model.safetensors")).unwrap();
        std::fs::copy(folder.join("config.json"), base.path().join("config.json")).unwrap();

        let (classifier, report) = Classifier::pretrained(base.path(), &labels, None, 1).unwrap();
        let mut head: Vec<_> = head.into_iter().map(|(name, _)| name.clone()).collect();
        let mut new = report.new.clone();
        head.sort();
        new.sort();
        assert_eq!((new, report.loaded, report.unused.len()), (head, encoder.len(), 0), "{}", architecture.model_type);
        for parameter in classifier.built().parameters.iter().filter(|p| !report.new.contains(&p.name().to_owned())) {
            let wanted = whole[parameter.name()].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(parameter.to_vec().unwrap(), wanted, "{}", parameter.name());
        }
    }
}

fn close(what: &str, got: &Tensor, reference: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), reference.dims(), "{what}");
    let got = &got.to_device(reference.device()).unwrap();
    let difference = (got - reference).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let difference = difference.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap();
    assert!(difference <= tolerance, "{what} is off by {difference:e}");
}

#[test]
fn every_architecture_is_transformers_own() {
    for architecture in ARCHITECTURES {
        golden(architecture, &Device::Cpu);
    }
}

#[test]
fn on_cuda_every_architecture_is_transformers_own() {
    match cuda_device(0) {
        Ok(device) => ARCHITECTURES.iter().for_each(|architecture| golden(architecture, &device)),
        Err(e) => skipped(&format!("no CUDA device ({e})")),
    }
}

#[test]
fn minilm_is_candle_transformers_bert() {
    use candle_transformers::models::bert::{BertModel, Config};
    let Some(folder) = fetched("all-MiniLM-L6-v2") else { return };
    let (classifier, report) = Classifier::pretrained(&folder, &["a".into(), "b".into()], None, 1).unwrap();
    assert_eq!(report.new, ["classifier.weight", "classifier.bias"]);
    assert_eq!(report.unused, ["embeddings.position_ids"]);

    let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let tensors = safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let peer =
        BertModel::load(candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config).unwrap();

    let rows: Vec<Vec<i32>> = [512usize, 1, 37, 128]
        .iter()
        .map(|&n| (0..n).map(|i| ((i * 7919 + n * 104_729) % 30_000 + 500) as i32).collect())
        .collect();
    let examples: Vec<_> = rows.iter().map(|row| Example { input_ids: row, token_type_ids: None }).collect();
    let inputs = classifier.inputs(&examples, vec![0, 1, 2, 3], Mode::Evaluate).unwrap().keep_hidden_states();
    classifier.built().model.forward(&inputs).unwrap();
    let hidden = inputs.into_hidden_states().pop().unwrap();
    let mut start = 0;
    for row in &rows {
        let ids = Tensor::new(row.iter().map(|&id| id as u32).collect::<Vec<_>>(), &Device::Cpu)
            .unwrap()
            .unsqueeze(0)
            .unwrap();
        let reference = peer.forward(&ids, &ids.zeros_like().unwrap(), None).unwrap().squeeze(0).unwrap();
        let got = hidden.data().unwrap().narrow(0, start, row.len()).unwrap();
        close(&format!("{} tokens", row.len()), &got, &reference, 2e-5);
        start += row.len();
    }
}

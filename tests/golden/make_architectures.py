"""Tiny random checkpoints and what transformers makes of them, as the reference for kiln's models.

usage: make_architectures.py [OUTPUT] [NAME…]      OUTPUT is by default the folder architectures/ beside this file

OUTPUT/NAME/ gets config.json and model.safetensors as transformers saves them; fixture.safetensors with the inputs
(in.*), out.hidden.N, out.logits, out.loss and grad.PARAMETER of every parameter that has one; and meta.json with the
versions, the loss, the gradient norm and how far f32 lies from f64 and eager attention from SDPA.
Nothing is downloaded. The same versions give the same weights; outputs and gradients differ by rounding (1e-6) between CPUs.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
import transformers as T
from safetensors.torch import save_file

torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)

HIDDEN, LAYERS, HEADS, VOCABULARY, LABELS = 32, 3, 4, 97, 5
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64,
    num_labels=LABELS, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip

# name -> (config class, model class, config)
ARCHITECTURES = {
    "bert": (T.BertConfig, T.BertForSequenceClassification, dict(COMMON, max_position_embeddings=64, classifier_dropout=0.0)),
    "distilbert": (T.DistilBertConfig, T.DistilBertForSequenceClassification, dict(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS, pad_token_id=1,
    )),
    "electra": (T.ElectraConfig, T.ElectraForSequenceClassification, dict(
        COMMON, embedding_size=16, max_position_embeddings=64, classifier_dropout=0.0, summary_last_dropout=0.0,
    )),
    "roberta": (T.RobertaConfig, T.RobertaForSequenceClassification, dict(COMMON, max_position_embeddings=66, type_vocab_size=1, classifier_dropout=0.0)),
    "xlm_roberta": (T.XLMRobertaConfig, T.XLMRobertaForSequenceClassification, dict(COMMON, max_position_embeddings=66, type_vocab_size=1, classifier_dropout=0.0)),
}  # fmt: skip


def inputs():
    """Four sequences of 24, 17, 9 and 2 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(1234)
    lengths, longest = [24, 17, 9, 2], 24
    ids = torch.ones(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 0, 2
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([3, 0, 4, 1])


def randomize(model):
    """Biases, norms and the padding's row get values of their own, so that parity tests them too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4.0)


def make(name, folder):
    config_class, model_class, settings = ARCHITECTURES[name]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(42)
    model = model_class(config_class(**settings, attn_implementation="eager"))
    randomize(model)
    model.save_pretrained(folder)

    load = lambda **options: model_class.from_pretrained(folder, **options).eval()
    given, labels = inputs()
    model = load(attn_implementation="eager")
    output = model(**given, labels=labels, output_hidden_states=True)
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    tensors = {f"in.{key}": value for key, value in given.items()} | {"in.labels": labels}
    tensors |= {"out.logits": output.logits.detach(), "out.loss": output.loss.detach().reshape(1)}
    tensors |= {f"out.hidden.{i}": hidden.detach() for i, hidden in enumerate(output.hidden_states)}
    tensors |= {f"grad.{key}": gradient for key, gradient in gradients.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "fixture.safetensors")

    with torch.no_grad():
        f64 = load(attn_implementation="eager", dtype=torch.float64)(**given).logits.float()
        sdpa = load(attn_implementation="sdpa")(**given).logits
    meta = {
        "config_kwargs": settings,
        "transformers": T.__version__,
        "torch": torch.__version__,
        "max_abs_f32_vs_f64": float((f64 - output.logits).abs().max()),
        "max_abs_eager_vs_sdpa": float((sdpa - output.logits).abs().max()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "grads": len(gradients),
        "no_grad": [key for key, _ in model.named_parameters() if key not in gradients],
        "loss": float(output.loss),
        "grad_norm": float(torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))),
        "logits_row0": [round(x, 5) for x in output.logits[0].tolist()],
        "n_tensors": len(model.state_dict()),
        "hidden_states": len(output.hidden_states),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{name}: loss {meta['loss']:.6f}, gradient norm {meta['grad_norm']:.6f}, {len(gradients)} gradients")


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "architectures"
    for name in sys.argv[2:] or ARCHITECTURES:
        make(name, output / name)

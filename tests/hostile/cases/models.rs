//! The files of a model that a training starts from.

use std::fs;

use super::{TRAIN, Table, fifo, words};

/// A safetensors file of this header and so many bytes.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

pub(super) fn models(table: &mut Table) {
    let tokenizer = "base/tokenizer.json";
    let says: (i32, &[&'static str]) = (2, &["base/tokenizer.json: no tokenizer"]);
    table.file(tokenizer, "empty", TRAIN, says, |_| Vec::new());
    table.file(tokenizer, "cut", TRAIN, says, |whole| whole[..whole.len() / 2].to_vec());
    table.file(tokenizer, "deep lists", TRAIN, says, |_| vec![b'['; 1_000_000]);
    table.file(tokenizer, "another thing", TRAIN, says, |_| b"{\"version\": 7}".to_vec());
    table.file(tokenizer, "bytes", TRAIN, says, |_| vec![0xff; 100]);
    table.file(
        tokenizer,
        "ids that the model does not have",
        TRAIN,
        (2, &["model \"a\"", "the id 900000", "vocab_size = 102"]),
        |whole| {
            let mut tokenizer: serde_json::Value = serde_json::from_slice(whole).unwrap();
            tokenizer["model"]["vocab"]["row"] = 900_000.into();
            serde_json::to_vec(&tokenizer).unwrap()
        },
    );
    table.add("tokenizer.json: a folder", &[2], &["base/tokenizer.json"], |folder| {
        fs::remove_file(folder.join("base/tokenizer.json")).unwrap();
        fs::create_dir(folder.join("base/tokenizer.json")).unwrap();
        words(TRAIN)
    });

    let config = "base/config.json";
    table.file(config, "cut", TRAIN, (2, &["base/config.json"]), |whole| whole[..40].to_vec());
    table.file(config, "a list", TRAIN, (2, &["base/config.json"]), |_| b"[]".to_vec());
    table.file(config, "deep lists", TRAIN, (2, &["base/config.json"]), |_| vec![b'['; 1_000_000]);
    for (key, value, says) in [
        ("hidden_size", "0", "hidden_size = 0"),
        ("hidden_size", "-16", "hidden_size = -16"),
        ("hidden_size", "1e30", "hidden_size = 1e"),
        ("hidden_size", "\"16\"", "hidden_size = \"16\""),
        ("hidden_size", "null", "hidden_size = null"),
        ("hidden_size", "32", "is [102, 16] in the checkpoint"),
        ("num_attention_heads", "7", "num_attention_heads = 7"),
        ("num_attention_heads", "0", "num_attention_heads = 0"),
        ("num_hidden_layers", "1099511627776", "num_hidden_layers = 1099511627776"),
        ("num_hidden_layers", "0", "num_hidden_layers = 0"),
        ("vocab_size", "1099511627776", "vocab_size = 1099511627776"),
        ("vocab_size", "1000000", "config.json makes it [1000000, 16]"),
        ("intermediate_size", "4611686018427387904", "intermediate_size = 4611686018427387904"),
        ("max_position_embeddings", "0", "max_position_embeddings = 0"),
        ("max_position_embeddings", "18446744073709551615", "max_position_embeddings = 18446744073709551615"),
        ("type_vocab_size", "0", "type_vocab_size = 0"),
        ("layer_norm_eps", "-1.0", "layer_norm_eps = -1"),
        ("layer_norm_eps", "\"x\"", "layer_norm_eps = \"x\""),
        ("initializer_range", "-1.0", "initializer_range = -1"),
        ("hidden_dropout_prob", "1.5", "hidden_dropout_prob = 1.5"),
        ("hidden_act", "\"swish\"", "hidden_act = \"swish\""),
        ("model_type", "\"gpt2\"", "model_type \"gpt2\" is not known"),
        ("model_type", "7", "model_type"),
    ] {
        table.add(format!("config.json: {key} = {value}"), &[2], &["base", says], move |folder| {
            let path = folder.join("base/config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config[key] = serde_json::from_str(value).unwrap();
            fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
            words(TRAIN)
        });
    }
    table.add("config: of a new model", &[2], &["num_hidden_layers = 1099511627776"], |_| {
        words("check --set model.0.config.num_hidden_layers=1099511627776")
    });

    let weights = "base/model.safetensors";
    let says: (i32, &[&'static str]) = (2, &["base/model.safetensors"]);
    table.file(weights, "empty", TRAIN, says, |_| Vec::new());
    table.file(weights, "cut", TRAIN, says, |whole| whole[..whole.len() - 1].to_vec());
    table.file(weights, "a header of 2^60 bytes", TRAIN, says, |_| {
        [&(1u64 << 60).to_le_bytes()[..], &[b' '; 100]].concat()
    });
    table.file(weights, "a header of 2^64 bytes", TRAIN, says, |_| vec![0xff; 100]);
    table.file(weights, "deep lists", TRAIN, says, |_| safetensors(&"[".repeat(1_000_000), 0));
    for (name, header, bytes) in [
        (
            "overlapping",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        ("backwards", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4),
        ("an overflowing shape", r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        (
            "offsets of 2^60",
            r#"{"a":{"dtype":"F32","shape":[288230376151711744],"data_offsets":[0,1152921504606846976]}}"#,
            4,
        ),
        (
            "one name twice",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
        ),
        ("no dtype", r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4),
        ("bytes of nothing", r#"{"__metadata__":{"format":"pt"}}"#, 10),
        ("integers", r#"{"classifier.bias":{"dtype":"I32","shape":[3],"data_offsets":[0,12]}}"#, 12),
        (
            "another shape",
            r#"{"bert.embeddings.LayerNorm.bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#,
            12,
        ),
    ] {
        let file = safetensors(header, bytes);
        table.file(weights, name, TRAIN, (2, &["base"]), move |_| file.clone());
    }
    table.add("weights: none", &[2], &["base has none of model.safetensors"], |folder| {
        fs::remove_file(folder.join("base/model.safetensors")).unwrap();
        words(TRAIN)
    });
    for (name, file, bytes, says) in [
        (
            "an index that leads elsewhere",
            "model.safetensors.index.json",
            r#"{"weight_map":{"a":"../../x"}}"#.as_bytes(),
            "names \"../../x\"",
        ),
        (
            "an index of what is not there",
            "model.safetensors.index.json",
            br#"{"weight_map":{"a":"a.safetensors"}}"#,
            "base/a.safetensors is not there",
        ),
        ("an index that is none", "model.safetensors.index.json", b"[", "model.safetensors.index.json"),
        (
            "an index of numbers",
            "model.safetensors.index.json",
            br#"{"weight_map":{"a":7}}"#,
            "model.safetensors.index.json",
        ),
        ("a pickle that is none", "pytorch_model.bin", b"\x80\x02not a pickle.", "base/pytorch_model.bin"),
        (
            "an archive without one",
            "pytorch_model.bin",
            b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            "base/pytorch_model.bin",
        ),
        ("an empty pickle", "pytorch_model.bin", b"", "base/pytorch_model.bin"),
    ] {
        table.add(format!("weights: {name}"), &[2], &[says], move |folder| {
            fs::remove_file(folder.join("base/model.safetensors")).unwrap();
            fs::write(folder.join("base").join(file), bytes).unwrap();
            words(TRAIN)
        });
    }
    table.add("model: no folder", &[2], &["nowhere"], |_| {
        words("train experiment.toml --stop-after train --set model.0.path=nowhere")
    });
    table.add("model: a FIFO for its config", &[2], &["base/config.json is not there"], |folder| {
        fs::remove_file(folder.join("base/config.json")).unwrap();
        fifo(&folder.join("base/config.json"));
        words(TRAIN)
    });
    table.add("init_from: nowhere", &[2], &["hostile/9"], |_| {
        words("train experiment.toml --stop-after train --set train.init_from=hostile/9/a")
    });
}

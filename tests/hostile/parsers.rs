//! Every door on bytes drawn at random, and on good ones with some of them changed: a value or an error.

use proptest::prelude::*;

use super::doors::DOORS;

/// What grammars hang on.
const SIGNS: &[u8] = b"\"'[]{}(),.:=-_\\\n\x00\xff019eE#";

/// What each door takes as it is.
fn good(door: &str) -> Vec<u8> {
    let tensors = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}"#;
    match door {
        "experiment" => {
            [kiln::config::QUICKSTART.as_bytes(), b"\n--set train.epochs=4\n--set model.0.name='b'\n"].concat()
        }
        "safetensors" => {
            [&(tensors.len() as u64).to_le_bytes()[..], tensors.as_bytes(), &[1, 2, 3, 4, 5, 6, 7, 8]].concat()
        }
        "delimited" => b"id,text,label\n1,\"a \"\"quoted\"\" text\",x\n2,\"two\nlines\",y\n".to_vec(),
        "jsonl" => b"{\"text\": \"a\\u00e9\", \"label\": 7}\n\n{\"label\": \"x\", \"text\": \"b\"}\n".to_vec(),
        "arrow" => super::cases::stream(),
        "launcher" => {
            b"SLURM_PROCID=6\nSLURM_LOCALID=2\nSLURM_NTASKS=7\nSLURM_STEP_ID=0\nSLURM_JOB_ID=4711\nSLURM_NODEID=1\n\
            SLURM_STEP_NODELIST=gpu[07-09,12]\nSLURM_STEP_TASKS_PER_NODE=4(x2),3\n"
                .to_vec()
        }
        "onnx" => vec![8, 8, 18, 4, b'k', b'i', b'l', b'n', 58, 5, 18, 3, b'a', b'b', b'c', 66, 2, 16, 12],
        "events" => {
            b"{\"event\":\"step\",\"step\":2,\"epoch\":0.2,\"train_loss\":null,\"learning_rate\":0.1,\"grad_norm\":1.0,\
            \"tokens_per_second\":1.0}\n"
                .to_vec()
        }
        "records" => {
            br#"{"weight_map": {"a": "a.safetensors"}, "examples": 3, "accuracy": 1.0, "labels": []}"#.to_vec()
        }
        other => unreachable!("{other}"),
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_door_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), text in "\\PC{0,80}") {
        for (_, door) in DOORS {
            door(&bytes);
            door(text.as_bytes());
        }
    }

    #[test]
    fn no_change_of_good_bytes_makes_a_door_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        for (name, door) in DOORS {
            let mut bytes = good(name);
            for (at, byte, how) in &changes {
                if bytes.is_empty() {
                    break;
                }
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = *byte,
                    1 => bytes.truncate(at),
                    2 => bytes.insert(at, *byte),
                    _ => bytes[at] = SIGNS[*byte as usize % SIGNS.len()],
                }
            }
            door(&bytes);
        }
    }
}

#[test]
fn every_door_opens_to_what_is_good() {
    // Each is what it claims to be, so that a change of it comes past the first check.
    for (name, door) in DOORS {
        door(&good(name));
    }
    let (folder, bytes) = (tempfile::tempdir().unwrap(), good("safetensors"));
    let path = folder.path().join("a.safetensors");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(kiln::tensors::TensorFile::open(&path).unwrap().names(), ["a", "b"]);
    std::fs::write(&path, good("onnx")).unwrap();
    kiln::export::onnx::read(&path).unwrap();
    std::fs::write(&path, good("events")).unwrap();
    assert_eq!(kiln::track::read(&path).unwrap().len(), 1);
}

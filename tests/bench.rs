//! `kiln bench` on the embedded sample: real processes, few steps.

use std::fs;

use serde_json::Value;

use crate::support::kiln;

#[test]
fn one_and_two_processes_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (root, output) = (folder.path().join("runs"), folder.path().join("out"));
    let sizes = [
        "--set=model.0.config.hidden_size=32",
        "--set=model.0.config.intermediate_size=64",
        "--set=train.batch_size=8",
        "--set=train.distributed.bucket_mb=1",
    ];
    let bench = |more: &[&str]| {
        let mut command = kiln();
        command.args(["bench", "--threads", "1", "--root"]).arg(&root).args(sizes).args(more);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let out = output.to_str().unwrap();
    let table = bench(&[
        "--world-sizes",
        "1,2",
        "--steps",
        "4",
        "--warmup",
        "1",
        "--rounds",
        "2",
        "--simulate",
        "--output",
        out,
    ]);
    assert!(table.contains("| processes | threads |") && table.contains("| 512 | "), "{table}");
    assert_eq!(fs::read_to_string(output.join("bench.md")).unwrap(), table);
    assert!(fs::read(output.join("scaling.png")).unwrap().starts_with(b"\x89PNG"));
    assert!(!root.join("quickstart/runs").exists(), "it makes no run");

    let report: Value = serde_json::from_slice(&fs::read(output.join("bench.json")).unwrap()).unwrap();
    let worlds = report["worlds"].as_array().unwrap();
    assert_eq!(worlds.len(), 2);
    for (world, world_size) in worlds.iter().zip([1, 2]) {
        assert_eq!((&world["world_size"], &world["batch_size"]), (&world_size.into(), &(8 * world_size).into()));
        let steps = world["steps"].as_array().unwrap();
        assert_eq!(steps.len(), 8);
        for step in steps {
            assert_eq!(step["sequences"], 8 * world_size);
            assert!(step["flops"].as_u64().unwrap() > 1_000_000 && step["tokens"].as_u64().unwrap() > 80);
            assert!(step["waiting"].as_f64().unwrap() < step["seconds"].as_f64().unwrap());
        }
        let figure = |name: &str| world["figures"][name].as_f64().unwrap();
        assert!(figure("utilisation") > 0.0 && figure("tokens_per_second") > 0.0, "{world}"); // above 1 where others disturb
        let buckets = world["profile"]["buckets"].as_array().unwrap();
        assert!(buckets.is_sorted_by_key(|bucket| bucket["complete"].as_f64().unwrap()) && !buckets.is_empty());
    }
    assert_eq!(worlds[0]["figures"]["efficiency"], 1.0);

    // The same measurements, another question; with --strong the batch stays.
    let from = output.join("bench.json");
    let again = bench(&["--from", from.to_str().unwrap(), "--simulate", "--gpus", "1,8", "--json"]);
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["worlds"], report["worlds"]);
    assert_eq!(again["simulations"][0]["predictions"][0]["efficiency"], 1.0);
    let out = folder.path().join("one world");
    let out = out.to_str().unwrap();
    let strong = bench(&["--world-sizes", "2", "--steps", "2", "--strong", "--json", "--output", out]);
    let strong: Value = serde_json::from_str(&strong).unwrap();
    assert_eq!((&strong["worlds"][0]["batch_size"], &strong["strong"]), (&8.into(), &true.into()));
}

#[test]
fn what_cannot_be_simulated_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = kiln()
        .args(["bench", "--world-sizes", "2", "--steps", "1", "--warmup", "0", "--simulate", "--root"])
        .arg(folder.path())
        .args(["--set", "model.0.config.hidden_size=32"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("needs 1 in --world-sizes"), "{stderr}");
}

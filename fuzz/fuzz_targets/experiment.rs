#![no_main]
#[allow(dead_code)] // the other doors
#[path = "../../tests/hostile/doors.rs"]
mod doors;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| doors::experiment(bytes));

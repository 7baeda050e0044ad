use maud::{Markup, html};
use serde::Deserialize;

use super::{Found, absent, figure, found};
use crate::store::{self, ModelDir};

const EXACT_COLUMNS: [&str; 7] =
    ["rows", "lengths", "largest difference", "mean difference", "flips", "F1 trained", "F1 exported"];
const AGREED_COLUMNS: [&str; 7] =
    ["rows", "agreement", "largest difference", "F1 fp32", "F1 int8", "MB fp32", "MB int8"];

/// What of export.json and test/certificate.json is shown.
#[derive(Deserialize)]
struct Exact {
    examples: usize,
    max_abs_diff: f64,
    mean_abs_diff: f64,
    argmax_flips: usize,
    lengths: Vec<usize>,
    f1_trained: f64,
    f1_onnx: f64,
}

/// What of export.int8.json and test/certificate.int8.json is shown.
#[derive(Deserialize)]
struct Agreed {
    examples: usize,
    agreement: f64,
    max_abs_diff: f64,
    f1_fp32: f64,
    f1_int8: f64,
    bytes_fp32: u64,
    bytes_int8: u64,
}

/// That the exported model is the trained one, and what it lost on 8-bit integers.
pub fn section(files: &ModelDir) -> Markup {
    let exact = [
        ("validation", found(&files.export_json(), ("export.json", "the model is not exported"), store::read_json)),
        (
            "test",
            found(
                &files.test().join("certificate.json"),
                ("test/certificate.json", "the export is not tested beside its weights"),
                store::read_json,
            ),
        ),
    ];
    if exact.iter().all(|(_, certificate)| certificate.is_err()) {
        let why = exact.into_iter().find_map(|(_, certificate): (_, Found<Exact>)| certificate.err());
        return absent("Certificate", &why.unwrap_or_default());
    }
    html! {
        h3 { "Certificate" }
        div.scroll tabindex="0" role="region" aria-label="Certificate of the export" {
            table {
                caption {
                    "model.onnx by ONNX Runtime against the trained weights, example by example and over a sweep of "
                    "lengths."
                }
                thead { tr {
                    th scope="col" { "part" }
                    @for name in EXACT_COLUMNS { th.number scope="col" { (name) } }
                } }
                tbody { @for (part, certificate) in &exact { (exact_row(part, certificate)) } }
            }
        }
        (int8(files))
    }
}

fn exact_row(part: &str, certificate: &Found<Exact>) -> Markup {
    html! {
        tr {
            th scope="row" { (part) }
            @match certificate {
                Ok(c) => {
                    td.number { (c.examples) }
                    td.number { (c.lengths.len()) }
                    td.number { (format!("{:.1e}", c.max_abs_diff)) }
                    td.number { (format!("{:.1e}", c.mean_abs_diff)) }
                    td.number { (c.argmax_flips) }
                    td.number { (figure(c.f1_trained)) }
                    td.number { (figure(c.f1_onnx)) }
                }
                Err(why) => { td.absent colspan="7" { (why) } }
            }
        }
    }
}

fn int8(files: &ModelDir) -> Markup {
    if !files.export_int8_json().exists() {
        return html! {}; // it was not asked for
    }
    let agreed: [(&str, Found<Agreed>); 2] = [
        (
            "validation",
            found(&files.export_int8_json(), ("export.int8.json", "there is no int8 model"), store::read_json),
        ),
        (
            "test",
            found(
                &files.test().join("certificate.int8.json"),
                ("test/certificate.int8.json", "the int8 model is not tested"),
                store::read_json,
            ),
        ),
    ];
    let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    html! {
        div.scroll tabindex="0" role="region" aria-label="Certificate of the int8 model" {
            table {
                caption { "model.int8.onnx against model.onnx, both by ONNX Runtime." }
                thead { tr {
                    th scope="col" { "part" }
                    @for name in AGREED_COLUMNS { th.number scope="col" { (name) } }
                } }
                tbody {
                    @for (part, agreed) in &agreed {
                        tr {
                            th scope="row" { (part) }
                            @match agreed {
                                Ok(a) => {
                                    td.number { (a.examples) }
                                    td.number { (figure(a.agreement)) }
                                    td.number { (format!("{:.2}", a.max_abs_diff)) }
                                    td.number { (figure(a.f1_fp32)) }
                                    td.number { (figure(a.f1_int8)) }
                                    td.number { (megabytes(a.bytes_fp32)) }
                                    td.number { (megabytes(a.bytes_int8)) }
                                }
                                Err(why) => { td.absent colspan="7" { (why) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

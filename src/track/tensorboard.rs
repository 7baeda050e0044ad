//! TensorBoard: an event file in the model's folder of the run.
//!
//! The file is a sequence of TFRecords, each an `Event` of TensorFlow's event.proto:
//! length (u64) · masked CRC-32C of it (u32) · data · masked CRC-32C of the data (u32), little-endian.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;

use self::proto::What;
use super::Sink;
use super::event::Event;
use super::records::RecordFile;

/// What TensorBoard asks for in a name is `tfevents`. It is the same in every process, so that a run
/// that goes on has one file.
const FILE: &str = "events.out.tfevents.kiln";

/// An event file that is being written.
pub(super) struct TensorBoard {
    path: PathBuf,
    file: Option<RecordFile>,
    time: f64,
}

impl TensorBoard {
    /// The event file in a model's folder; nothing is opened yet.
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join(FILE), file: None, time: 0.0 }
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let file = self.file.as_mut().context("cut_back opens the file")?;
        if file.len() == 0 {
            let version = Some(What::FileVersion("brain.Event:2".into()));
            let event = proto::Event { wall_time: self.time, step: 0, what: version };
            file.append(&frame(&event.encode_to_vec()))?;
        }
        let event = proto::Event { wall_time: self.time, step: step as i64, what: Some(what) };
        file.append(&frame(&event.encode_to_vec()))
    }
}

impl Sink for TensorBoard {
    fn cut_back(&mut self, step: u64) -> Result<()> {
        let mut file = RecordFile::open(&self.path)?;
        let mut end = 0;
        for (after, data) in records(&file.read()?) {
            let Ok(event) = proto::Event::decode(data) else { break };
            if event.step > i64::try_from(step).unwrap_or(i64::MAX) || event.is_of_test() {
                break;
            }
            end = after;
        }
        file.truncate(end)?;
        self.file = Some(file);
        Ok(())
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        self.time = event.time().unwrap_or(self.time);
        if let Event::Start(start) = event {
            let config = serde_json::to_string_pretty(&start.config)?;
            // TensorBoard shows text as Markdown, where four spaces make code.
            let code = config.lines().map(|line| format!("    {line}\n")).collect::<String>();
            return self.write(start.step, What::Summary(proto::Summary { value: vec![proto::text("config", code)] }));
        }
        let value: Vec<_> = event.figures().into_iter().map(|(tag, value)| proto::scalar(tag, value as f32)).collect();
        if value.is_empty() { Ok(()) } else { self.write(event.step(), What::Summary(proto::Summary { value })) }
    }
}

/// A TFRecord.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// The whole records of a file, each with where it ends. What is broken ends them, as it ends every
/// reader's way.
fn records(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &bytes[at..];
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (length_crc, rest) = rest.split_first_chunk::<4>()?;
        let size = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (data, rest) = rest.split_at_checked(size)?;
        let (data_crc, _) = rest.split_first_chunk::<4>()?;
        if *length_crc != masked_crc(length) || *data_crc != masked_crc(data) {
            return None;
        }
        at += 16 + size;
        Some((at as u64, data))
    })
}

/// A CRC over data that may itself hold CRCs is rotated and moved away from itself.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// The part of TensorFlow's event.proto, summary.proto and tensor.proto that is written here.
mod proto {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Event {
        #[prost(double, tag = "1")]
        pub wall_time: f64,
        #[prost(int64, tag = "2")]
        pub step: i64,
        #[prost(oneof = "What", tags = "3, 5")]
        pub what: Option<What>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum What {
        #[prost(string, tag = "3")]
        FileVersion(String),
        #[prost(message, tag = "5")]
        Summary(Summary),
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Summary {
        #[prost(message, repeated, tag = "1")]
        pub value: Vec<Value>,
    }

    /// `Summary.Value`.
    #[derive(Clone, PartialEq, Message)]
    pub struct Value {
        #[prost(string, tag = "1")]
        pub tag: String,
        #[prost(float, optional, tag = "2")]
        pub simple_value: Option<f32>,
        #[prost(message, optional, tag = "8")]
        pub tensor: Option<TensorProto>,
        #[prost(message, optional, tag = "9")]
        pub metadata: Option<SummaryMetadata>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct TensorProto {
        #[prost(int32, tag = "1")]
        pub dtype: i32,
        #[prost(bytes = "vec", repeated, tag = "8")]
        pub string_val: Vec<Vec<u8>>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct SummaryMetadata {
        #[prost(message, optional, tag = "1")]
        pub plugin_data: Option<PluginData>,
    }

    /// `SummaryMetadata.PluginData`.
    #[derive(Clone, PartialEq, Message)]
    pub struct PluginData {
        #[prost(string, tag = "1")]
        pub plugin_name: String,
    }

    impl Event {
        /// Whether it holds figures of the test part, which are told when a run ends.
        pub fn is_of_test(&self) -> bool {
            match &self.what {
                Some(What::Summary(summary)) => summary.value.iter().any(|value| value.tag.starts_with("test/")),
                _ => false,
            }
        }
    }

    /// A point of a curve.
    pub fn scalar(tag: &str, value: f32) -> Value {
        Value { tag: tag.into(), simple_value: Some(value), tensor: None, metadata: None }
    }

    /// A text.
    pub fn text(tag: &str, text: String) -> Value {
        const DT_STRING: i32 = 7;
        let tensor = TensorProto { dtype: DT_STRING, string_val: vec![text.into_bytes()] };
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        let metadata = Some(SummaryMetadata { plugin_data });
        Value { tag: tag.into(), simple_value: None, tensor: Some(tensor), metadata }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_framed_as_tensorflow_does() {
        // By masked_crc32c of the tensorboard package.
        let expected = "0300000000000000b099490e6162636e57f121";
        let hex: String = frame(b"abc").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected);
    }

    #[test]
    fn a_cut_or_broken_record_ends_the_file() {
        let whole = [frame(b"one"), frame(b""), frame(b"three")].concat();
        let read = |bytes: &[u8]| records(bytes).map(|(_, data)| data.to_vec()).collect::<Vec<_>>();
        assert_eq!(read(&whole), [&b"one"[..], b"", b"three"]);
        assert_eq!(read(&whole[..whole.len() - 1]).len(), 2);
        for broken in [0, 9, 13, 17] {
            let mut bytes = whole.clone();
            bytes[broken] ^= 1;
            assert_eq!(read(&bytes).len(), 0, "byte {broken}");
        }
        assert_eq!(records(&whole).last().unwrap().0, whole.len() as u64);
    }
}

//! One prefix as a file: `safetensors` that says what it was read from, with a hash over all of it.
//!
//! The header is exactly what this program writes for its record, byte for byte, so that nothing in it needs to be
//! believed.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write};
use std::path::Path;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::super::kv_cache::{KvCache, Piece, PositionKey};
use super::scope::{Scope, Stretch};
use crate::disk::{hex, map};
use crate::error::Result;
use crate::package::manifest::DType;

/// The number of this layout; snapshots of another one are not used.
const FORMAT: u32 = 1;
/// More than the header of a full context takes.
const LARGEST_HEADER: u64 = 16 << 20;
const LENGTH: usize = 8;
const CUT_OFF: &str = "it was cut off";

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    format: u32,
    /// What the package is called.
    pub(super) name: String,
    /// What computed the rows.
    pub(super) scope: Scope,
    /// When it was read, in seconds since 1970.
    pub(super) created: u64,
    /// How many positions it holds.
    pub(super) positions: usize,
    /// What stands at each.
    pub(super) content: Vec<Stretch>,
}

impl Record {
    pub(super) fn new(name: &str, scope: &Scope, keys: &[PositionKey], created: u64) -> Self {
        Self {
            format: FORMAT,
            name: name.to_owned(),
            scope: scope.clone(),
            created,
            positions: keys.len(),
            content: Stretch::of(keys),
        }
    }

    /// How many images it holds, whole or in part.
    pub(super) fn images(&self) -> usize {
        self.content.iter().filter(|one| matches!(one, Stretch::Image { .. })).count()
    }

    /// What stands at each position.
    pub(super) fn keys(&self) -> Option<Vec<PositionKey>> {
        Stretch::keys(&self.content, self.positions)
    }

    fn data_bytes(&self) -> Option<usize> {
        self.scope.layout.tensors.checked_mul(self.tensor_bytes()?)
    }

    fn tensor_bytes(&self) -> Option<usize> {
        let layout = self.scope.layout;
        let row = layout.heads.checked_mul(layout.columns)?.checked_mul(layout.dtype.bytes())?;
        // Rows of nothing would let a small file speak of any number of positions.
        if row == 0 {
            return None;
        }
        row.checked_mul(self.positions)
    }

    /// Bytes of its file.
    pub(super) fn file_bytes(&self) -> Option<u64> {
        // Every hash is as long as this one.
        let header = self.header(&hex(&[0; 32]))?.len();
        Some(header.checked_add(self.data_bytes()?)? as u64)
    }

    /// The header for this record: its length and its text.
    fn header(&self, sha256: &str) -> Option<Vec<u8>> {
        let (layout, size) = (self.scope.layout, self.tensor_bytes()?);
        // Bounds what a record that comes from a file can ask for.
        if layout.tensors > 4096 {
            return None;
        }
        let dtype = match layout.dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::I8 => "I8",
            DType::I32 => "I32",
            DType::I64 => "I64",
        };
        let record = serde_json::to_string(self).ok()?;
        let mut all = Map::new();
        all.insert("__metadata__".to_owned(), json!({ "record": record, "sha256": sha256 }));
        for index in 0..layout.tensors {
            let what = ["key", "value"][index % 2];
            let offsets = [index.checked_mul(size)?, (index + 1).checked_mul(size)?];
            let shape = [1, layout.heads, self.positions, layout.columns];
            let tensor = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
            all.insert(format!("{}.{what}", index / 2), tensor);
        }
        let mut text = Value::Object(all).to_string().into_bytes();
        // Numbers of any type are aligned then.
        text.resize(text.len().next_multiple_of(LENGTH), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        Some(header)
    }

    /// The hash over record and data.
    fn hash(&self, data: &[u8]) -> Option<String> {
        let mut hash = Sha256::new();
        hash.update(serde_json::to_string(self).ok()?);
        hash.update(data);
        Some(hex(&hash.finalize()))
    }
}

/// Why a snapshot is not used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It is not what this program writes, or not what is wanted.
    Wrong(String),
    /// It cannot be read here; others may be able to.
    Unreadable(io::Error),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(why) => f.write_str(why),
            Self::Unreadable(error) => write!(f, "it cannot be read ({error})"),
        }
    }
}

impl From<String> for Unusable {
    fn from(why: String) -> Self {
        Self::Wrong(why)
    }
}

impl From<&str> for Unusable {
    fn from(why: &str) -> Self {
        Self::Wrong(why.to_owned())
    }
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => CUT_OFF.into(),
            _ => Self::Unreadable(error),
        }
    }
}

/// Writes a snapshot of `data`, the rows of every tensor.
pub(super) fn write(file: &File, record: &Record, data: &[u8]) -> io::Result<()> {
    let wrong = || io::Error::other("its rows are not those of its record");
    if record.data_bytes() != Some(data.len()) {
        return Err(wrong());
    }
    let header = record.hash(data).and_then(|sha256| record.header(&sha256)).ok_or_else(wrong)?;
    let mut out = BufWriter::new(file);
    out.write_all(&header)?;
    out.write_all(data)?;
    out.flush()?;
    file.sync_all()
}

/// A snapshot that was proved whole.
#[derive(Debug)]
pub(super) struct Snapshot {
    bytes: Bytes,
    at: usize,
    pub(super) keys: Vec<PositionKey>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Memory(&'static [u8]),
}

impl Bytes {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl Snapshot {
    /// Maps the snapshot at `path`, if every byte is as it was written for a scope that `serves`; else says what is
    /// wrong.
    pub(super) fn open(path: &Path, serves: impl Fn(&Scope) -> bool) -> Result<Self, Unusable> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Err(CUT_OFF.into());
        }
        Self::prove(Bytes::Mapped(map(&file)?), serves)
    }

    /// The same, for one inside the program.
    pub(super) fn of(bytes: &'static [u8], serves: impl Fn(&Scope) -> bool) -> Result<Self, Unusable> {
        Self::prove(Bytes::Memory(bytes), serves)
    }

    fn prove(bytes: Bytes, serves: impl Fn(&Scope) -> bool) -> Result<Self, Unusable> {
        let all = bytes.all();
        let (record, sha256) = parse(all)?;
        if !serves(&record.scope) {
            return Err("it was read by another model, variant, provider or version".into());
        }
        let damaged = || Unusable::from("it is damaged");
        let header = record.header(&sha256).ok_or_else(damaged)?;
        if !all.starts_with(&header) {
            return Err("its header is not what belongs to its record".into());
        }
        let data = &all[header.len()..];
        if record.data_bytes() != Some(data.len()) {
            return Err(CUT_OFF.into());
        }
        if record.hash(data).as_ref() != Some(&sha256) {
            return Err("its hash is another one".into());
        }
        let keys = record.keys().ok_or_else(damaged)?;
        Ok(Self { at: header.len(), bytes, keys })
    }

    /// How many positions from the beginning of `keys` it holds.
    pub(super) fn common(&self, keys: &[PositionKey]) -> usize {
        self.keys.iter().zip(keys).take_while(|(held, wanted)| held == wanted).count()
    }

    /// Adds the positions of `keys` from the end of `cache` to `common`.
    pub(super) fn add_to(&self, cache: &mut KvCache, keys: &[PositionKey], common: usize) -> Result<()> {
        let held = cache.len();
        cache.reserve(keys.len())?;
        let bytes = &self.bytes.all()[self.at..];
        let piece = Piece { bytes, height: self.keys.len(), wanted: held..common };
        cache.import(&keys[held..common], &[piece])
    }
}

/// The record of the snapshot at `path`, without a look at its rows.
pub(super) fn record(path: &Path) -> Result<Record, Unusable> {
    let mut file = File::open(path)?;
    let whole = file.metadata()?.len();
    let mut length = [0; LENGTH];
    file.read_exact(&mut length)?;
    let size = u64::from_le_bytes(length);
    if size > LARGEST_HEADER {
        return Err("its header is too long".into());
    }
    let mut header = length.to_vec();
    let read = file.take(size).read_to_end(&mut header)?;
    if read as u64 != size {
        return Err(CUT_OFF.into());
    }
    let (record, _) = parse(&header)?;
    let wanted = record.data_bytes().and_then(|data| data.checked_add(header.len())).map(|all| all as u64);
    if wanted != Some(whole) {
        return Err(CUT_OFF.into());
    }
    Ok(record)
}

/// The record and the hash in the header at the beginning of `bytes`.
fn parse(bytes: &[u8]) -> Result<(Record, String), String> {
    let no_snapshot = |e: &dyn std::fmt::Display| format!("it is no snapshot ({e})");
    let declared = u64::from_le_bytes(*bytes.first_chunk().ok_or(CUT_OFF)?);
    if declared > LARGEST_HEADER {
        return Err("its header is too long".to_owned());
    }
    let header = usize::try_from(declared).ok().and_then(|size| bytes.get(LENGTH..LENGTH.checked_add(size)?));
    let header = header.ok_or(CUT_OFF)?;
    let all: Value = serde_json::from_slice(header).map_err(|e| no_snapshot(&e))?;
    let text = |name: &str| all.get("__metadata__").and_then(|meta| meta.get(name)).and_then(Value::as_str);
    let (Some(record), Some(sha256)) = (text("record"), text("sha256")) else {
        return Err(no_snapshot(&"it does not say what it holds"));
    };
    let record: Record = serde_json::from_str(record).map_err(|e| no_snapshot(&e))?;
    if record.format != FORMAT {
        return Err(format!("it is of format {}, this program writes {FORMAT}", record.format));
    }
    Ok((record, sha256.to_owned()))
}

/// Whether other programs can read `bytes` too.
#[cfg(test)]
pub(super) fn is_safetensors(bytes: &[u8]) -> bool {
    safetensors::SafeTensors::deserialize(bytes).is_ok()
}

//! What one entry holds, and whether it is still what was built.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Component, Path};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::USED;
use crate::disk::{hex, seconds, sync_dir, write_failed};
use crate::error::{Error, Result};

/// The number of this layout; entries of another one are not used.
pub const FORMAT: u32 = 2;

pub(super) const RECORD: &str = "entry.json";
/// Larger files are compared by size and time of change, and hashed only when the time differs: hashing gigabytes at
/// each use would take longer than loading them.
const HASHED: u64 = 64 << 20;
const COMPLETE: &str = "complete";

/// Everything that decides what a provider compiles. Two keys that differ anywhere are two entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// The component that is compiled.
    pub component: String,
    /// SHA-256 of the graph and of its external data, by relative path in the package.
    pub files: BTreeMap<String, String>,
    /// The provider.
    pub provider: String,
    /// The provider's device; empty for its own choice.
    pub device: String,
    /// The provider's options, without paths into this cache.
    pub options: BTreeMap<String, String>,
    /// ONNX Runtime's version, with that of a provider's own library where it is known.
    pub runtime: String,
    /// The fingerprint of the machine: drivers, GPUs, libraries.
    pub machine: String,
    /// For each dimension that varies, the least, the usual and the largest size.
    pub sizes: BTreeMap<String, [usize; 3]>,
}

impl Key {
    /// The name of the entry: 32 hexadecimal digits over every field and the format.
    pub fn digest(&self) -> String {
        // Maps are sorted, so that equal keys are equal texts.
        let text = serde_json::to_string(&(FORMAT, self)).expect("text and numbers can always be written");
        hex(&Sha256::digest(text.as_bytes())[..16])
    }
}

/// `entry.json`: what is in an entry and what it was compiled from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Always [`FORMAT`].
    pub format: u32,
    /// Always `complete`.
    pub status: String,
    /// What it was compiled from.
    pub key: Key,
    /// When it was built, in seconds since 1970.
    pub created: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Size and hash of each file, by relative path.
    pub files: BTreeMap<String, FileRecord>,
}

/// Size, hash and age of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
    /// When it was changed last, in nanoseconds since 1970; 0 where the file system does not tell.
    pub modified: u64,
}

/// The record of the entry in `dir`, if everything in it is as it was built from `key`; else what is wrong.
pub(super) fn read(dir: &Path, key: &Key) -> Result<Record, String> {
    let record = record(dir)?;
    if record.key != *key {
        return Err(format!("{} was compiled from something else", dir.display()));
    }
    for (name, file) in &record.files {
        check(dir, name, file)?;
    }
    Ok(record)
}

/// The record of the entry in `dir`, without a look at its files.
pub(super) fn record(dir: &Path) -> Result<Record, String> {
    let path = dir.join(RECORD);
    let bytes = fs::read(&path).map_err(|e| format!("{} cannot be read ({e})", path.display()))?;
    let record: Record =
        serde_json::from_slice(&bytes).map_err(|e| format!("{} is no record ({e})", path.display()))?;
    if record.format != FORMAT || record.status != COMPLETE {
        return Err(format!("{} is of another version of this program", path.display()));
    }
    Ok(record)
}

fn check(dir: &Path, name: &str, file: &FileRecord) -> Result<(), String> {
    let path = dir.join(name);
    if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(format!("{} lies outside of its entry", path.display()));
    }
    let meta = path.symlink_metadata().map_err(|e| format!("{} cannot be read ({e})", path.display()))?;
    if !meta.is_file() {
        return Err(format!("{} is no file", path.display()));
    }
    if meta.len() != file.bytes {
        let (found, built) = (meta.len(), file.bytes);
        return Err(format!("{} has {found} bytes, {built} were built", path.display()));
    }
    if file.bytes > HASHED && file.modified != 0 && modified(&meta) == file.modified {
        return Ok(());
    }
    let (_, sha256) = hash(&path).map_err(|e| format!("{} cannot be read ({e})", path.display()))?;
    if sha256 != file.sha256 {
        return Err(format!("{} was changed: its hash is another one", path.display()));
    }
    Ok(())
}

/// Records what a builder wrote into `dir`, and puts all of it on the disk.
///
/// # Errors
/// [`Error::Cache`] when there is nothing, something that is no file, or no room.
pub(super) fn seal(dir: &Path, key: &Key) -> Result<Record> {
    let mut files = BTreeMap::new();
    collect(dir, "", &mut files)?;
    if files.is_empty() {
        return Err(Error::cache(dir, format!("provider {} compiled nothing to keep", key.provider)));
    }
    let record = Record {
        format: FORMAT,
        status: COMPLETE.to_owned(),
        key: key.clone(),
        created: seconds(SystemTime::now()),
        bytes: files.values().fold(0, |bytes, file: &FileRecord| bytes.saturating_add(file.bytes)),
        files,
    };
    let write = || {
        let mut file = File::create_new(dir.join(RECORD))?;
        file.write_all(&serde_json::to_vec_pretty(&record)?)?;
        file.sync_all()?;
        sync_dir(dir)
    };
    write().map_err(|e| write_failed(dir, e))?;
    Ok(record)
}

/// Adds every file below `dir`, whose path in the entry starts with `prefix`.
fn collect(dir: &Path, prefix: &str, files: &mut BTreeMap<String, FileRecord>) -> Result<()> {
    let failed = |e| write_failed(dir, e);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let (Ok(kind), Ok(name)) = (entry.file_type(), entry.file_name().into_string()) else {
            return Err(Error::cache(path, "the provider wrote a name that is no text"));
        };
        let name = format!("{prefix}{name}");
        if kind.is_dir() {
            collect(&path, &format!("{name}/"), files)?;
        } else if !kind.is_file() || name == RECORD || name == USED {
            return Err(Error::cache(path, "the provider wrote something that cannot be kept"));
        } else {
            let (bytes, sha256) = hash(&path).map_err(|e| write_failed(&path, e))?;
            File::options()
                .append(true)
                .open(&path)
                .and_then(|file| file.sync_all())
                .map_err(|e| write_failed(&path, e))?;
            let modified = path.metadata().map_or(0, |meta| modified(&meta));
            files.insert(name, FileRecord { bytes, sha256, modified });
        }
    }
    sync_dir(dir).map_err(failed)
}

/// When a file was changed last, in nanoseconds since 1970; 0 where that is not known.
pub(crate) fn modified(meta: &fs::Metadata) -> u64 {
    let since = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

/// Size and SHA-256 of a file.
fn hash(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, hex(&hash.finalize()))),
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

//! Snapshots of prefixes on disk, shared by every process that is given the directory.
//!
//! ```text
//! prefixes/
//! ├── 91bc...-3f2a....safetensors   one prefix: the digest of its scope, then that of its positions; its time of
//! │                                 change is the last use
//! ├── .partial-Xy12                 a prefix that is being written, or that a killed process left
//! └── locks/3f                      held by who reads a prompt that others may be about to read too
//! ```
//!
//! A snapshot appears by one rename, whole, or not at all. What reads it needs no lock: a file that is removed stays
//! until it is closed. A partial file is locked by who writes it, so that others know an abandoned one.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::super::kv_cache::PositionKey;
use super::scope::{Scope, after, is_image};
use super::snapshot::{self, Record, Snapshot, Unusable};
use crate::disk::{hex, lock_failed, remove_all, seconds, sync_dir, write_failed};
use crate::error::{Error, Result, size};

const EXTENSION: &str = "safetensors";
const PARTIAL: &str = ".partial-";
const LOCKS: &str = "locks";
/// Bytes of a digest in a name.
const NAME: usize = 16;
/// A partial file that is older and has no lock was left by a process that ended before it took one.
const NEW: Duration = Duration::from_mins(1);

/// A directory of snapshots with a limit on its size.
#[derive(Clone, Debug)]
pub struct PrefixDirectory {
    root: PathBuf,
    limit: u64,
}

/// One file of the directory.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub file: String,
    /// What it is.
    pub state: State,
    /// Its size.
    pub bytes: u64,
    /// When it was used last, in seconds since 1970.
    pub last_used: u64,
    /// What it holds, where it says so.
    #[serde(flatten)]
    pub content: Option<Content>,
    #[serde(skip)]
    order: SystemTime,
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Content {
    /// What the package is called.
    pub package: String,
    /// The decoder's variant.
    pub variant: String,
    /// Its provider.
    pub provider: String,
    /// Positions.
    pub positions: usize,
    /// Images.
    pub images: usize,
    /// When it was written, in seconds since 1970.
    pub created: u64,
}

/// What a file of the directory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A snapshot. Its rows are hashed when it is used.
    Whole,
    /// A process is writing it.
    Writing,
    /// A process left it half written.
    Abandoned,
    /// It cannot be used; the text says why.
    Damaged(String),
    /// It cannot be read by this user; the text says why. Others may use it.
    Unreadable(String),
}

/// What a pruning removed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// What was removed, in this order.
    pub removed: Vec<Listed>,
    /// Bytes that were freed.
    pub freed: u64,
    /// Bytes that are left.
    pub kept: u64,
}

/// While this lives, nobody else reads the same prompt.
#[derive(Debug)]
pub(super) struct Claim {
    _lock: File,
}

impl PrefixDirectory {
    /// The snapshots in `dir`, which is made when it is first written. Beyond `limit` bytes those are removed that were
    /// used longest ago.
    pub fn at(dir: &Path, limit: u64) -> Self {
        Self { root: dir.to_owned(), limit }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// The most bytes that the snapshots may take.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Where the snapshot of exactly `keys` is, or would be.
    pub(super) fn path(&self, scope: &Scope, keys: &[PositionKey]) -> PathBuf {
        let scope = scope.digest();
        let name = hex(&after(&scope, keys)[..NAME]);
        self.root.join(format!("{}-{name}.{EXTENSION}", hex(&scope[..NAME])))
    }

    /// Snapshots that hold more than `beyond` positions of `keys`, and a row of an image among those; the best first.
    /// `last` is where the last image of `keys` ends.
    pub(super) fn candidates(
        &self,
        scope: &Scope,
        keys: &[PositionKey],
        beyond: usize,
        last: usize,
    ) -> Vec<PathBuf> {
        let exact = self.path(scope, &keys[..last]);
        if exact.is_file() {
            return vec![exact];
        }
        let mut found: Vec<(usize, u64, PathBuf)> = self
            .files(scope)
            .filter_map(|path| {
                let bytes = path.metadata().ok()?.len();
                let held = keys_of(&path, scope)?;
                let common = held.iter().zip(keys).take_while(|(held, wanted)| held == wanted).count();
                keys.get(beyond..common)?.iter().any(is_image).then_some((common, bytes, path))
            })
            .collect();
        found.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        found.into_iter().map(|(_, _, path)| path).collect()
    }

    /// Writes a snapshot of `keys`, whose rows are `data`; removes those that it begins with, then what exceeds the
    /// limit.
    ///
    /// # Errors
    /// [`Error::Cache`] when it cannot be written, or is larger than the limit. Nothing of it then stays.
    pub(super) fn publish(
        &self,
        name: &str,
        scope: &Scope,
        keys: &[PositionKey],
        data: &[u8],
    ) -> Result<PathBuf> {
        let record = Record::new(name, scope, keys, seconds(SystemTime::now()));
        let bytes = record.file_bytes().unwrap_or(u64::MAX);
        if bytes > self.limit {
            let (needed, limit) = (size(bytes), size(self.limit));
            let text = format!("a prefix of {} positions takes {needed} of at most {limit}", keys.len());
            return Err(Error::cache(&self.root, format!("{text}; raise --snapshot-limit")));
        }
        let failed = |e| write_failed(&self.root, e);
        let path = self.path(scope, keys);
        fs::create_dir_all(&self.root).map_err(failed)?;
        let file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(&self.root).map_err(failed)?;
        // Nobody else knows the file; where there are no locks, age alone protects it from pruning.
        let _ = file.as_file().try_lock();
        snapshot::write(file.as_file(), &record, data).map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        sync_dir(&self.root).map_err(failed)?;
        self.drop_prefixes(scope, keys, &path);
        if let Err(error) = self.prune(self.limit) {
            tracing::warn!(%error, "the snapshots are not pruned");
        }
        Ok(path)
    }

    /// The right to read `keys` alone; `None` while another process has it.
    ///
    /// # Errors
    /// [`Error::Cache`] when the directory cannot be written or has no locks.
    pub(super) fn claim(&self, scope: &Scope, keys: &[PositionKey]) -> Result<Option<Claim>> {
        let locks = self.root.join(LOCKS);
        fs::create_dir_all(&locks).map_err(|e| write_failed(&locks, e))?;
        // Few locks for all prefixes: two that share one wait for each other, which harms nothing.
        let path = locks.join(hex(&after(&scope.digest(), keys)[..1]));
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|e| write_failed(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { _lock: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(lock_failed(&path, e)),
        }
    }

    /// Everything in the directory, what was used last first; nothing when there is no such directory.
    ///
    /// # Errors
    /// [`Error::Cache`] when the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => {
                return Err(Error::cache(&self.root, "it cannot be read; use another directory").because(e));
            }
        };
        let mut listed: Vec<Listed> = entries.filter_map(|entry| look(&entry.ok()?.path())).collect();
        listed.sort_by(|a, b| b.order.cmp(&a.order).then_with(|| a.file.cmp(&b.file)));
        Ok(listed)
    }

    /// Removes what killed processes left and what is damaged, then readable snapshots until at most `limit` bytes are left,
    /// those first that were used longest ago. What a process writes stays.
    ///
    /// # Errors
    /// [`Error::Cache`] when something cannot be read or removed.
    pub fn prune(&self, limit: u64) -> Result<Pruned> {
        let listed = self.list()?;
        let mut pruned = Pruned { kept: listed.iter().map(|one| one.bytes).sum(), ..Pruned::default() };
        let broken = |one: &&Listed| matches!(one.state, State::Abandoned | State::Damaged(_));
        let whole = |one: &&Listed| one.state == State::Whole;
        for one in listed.iter().filter(broken).chain(listed.iter().rev().filter(whole)) {
            if one.state == State::Whole && pruned.kept <= limit {
                break;
            }
            let path = self.root.join(&one.file);
            remove_all(&path).map_err(|e| write_failed(&path, e))?;
            pruned.kept -= one.bytes;
            pruned.freed += one.bytes;
            pruned.removed.push(one.clone());
        }
        Ok(pruned)
    }

    /// Removes snapshots of nothing but the beginning of `keys`: the one at `path` serves instead.
    fn drop_prefixes(&self, scope: &Scope, keys: &[PositionKey], path: &Path) {
        for other in self.files(scope).filter(|other| other != path) {
            if keys_of(&other, scope).is_some_and(|held| keys.starts_with(&held)) {
                discard(&other);
            }
        }
    }

    /// The snapshots of `scope`.
    fn files(&self, scope: &Scope) -> impl Iterator<Item = PathBuf> + use<> {
        let start = format!("{}-", hex(&scope.digest()[..NAME]));
        let entries = fs::read_dir(&self.root).into_iter().flatten().filter_map(std::result::Result::ok);
        let own = entries.filter(move |entry| entry.file_name().to_string_lossy().starts_with(&start));
        own.map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|kind| kind == EXTENSION) && path.is_file())
    }
}

/// What the snapshot at `path` says that it holds, if it was read by `scope`.
fn keys_of(path: &Path, scope: &Scope) -> Option<Vec<PositionKey>> {
    snapshot::record(path).ok().filter(|record| record.scope == *scope)?.keys()
}

/// Opens a snapshot for use.
pub(super) fn open(path: &Path, scope: &Scope) -> Result<Snapshot, Unusable> {
    let snapshot = Snapshot::open(path, |other| other == scope)?;
    // The time of use decides only what is removed first.
    let used = File::options().append(true).open(path);
    let _ = used.and_then(|file| file.set_modified(SystemTime::now()));
    Ok(snapshot)
}

/// Removes one snapshot; says whether it is gone.
pub(super) fn discard(path: &Path) -> bool {
    remove_all(path).inspect_err(|error| tracing::warn!(path = %path.display(), %error, "it stays")).is_ok()
}

/// What the file at `path` is; `None` for what does not belong to the directory, or went away meanwhile.
fn look(path: &Path) -> Option<Listed> {
    let file = path.file_name()?.to_str()?.to_owned();
    let meta = path.metadata().ok().filter(fs::Metadata::is_file)?;
    let order = meta.modified().ok()?;
    let (state, content) = if file.starts_with(PARTIAL) {
        let free = File::open(path).is_ok_and(|file| file.try_lock_shared().is_ok());
        let old = order.elapsed().is_ok_and(|age| age > NEW);
        (if free && old { State::Abandoned } else { State::Writing }, None)
    } else if is_ours(&file) {
        match snapshot::record(path) {
            Ok(record) => (State::Whole, Some(content(&record))),
            Err(Unusable::Wrong(why)) => (State::Damaged(why), None),
            Err(Unusable::Unreadable(error)) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(why) => (State::Unreadable(why.to_string()), None),
        }
    } else {
        return None;
    };
    Some(Listed { file, state, bytes: meta.len(), last_used: seconds(order), content, order })
}

/// Whether a name is that of a snapshot: what else lies here is left alone.
fn is_ours(file: &str) -> bool {
    let digest = |text: &str| text.len() == 2 * NAME && text.bytes().all(|b| b.is_ascii_hexdigit());
    let parts = file.strip_suffix(".safetensors").and_then(|stem| stem.split_once('-'));
    parts.is_some_and(|(scope, keys)| digest(scope) && digest(keys))
}

fn content(record: &Record) -> Content {
    let decoder = record.scope.components.iter().find(|one| one.component == "decoder");
    Content {
        package: record.name.clone(),
        variant: decoder.map_or_else(String::new, |one| one.variant.clone()),
        provider: decoder.map_or_else(String::new, |one| one.provider.clone()),
        positions: record.positions,
        images: record.images(),
        created: record.created,
    }
}

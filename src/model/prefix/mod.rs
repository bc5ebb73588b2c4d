//! Never read twice: where the beginning of a prompt comes from when it was read before.
//!
//! ```text
//! prompt   system ─ image ─ question            any prefix of what was read before counts, whoever asked
//!
//! working  the cache of the last request        nothing is copied
//! memory   blocks of other conversations        rows are copied, an image is not encoded
//! package  the head of every prompt             the same, from the package's own file
//! disk     snapshots up to the last image       the same, after a hash over the file; for other processes
//! ```
//!
//! Rows are kept as the decoder's cache holds them, in its own type: what is used again is what was computed.

mod directory;
mod memory;
mod scope;
mod ship;
mod snapshot;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::cancel::Canceler;
use super::compiled::{Notice, NoticeSink};
use super::kv_cache::{KvCache, PositionKey};
use super::projector::ImageEmbeds;
use crate::error::{Error, Result, size};
use directory::Claim;
use memory::MemoryStore;
use snapshot::{Snapshot, Unusable};

pub use directory::{Content, Listed, PrefixDirectory, Pruned, State};
pub use scope::{Scope, Served, Stretch};

/// Fewer lost positions of text are read again rather than kept.
const WORTH_KEEPING: usize = 16;
/// How long another process may take to read the same prompt before this one does so too.
const PATIENCE: Duration = Duration::from_mins(2);
const MOMENT: Duration = Duration::from_millis(10);

/// What is kept of prompts that were read.
#[derive(Clone, Debug, Default)]
pub struct PrefixOptions {
    /// The most bytes of memory for other conversations than the last; 0 keeps none, `None` lets the engine choose.
    pub memory: Option<u64>,
    /// Where snapshots for other processes are kept; none are otherwise.
    pub directory: Option<Arc<PrefixDirectory>>,
}

/// Where the positions that were not read again came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CachedFrom {
    /// The cache that the last request left.
    pub working: usize,
    /// Memory, where an earlier conversation was kept.
    pub memory: usize,
    /// A snapshot in the package.
    pub package: usize,
    /// A snapshot on disk.
    pub disk: usize,
}

impl CachedFrom {
    /// All of them.
    pub fn total(&self) -> usize {
        self.working + self.memory + self.package + self.disk
    }

    /// The same with `most` positions in all; what was found last is given up first.
    pub(super) fn at_most(mut self, most: usize) -> Self {
        let mut excess = self.total().saturating_sub(most);
        for part in [&mut self.disk, &mut self.package, &mut self.memory, &mut self.working] {
            let less = excess.min(*part);
            *part -= less;
            excess -= less;
        }
        self
    }
}

/// What is kept of prompts, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefixReport {
    /// The most bytes of memory.
    pub memory_limit: u64,
    /// Bytes of memory in use.
    pub memory_used: u64,
    /// What decided the limit.
    pub decided_by: String,
    /// Where snapshots are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Why nothing is kept, or nothing is written, if that is so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// What was read before, in memory and on disk, for the model as it is served.
#[derive(Debug)]
pub(super) struct Prefixes {
    name: String,
    scope: Scope,
    memory: MemoryStore,
    decided_by: String,
    shipped: Option<Snapshot>,
    directory: Option<Arc<PrefixDirectory>>,
    notices: Option<NoticeSink>,
    refused: HashSet<PathBuf>,
    closed: Option<&'static str>,
    too_large: bool,
    disk: Arc<Disk>,
    writer: Option<JoinHandle<()>>,
    patience: Duration,
}

/// What the thread that writes tells.
#[derive(Debug, Default)]
struct Disk {
    /// Nothing is written any more.
    stopped: AtomicBool,
    why: Mutex<Option<String>>,
    /// What this session wrote.
    written: Mutex<Vec<PathBuf>>,
}

/// What was found of a prompt.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) from: CachedFrom,
    /// The right to write what is now read.
    claim: Option<Claim>,
}

impl Prefixes {
    /// Nothing was read yet by the model called `name`, as `scope` serves it.
    pub(super) fn new(
        name: &str,
        scope: Scope,
        memory: (u64, String),
        directory: Option<Arc<PrefixDirectory>>,
        notices: Option<NoticeSink>,
    ) -> Self {
        let (limit, decided_by) = memory;
        Self {
            name: name.to_owned(),
            scope,
            memory: MemoryStore::new(limit),
            decided_by,
            shipped: None,
            directory,
            notices,
            refused: HashSet::new(),
            closed: None,
            too_large: false,
            disk: Arc::default(),
            writer: None,
            patience: PATIENCE,
        }
    }

    /// Does not wait for another process that reads the same prompt: others are being answered meanwhile.
    pub(super) fn never_wait(&mut self) {
        self.patience = Duration::ZERO;
    }

    /// Another model serves from now on: what the last one read is of no use, and what it wrote is in doubt.
    pub(super) fn replace(&mut self, scope: Scope) {
        self.memory.clear();
        self.finish();
        let written = std::mem::take(&mut *lock(&self.disk.written));
        for path in &written {
            directory::discard(path);
        }
        self.scope = scope;
    }

    /// Puts what was read before of `keys` into `cache`, which afterwards holds so much of them and nothing else: what
    /// one of `others` holds, or memory, or a file. What that takes out of the cache is kept in memory first, where it is
    /// worth it.
    ///
    /// # Errors
    /// [`Error::Cancelled`] while another process reads the same prompt; others when rows cannot be copied, and the
    /// cache must then be dropped.
    pub(super) fn restore(
        &mut self,
        cache: &mut KvCache,
        keys: &[PositionKey],
        others: &[&KvCache],
        canceler: &Canceler,
    ) -> Result<Found> {
        let working = cache.common_prefix(keys);
        let mut found = Found { from: CachedFrom { working, ..CachedFrom::default() }, claim: None };
        self.closed = cache.is_closed();
        if self.closed.is_none() {
            self.memory.touch(keys);
            self.keep_lost(cache, working);
        }
        if cache.len() > working {
            cache.truncate(working)?;
        }
        if self.closed.is_some() {
            return Ok(found);
        }
        let held = self.memory.longest(keys);
        let other =
            others.iter().map(|other| (other.common_prefix(keys), other)).max_by_key(|(common, _)| *common);
        match other {
            Some((common, other)) if common > working && common >= held => {
                cache.reserve(keys.len())?;
                cache.copy_from(other, working..common)?;
                found.from.memory = common - working;
            }
            _ if held > working => {
                cache.reserve(keys.len())?;
                cache.import(&keys[working..held], &self.memory.pieces(keys, working, held))?;
                found.from.memory = held - working;
            }
            _ => {}
        }
        if let Some(snapshot) = &self.shipped {
            let (held, common) = (cache.len(), snapshot.common(keys));
            if common > held {
                snapshot.add_to(cache, keys, common)?;
                found.from.package = common - held;
            }
        }
        self.take_from_disk(cache, keys, canceler, &mut found)?;
        Ok(found)
    }

    /// Keeps what `cache` holds beyond `working` positions, where reading it again costs more than that.
    fn keep_lost(&mut self, cache: &KvCache, working: usize) {
        let keys = cache.positions();
        let lost = &keys[working..];
        let copied = keys.len() - self.memory.longest(keys);
        let long = lost.len() >= WORTH_KEEPING && lost.len() >= copied / 4;
        if self.memory.limit() == 0 || copied == 0 || !(long || lost.iter().any(scope::is_image)) {
            return;
        }
        if let Err(error) = self.memory.keep(cache) {
            tracing::warn!(%error, "a conversation is not kept");
        }
    }

    fn take_from_disk(
        &mut self,
        cache: &mut KvCache,
        keys: &[PositionKey],
        canceler: &Canceler,
        found: &mut Found,
    ) -> Result<()> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        let Some(last) = scope::last_image_end(keys) else { return Ok(()) };
        while cache.len() < last {
            if let Some(positions) = self.take_snapshot(&directory, cache, keys, last)? {
                found.from.disk += positions;
                continue;
            }
            if found.claim.is_some() || self.disk.stopped.load(Ordering::SeqCst) {
                break;
            }
            match self.wait_for_claim(&directory, &keys[..last], canceler)? {
                // Another process may have finished meanwhile: look once more.
                Some(claim) => found.claim = Some(claim),
                None => break,
            }
        }
        if cache.len() >= last {
            found.claim = None;
        }
        Ok(())
    }

    /// Adds positions from the best snapshot, and says how many; `None` when there is none of use.
    fn take_snapshot(
        &mut self,
        directory: &PrefixDirectory,
        cache: &mut KvCache,
        keys: &[PositionKey],
        last: usize,
    ) -> Result<Option<usize>> {
        let held = cache.len();
        for path in directory.candidates(&self.scope, keys, held, last) {
            if self.refused.contains(&path) {
                continue;
            }
            let snapshot = match directory::open(&path, &self.scope) {
                Ok(snapshot) => snapshot,
                Err(why) => {
                    self.refuse(path, &why);
                    continue;
                }
            };
            let common = snapshot.common(keys);
            if common > held {
                snapshot.add_to(cache, keys, common)?;
                return Ok(Some(common - held));
            }
            self.refuse(path, &"it holds something else than its name says".into());
        }
        Ok(None)
    }

    /// Tells of a snapshot that must not be used, once, and removes it, unless others may be able to read it.
    fn refuse(&mut self, path: PathBuf, why: &Unusable) {
        let unreadable = match why {
            // Another process removed it meanwhile.
            Unusable::Unreadable(error) if error.kind() == io::ErrorKind::NotFound => return,
            Unusable::Unreadable(_) => true,
            Unusable::Wrong(_) => false,
        };
        let text = format!("snapshot {} is not used: {why}; the prompt is read again", path.display());
        tell(self.notices.as_ref(), text);
        if unreadable || !directory::discard(&path) {
            self.refused.insert(path);
        }
    }

    fn wait_for_claim(
        &self,
        directory: &PrefixDirectory,
        keys: &[PositionKey],
        canceler: &Canceler,
    ) -> Result<Option<Claim>> {
        let begin = Instant::now();
        let mut told = false;
        loop {
            match directory.claim(&self.scope, keys) {
                Ok(None) if begin.elapsed() < self.patience => {}
                Ok(claim) => return Ok(claim),
                Err(error) => {
                    self.disk.stop(&error, self.notices.as_ref());
                    return Ok(None);
                }
            }
            if canceler.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if !told && begin.elapsed() > Duration::from_secs(1) {
                tell(
                    self.notices.as_ref(),
                    "waiting for another process that reads the same prompt".to_owned(),
                );
                told = true;
            }
            thread::sleep(MOMENT);
        }
    }

    /// Writes a snapshot of `cache`, which now holds `keys`, up to the last image, if `found` lacked it. The rows are
    /// copied here, and written by a thread.
    pub(super) fn write(&mut self, cache: &KvCache, keys: &[PositionKey], found: Found) {
        let (Some(claim), Some(directory)) = (found.claim, &self.directory) else { return };
        let Some(last) = scope::last_image_end(keys) else { return };
        // What lies there cannot be read, or not be removed: it is not ours to replace.
        if self.refused.contains(&directory.path(&self.scope, &keys[..last])) {
            return;
        }
        let needed = (last * cache.layout().position_bytes()) as u64;
        if needed > directory.limit() {
            if !self.too_large {
                let (needed, limit) = (size(needed), size(directory.limit()));
                let text = format!(
                    "no snapshot is written: {last} positions take {needed} of at most {limit}; raise --snapshot-limit"
                );
                tell(self.notices.as_ref(), text);
                self.too_large = true;
            }
            return;
        }
        let data = match cache.export(&(0..last)) {
            Ok(data) => data,
            Err(error) => return tell(self.notices.as_ref(), format!("no snapshot is written: {error}")),
        };
        let (directory, disk) = (Arc::clone(directory), Arc::clone(&self.disk));
        let (notices, name, scope) = (self.notices.clone(), self.name.clone(), self.scope.clone());
        let keys = keys[..last].to_vec();
        let write = move || {
            match directory.publish(&name, &scope, &keys, &data) {
                Ok(path) => lock(&disk.written).push(path),
                Err(error) => disk.stop(&error, notices.as_ref()),
            }
            drop(claim);
        };
        // One at a time: the next one waits rather than that both stand in memory.
        self.finish();
        match thread::Builder::new().name("llava-phi snapshot".to_owned()).spawn(write) {
            Ok(writer) => self.writer = Some(writer),
            Err(error) => tell(self.notices.as_ref(), format!("no snapshot is written: {error}")),
        }
    }

    /// The embeddings of an image that was encoded before.
    pub(super) fn image(&mut self, hash: &[u8; 32]) -> Option<Arc<ImageEmbeds>> {
        self.memory.image(hash)
    }

    /// Keeps the embeddings of an image.
    pub(super) fn keep_image(&mut self, hash: [u8; 32], embeds: &Arc<ImageEmbeds>) {
        self.memory.keep_image(hash, embeds);
    }

    pub(super) fn report(&self) -> PrefixReport {
        let stopped = lock(&self.disk.why).clone();
        PrefixReport {
            memory_limit: self.memory.limit(),
            memory_used: self.memory.used(),
            decided_by: self.decided_by.clone(),
            directory: self.directory.as_ref().map(|directory| directory.dir().to_owned()),
            refused: self.closed.map(|why| format!("nothing is kept: {why}")).or(stopped),
        }
    }

    /// Waits for what is being written.
    fn finish(&mut self) {
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::warn!("the thread that wrote a snapshot ended early");
        }
    }
}

impl Drop for Prefixes {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Disk {
    /// Writes nothing any more, and says why.
    fn stop(&self, error: &Error, notices: Option<&NoticeSink>) {
        let text = format!("no snapshots are written: {error}");
        if !self.stopped.swap(true, Ordering::SeqCst) {
            *lock(&self.why) = Some(text.clone());
            tell(notices, text);
        }
    }
}

fn tell(notices: Option<&NoticeSink>, text: String) {
    tracing::warn!("{text}");
    if let Some(sink) = notices {
        sink.tell(Notice::Prefix(text));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

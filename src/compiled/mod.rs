//! What accelerators compile from graphs, kept by what it was compiled from.
//!
//! ```text
//! cache/
//! ├── 3f2a.../            one entry, named by the digest of its key
//! │   ├── entry.json      the key, the files with sizes and hashes; written last
//! │   ├── used            its time of change is the last use
//! │   └── ...             what the provider wrote
//! ├── .partial-91bc.../   an entry that is being built, or that a killed process left
//! ├── .copy-.../          the files of an entry for one session that may write to them
//! └── locks/91bc...       held alone by who builds or removes the entry, shared by who uses it
//! ```
//!
//! An entry appears by one rename, whole, or not at all. Locks go with the process that holds them, so that nothing has
//! to be cleaned up by hand. Lock files themselves stay: to remove one while another process opens it would give two
//! processes a lock each.

mod copy;
mod entry;
mod prune;
#[cfg(test)]
mod tests;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::disk::{check_writable, lock_failed, remove_all, sync_dir, write_failed};
use crate::error::{Error, Result};

pub use copy::PrivateCopy;
pub(crate) use entry::modified;
pub use entry::{FORMAT, FileRecord, Key, Record};
pub use prune::{Listed, Pruned, State};

const LOCKS: &str = "locks";
const PARTIAL: &str = ".partial-";
const USED: &str = "used";
/// Who lists the cache holds each lock for a moment; who builds, for minutes.
const MOMENT: Duration = Duration::from_millis(5);
const MOMENTS: usize = 5;

/// A directory of compiled entries with a limit on its size.
#[derive(Clone, Debug)]
pub struct CompiledCache {
    root: PathBuf,
    limit: u64,
    writable: bool,
}

/// An entry in use. While this value lives no process removes the entry.
#[derive(Debug)]
pub struct Entry {
    /// The directory with what the provider wrote. It is not to be written to: a file that changes damages the entry.
    pub dir: PathBuf,
    /// What is in it and what it was compiled from.
    pub record: Record,
    // `None` where the cache cannot be written, so that nobody removes anything either.
    _lock: Option<File>,
}

/// What [`CompiledCache::find`] found.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one is held for each session, and mostly the largest")]
pub enum Found {
    /// An entry, whole.
    Whole(Entry),
    /// There is none, or another process is building it.
    Absent,
    /// There was one that must not be used, and it was removed where possible. The text says what was wrong.
    Damaged(String),
}

impl CompiledCache {
    /// Opens the cache in `dir`, which is made when it is not there. Entries beyond `limit` bytes are removed after a
    /// build, those first that were used longest ago.
    ///
    /// # Errors
    /// [`Error::Cache`] when the directory cannot be made or written; [`CompiledCache::read_only`] may still serve.
    pub fn open(dir: &Path, limit: u64) -> Result<Self> {
        let cache = Self::at(dir, limit);
        cache.check_writable()?;
        Ok(cache)
    }

    /// Makes the directory when it is not there, and sees whether it can be written.
    ///
    /// # Errors
    /// As [`CompiledCache::open`].
    pub fn check_writable(&self) -> Result<()> {
        let locks = self.root.join(LOCKS);
        fs::create_dir_all(&locks).map_err(|e| write_failed(&self.root, e))?;
        check_writable(&self.root)
    }

    /// As [`CompiledCache::open`], but nothing is made or written before the first build, which may then fail.
    pub fn at(dir: &Path, limit: u64) -> Self {
        Self { root: dir.to_owned(), limit, writable: true }
    }

    /// The cache in `dir` as it is: entries are found, but none is built or removed.
    pub fn read_only(dir: &Path) -> Self {
        Self { root: dir.to_owned(), limit: u64::MAX, writable: false }
    }

    /// Another cache in the directory `name` of this one, which neither lists nor prunes it, with a limit of its own.
    #[must_use]
    pub fn below(&self, name: &str, limit: u64) -> Self {
        Self { root: self.root.join(name), limit, writable: self.writable }
    }

    /// The cache's directory.
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// The entry for `key`, if it is whole: complete, of this format, compiled from exactly this key, every file there
    /// with its size and, up to 64 MiB, its hash.
    ///
    /// # Errors
    /// [`Error::Cache`] when its lock cannot be taken.
    pub fn find(&self, key: &Key) -> Result<Found> {
        let digest = key.digest();
        let dir = self.root.join(&digest);
        if !dir.exists() {
            return Ok(Found::Absent);
        }
        let mut lock = self.share(&digest)?;
        for _ in 0..MOMENTS {
            if lock.is_none() {
                thread::sleep(MOMENT);
                lock = self.share(&digest)?;
            }
        }
        let Some(lock) = lock else { return Ok(Found::Absent) };
        if !dir.exists() {
            return Ok(Found::Absent);
        }
        match entry::read(&dir, key) {
            Ok(record) => Ok(Found::Whole(self.in_use(dir, record, lock))),
            Err(why) => {
                drop(lock);
                // Another process may have built it anew before the lock was had.
                if self.writable
                    && let Some(_alone) = self.try_alone(&digest)?
                    && entry::read(&dir, key).is_err()
                {
                    self.remove(&digest).map_err(|e| write_failed(&dir, e))?;
                }
                Ok(Found::Damaged(why))
            }
        }
    }

    /// Builds the entry for `key` with `work`, which writes into the directory that it is given, and then removes what
    /// exceeds the limit. When another process builds the same entry, calls `waiting`, waits, and takes what that one
    /// built.
    ///
    /// # Errors
    /// What `work` returns; [`Error::Cache`] when the disk is full, when nothing was written, or when the entry cannot
    /// be published. Nothing of a failed build stays.
    pub fn build(
        &self,
        key: &Key,
        waiting: &mut dyn FnMut(),
        work: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Entry> {
        if !self.writable {
            return Err(Error::cache(&self.root, "it was opened for reading only; open it for writing"));
        }
        let locks = self.root.join(LOCKS);
        fs::create_dir_all(&locks).map_err(|e| write_failed(&locks, e))?;
        let digest = key.digest();
        let dir = self.root.join(&digest);
        let (mut told, mut patience) = (false, MOMENTS);
        loop {
            if let Some(lock) = self.try_alone(&digest)? {
                let (record, built) = match entry::read(&dir, key) {
                    Ok(record) => (record, false),
                    Err(_) => (self.publish(key, &digest, &dir, work)?, true),
                };
                drop(lock);
                return self.published(&digest, record, built);
            }
            // Somebody builds it, which the shared lock waits for, or uses it, which it does not.
            let mut shared = self.share(&digest)?;
            if shared.is_none() && !told {
                waiting();
                told = true;
            }
            if shared.is_none() {
                shared = Some(Some(self.wait_shared(&digest)?));
            }
            match entry::read(&dir, key) {
                Ok(record) => return Ok(self.in_use(dir, record, shared.flatten())),
                Err(why) if dir.exists() => {
                    if patience == 0 {
                        let text = format!("it is damaged and another process uses it ({why}); end that one");
                        return Err(Error::cache(&dir, text));
                    }
                    patience -= 1;
                }
                // The other's build failed: it is this one's turn, or that of another that waited too.
                Err(_) => {}
            }
            drop(shared);
            thread::sleep(MOMENT);
        }
    }

    /// Removes the entry with this digest, unless a process uses or builds it; says whether it is gone.
    ///
    /// # Errors
    /// [`Error::Cache`] when it cannot be locked or removed.
    pub fn discard(&self, digest: &str) -> Result<bool> {
        let dir = self.root.join(digest);
        if !self.writable {
            return Ok(false);
        }
        let Some(_alone) = self.try_alone(digest)? else { return Ok(false) };
        self.remove(digest).map_err(|e| write_failed(&dir, e))?;
        Ok(true)
    }

    /// The entry that this process has just built or found, in use.
    fn published(&self, digest: &str, record: Record, built: bool) -> Result<Entry> {
        let dir = self.root.join(digest);
        let shared = self.wait_shared(digest)?;
        // Between the two locks somebody may prune; then there is nothing for it but to ask again.
        if !dir.exists() {
            return Err(Error::cache(&dir, "it was removed as soon as it was built; try again"));
        }
        let entry = self.in_use(dir, record, Some(shared));
        if built && let Err(error) = self.prune(self.limit) {
            tracing::warn!(%error, "the cache is not pruned");
        }
        Ok(entry)
    }

    /// Builds an entry beside its place, and moves it there. Its lock must be held alone.
    fn publish(
        &self,
        key: &Key,
        digest: &str,
        dir: &Path,
        work: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Record> {
        self.remove(digest).map_err(|e| write_failed(dir, e))?;
        let partial = self.root.join(format!("{PARTIAL}{digest}"));
        let publish = || {
            fs::create_dir(&partial).map_err(|e| write_failed(&partial, e))?;
            work(&partial).map_err(|e| full_disk(&partial, e))?;
            let record = entry::seal(&partial, key)?;
            fs::rename(&partial, dir).map_err(|e| write_failed(dir, e))?;
            sync_dir(&self.root).map_err(|e| write_failed(&self.root, e))?;
            Ok(record)
        };
        publish().inspect_err(|_| {
            // What cannot be removed now is removed by the next build or pruning.
            let _ = fs::remove_dir_all(&partial);
        })
    }

    fn in_use(&self, dir: PathBuf, record: Record, lock: Option<File>) -> Entry {
        if self.writable {
            // The time of use decides only what is removed first.
            let used = File::options().create(true).append(true).open(dir.join(USED));
            let _ = used.and_then(|file| file.set_modified(SystemTime::now()));
        }
        Entry { dir, record, _lock: lock }
    }

    /// The shared lock of an entry: `Some(None)` where no lock can be had because nothing can be written, `None` when
    /// another process holds it alone.
    #[expect(clippy::option_option, reason = "no lock and no need of one are two things")]
    fn share(&self, digest: &str) -> Result<Option<Option<File>>> {
        if !self.writable {
            let Ok(file) = File::open(self.lock_path(digest)) else { return Ok(Some(None)) };
            return Ok(file.try_lock_shared().is_ok().then_some(Some(file)));
        }
        let file = self.lock_file(digest)?;
        match file.try_lock_shared() {
            Ok(()) => Ok(Some(Some(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(lock_failed(&self.lock_path(digest), e)),
        }
    }

    /// The lock of an entry for this process alone, when nobody holds it.
    fn try_alone(&self, digest: &str) -> Result<Option<File>> {
        let file = self.lock_file(digest)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(lock_failed(&self.lock_path(digest), e)),
        }
    }

    /// The shared lock of an entry, after whoever holds it alone.
    fn wait_shared(&self, digest: &str) -> Result<File> {
        let file = self.lock_file(digest)?;
        file.lock_shared().map_err(|e| lock_failed(&self.lock_path(digest), e))?;
        Ok(file)
    }

    fn lock_file(&self, digest: &str) -> Result<File> {
        let path = self.lock_path(digest);
        // Appending needs no content, and neither shortens nor changes a file that is there.
        File::options().create(true).append(true).open(&path).map_err(|e| write_failed(&path, e))
    }

    fn lock_path(&self, digest: &str) -> PathBuf {
        self.root.join(LOCKS).join(digest)
    }

    /// Removes an entry and what a build of it left. Its lock must be held alone.
    fn remove(&self, digest: &str) -> io::Result<()> {
        let (dir, partial) = (self.root.join(digest), self.root.join(format!("{PARTIAL}{digest}")));
        remove_all(&partial)?;
        // Out of sight by one rename, so that a process that is killed meanwhile leaves no half entry.
        match fs::rename(&dir, &partial) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        remove_all(&partial)
    }
}

/// A builder's failure, or the sentence for a full disk when that is what lies below it.
fn full_disk(partial: &Path, error: Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(one) = cause {
        let kind = one.downcast_ref::<io::Error>().map(io::Error::kind);
        if let Some(kind @ (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) = kind {
            return write_failed(partial, kind.into());
        }
        cause = one.source();
    }
    error
}

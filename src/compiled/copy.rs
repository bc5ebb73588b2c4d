//! A copy of an entry for one session, for providers that write into the directory that they read.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::{CompiledCache, Entry};
use crate::disk::{remove_all, write_failed};
use crate::error::Result;

const PREFIX: &str = ".copy-";
const LOCK: &str = "lock";
const FILES: &str = "files";
/// A copy that is older and has no lock was left by a process that ended before it took one.
const NEW: Duration = Duration::from_mins(1);

/// The files of an entry, which may be written to. They go with this value; [`CompiledCache::prune`] removes what a
/// killed process left.
#[derive(Debug)]
pub struct PrivateCopy {
    files: PathBuf,
    // Before the directory: some systems do not remove what is open.
    _lock: File,
    _dir: TempDir,
}

impl PrivateCopy {
    /// The directory with the files, as in the entry.
    pub fn dir(&self) -> &Path {
        &self.files
    }
}

impl Entry {
    /// Copies what the provider wrote: beside the entry, where file systems that can share the blocks do so, or among
    /// the system's temporary files when the cache cannot be written.
    ///
    /// # Errors
    /// [`Error::Cache`](crate::error::Error::Cache) when there is no room, or a file cannot be read.
    pub fn copy(&self) -> Result<PrivateCopy> {
        let failed = |e| write_failed(&self.dir, e);
        let make = || tempfile::Builder::new().prefix(PREFIX).to_owned();
        let beside = self.dir.parent().and_then(|root| make().tempdir_in(root).ok());
        let dir = beside.map_or_else(|| make().tempdir(), Ok).map_err(failed)?;
        let lock = File::create_new(dir.path().join(LOCK)).map_err(failed)?;
        // Nobody else knows the file; where there are no locks, age alone protects it from pruning.
        let _ = lock.try_lock();
        let files = dir.path().join(FILES);
        for name in self.record.files.keys() {
            let (from, to) = (self.dir.join(name), files.join(name));
            let parent = to.parent().unwrap_or(&files);
            fs::create_dir_all(parent).and_then(|()| fs::copy(&from, &to)).map_err(failed)?;
        }
        Ok(PrivateCopy { files, _lock: lock, _dir: dir })
    }
}

impl CompiledCache {
    /// Removes the copies of processes that ended without doing so.
    pub(super) fn remove_copies(&self) {
        let entries = fs::read_dir(&self.root).into_iter().flatten().filter_map(std::result::Result::ok);
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
            let path = entry.path();
            let changed = || entry.metadata().and_then(|meta| meta.modified()).ok()?.elapsed().ok();
            let abandoned = File::open(path.join(LOCK))
                .map_or_else(|_| changed().is_some_and(|age| age > NEW), |lock| lock.try_lock().is_ok());
            if abandoned && let Err(error) = remove_all(&path) {
                tracing::warn!(path = %path.display(), %error, "an abandoned copy stays");
            }
        }
    }
}

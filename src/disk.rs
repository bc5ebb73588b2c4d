//! What everything that keeps files between runs does in one way.

#![allow(unsafe_code)] // Mapping a file is unsafe because another process may change it; see `map`.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps `file` for reading.
///
/// # Errors
/// Those of the system: an empty file, or none that can be mapped.
pub(crate) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read only, and safe code reads it through bounds checks against its length, so a file that
    // another process rewrites can give wrong numbers but not break memory safety. A file that is cut while it is
    // mapped ends the process, as for every program that maps its weights.
    unsafe { Mmap::map(file) }
}

/// Puts the names in a directory on the disk, where systems have that.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Removes a directory or file; one that is not there is fine.
pub(crate) fn remove_all(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    removed.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// The error for a lock that cannot be taken.
pub(crate) fn lock_failed(path: &Path, cause: io::Error) -> Error {
    let text = format!("it cannot be locked ({cause}); use a cache on a file system that has locks");
    Error::cache(path, text).because(cause)
}

/// The error for a cache that cannot be written.
pub(crate) fn write_failed(path: &Path, cause: io::Error) -> Error {
    let text = match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; free some, lower the cache's limit, or use another directory".to_owned()
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "it cannot be written; allow it, or use another directory".to_owned()
        }
        _ => format!("it cannot be written ({cause}); use another directory"),
    };
    Error::cache(path, text).because(cause)
}

/// Makes `dir` when it is not there, and sees whether it can be written.
///
/// # Errors
/// [`Error::Cache`] when it cannot.
pub(crate) fn check_writable(dir: &Path) -> Result<()> {
    let probe = || {
        fs::create_dir_all(dir)?;
        tempfile::NamedTempFile::with_prefix_in(".probe-", dir).map(drop)
    };
    probe().map_err(|e| write_failed(dir, e))
}

/// `time` in seconds since 1970; 0 before.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

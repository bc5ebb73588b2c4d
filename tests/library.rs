//! ONNX Runtime found, refused, fetched and installed, with no network: pip is played by scripts.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::{Path, PathBuf};

use llava_phi::runtime::library::{self, Origin};
use llava_phi::runtime::{LibraryOptions, LibraryVariant, Runtime, fetch};
use tempfile::TempDir;

use crate::support;

/// The library's name on this system, with a version in it.
fn name(version: &str) -> String {
    match std::env::consts::OS {
        "windows" => "onnxruntime.dll".to_owned(),
        "macos" => format!("libonnxruntime.{version}.dylib"),
        _ => format!("libonnxruntime.so.{version}"),
    }
}

fn put(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    path.to_owned()
}

fn start() -> &'static Runtime {
    Runtime::start(&support::library(), &mut |_| {}).unwrap()
}

fn running() -> PathBuf {
    start().library().path.clone().expect("tests load the library")
}

/// The text of the error that comes when the user names `path`.
fn refused(path: &Path) -> String {
    let candidates =
        library::candidates(&LibraryOptions { explicit: Some(path.to_owned()), ..LibraryOptions::default() });
    assert_eq!((candidates.len(), candidates[0].origin), (1, Origin::Explicit));
    candidates[0].fault.clone().unwrap_or_default()
}

#[test]
fn libraries_are_found_in_the_order_that_is_documented() {
    let dir = TempDir::new().unwrap();
    let at = |path: &str| dir.path().join(path);
    let beside = put(&at(&format!("bin/{}", name("1.40.0"))), b"x");
    let packages = if cfg!(windows) { "venv/Lib/site-packages" } else { "venv/lib/python3.12/site-packages" };
    let python = put(&at(&format!("{packages}/onnxruntime/capi/{}", name("1.30.0"))), b"x");
    put(&at("bin/libonnxruntime_providers_shared.so"), b"x");
    let mut options = LibraryOptions {
        executable_dir: Some(at("bin")),
        python_environment: Some(at("venv")),
        cache: Some(at("cache")),
        ..LibraryOptions::default()
    };
    let found = |options: &LibraryOptions| -> Vec<(PathBuf, Origin)> {
        library::candidates(options).into_iter().map(|one| (one.path, one.origin)).collect()
    };
    assert_eq!(found(&options), [(beside.clone(), Origin::Executable), (python.clone(), Origin::Python)]);

    put(&at("cache/onnxruntime/local/installed.json"), b"{}");
    let cached = at("cache/onnxruntime/local");
    assert_eq!(
        found(&options),
        [(beside, Origin::Executable), (cached, Origin::Cache), (python, Origin::Python)]
    );
    options.environment = Some(PathBuf::new());
    assert_eq!(found(&options).len(), 3, "an empty variable is none");
    options.environment = Some(at("environment"));
    assert_eq!(found(&options), [(at("environment"), Origin::Environment)]);
    options.explicit = Some(at("flag"));
    assert_eq!(found(&options), [(at("flag"), Origin::Explicit)]);
}

#[test]
#[cfg(not(windows))]
fn the_highest_version_in_a_directory_comes_first() {
    let dir = TempDir::new().unwrap();
    for version in ["1.9.0", "1.32.0", "1.4.1"] {
        put(&dir.path().join(name(version)), b"x");
    }
    // The user's own cache may hold a library too.
    let executable_dir = Some(dir.path().to_owned());
    let options = LibraryOptions { executable_dir, cache: None, ..LibraryOptions::default() };
    let names: Vec<_> = library::candidates(&options)
        .into_iter()
        .map(|one| one.path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, [name("1.32.0"), name("1.9.0"), name("1.4.1")]);
}

#[test]
fn a_file_that_is_no_library_is_refused_before_it_is_loaded() {
    let dir = TempDir::new().unwrap();
    let check = |path: &Path, expected: &str| {
        let text = refused(path);
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(text.contains(expected) && text.contains("llava-phi runtime install"), "{text}");
    };
    check(&put(&dir.path().join("text.so"), b"not a library"), "is a text file");
    check(&put(&dir.path().join("empty.so"), b""), "is empty");
    check(&put(&dir.path().join("some.whl"), b"PK\x03\x04"), "is a zip archive");
    check(dir.path(), "is a directory");
    check(&dir.path().join("none.so"), "does not exist");
    let mut whole = fs::read(running()).unwrap();
    whole.truncate(whole.len() - 1);
    check(&put(&dir.path().join("cut.so"), &whole), "is cut off");
    assert_eq!(refused(&running()), "");
}

#[test]
#[cfg(target_os = "linux")]
fn a_library_that_is_not_onnx_runtime_is_refused_with_its_path() {
    let dirs = ["/lib64", "/usr/lib", "/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu"];
    let Some(other) = dirs.iter().map(|dir| Path::new(dir).join("libm.so.6")).find(|path| path.exists())
    else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let options = LibraryOptions { cache: Some(dir.path().to_owned()), ..LibraryOptions::default() };
    let error = fetch::install_from(&other, &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("libm.so.6 is a library but not ONNX Runtime"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_second_start_returns_the_first_and_refuses_another_library() {
    let first = start();
    assert!(std::ptr::eq(first, start()));
    assert!(first.version().starts_with("1."), "{}", first.version());
    let named = |path: PathBuf| {
        Runtime::start(&LibraryOptions { explicit: Some(path), ..LibraryOptions::default() }, &mut |_| {})
    };
    assert!(std::ptr::eq(first, named(running()).unwrap()));
    let error = named(PathBuf::from("other.so")).unwrap_err().to_string();
    assert!(error.contains("and cannot change to other.so; start another process for it"), "{error}");
}

#[test]
fn a_library_of_the_user_is_installed_with_its_providers_and_used_until_it_is_changed() {
    let dir = TempDir::new().unwrap();
    let options = LibraryOptions { cache: Some(dir.path().join("cache")), ..LibraryOptions::default() };
    let mut notices = Vec::new();
    let installed =
        fetch::install_from(&running(), &options, &mut |p| notices.push(format!("{p:?}"))).unwrap();
    assert!(installed.starts_with(dir.path().join("cache/onnxruntime/local")), "{}", installed.display());
    assert!(notices[0].contains("SHA-256 "), "{notices:?}");
    let found = library::candidates(&options);
    assert_eq!((found.len(), &found[0].path, &found[0].fault), (1, &installed, &None));

    let mut bytes = fs::read(&installed).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&installed, bytes).unwrap();
    let fault = library::candidates(&options)[0].fault.clone().unwrap();
    assert!(fault.ends_with("was changed: its hash is another one"), "{fault}");
}

#[test]
fn a_wheel_that_is_not_pinned_and_files_that_are_nothing_are_not_installed() {
    let dir = TempDir::new().unwrap();
    let options = LibraryOptions { cache: Some(dir.path().join("cache")), ..LibraryOptions::default() };
    let check = |path: &Path, expected: &str| {
        let error = fetch::install_from(path, &options, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(
        &put(&dir.path().join("a.whl"), b"PK\x03\x04"),
        "a.whl is none of the wheels that this program knows",
    );
    check(&put(&dir.path().join("b.so"), b"text"), "b.so is a text file");
    check(&dir.path().join("none"), "none cannot be read; name a wheel or a library");
    check(dir.path(), "is a directory; name a wheel or a library");
    assert!(!dir.path().join("cache").exists());
}

#[cfg(unix)]
mod pip {
    use super::*;

    /// A cache and a Python that does what a script says; `$dest` is where pip is to put the wheel.
    struct Bench {
        dir: TempDir,
        options: LibraryOptions,
    }

    impl Bench {
        fn new(script: &str) -> Self {
            let dir = TempDir::new().unwrap();
            put(
                &dir.path().join("script"),
                format!("touch {}/ran\n{script}", dir.path().display()).as_bytes(),
            );
            let python = dir.path().join("python3");
            let player = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/python.sh");
            std::os::unix::fs::symlink(player, &python).unwrap();
            let options = LibraryOptions {
                cache: Some(dir.path().join("cache")),
                pythons: vec![python],
                ..LibraryOptions::default()
            };
            Self { dir, options }
        }

        /// The error of an installation, which leaves nothing but the lock.
        fn error(&self) -> String {
            let error = fetch::install(LibraryVariant::Cpu, &self.options, &mut |_| {}).unwrap_err();
            let left: Vec<_> = fs::read_dir(self.dir.path().join("cache/onnxruntime"))
                .map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect())
                .unwrap_or_default();
            assert!(left.iter().all(|name| name == "lock"), "{left:?}");
            error.to_string()
        }
    }

    fn check(script: &str, expected: &str) {
        let error = Bench::new(script).error();
        assert!(error.starts_with("ONNX Runtime: ") && error.contains(expected), "{error}");
        assert!(!error.contains('\n'), "one sentence: {error}");
    }

    #[test]
    fn a_wheel_with_another_hash_is_not_installed() {
        check(
            "echo hello > \"$dest/onnxruntime-1.whl\"",
            "that pip downloaded has SHA-256 5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        );
    }

    #[test]
    fn what_pip_says_in_the_end_is_passed_on() {
        check(
            "echo 'WARNING: Retrying'; echo 'ERROR: No matching distribution found for onnxruntime' >&2; exit 1",
            "(No matching distribution found for onnxruntime); check the network",
        );
        check("exit 3", "(exit status: 3); check the network");
        check("kill -9 $$", "SIGKILL");
        check("exit 0", "ended well but left no wheel");
        check("echo half > \"$dest/onnxruntime-1.whl.part\"; exit 1", "could not download onnxruntime");
        check("echo \"[Errno 28] No space left on device\"; exit 1", "the disk is full at ");
        check("head -c 3000000 /dev/zero | tr '\\0' x; exit 1", "could not download onnxruntime");
    }

    #[test]
    fn the_next_python_is_tried_when_one_is_missing_or_has_no_pip() {
        let mut bench = Bench::new("echo 'python3: No module named pip' >&2; exit 1");
        let error = bench.error();
        assert!(error.contains("python3 has no pip to fetch it with; install Python 3 with pip"), "{error}");
        let with_pip = Bench::new("echo 'ERROR: this one was asked'; exit 1");
        bench.options.pythons.insert(0, PathBuf::from("no-such-python"));
        bench.options.pythons.extend(with_pip.options.pythons.clone());
        assert!(bench.error().contains("(this one was asked)"));
        bench.options.pythons = vec![PathBuf::from("no-such-python"), PathBuf::from("nor-this")];
        let error = bench.error();
        assert!(error.contains("no Python to fetch it with (tried no-such-python, nor-this)"), "{error}");
    }

    #[test]
    fn offline_asks_no_python_and_says_what_is_missing() {
        let mut bench = Bench::new("exit 0");
        bench.options.offline = true;
        let error = bench.error();
        assert!(
            error.contains("is not installed in ") && error.contains("cannot be fetched offline"),
            "{error}"
        );
        assert!(!bench.dir.path().join("ran").exists());
        bench.options.offline = false;
        bench.error();
        assert!(bench.dir.path().join("ran").exists());
    }

    #[test]
    fn a_cache_that_cannot_be_made_is_named() {
        let mut bench = Bench::new("exit 0");
        bench.options.cache = Some(put(&bench.dir.path().join("file"), b""));
        let error = bench.error();
        assert!(error.contains("/file/onnxruntime cannot be used; name a directory that can"), "{error}");
        bench.options.cache = None;
        assert!(bench.error().contains("there is no cache directory"));
    }
}

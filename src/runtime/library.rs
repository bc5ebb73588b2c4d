//! Finds the ONNX Runtime library: where it is looked for, in which order.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::cache::{Cache, State};
use super::identify;
pub use super::pins::LibraryVariant;

/// Where to look for ONNX Runtime. The face fills it in: nothing here reads the environment.
#[derive(Clone, Debug)]
pub struct LibraryOptions {
    /// A library that the user named; no other is tried.
    pub explicit: Option<PathBuf>,
    /// The value of `ORT_DYLIB_PATH`; no other is tried either.
    pub environment: Option<PathBuf>,
    /// The directory of the program, or `None` to leave it out.
    pub executable_dir: Option<PathBuf>,
    /// The program's cache directory; libraries are kept in its `onnxruntime`. `None`: none is kept or fetched.
    pub cache: Option<PathBuf>,
    /// An active Python environment, the value of `VIRTUAL_ENV`.
    pub python_environment: Option<PathBuf>,
    /// The interpreters that pip is asked of, best first: names on the search path, or paths.
    pub pythons: Vec<PathBuf>,
    /// Never touch the network.
    pub offline: bool,
    /// The build to use from the cache or to fetch; `None` uses the one that was installed last, else fetches
    /// [`LibraryVariant::Cpu`].
    pub variant: Option<LibraryVariant>,
}

impl Default for LibraryOptions {
    fn default() -> Self {
        Self {
            explicit: None,
            environment: None,
            executable_dir: None,
            cache: Self::default_cache(),
            python_environment: None,
            pythons: ["python3", "python", "py"].map(PathBuf::from).to_vec(),
            offline: false,
            variant: None,
        }
    }
}

impl LibraryOptions {
    /// The cache directory that the system gives to this program.
    pub fn default_cache() -> Option<PathBuf> {
        directories::ProjectDirs::from("", "", "llava-phi").map(|dirs| dirs.cache_dir().to_owned())
    }
}

/// How a library was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Origin {
    /// The user named it.
    Explicit,
    /// `ORT_DYLIB_PATH` names it.
    Environment,
    /// It lies next to the program.
    Executable,
    /// It was installed into the cache.
    Cache,
    /// It is part of the active Python environment.
    Python,
    /// It is part of the program.
    Linked,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Explicit => "named by the user",
            Self::Environment => "ORT_DYLIB_PATH",
            Self::Executable => "next to the program",
            Self::Cache => "cache",
            Self::Python => "active Python environment",
            Self::Linked => "linked in",
        })
    }
}

/// The library that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Library {
    /// The file; `None` when it is linked in.
    pub path: Option<PathBuf>,
    /// How it was found.
    pub origin: Origin,
    /// Its version, as exactly as it is known: `1.32.0`, or `1.32`.
    pub version: String,
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{} {} ({})", self.version, path.display(), self.origin),
            None => write!(f, "{} ({})", self.version, self.origin),
        }
    }
}

/// A file that may be ONNX Runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// The file.
    pub path: PathBuf,
    /// How it was found.
    pub origin: Origin,
    /// What is wrong with it, if its file alone tells; it is then not tried.
    pub fault: Option<String>,
}

impl Candidate {
    fn new(path: PathBuf, origin: Origin) -> Self {
        // A bare name would be looked for by the system, and not here.
        let path = std::path::absolute(&path).unwrap_or(path);
        let fault = identify::check_file(&path).err();
        Self { path, origin, fault }
    }

    /// Whether the user chose it, so that no other may stand in for it.
    pub fn is_chosen(&self) -> bool {
        matches!(self.origin, Origin::Explicit | Origin::Environment)
    }
}

/// Every library that the options lead to, in the order in which they are tried. Loads none, fetches none.
/// A directory that cannot be read counts as empty.
pub fn candidates(options: &LibraryOptions) -> Vec<Candidate> {
    let named = [(&options.explicit, Origin::Explicit), (&options.environment, Origin::Environment)];
    if let Some((Some(path), origin)) =
        named.into_iter().find(|(path, _)| path.as_deref().is_some_and(|path| path != Path::new("")))
    {
        return vec![Candidate::new(path.clone(), origin)];
    }
    let mut found = Vec::new();
    if let Some(dir) = &options.executable_dir {
        for dir in [dir.clone(), dir.join("../lib")] {
            found.extend(libraries_in(&dir).into_iter().map(|path| Candidate::new(path, Origin::Executable)));
        }
    }
    if let Some(cache) = options.cache.as_deref().map(Cache::new) {
        for slot in cache.slots(options.variant) {
            match cache.state(&slot) {
                State::Absent => {}
                State::Whole(installed) => {
                    found.push(Candidate::new(cache.library(&slot, &installed), Origin::Cache));
                }
                State::Damaged(fault) => found.push(Candidate {
                    path: cache.dir(&slot),
                    origin: Origin::Cache,
                    fault: Some(fault),
                }),
            }
        }
    }
    if let Some(environment) = &options.python_environment {
        for dir in python_packages(environment) {
            let capi = dir.join("onnxruntime").join("capi");
            found.extend(libraries_in(&capi).into_iter().map(|path| Candidate::new(path, Origin::Python)));
        }
    }
    found
}

/// Where a Python environment keeps its packages.
fn python_packages(environment: &Path) -> Vec<PathBuf> {
    let mut dirs = vec![environment.join("Lib").join("site-packages")];
    dirs.extend(
        names_in(&environment.join("lib"))
            .into_iter()
            .filter(|name| name.starts_with("python"))
            .map(|name| environment.join("lib").join(name).join("site-packages")),
    );
    dirs.retain(|dir| dir.is_dir());
    dirs
}

/// The main libraries in a directory, those with the highest version in their names first.
fn libraries_in(dir: &Path) -> Vec<PathBuf> {
    let mut names = names_in(dir);
    names.retain(|name| is_library_name(name));
    names.sort_by_cached_key(|name| {
        let numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u64>().ok());
        std::cmp::Reverse(numbers.collect::<Vec<_>>())
    });
    names.into_iter().map(|name| dir.join(name)).collect()
}

/// Whether a file is ONNX Runtime's main library on this system, by its name; its provider libraries are not.
pub(super) fn is_library_name(name: &str) -> bool {
    match std::env::consts::OS {
        "windows" => name.eq_ignore_ascii_case("onnxruntime.dll"),
        "macos" => {
            name.strip_suffix(".dylib").is_some_and(|stem| format!("{stem}.").starts_with("libonnxruntime."))
        }
        _ => name == "libonnxruntime.so" || name.starts_with("libonnxruntime.so."),
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = dir.read_dir() else { return Vec::new() };
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

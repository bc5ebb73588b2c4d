//! Finds and starts ONNX Runtime, once, or says why not: the only folder that names `ort`.

mod built_in;
mod cache;
mod cache_memory;
pub mod compiled;
pub mod fetch;
pub mod graph;
mod identify;
mod keys;
pub mod library;
mod operators;
pub mod options;
mod pins;
mod placement;
pub mod plugins;
pub mod provider;
mod rows;
mod session;
mod settings;
mod slots;
pub mod status;
pub mod tensor;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ort::environment::{Environment, EnvironmentBuilder};
use ort::logging::LogLevel;

use crate::error::{Error, Result};

pub use cache_memory::CacheMemory;
pub use compiled::Compiled;
pub use graph::{Canceler, Graph, GraphSource, OpenError, Outputs, SessionOptions};
pub use library::{Library, LibraryOptions, LibraryVariant, Origin};
pub use operators::OwnNodes;
pub use plugins::{DeviceInfo, DeviceKind};
pub use provider::{Placement, Provider, Refusal, Step, Target};
pub use rows::RowBytes;
pub use slots::{Slot, Slots};
pub use status::ProviderStatus;
pub use tensor::Tensor;

/// ONNX Runtime, loaded and started. There is one for the life of the process.
pub struct Runtime {
    environment: Environment,
    library: Library,
    plugins: Mutex<BTreeMap<Provider, PathBuf>>,
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// What happens while ONNX Runtime is looked for or installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// A line for the user.
    Notice(&'a str),
    /// How many bytes of a download have arrived.
    Download {
        /// Bytes that are here.
        done: u64,
        /// Bytes that there are.
        total: u64,
    },
}

impl Runtime {
    /// Finds ONNX Runtime, fetching it if need be, and starts it; later calls return the one that runs.
    ///
    /// It is looked for where [`library::candidates`] says; the first that can be started is. One that the user
    /// chose must serve. If none is found it is fetched once, as [`fetch::install`] does, unless
    /// [`LibraryOptions::offline`]. A program that has it linked in looks for nothing.
    ///
    /// ONNX Runtime's telemetry is turned off, but its official builds since 1.29 report the start of the process
    /// before they can be told, and keep an identifier on disk. Only `ORT_DISABLE_TELEMETRY=1` in the environment
    /// prevents that: a program that embeds this crate should set it before it starts a thread, as `llava-phi` does.
    ///
    /// # Errors
    /// [`Error::Library`] when there is none that serves, and when another than the running one is asked for by
    /// [`LibraryOptions::explicit`].
    pub fn start(options: &LibraryOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<&'static Self> {
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = RUNTIME.get() {
            return runtime.unless_other(options);
        }
        let (environment, library) = open(options, progress)?;
        Ok(RUNTIME.get_or_init(|| Self { environment, library, plugins: Mutex::default() }))
    }

    /// The runtime that [`Runtime::start`] started.
    ///
    /// # Errors
    /// [`Error::Library`] when it was not started.
    pub fn started() -> Result<&'static Self> {
        RUNTIME.get().ok_or_else(|| Error::library("it was not started; call Runtime::start first"))
    }

    /// The version, as exactly as the library tells it: `1.32.0`, or `1.32`.
    pub fn version(&self) -> &str {
        &self.library.version
    }

    /// The library that was loaded, and how it was found.
    pub fn library(&self) -> &Library {
        &self.library
    }

    fn environment(&self) -> &Environment {
        &self.environment
    }

    fn unless_other(&'static self, options: &LibraryOptions) -> Result<&'static Self> {
        let (Some(wanted), Some(running)) = (&options.explicit, &self.library.path) else { return Ok(self) };
        let same = |one: &Path, other: &Path| {
            one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(a), Ok(b)) if a == b)
        };
        if same(wanted, running) {
            return Ok(self);
        }
        Err(Error::library(format!(
            "this process runs {} already and cannot change to {}; start another process for it",
            running.display(),
            wanted.display()
        )))
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("library", &self.library).finish_non_exhaustive()
    }
}

#[cfg(feature = "load-dynamic")]
fn open(options: &LibraryOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<(Environment, Library)> {
    let start = |path: &Path, origin: Origin| {
        let (builder, version) = identify::load(path)?;
        let library = Library { path: Some(path.to_owned()), origin, version };
        Ok((environment(builder, &library)?, library))
    };
    let mut failed_in_cache = None;
    for candidate in library::candidates(options) {
        let result = match &candidate.fault {
            Some(fault) => Err(Error::library(fault)),
            None => start(&candidate.path, candidate.origin),
        };
        match result {
            Ok(started) => return Ok(started),
            Err(e) if candidate.is_chosen() => return Err(e),
            Err(e) => {
                tracing::warn!(path = %candidate.path.display(), "passed over: {e}");
                // What is damaged is fetched again; what is whole and does not load would not load again either.
                if candidate.origin == Origin::Cache && candidate.fault.is_none() {
                    failed_in_cache.get_or_insert(e);
                } else {
                    progress(Progress::Notice(&e.to_string()));
                }
            }
        }
    }
    if let Some(e) = failed_in_cache {
        return Err(e);
    }
    let path = fetch::install(options.variant.unwrap_or_default(), options, progress)?;
    start(&path, Origin::Cache)
}

#[cfg(not(feature = "load-dynamic"))]
fn open(options: &LibraryOptions, _progress: &mut dyn FnMut(Progress<'_>)) -> Result<(Environment, Library)> {
    if let Some(path) = &options.explicit {
        return Err(Error::library(format!(
            "{} cannot be used: this program has ONNX Runtime linked in",
            path.display()
        )));
    }
    let version = format!("1.{}", ort::MINOR_VERSION);
    let library = Library { path: None, origin: Origin::Linked, version };
    Ok((environment(ort::init(), &library)?, library))
}

fn environment(builder: EnvironmentBuilder, library: &Library) -> Result<Environment> {
    let environment = builder
        .with_name("llava-phi")
        .with_telemetry(false)
        .with_logger(Arc::new(|level, _, _, place, message| log(level, place, message)))
        .build()
        .map_err(|e| Error::library(format!("{library} could not be started")).because(e))?;
    // ort asks for every message, several for each operator of each run.
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}

/// ONNX Runtime warns about much that a user can do nothing about, and an error reaches them as a value.
fn log(level: LogLevel, place: &str, message: &str) {
    match level {
        LogLevel::Error | LogLevel::Fatal => tracing::warn!(target: "onnxruntime", place, "{message}"),
        LogLevel::Warning => tracing::debug!(target: "onnxruntime", place, "{message}"),
        _ => tracing::trace!(target: "onnxruntime", place, "{message}"),
    }
}

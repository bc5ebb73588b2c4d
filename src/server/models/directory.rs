//! The packages that a directory holds.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use super::Offer;
use super::registry::Registry;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::package::manifest::Fit;
use crate::package::plan::MemoryPlan;
use crate::package::{MANIFEST, ModelPackage, read_manifest};

/// Opens the engine of a package, on a thread that may block.
pub(super) type Opener = dyn Fn(&ModelPackage) -> Result<Engine> + Send + Sync;

/// Several models: each directory in this one that holds a manifest is one, and has the directory's name.
#[derive(Clone)]
pub struct ModelsDirectory {
    /// The directory.
    pub path: PathBuf,
    /// Opens the engine of a package.
    pub open: Arc<Opener>,
    /// How pictures are made square, where manifests do not decide.
    pub fit: Option<Fit>,
    /// Models that may be open at once; 0 is as 1.
    pub most: usize,
    /// Bytes that all open models together may take by their plans; what the machine has left bounds them in any case.
    pub memory: Option<u64>,
    /// Models that are opened at once.
    pub preload: Vec<String>,
    /// How long a model that could not be opened is not tried again.
    pub retry: Duration,
}

impl fmt::Debug for ModelsDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelsDirectory").field("path", &self.path).finish_non_exhaustive()
    }
}

impl ModelsDirectory {
    /// The packages in `path`, one open at a time.
    pub fn at(path: impl Into<PathBuf>, open: Arc<Opener>) -> Self {
        let (fit, memory, preload) = (None, None, Vec::new());
        Self { path: path.into(), open, fit, most: 1, memory, preload, retry: Duration::from_secs(10) }
    }

    /// What the directory holds, none of it open.
    pub(super) fn read(self) -> Result<Registry> {
        let path = self.path.display();
        let failed = |e: std::io::Error| {
            Error::Request(format!("models directory {path} cannot be read ({e}); check the path"))
        };
        let mut offers = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let manifest = entry.path().join(MANIFEST);
            if !manifest.is_file() {
                continue;
            }
            let name = entry.file_name().into_string().map_err(|name| {
                let name = name.display();
                Error::Request(format!("models directory {path}: the name {name} is not UTF-8; rename it"))
            })?;
            offers.push(offer(name, &manifest));
        }
        if offers.is_empty() {
            return Err(Error::Request(format!(
                "models directory {path} holds no package; give one whose directories hold a {MANIFEST}"
            )));
        }
        offers.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(Registry::new(offers, Some(self)))
    }

    /// The package of the model `name`, and the bytes that it takes where it can be planned.
    pub(super) fn package(&self, name: &str) -> Result<(ModelPackage, Option<u64>)> {
        let package = ModelPackage::open(self.path.join(name))?;
        // What cannot be planned is refused when it is opened, with a better sentence.
        let held = MemoryPlan::new(&package, None).ok().map(|plan| plan.held());
        Ok((package, held))
    }

    /// What went wrong with the model `name`, for clients: where files lie is not told.
    pub(super) fn told(&self, name: &str, error: &Error) -> String {
        let mut text = error.to_string();
        // A package may be a link to elsewhere.
        if let Ok(package) = fs::canonicalize(self.path.join(name)) {
            text = text.replace(&package.display().to_string(), name);
        }
        let place = self.path.display().to_string();
        if !place.is_empty() {
            text = text.replace(&format!("{}/", place.trim_end_matches('/')), "");
        }
        text
    }
}

/// A package of which only the manifest was read.
fn offer(name: String, manifest: &Path) -> Offer {
    let modified = fs::metadata(manifest).and_then(|known| known.modified()).ok();
    let created = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    // What is wrong with it is told to whoever asks for the model.
    let known = fs::read(manifest).ok().and_then(|bytes| read_manifest(manifest, &bytes).ok());
    let positions = known.map(|known| (known.decoder.context, known.vision.tokens_per_image));
    Offer { name, created: created.map_or(0, |since| since.as_secs()), positions }
}

//! A model on disk: a directory, or the same files inside the program.

pub mod embedded;
pub mod manifest;
pub mod plan;
pub(crate) mod protobuf;
mod verify;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Serialize, Serializer};

use crate::error::{Error, Result};
use embedded::EmbeddedFiles;
use manifest::{Choice, FileInfo, GraphSpec, KvSpec, Manifest, Serve, Variant};

/// The file that makes a directory a package.
pub const MANIFEST: &str = "manifest.json";

/// A package whose manifest was read and checked against its files.
#[derive(Clone, Debug)]
pub struct ModelPackage {
    root: Root,
    manifest: Manifest,
    digest: String,
    /// What is wrong with files that only some variants need.
    faults: Arc<BTreeMap<String, Error>>,
}

/// Where the files of a package are.
#[derive(Clone, Debug)]
enum Root {
    /// Below this directory, which is canonical.
    Directory(PathBuf),
    /// In the program itself.
    Embedded(EmbeddedFiles),
}

/// Reads a manifest and checks everything in it that can be checked without its files. `path` is what errors name.
///
/// # Errors
/// [`Error::Package`] for another format, an unknown field, a path that leads out, or sizes that contradict each other.
pub fn read_manifest(path: &Path, bytes: &[u8]) -> Result<Manifest> {
    let manifest = verify::parse(path, bytes)?;
    verify::arithmetic(path, &manifest)?;
    Ok(manifest)
}

/// One file of a package, ready to be opened by whoever needs it.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// A file on disk; the path is absolute and inside the package.
    Path(PathBuf),
    /// The content itself.
    Memory(&'static [u8]),
}

/// The parts of the model that run as graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// Pixels to patch features.
    VisionEncoder,
    /// Patch features to image embeddings.
    Projector,
    /// Embeddings and cache to logits, or to hidden states.
    Decoder,
    /// Hidden states to logits.
    Head,
}

impl Component {
    /// Every component, in the order in which an image meets them.
    pub const ALL: [Self; 4] = [Self::VisionEncoder, Self::Projector, Self::Decoder, Self::Head];

    /// The name in manifests, reports and errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::VisionEncoder => "vision_encoder",
            Self::Projector => "projector",
            Self::Decoder => "decoder",
            Self::Head => "head",
        }
    }

    /// What serves this component, best first.
    pub fn choices(self, serve: &Serve) -> &[Choice] {
        match self {
            Self::VisionEncoder => &serve.vision_encoder,
            Self::Projector => &serve.projector,
            Self::Decoder => &serve.decoder,
            Self::Head => &serve.head,
        }
    }

    /// The graph of this component in `variant`, and how its cache is kept when it is the decoder.
    fn graph(self, variant: &Variant) -> Option<(&GraphSpec, Option<KvSpec>)> {
        match self {
            Self::VisionEncoder => variant.vision_encoder.as_ref().map(|graph| (graph, None)),
            Self::Projector => variant.projector.as_ref().map(|graph| (graph, None)),
            Self::Decoder => variant.decoder.as_ref().map(|decoder| (&decoder.graph, Some(decoder.kv))),
            Self::Head => variant.head.as_ref().map(|graph| (graph, None)),
        }
    }
}

impl Serialize for Component {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl ModelPackage {
    /// Opens the package in directory `root`: reads the manifest, checks its arithmetic, and checks that every file is
    /// there with its size. Files of up to 64 MiB are hashed too; the larger ones by [`ModelPackage::verify`]. What is
    /// wrong with a graph's file is kept for [`ModelPackage::check_graph`], since another variant may be whole.
    ///
    /// # Errors
    /// [`Error::Package`] names the file or field that is at fault.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let given = root.as_ref();
        if !given.exists() {
            return Err(Error::package(given, "there is no such directory; give the directory of a package"));
        }
        let root = fs::canonicalize(given)
            .map_err(|e| Error::package(given, "the directory cannot be reached").because(e))?;
        if !root.is_dir() {
            return Err(Error::package(given, "this is a file; give the directory that holds manifest.json"));
        }
        let path = root.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|e| {
            Error::package(&path, "the manifest cannot be read; is this a package of llava-phi-export?")
                .because(e)
        })?;
        Self::from_manifest(Root::Directory(root), &path, &bytes)
    }

    /// The miniature model inside this program.
    ///
    /// # Errors
    /// None in a program that passed its tests.
    pub fn embedded() -> Result<Self> {
        let files = EmbeddedFiles::tiny();
        let bytes = files.get(MANIFEST).unwrap_or_default();
        Self::from_manifest(Root::Embedded(files), Path::new("embedded").join(MANIFEST).as_path(), bytes)
    }

    fn from_manifest(root: Root, path: &Path, bytes: &[u8]) -> Result<Self> {
        let manifest = read_manifest(path, bytes)?;
        let digest = verify::digest(bytes);
        let mut package = Self { root, manifest, digest, faults: Arc::default() };
        let mut optional = verify::graph_files(&package.manifest);
        optional.extend(package.manifest.snapshots.iter().map(|snapshot| snapshot.file.clone()));
        let mut faults = BTreeMap::new();
        for (name, info) in &package.manifest.files {
            match package.check_file(name, info, verify::HASHED_AT_OPEN) {
                Err(error) if optional.contains(name) => _ = faults.insert(name.clone(), error),
                checked => checked?,
            }
        }
        package.faults = Arc::new(faults);
        Ok(package)
    }

    /// Refuses a graph one of whose files was missing or damaged when the package was opened.
    ///
    /// # Errors
    /// [`Error::Package`] names the file.
    pub fn check_graph(&self, graph: &GraphSpec) -> Result<()> {
        match graph.files().find_map(|name| self.faults.get(name)) {
            Some(Error::Package { path, reason, .. }) => Err(Error::package(path, reason)),
            _ => Ok(()),
        }
    }

    /// Hashes every file, whatever its size.
    ///
    /// # Errors
    /// [`Error::Package`] names the first file that differs from the manifest.
    pub fn verify(&self) -> Result<()> {
        let mut files = self.manifest.files.iter();
        files.try_for_each(|(name, info)| self.check_file(name, info, u64::MAX))
    }

    fn check_file(&self, name: &str, info: &FileInfo, hashed_up_to: u64) -> Result<()> {
        match self.file(name)? {
            FileSource::Memory(bytes) => verify::content(&self.display_path(name), bytes, info),
            FileSource::Path(file) => verify::file(&file, info, hashed_up_to),
        }
    }

    /// What the exporter knew about the model.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the manifest, and so of everything that it lists, hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// SHA-256 over what the manifest says of everything but snapshots, which are made of the rest: hexadecimal.
    pub fn content_digest(&self) -> String {
        let mut manifest = self.manifest.clone();
        for snapshot in std::mem::take(&mut manifest.snapshots) {
            manifest.files.remove(&snapshot.file);
        }
        verify::digest(&serde_json::to_vec(&manifest).expect("what was read as JSON can be written as such"))
    }

    /// The package's directory; `None` when the package is inside the program.
    pub fn directory(&self) -> Option<&Path> {
        match &self.root {
            Root::Directory(root) => Some(root),
            Root::Embedded(_) => None,
        }
    }

    /// The file with the relative path `name`, which the manifest must list.
    ///
    /// # Errors
    /// [`Error::Package`] when the file is not listed, is missing, or lies outside the package.
    pub fn file(&self, name: &str) -> Result<FileSource> {
        if !self.manifest.files.contains_key(name) {
            return Err(Error::package(
                self.display_path(name),
                "the manifest does not list this file; export again",
            ));
        }
        match &self.root {
            Root::Directory(root) => verify::confined(root, name).map(FileSource::Path),
            Root::Embedded(files) => files.get(name).map(FileSource::Memory).ok_or_else(|| {
                Error::package(self.display_path(name), "the file is missing; build the program again")
            }),
        }
    }

    /// The content of the file `name`. For files that are read whole; weights are opened through [`ModelPackage::file`].
    ///
    /// # Errors
    /// As [`ModelPackage::file`], and when the file cannot be read.
    pub fn read(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        match self.file(name)? {
            FileSource::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
            FileSource::Path(path) => fs::read(&path)
                .map(Cow::Owned)
                .map_err(|e| Error::package(&path, "the file cannot be read").because(e)),
        }
    }

    /// The graph of `component` in variant `variant`, and how its cache is kept when it is the decoder.
    pub fn graph(&self, component: Component, variant: &str) -> Option<(&GraphSpec, Option<KvSpec>)> {
        component.graph(self.manifest.variants.get(variant)?)
    }

    /// What serves `component`, best first.
    pub fn choices(&self, component: Component) -> &[Choice] {
        component.choices(&self.manifest.serve)
    }

    /// The path that errors name.
    pub fn display_path(&self, name: &str) -> PathBuf {
        match &self.root {
            Root::Directory(root) => root.join(name),
            Root::Embedded(_) => Path::new("embedded").join(name),
        }
    }
}

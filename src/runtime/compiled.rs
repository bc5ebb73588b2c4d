//! How each provider keeps what it compiles, and what a session is told to write or to read it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use ort::session::builder::SessionBuilder;
use sha2::{Digest as _, Sha256};

use crate::compiled::{Entry, PrivateCopy, modified};
use crate::error::Result;
use crate::package::manifest::GraphSpec;

use super::Runtime;
use super::graph::{GraphSource, SessionOptions};
use super::provider::Provider;
use super::settings::settings;

/// What becomes of what a provider compiles.
#[derive(Clone, Debug, Default)]
pub enum Compiled {
    /// It goes with the session.
    #[default]
    Unkept,
    /// It is written into this directory, which may be renamed afterwards.
    Write(PathBuf),
    /// It was written into this entry, which stays as it is. The session holds the entry.
    Read(Arc<Entry>),
}

/// The form in which a provider keeps what it compiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Files of its own in a directory that it is told. It looks for them there and writes what it misses.
    Files,
    /// A graph for ONNX Runtime to load in place of the source, with a binary beside it. Loading writes nothing.
    Context,
    /// As [`Form::Context`], but the graph is an ordinary one with its weights beside it, twice: as they were, and in the
    /// layout of the kernels, which a session maps instead of making it.
    Packed,
}

/// The graph of [`Form::Context`] and [`Form::Packed`] in its directory.
const CONTEXT: &str = "graph.onnx";
/// The weights of [`Form::Packed`] beside it.
const WEIGHTS: &str = "graph.onnx.data";
/// Weights of fewer bytes stay inside the graph.
const SMALLEST: &str = "1024";

impl Provider {
    /// Whether what it compiles can be kept for another session.
    pub fn keeps_compiled(self) -> bool {
        form(self).is_some()
    }
}

fn form(provider: Provider) -> Option<Form> {
    match provider {
        Provider::TensorRt | Provider::CoreMl => Some(Form::Files),
        Provider::Qnn | Provider::OpenVino | Provider::TensorRtRtx => Some(Form::Context),
        Provider::Cpu => Some(Form::Packed),
        // NNAPI compiles too, but ONNX Runtime gives it no place to keep anything.
        Provider::Cuda | Provider::Nnapi | Provider::Xnnpack | Provider::WebGpu | Provider::DirectMl => None,
    }
}

/// What one session reads and where it writes.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// The directory of [`Form::Files`].
    pub(super) files: Option<PathBuf>,
    /// Where a graph of [`Form::Context`] is to be written.
    context: Option<PathBuf>,
    /// Where a graph of [`Form::Packed`] is to be written.
    packed: Option<PathBuf>,
    /// The graph of [`Form::Context`] or [`Form::Packed`] to load instead of the source.
    pub(super) source: Option<GraphSource>,
    _copy: Option<PrivateCopy>,
    // Last: the entry may be removed as soon as nothing holds it.
    _entry: Option<Arc<Entry>>,
}

impl Place {
    /// # Errors
    /// [`Error::Cache`](crate::error::Error::Cache) when an entry cannot be copied for a provider that writes.
    pub(super) fn new(provider: Provider, compiled: &Compiled) -> Result<Self> {
        let none = Self::default();
        Ok(match (form(provider), compiled) {
            (None, _) | (_, Compiled::Unkept) => none,
            (Some(Form::Files), Compiled::Write(dir)) => Self { files: Some(dir.clone()), ..none },
            (Some(Form::Context), Compiled::Write(dir)) => Self { context: Some(dir.join(CONTEXT)), ..none },
            (Some(Form::Packed), Compiled::Write(dir)) => Self { packed: Some(dir.join(CONTEXT)), ..none },
            (Some(Form::Files), Compiled::Read(entry)) => {
                let copy = entry.copy()?;
                let files = Some(copy.dir().to_owned());
                Self { files, _copy: Some(copy), _entry: Some(Arc::clone(entry)), ..none }
            }
            (Some(Form::Context | Form::Packed), Compiled::Read(entry)) => {
                let source = Some(GraphSource::File(entry.dir.join(CONTEXT)));
                Self { source, _entry: Some(Arc::clone(entry)), ..none }
            }
        })
    }

    /// Tells the session to write its context, or its graph with packed weights.
    pub(super) fn apply(&self, builder: SessionBuilder) -> ort::Result<SessionBuilder> {
        if let Some(path) = &self.packed {
            return Ok(builder
                .with_optimized_model_path(path)?
                .with_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)?
                .with_config_entry(
                    "session.optimized_model_external_initializers_min_size_in_bytes",
                    SMALLEST,
                )?
                .with_config_entry("session.save_external_prepacked_constant_initializers", "1")?);
        }
        // ONNX Runtime takes paths as UTF-8; with another one nothing is kept.
        let Some(path) = self.context.as_deref().and_then(Path::to_str) else { return Ok(builder) };
        Ok(builder
            .with_config_entry("ep.context_enable", "1")?
            .with_config_entry("ep.context_file_path", path)?
            // The binary beside the graph, by its bare name: inside, two gigabytes would be the limit.
            .with_config_entry("ep.context_embed_mode", "0")?)
    }
}

/// What decides, beside graph and machine, what `options.target` compiles: every setting of its session, with no path
/// but those that the user gave.
pub fn key_options(spec: &GraphSpec, options: &SessionOptions) -> BTreeMap<String, String> {
    settings(spec, options, None, None)
}

/// Whether the provider may compile only when it first runs, since an input's size is not known before.
pub(super) fn compiles_when_run(provider: Provider, spec: &GraphSpec) -> bool {
    form(provider) == Some(Form::Files) && !super::settings::is_static(spec)
}

impl Runtime {
    /// What compiles for `provider`, for a key: ONNX Runtime's version with a hash over the size and time of its library,
    /// and for a plugin its name with a hash over the names, sizes and times of the files beside it, among which its
    /// compiler lies.
    pub fn compiler(&self, provider: Provider) -> String {
        let version = self.version();
        let Some(plugin) = self.plugin(provider) else {
            let meta = self.library().path.as_ref().and_then(|path| path.metadata().ok());
            return meta.map_or_else(
                || version.to_owned(),
                |meta| format!("{version} {}", short_hash(&(meta.len(), modified(&meta)))),
            );
        };
        let mut files: Vec<(String, u64, u64)> = plugin
            .parent()
            .and_then(|dir| dir.read_dir().ok())
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let meta = entry.path().metadata().ok().filter(std::fs::Metadata::is_file)?;
                let changed = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
                let name = entry.file_name().to_string_lossy().into_owned();
                Some((name, meta.len(), changed.map_or(0, |since| since.as_secs())))
            })
            .collect();
        files.sort();
        let name = plugin.file_name().unwrap_or_default().to_string_lossy();
        format!("{version} with {name} {}", short_hash(&files))
    }
}

/// Sixteen hexadecimal digits over what a value prints.
fn short_hash(value: &impl std::fmt::Debug) -> String {
    let hash = Sha256::digest(format!("{value:?}").as_bytes());
    hash.iter().take(8).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compiled::{CompiledCache, Key};
    use crate::package::manifest::{DType, Dim, TensorSpec};

    fn spec(dim: Dim) -> GraphSpec {
        let input = TensorSpec { dtype: DType::F16, shape: vec![dim] };
        let inputs = BTreeMap::from([("x".to_owned(), input)]);
        GraphSpec { path: String::new(), data: Vec::new(), inputs, outputs: BTreeMap::new() }
    }

    #[test]
    fn each_provider_reads_in_its_own_way_and_none_gets_at_the_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = CompiledCache::open(dir.path(), u64::MAX).unwrap();
        let work = |dir: &Path| {
            std::fs::write(dir.join("engine"), "7").unwrap();
            Ok(())
        };
        let entry = Arc::new(cache.build(&Key::default(), &mut || {}, work).unwrap());
        let read = Compiled::Read(Arc::clone(&entry));
        for provider in [Provider::TensorRt, Provider::CoreMl] {
            let place = Place::new(provider, &read).unwrap();
            let files = place.files.clone().unwrap();
            assert_ne!(files, entry.dir);
            assert_eq!(std::fs::read(files.join("engine")).unwrap(), b"7");
            assert!(place.source.is_none());
            drop(place);
            assert!(!files.exists());
        }
        for provider in [Provider::Qnn, Provider::OpenVino, Provider::TensorRtRtx] {
            let place = Place::new(provider, &read).unwrap();
            assert!(place.files.is_none() && place.context.is_none());
            let Some(GraphSource::File(path)) = &place.source else { panic!("{place:?}") };
            assert_eq!(*path, entry.dir.join("graph.onnx"));
            let written = Place::new(provider, &Compiled::Write("new".into())).unwrap();
            assert_eq!(written.context, Some(Path::new("new").join("graph.onnx")));
        }
        let place = Place::new(Provider::Cpu, &read).unwrap();
        assert!(place.files.is_none() && place.packed.is_none() && place.source.is_some());
        let written = Place::new(Provider::Cpu, &Compiled::Write("new".into())).unwrap();
        assert_eq!(written.packed, Some(Path::new("new").join("graph.onnx")));
        assert!(written.context.is_none());
        for &provider in Provider::ALL.iter().filter(|provider| !provider.keeps_compiled()) {
            let place = Place::new(provider, &Compiled::Write("new".into())).unwrap();
            assert!(place.files.is_none() && place.context.is_none() && place.source.is_none());
        }
    }

    #[test]
    fn only_an_engine_for_sizes_that_vary_needs_a_run() {
        assert!(compiles_when_run(Provider::TensorRt, &spec(Dim::Named("new".to_owned()))));
        assert!(!compiles_when_run(Provider::TensorRt, &spec(Dim::Fixed(8))));
        assert!(!compiles_when_run(Provider::OpenVino, &spec(Dim::Named("new".to_owned()))));
    }

    #[test]
    fn a_key_holds_the_settings_of_the_program_and_of_the_user_and_no_place_in_the_cache() {
        let told = |target: Provider, key: &str, value: &str| {
            let options = SessionOptions {
                target: target.into(),
                provider_options: BTreeMap::from([(key.to_owned(), value.to_owned())]),
                compiled: Compiled::Write("cache".into()),
                ..SessionOptions::default()
            };
            key_options(&spec(Dim::Fixed(8)), &options).into_keys().collect::<Vec<_>>()
        };
        let coreml = told(Provider::CoreMl, "MLComputeUnits", "ALL");
        assert_eq!(coreml, ["MLComputeUnits", "ModelFormat", "RequireStaticInputShapes"]);
        assert_eq!(told(Provider::TensorRt, "trt_fp16_enable", "1"), ["trt_fp16_enable"]);
    }
}

//! A graph through the cache of what providers compiled.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::{Serialize, Serializer};

use super::chain::Loader;
use crate::compiled::{CompiledCache, Entry, Found, Key};
use crate::error::{Error, Result};
use crate::machine::{Machine, Roots};
use crate::package::manifest::GraphSpec;
use crate::package::{Component, ModelPackage};
use crate::runtime::compiled::key_options;
use crate::runtime::{Compiled, Graph, GraphSource, OpenError, Runtime, SessionOptions, Target};

/// What became of what a provider compiled for one component.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompiledReport {
    /// Whether it was there.
    pub state: CompiledState,
    /// The entry of the cache that serves; `None` when there is none.
    pub entry: Option<String>,
    /// Bytes of the entry.
    pub bytes: u64,
    /// Seconds that the provider took to compile; 0 when it was there.
    pub seconds: f64,
    /// Why the entry that was there before could not be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaced: Option<String>,
}

/// Whether what a provider compiled was kept; as text `reused`, `built` or `not cached: reason`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompiledState {
    /// An earlier session, or another process meanwhile, had compiled it.
    Reused,
    /// This session compiled it, and the next one will find it.
    Built,
    /// This session compiled it for itself alone, for this reason.
    NotCached(String),
}

impl fmt::Display for CompiledState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reused => f.write_str("reused"),
            Self::Built => f.write_str("built"),
            Self::NotCached(reason) => write!(f, "not cached: {reason}"),
        }
    }
}

impl Serialize for CompiledState {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for CompiledReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compiled graph {}", self.state)?;
        match &self.replaced {
            Some(why) => write!(f, ", since {why}"),
            None => Ok(()),
        }
    }
}

/// What takes long while a model is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The provider compiles a component, for this session and all later ones.
    Compiling(Component, Target),
    /// Another process compiles the same component, and this one waits for it.
    Waiting(Component, Target),
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiling(component, target) => {
                write!(f, "compiling {} for {target}, once", component.name())
            }
            Self::Waiting(component, target) => {
                write!(f, "waiting for another process that compiles {} for {target}", component.name())
            }
        }
    }
}

/// Who is told of a [`Notice`], from the thread that opens the model.
#[derive(Clone)]
pub struct NoticeSink(Arc<dyn Fn(Notice) + Send + Sync>);

impl NoticeSink {
    /// A sink that calls `tell`.
    pub fn new(tell: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }
}

impl fmt::Debug for NoticeSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NoticeSink")
    }
}

type Opening<T> = std::result::Result<T, OpenError>;

/// One graph that is to be opened.
pub(super) struct Request<'a> {
    pub(super) component: Component,
    pub(super) source: &'a GraphSource,
    pub(super) spec: &'a GraphSpec,
    pub(super) session: SessionOptions,
}

/// Opens a graph, from the cache when `loader` has one and the provider compiles what can be kept.
///
/// # Errors
/// As [`Graph::open`]. That the cache cannot be used is none: the report says it.
pub(super) fn open(loader: &Loader, request: &Request<'_>) -> Opening<(Graph, Option<CompiledReport>)> {
    let provider = request.session.target.provider;
    let Some(cache) = loader.options.compiled.as_deref().filter(|_| provider.keeps_compiled()) else {
        return Ok((request.graph(Compiled::Unkept)?, None));
    };
    let key = key(&loader.package, request)?;
    let digest = key.digest();
    let replaced = match find(cache, &key) {
        Ok(Found::Whole(entry)) => match request.read(entry, CompiledState::Reused, 0.0) {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                discard(cache, &digest);
                Some(format!("the one that was kept could not be loaded ({})", reason(&error)))
            }
        },
        Ok(Found::Damaged(why)) => Some(why),
        Ok(Found::Absent) => None,
        Err(error) => return request.uncached(error.to_string(), None),
    };
    if let Some(why) = &replaced {
        tracing::warn!(component = request.component.name(), "compiled anew: {why}");
    }
    // Before anything is written or announced: mostly the provider is not there at all.
    Graph::check(request.component.name(), request.source, request.spec, &request.session)?;
    let notify = |notice: Notice| {
        tracing::info!("{notice}");
        if let Some(NoticeSink(tell)) = &loader.options.notices {
            tell(notice);
        }
    };
    let target = request.session.target;
    let mut seconds = None;
    let built = cache.build(&key, &mut || notify(Notice::Waiting(request.component, target)), |dir| {
        notify(Notice::Compiling(request.component, target));
        let begin = Instant::now();
        request.compile(Compiled::Write(dir.to_owned()))?;
        seconds = Some(begin.elapsed().as_secs_f64());
        Ok(())
    });
    let entry = match built {
        Ok(entry) => entry,
        Err(Error::Cancelled) => return Err(Error::Cancelled.into()),
        Err(error) => return request.uncached(error.to_string(), replaced),
    };
    let state = if seconds.is_some() { CompiledState::Built } else { CompiledState::Reused };
    match request.read(entry, state, seconds.unwrap_or_default()) {
        Ok((graph, report)) => Ok((graph, report.map(|report| CompiledReport { replaced, ..report }))),
        Err(error) => {
            discard(cache, &digest);
            let why = format!("what {target} compiled could not be loaded again ({})", reason(&error));
            request.uncached(why, replaced)
        }
    }
}

/// Removes an entry that turned out to be of no use.
pub(super) fn discard(cache: &CompiledCache, digest: &str) {
    match cache.discard(digest) {
        Ok(true) => tracing::info!(entry = digest, "removed from the cache"),
        Ok(false) => tracing::warn!(entry = digest, "it stays in the cache, since another process uses it"),
        Err(error) => tracing::warn!(entry = digest, %error, "it stays in the cache"),
    }
}

/// What the cache has. One that cannot be locked may still be read.
fn find(cache: &CompiledCache, key: &Key) -> Result<Found> {
    cache.find(key).or_else(|_| CompiledCache::read_only(cache.dir()).find(key))
}

impl Request<'_> {
    fn graph(&self, compiled: Compiled) -> Opening<Graph> {
        let session = SessionOptions { compiled, ..self.session.clone() };
        Graph::open(self.component.name(), self.source, self.spec, &session)
    }

    fn compile(&self, compiled: Compiled) -> Result<()> {
        let session = SessionOptions { compiled, placement: false, ..self.session.clone() };
        Graph::compile(self.component.name(), self.source, self.spec, &session).map_err(|error| match error {
            OpenError::Failed(error) => error,
            OpenError::Refused { reason, .. } => {
                Error::Provider { name: self.session.target.to_string(), reason }
            }
        })
    }

    fn read(
        &self,
        entry: Entry,
        state: CompiledState,
        seconds: f64,
    ) -> Opening<(Graph, Option<CompiledReport>)> {
        let (digest, bytes) = (entry.record.key.digest(), entry.record.bytes);
        let graph = self.graph(Compiled::Read(Arc::new(entry)))?;
        let report = CompiledReport { state, entry: Some(digest), bytes, seconds, replaced: None };
        Ok((graph, Some(report)))
    }

    fn uncached(&self, why: String, replaced: Option<String>) -> Opening<(Graph, Option<CompiledReport>)> {
        let begin = Instant::now();
        let graph = self.graph(Compiled::Unkept)?;
        tracing::warn!(component = self.component.name(), "not cached: {why}");
        let seconds = begin.elapsed().as_secs_f64();
        let state = CompiledState::NotCached(why);
        Ok((graph, Some(CompiledReport { state, entry: None, bytes: 0, seconds, replaced })))
    }
}

fn key(package: &ModelPackage, request: &Request<'_>) -> Result<Key> {
    let Request { component, spec, session, .. } = request;
    let files = &package.manifest().files;
    let hash = |name: &String| files.get(name).map(|file| (name.clone(), file.sha256.clone()));
    let provider = session.target.provider;
    Ok(Key {
        component: component.name().to_owned(),
        files: spec.files().filter_map(hash).collect(),
        provider: provider.to_string(),
        device: session.target.device.map(|device| device.to_string()).unwrap_or_default(),
        options: key_options(spec, session),
        runtime: Runtime::started()?.compiler(provider),
        machine: Machine::probe(&Roots::default()).fingerprint(),
        sizes: session.sizes.clone(),
    })
}

fn reason(error: &OpenError) -> String {
    match error {
        OpenError::Refused { reason, .. } => reason.clone(),
        OpenError::Failed(error) => error.to_string(),
    }
}

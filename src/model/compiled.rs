//! A graph through the cache of what providers compiled.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::{Serialize, Serializer};

use super::chain::Loader;
use crate::compiled::{CompiledCache, Entry, Found, Key};
use crate::error::{Error, Result, size};
use crate::kernels::Kernels;
use crate::package::Component;
use crate::package::manifest::GraphSpec;
use crate::runtime::compiled::key_options;
use crate::runtime::{Compiled, Graph, GraphSource, OpenError, Provider, Runtime, SessionOptions, Target};

/// What became of what a provider compiled for one component.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompiledReport {
    /// Whether it was there.
    pub state: CompiledState,
    /// The entry of the cache that serves; `None` when there is none.
    pub entry: Option<String>,
    /// Bytes of the entry.
    pub bytes: u64,
    /// When the entry was built, in seconds since 1970; 0 when there is none.
    pub created: u64,
    /// Seconds that the provider took to compile; 0 when it was there.
    pub seconds: f64,
    /// Whether it is the processor's: weights in the layout of its kernels, which the session maps.
    pub packed: bool,
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
        let what = if self.packed { "packed weights" } else { "compiled graph" };
        write!(f, "{what} {}", self.state)?;
        match &self.replaced {
            Some(why) => write!(f, ", since {why}"),
            None => Ok(()),
        }
    }
}

/// What becomes of weights in the layout that the kernels of the CPU provider want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PackedWeights {
    /// Those that are in the cache are mapped, and none are put there.
    #[default]
    Found,
    /// They are kept in the cache of compiled graphs, and each session maps them, where a graph's files have at least
    /// this many bytes. An entry takes a good twice the bytes of those files.
    KeptFrom(u64),
    /// Each session makes them anew in its own memory.
    Private,
}

impl PackedWeights {
    /// Kept, unless loading is a matter of an instant.
    pub const WORTH_KEEPING: Self = Self::KeptFrom(32 << 20);
}

/// What takes long while a model is opened, and what its user should know while it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The provider compiles a component, for this session and all later ones.
    Compiling(Component, Target),
    /// The weights of a component, of so many bytes on disk, are brought into the layout of the processor's kernels, for
    /// this session and all later ones.
    Packing(Component, u64),
    /// The weights of a component were to be kept in the layout of the processor's kernels and are not, for this reason.
    Unkept(Component, &'static str),
    /// Another process compiles the same component, and this one waits for it.
    Waiting(Component, Target),
    /// What was read before cannot be used, or cannot be kept.
    Prefix(String),
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiling(component, target) => {
                write!(f, "compiling {} for {target}, once", component.name())
            }
            Self::Packing(component, bytes) => {
                let (component, about) = (component.name(), size(bytes.saturating_mul(PACKED_PERCENT) / 100));
                write!(f, "packing the weights of the {component}, once; about {about} in the cache")
            }
            Self::Unkept(component, reason) => {
                write!(f, "the packed weights of the {} are not kept: {reason}", component.name())
            }
            Self::Waiting(component, target) => {
                write!(f, "waiting for another process that compiles {} for {target}", component.name())
            }
            Self::Prefix(text) => f.write_str(text),
        }
    }
}

/// Who is told of a [`Notice`], from whichever thread knows of it.
#[derive(Clone)]
pub struct NoticeSink(Arc<dyn Fn(Notice) + Send + Sync>);

impl NoticeSink {
    /// A sink that calls `tell`.
    pub fn new(tell: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(super) fn tell(&self, notice: Notice) {
        (self.0)(notice);
    }
}

impl fmt::Debug for NoticeSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NoticeSink")
    }
}

/// Bytes of an entry with packed weights for 100 bytes of a graph's files: measured 219 for 4 bits in blocks of 32, 200
/// for single precision.
const PACKED_PERCENT: u64 = 220;

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
    let notify = |notice: Notice| {
        tracing::info!("{notice}");
        if let Some(sink) = &loader.options.notices {
            sink.tell(notice);
        }
    };
    let unkept = unkept(loader, provider, request.spec, request.session.kernels);
    let Some(cache) = loader.options.compiled.as_deref().filter(|_| unkept.is_none()) else {
        let asked = matches!(loader.options.packed_weights, PackedWeights::KeptFrom(_));
        if asked && provider == Provider::Cpu {
            notify(Notice::Unkept(request.component, unkept.unwrap_or("there is no cache")));
        }
        return Ok((request.graph(Compiled::Unkept)?, None));
    };
    let only_found = provider == Provider::Cpu && loader.options.packed_weights == PackedWeights::Found;
    let key = key(loader, request)?;
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
        Err(_) if only_found => None,
        Err(error) => return request.uncached(error.to_string(), None),
    };
    if let Some(why) = &replaced {
        tracing::warn!(component = request.component.name(), "compiled anew: {why}");
    }
    if only_found {
        return Ok((request.graph(Compiled::Unkept)?, None));
    }
    // Before anything is written or announced: mostly the provider is not there at all.
    Graph::check(request.component.name(), request.source, request.spec, &request.session)?;
    let target = request.session.target;
    let mut seconds = None;
    let built = cache.build(&key, &mut || notify(Notice::Waiting(request.component, target)), |dir| {
        notify(match target.provider {
            Provider::Cpu => Notice::Packing(request.component, bytes(loader, request.spec)),
            _ => Notice::Compiling(request.component, target),
        });
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

/// Why what `provider` makes of a graph is not to be kept; `None` where it is.
pub(super) fn unkept(
    loader: &Loader,
    provider: Provider,
    spec: &GraphSpec,
    kernels: Option<Kernels>,
) -> Option<&'static str> {
    if provider != Provider::Cpu {
        return (!provider.keeps_compiled()).then_some("the provider compiles nothing that could be kept");
    }
    let small = match loader.options.packed_weights {
        PackedWeights::Private => return Some("each session is to make its own"),
        PackedWeights::Found => false,
        PackedWeights::KeptFrom(least) => bytes(loader, spec) < least,
    };
    let reasons = [
        (kernels.is_some(), "this program's own kernels read them as they lie in the package"),
        (
            loader.package.directory().is_none(),
            "the package is inside this program, where nothing can be mapped",
        ),
        (small, "they are too small to be worth it"),
    ];
    reasons.into_iter().find_map(|(holds, reason)| holds.then_some(reason))
}

/// Bytes of the graph and its external data.
fn bytes(loader: &Loader, spec: &GraphSpec) -> u64 {
    let files = &loader.package.manifest().files;
    let sizes = spec.files().filter_map(|name| files.get(name)).map(|info| info.bytes);
    sizes.fold(0, u64::saturating_add)
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
        let session =
            SessionOptions { compiled, placement: false, parallel_packing: false, ..self.session.clone() };
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
        let created = entry.record.created;
        let graph = self.graph(Compiled::Read(Arc::new(entry)))?;
        let entry = Some(digest);
        let packed = self.session.target.provider == Provider::Cpu;
        let report = CompiledReport { state, entry, bytes, created, seconds, packed, replaced: None };
        Ok((graph, Some(report)))
    }

    fn uncached(&self, why: String, replaced: Option<String>) -> Opening<(Graph, Option<CompiledReport>)> {
        let begin = Instant::now();
        let graph = self.graph(Compiled::Unkept)?;
        tracing::warn!(component = self.component.name(), "not cached: {why}");
        let seconds = begin.elapsed().as_secs_f64();
        let state = CompiledState::NotCached(why);
        let packed = self.session.target.provider == Provider::Cpu;
        let report = CompiledReport { state, entry: None, bytes: 0, created: 0, seconds, packed, replaced };
        Ok((graph, Some(report)))
    }
}

pub(super) fn key(loader: &Loader, request: &Request<'_>) -> Result<Key> {
    let Request { component, spec, session, .. } = request;
    let files = &loader.package.manifest().files;
    let hash = |name: &String| files.get(name).map(|file| (name.clone(), file.sha256.clone()));
    let provider = session.target.provider;
    Ok(Key {
        component: component.name().to_owned(),
        files: spec.files().filter_map(hash).collect(),
        provider: provider.to_string(),
        device: session.target.device.map(|device| device.to_string()).unwrap_or_default(),
        options: key_options(spec, session),
        runtime: Runtime::started()?.compiler(provider),
        machine: loader.machine().to_owned(),
        sizes: session.sizes.clone(),
    })
}

fn reason(error: &OpenError) -> String {
    match error {
        OpenError::Refused { reason, .. } => reason.clone(),
        OpenError::Failed(error) => error.to_string(),
    }
}

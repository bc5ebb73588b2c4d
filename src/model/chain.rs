//! The candidates for one component, tried in turn until one serves.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, OnceLock};

use serde::Serialize;

use super::compiled::{self, CompiledReport, CompiledState};
use super::decision;
use super::goldens::Agreement;
use super::memory::{MemoryGate, Room, host};
use super::selection::{Candidate, Candidates};
use super::stamp::{self, Passed, Stamp};
use super::{ModelOptions, cancel::Canceler};
use crate::compiled::Key;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::machine::{Machine, Roots};
use crate::package::manifest::{GraphSpec, KvSpec, Tolerance};
use crate::package::{Component, FileSource, ModelPackage};
use crate::runtime::graph::own_nodes;
use crate::runtime::{
    Compiled, Graph, GraphSource, OpenError, OwnNodes, Placement, Provider, Refusal, Runtime, SessionOptions,
    Step, Target,
};

/// Which variant and provider serve one component, what was tried before, and what proves the choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComponentReport {
    /// The component.
    pub component: Component,
    /// The variant that serves it.
    pub variant: String,
    /// The provider that runs it.
    pub provider: Target,
    /// Threads that the runtime was told to use; its own choice otherwise.
    pub threads: Option<usize>,
    /// The day on which this choice was measured to be the fastest here, when that is why it serves.
    pub tuned: Option<String>,
    /// What was tried before, in order, and why it does not serve.
    pub refused: Vec<Refusal>,
    /// Which providers run the graph's nodes, as the runtime told of the self-check's run.
    pub placement: Option<Placement>,
    /// What the self-check compared.
    pub self_check: Vec<Agreement>,
    /// The kernels of this program that compute a part of it; `None` when ONNX Runtime's compute all.
    pub kernels: Option<OwnKernels>,
    /// The kept result of the self-check, which the next load may use or this one used; `None` when it is not kept.
    pub stamp: Option<Stamp>,
    /// Whether all threads brought its weights into the layout of the processor's kernels, which loads faster and for a
    /// moment takes the memory of the weights once more.
    pub parallel_packing: bool,
    /// What became of what the provider compiled; `None` when it keeps nothing, or there is no cache for it.
    pub compiled: Option<CompiledReport>,
}

/// This program's own kernels in a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OwnKernels {
    /// The instructions that they are made for.
    pub instructions: String,
    /// Products of few-bit weights that they compute.
    pub products: usize,
    /// Attentions over a cache that they compute.
    pub attentions: usize,
    /// Kernels of the same identity compute the same.
    #[serde(skip)]
    pub(super) identity: String,
}

impl OwnKernels {
    fn new(kernels: Kernels, OwnNodes { products, attentions }: OwnNodes) -> Self {
        Self { instructions: kernels.to_string(), products, attentions, identity: kernels.identity() }
    }
}

impl fmt::Display for OwnKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} products of few-bit weights", self.products)?;
        if self.attentions > 0 {
            write!(f, " and {} attentions", self.attentions)?;
        }
        write!(f, " by this program's own, for {}", self.instructions)
    }
}

/// What opens graphs: the package, and how its user wants them.
#[derive(Debug)]
pub(super) struct Loader {
    pub(super) package: Arc<ModelPackage>,
    pub(super) options: ModelOptions,
    pub(super) canceler: Canceler,
    pub(super) memory: MemoryGate,
    machine: OnceLock<String>,
}

/// A graph that a provider took, not yet proved.
pub(super) struct Opened {
    pub(super) graph: Graph,
    pub(super) kv: Option<KvSpec>,
    pub(super) tolerance: Tolerance,
    pub(super) compiled: Option<CompiledReport>,
    pub(super) kernels: Option<OwnKernels>,
    /// What the self-check found at an earlier load, if that stands for it now.
    pub(super) proved: Option<Vec<Agreement>>,
    stamping: Stamping,
}

/// What is known of a session's self-check before it is run.
#[derive(Clone, Default)]
struct Stamping {
    /// Where its stamp is kept.
    key: Option<Key>,
    /// The stamp that stands for it.
    passed: Option<Passed>,
}

/// Why a graph is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// It is to be proved.
    Serve,
    /// It was proved when it was opened before.
    Again,
}

/// What serves a component by running a graph.
pub(super) trait Serving {
    fn graph(&mut self) -> &mut Graph;
}

/// A component while it serves, and what may take over from it.
#[derive(Debug)]
pub(super) struct Chain {
    component: Component,
    waiting: VecDeque<Candidate>,
    refused: Vec<Refusal>,
    /// Whether this program's own kernels computed what they should not; ONNX Runtime's do so then.
    distrusted: bool,
    /// What was wrong with the package's own files, which another candidate may not need.
    fault: Option<Error>,
}

impl Loader {
    pub(super) fn new(package: &ModelPackage, options: &ModelOptions) -> Self {
        Self {
            package: Arc::new(package.clone()),
            options: options.clone(),
            canceler: Canceler::default(),
            memory: MemoryGate::new(options.memory_limit),
            machine: OnceLock::new(),
        }
    }

    /// [`Machine::fingerprint`] of this machine.
    pub(super) fn machine(&self) -> &str {
        self.machine.get_or_init(|| Machine::probe(&Roots::default()).fingerprint())
    }

    /// The kernels of this program that would compute a part of a candidate's graph.
    pub(super) fn kernels(&self, component: Component, candidate: &Candidate) -> Option<Kernels> {
        let kernels = self.options.kernels.filter(|_| candidate.target.provider == Provider::Cpu)?;
        let (spec, _) = self.package.graph(component, &candidate.variant)?;
        let source = graph_source(&self.package, spec).ok()?;
        (own_nodes(&source, kernels).products > 0).then_some(kernels)
    }

    /// Opens the graph of a candidate. One that is to be proved has its first runs profiled, until they are asked where
    /// they ran.
    fn open(
        &self,
        component: Component,
        candidate: &Candidate,
        purpose: Purpose,
        room: &Room,
        kernels: Option<Kernels>,
    ) -> Result<Opened, OpenError> {
        let package = &self.package;
        let variant = package.manifest().variants.get(&candidate.variant);
        let (Some(variant), Some((spec, kv))) = (variant, package.graph(component, &candidate.variant))
        else {
            let reason = format!("the package has no {} in {}", component.name(), candidate.variant);
            return Err(OpenError::Refused { step: Step::Package, reason });
        };
        package.check_graph(spec)?;
        let provider = candidate.target.provider;
        let session = SessionOptions {
            threads: self.threads(component, candidate),
            target: candidate.target,
            provider_options: self.options.provider_options.get(&provider).cloned().unwrap_or_default(),
            sizes: sizes(package, kv),
            compiled: Compiled::Unkept,
            kernels,
            parallel_packing: self.packs_in_parallel(candidate.target, room),
            placement: purpose == Purpose::Serve,
        };
        let source = graph_source(package, spec)?;
        let mut request = compiled::Request { component, source: &source, spec, session };
        let mut stamping = Stamping::default();
        if purpose == Purpose::Serve {
            stamping.key = stamp::key(self, &request, &candidate.variant)?;
            stamping.passed = stamping.key.as_ref().and_then(|key| stamp::find(self, key));
            request.session.placement = stamping.passed.is_none();
        }
        let open = |request: &compiled::Request<'_>| {
            compiled::open(self, request).map_err(|error| match error {
                OpenError::Failed(error) => OpenError::Failed(of_package(package, spec, error)),
                refused @ OpenError::Refused { .. } => refused,
            })
        };
        let (mut graph, mut compiled) = open(&request)?;
        if stamping.passed.as_ref().is_some_and(|passed| !passed.is_of(compiled.as_ref())) {
            // It is to be proved after all, and its runs have to be profiled for that.
            drop(graph);
            stamping.passed = None;
            request.session.placement = true;
            let again;
            (graph, again) = open(&request)?;
            compiled = compiled.filter(|first| first.state == CompiledState::Built).or(again);
        }
        self.canceler.serve(component, graph.canceler());
        let kernels = kernels.map(|kernels| OwnKernels::new(kernels, graph.own_nodes()));
        let proved = stamping.passed.as_ref().map(|passed| passed.self_check.clone());
        Ok(Opened { graph, kv, tolerance: variant.tolerance, compiled, kernels, proved, stamping })
    }

    /// Whether all threads pack weights at once.
    fn packs_in_parallel(&self, target: Target, room: &Room) -> bool {
        target.provider == Provider::Cpu && *room == Room::Ample && !self.options.low_memory
    }

    /// Whether what the provider makes of the graph of `candidate` would be kept.
    pub(super) fn keeps(&self, component: Component, candidate: &Candidate) -> bool {
        let graph = self.package.graph(component, &candidate.variant);
        let kernels = self.kernels(component, candidate);
        graph.is_some_and(|(spec, _)| {
            compiled::unkept(self, candidate.target.provider, spec, kernels).is_none()
        })
    }

    /// Why the provider of a candidate cannot be had at all, as far as that is known without its graph.
    fn lacks(&self, component: Component, candidate: &Candidate) -> Result<Option<OpenError>> {
        // What is not whole is refused for that reason, wherever it would run.
        let graph = self.package.graph(component, &candidate.variant);
        let whole = graph.is_some_and(|(graph, _)| self.package.check_graph(graph).is_ok());
        Ok(if whole { Runtime::started()?.lacks(candidate.target.provider) } else { None })
    }

    /// Removes the stamp of what turned out not to compute what it should.
    pub(super) fn forget(&self, stamp: Option<&Stamp>) {
        if let Some(stamp) = stamp {
            stamp::forget(self, &stamp.entry);
        }
    }

    /// Removes from the cache what does not compute what it should.
    fn discard(&self, compiled: Option<&CompiledReport>) {
        let digest = compiled.and_then(|report| report.entry.as_deref());
        if let (Some(cache), Some(digest)) = (&self.options.compiled, digest) {
            compiled::discard(cache, digest);
        }
    }

    /// Threads for a candidate: those that were asked for, or those that it was measured with.
    fn threads(&self, component: Component, candidate: &Candidate) -> Option<usize> {
        let tuned = || decision::behind(&self.options, component, &self.package, candidate)?.threads;
        self.options.threads.or_else(tuned)
    }

    /// Opens again what `report` tells of, which was proved before.
    pub(super) fn reopen(&self, report: &ComponentReport) -> Result<Opened> {
        let candidate = Candidate { variant: report.variant.clone(), target: report.provider };
        let kernels = self.options.kernels.filter(|_| report.kernels.is_some());
        self.open(report.component, &candidate, Purpose::Again, &Room::Enough, kernels).map_err(|error| {
            match error {
                OpenError::Failed(error) => error,
                OpenError::Refused { step, reason } => Error::Provider {
                    name: report.provider.to_string(),
                    reason: format!(
                        "it served the {} and no longer does at {step}: {reason}",
                        report.component.name()
                    ),
                },
            }
        })
    }
}

impl Chain {
    pub(super) fn new(loader: &Loader, component: Component) -> Result<Self> {
        let ModelOptions { variants, providers, .. } = &loader.options;
        let Candidates { mut waiting, refused } =
            Candidates::new(&loader.package, component, variants, &providers.preference(component))?;
        if let Some(decided) = decision::of(&loader.options, component, &loader.package)? {
            let first = Candidate { variant: decided.variant.clone(), target: decided.provider };
            waiting.retain(|candidate| *candidate != first);
            waiting.insert(0, first);
        }
        Ok(Self { component, waiting: waiting.into(), refused, distrusted: false, fault: None })
    }

    /// Nothing but `candidate`.
    pub(super) fn of(component: Component, candidate: Candidate) -> Self {
        Self { component, waiting: [candidate].into(), refused: Vec::new(), distrusted: false, fault: None }
    }

    /// What was tried so far and does not serve.
    pub(super) fn refused(&self) -> &[Refusal] {
        &self.refused
    }

    /// Opens one candidate after another until `check` proves one.
    ///
    /// # Errors
    /// [`Error::Package`] when files are at fault and [`Error::Provider`] otherwise, when nothing is left to try.
    pub(super) fn serve<T: Serving>(
        &mut self,
        loader: &Loader,
        mut check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
    ) -> Result<(T, ComponentReport)> {
        let mut packed_anew = false;
        while let Some(candidate) = self.waiting.pop_front() {
            // Asked first, since a plan reads graphs.
            if let Some(OpenError::Refused { step, reason }) = loader.lacks(self.component, &candidate)? {
                self.refuse(candidate, step, reason);
                continue;
            }
            let kernels = loader.kernels(self.component, &candidate).filter(|_| !self.distrusted);
            let room = loader.memory.room(loader, self.component, &candidate, kernels)?;
            if let Room::Short(reason) = room {
                self.refuse(candidate, Step::Memory, reason);
                continue;
            }
            let opened = match loader.open(self.component, &candidate, Purpose::Serve, &room, kernels) {
                Ok(opened) => opened,
                Err(OpenError::Refused { step, reason }) => {
                    self.refuse(candidate, step, reason);
                    continue;
                }
                Err(OpenError::Failed(error @ Error::Package { .. })) => {
                    self.refuse(candidate, Step::Package, error.to_string());
                    self.fault.get_or_insert(error);
                    continue;
                }
                Err(OpenError::Failed(error)) => return Err(error),
            };
            let parallel_packing = loader.packs_in_parallel(candidate.target, &room);
            let (compiled, kernels) = (opened.compiled.clone(), opened.kernels.clone());
            let stamping = opened.stamping.clone();
            let checked = match check(opened) {
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => Err(with_causes(&error)),
                Ok((serving, self_check)) => match self_check.iter().find(|agreement| !agreement.passes()) {
                    // The session goes first, since it holds what it was compiled into.
                    Some(failed) => {
                        drop(serving);
                        Err(failed.to_string())
                    }
                    None => Ok((serving, self_check)),
                },
            };
            let (mut serving, self_check) = match checked {
                Ok(checked) => checked,
                Err(reason) => {
                    loader.discard(compiled.as_ref());
                    if let Some(key) = &stamping.key {
                        stamp::forget(loader, &key.digest());
                    }
                    let kept =
                        compiled.is_some_and(|report| report.packed && report.state == CompiledState::Reused);
                    if kept && !std::mem::replace(&mut packed_anew, true) {
                        // Kept weights were at fault or were not; packed anew they tell.
                        tracing::warn!(component = self.component.name(), "packed anew: {reason}");
                        self.waiting.push_front(candidate);
                        continue;
                    }
                    self.refuse_with(candidate, Step::SelfCheck, reason, kernels.as_ref());
                    continue;
                }
            };
            let placement = match &stamping.passed {
                Some(passed) => passed.placement.clone(),
                None => serving.graph().placement()?,
            };
            let most = loader.options.max_partitions;
            if let Some(reason) =
                placement.as_ref().and_then(|placement| misplaced(placement, candidate.target, most))
            {
                self.refuse(candidate, Step::Placement, reason);
                continue;
            }
            loader.memory.takes(
                self.component,
                host(candidate.target.provider, kernels.is_some()),
                &candidate,
            );
            let stamp = match stamping {
                Stamping { passed: Some(passed), .. } => Some(passed.stamp),
                Stamping { key: Some(key), .. } if !self_check.is_empty() => {
                    stamp::keep(loader, &key, &self_check, placement.as_ref(), compiled.as_ref())
                }
                Stamping { .. } => None,
            };
            let tuned =
                decision::behind(&loader.options, self.component, &loader.package, &candidate).is_some();
            let date = loader.options.decision.as_ref().map(|decision| decision.date.clone());
            let report = ComponentReport {
                component: self.component,
                threads: loader.threads(self.component, &candidate),
                tuned: date.filter(|_| tuned),
                variant: candidate.variant,
                provider: candidate.target,
                refused: self.refused.clone(),
                placement,
                self_check,
                kernels,
                stamp,
                parallel_packing,
                compiled,
            };
            return Ok((serving, report));
        }
        let reasons: Vec<String> = self.refused.iter().map(ToString::to_string).collect();
        let reason = match reasons.len() {
            0 => format!("the package names nothing that serves the {}", self.component.name()),
            _ => format!("nothing serves the {} ({})", self.component.name(), reasons.join("; ")),
        };
        let too_large = self.refused.iter().any(|refusal| refusal.step == Step::Memory);
        let advice = match (too_large, loader.options.low_memory) {
            (true, false) => "; give --low-memory, or a larger --memory-limit",
            (true, true) => "; give a larger --memory-limit, or free memory",
            (false, _) => "",
        };
        let reason = reason + advice;
        Err(match self.fault.take() {
            Some(fault) if self.files_are_at_fault() => fault,
            _ => {
                let name =
                    self.refused.first().map_or_else(|| "none".to_owned(), |one| one.provider.to_string());
                Error::Provider { name, reason }
            }
        })
    }

    /// Takes what `report` tells of out of service, so that [`Chain::serve`] goes on with the next candidate.
    pub(super) fn demote(&mut self, report: &ComponentReport, reason: &str) -> Refusal {
        let candidate = Candidate { variant: report.variant.clone(), target: report.provider };
        self.refuse_with(candidate, Step::Serving, reason.to_owned(), report.kernels.as_ref())
    }

    /// Whether there is nothing left to try.
    pub(super) fn is_exhausted(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether no candidate came further on the processor, which runs everything, than to its files.
    fn files_are_at_fault(&self) -> bool {
        let mut refused = self.refused.iter().filter(|refusal| refusal.provider.provider == Provider::Cpu);
        refused.all(|refusal| refusal.step == Step::Package)
    }

    /// Refuses a candidate for what it computed. It is tried once more without this program's own kernels, if it had some.
    fn refuse_with(
        &mut self,
        candidate: Candidate,
        step: Step,
        reason: String,
        kernels: Option<&OwnKernels>,
    ) -> Refusal {
        let Some(OwnKernels { instructions, .. }) = kernels else {
            return self.refuse(candidate, step, reason);
        };
        self.distrusted = true;
        self.waiting.push_front(candidate.clone());
        self.refuse(candidate, step, format!("with the kernels {instructions}: {reason}"))
    }

    fn refuse(&mut self, candidate: Candidate, step: Step, reason: String) -> Refusal {
        let refusal = Refusal { provider: candidate.target, variant: candidate.variant, step, reason };
        tracing::info!(component = self.component.name(), "refused: {refusal}");
        self.refused.push(refusal.clone());
        refusal
    }
}

/// An error and what lies below it, as one line.
fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut below = std::error::Error::source(error);
    while let Some(cause) = below {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        below = cause.source();
    }
    text
}

/// Why a graph is not where it should be, if it is not.
fn misplaced(placement: &Placement, target: Target, most: usize) -> Option<String> {
    if target.provider == Provider::Cpu {
        return None;
    }
    let left: Vec<String> =
        placement.left_to_cpu.iter().map(|(operator, count)| format!("{operator} ({count})")).collect();
    let left = if left.is_empty() { "nothing".to_owned() } else { left.join(", ") };
    let provider = target.provider;
    if !placement.nodes.contains_key(provider.name()) {
        return Some(format!("{provider} took no node of the graph; the processor ran {left}"));
    }
    // The others run node by node: pieces cost them nothing.
    let compiles =
        matches!(provider, Provider::CoreMl | Provider::Nnapi | Provider::Qnn | Provider::OpenVino);
    (compiles && placement.partitions > most).then(|| {
        let pieces = placement.partitions;
        format!(
            "the graph falls into {pieces} pieces on {provider}, {most} are allowed; the processor ran {left}"
        )
    })
}

/// The sizes that a provider which compiles for them must be ready for, by the names of dimensions.
fn sizes(package: &ModelPackage, kv: Option<KvSpec>) -> std::collections::BTreeMap<String, [usize; 3]> {
    let context = package.manifest().decoder.context;
    let patches = package.manifest().vision.tokens_per_image;
    let capacity = kv.and_then(|kv| kv.capacity).unwrap_or(context);
    let chunk = kv.and_then(|kv| kv.chunk).unwrap_or(capacity);
    [
        ("batch", [1, 1, 1]),
        ("patches", [1, patches, patches]),
        ("new", [1, 1, chunk]),
        ("past", [0, capacity / 2, capacity]),
        ("total", [1, capacity / 2 + 1, capacity]),
        ("capacity", [1, capacity, capacity]),
    ]
    .into_iter()
    .map(|(name, sizes)| (name.to_owned(), sizes))
    .collect()
}

/// A graph that does not open is a fault of the package, and the file is what must be mended.
fn of_package(package: &ModelPackage, spec: &GraphSpec, error: Error) -> Error {
    match error {
        Error::Graph { graph, reason, source } => {
            let path = package.display_path(&spec.path);
            Error::Package { path, reason: format!("as the {graph}: {reason}"), source }
        }
        error => error,
    }
}

fn graph_source(package: &ModelPackage, spec: &GraphSpec) -> Result<GraphSource> {
    match package.file(&spec.path)? {
        FileSource::Path(path) => Ok(GraphSource::File(path)),
        FileSource::Memory(graph) => {
            let data = spec.data.iter().map(|name| {
                let file = name.rsplit('/').next().unwrap_or(name).to_owned();
                match package.file(name)? {
                    FileSource::Memory(bytes) => Ok((file, bytes)),
                    FileSource::Path(path) => {
                        Err(Error::package(path, "the file lies on disk and its graph in the program"))
                    }
                }
            });
            Ok(GraphSource::Memory { graph, data: data.collect::<Result<_>>()? })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_in_too_many_pieces_is_refused_with_what_breaks_it() {
        let placement = |provider: &str, partitions| Placement {
            nodes: [("cpu".to_owned(), 5), (provider.to_owned(), partitions)].into(),
            partitions,
            left_to_cpu: [("Erf".to_owned(), 4), ("Where".to_owned(), 1)].into(),
        };
        let coreml = Target::from(Provider::CoreMl);
        assert_eq!(misplaced(&placement("coreml", 4), coreml, 4), None);
        assert_eq!(
            misplaced(&placement("coreml", 5), coreml, 4).unwrap(),
            "the graph falls into 5 pieces on coreml, 4 are allowed; the processor ran Erf (4), Where (1)"
        );
        assert_eq!(misplaced(&placement("cuda", 90), Provider::Cuda.into(), 4), None);
        let reason = misplaced(&placement("coreml", 0), Provider::Cuda.into(), 4).unwrap();
        assert!(reason.starts_with("cuda took no node of the graph"), "{reason}");
        assert_eq!(misplaced(&placement("cpu", 5), Target::default(), 4), None);
    }
}

//! Whether a candidate fits into memory, before anything is allocated for it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::chain::Loader;
use super::selection::Candidate;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::machine::{Memory, Roots};
use crate::package::Component;
use crate::package::plan::{Host, MemoryPlan, Part};
use crate::runtime::Provider;

/// Holds plans against what the user allows and what the machine has left.
#[derive(Debug)]
pub(super) struct MemoryGate {
    limit: Option<u64>,
    served: Mutex<BTreeMap<Component, (String, Host)>>,
}

/// How a candidate fits into memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Even while its weights are packed by all threads, the machine has as much again; and no limit was given.
    Ample,
    /// It fits.
    Enough,
    /// It does not, for this reason.
    Short(String),
}

impl MemoryGate {
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit, served: Mutex::default() }
    }

    /// Whether `candidate` fits: alone into what the machine has left, and with what serves already into what the user
    /// allows.
    pub(super) fn room(
        &self,
        loader: &Loader,
        component: Component,
        candidate: &Candidate,
        kernels: Option<Kernels>,
    ) -> Result<Room> {
        // What is not whole is refused when it is opened, for that reason.
        let graph = loader.package.graph(component, &candidate.variant);
        if graph.is_none_or(|(graph, _)| loader.package.check_graph(graph).is_err()) {
            return Ok(Room::Enough);
        }
        let part = Part {
            component,
            variant: &candidate.variant,
            host: host(candidate.target.provider, kernels.is_some()),
        };
        let memory = Memory::probe(&Roots::default());
        let alone = MemoryPlan::of(&loader.package, &[part])?;
        if let Err(shortfall) = alone.fits(memory.budget(), &memory.explain()) {
            return Ok(Room::Short(shortfall.to_string()));
        }
        let Some(limit) = self.limit else {
            // Packing at once holds the files beside what is made of them, and twice of that where it is kept.
            let peak = alone.parts.iter().map(|part| part.files.saturating_add(part.weights));
            let peak = peak.fold(alone.held(), u64::saturating_add);
            return Ok(if peak <= memory.budget() / 2 { Room::Ample } else { Room::Enough });
        };
        let served = self.served();
        let others = served.iter().filter(|(other, _)| **other != component);
        let mut parts: Vec<Part<'_>> = others
            .map(|(component, (variant, host))| Part { component: *component, variant, host: *host })
            .collect();
        parts.push(part);
        let together = MemoryPlan::of(&loader.package, &parts)?;
        Ok(match together.fits(limit, "the limit that was given") {
            Ok(()) => Room::Enough,
            Err(shortfall) => Room::Short(shortfall.to_string()),
        })
    }

    /// How many bytes may be used for what need not be kept, at most `wanted`, and what decided that: one part of
    /// `parts` of what the machine has left, and of `limit` what the model leaves.
    pub(super) fn spare(
        &self,
        loader: &Loader,
        wanted: u64,
        parts: u64,
        limit: Option<u64>,
    ) -> Result<(u64, String)> {
        let memory = Memory::probe(&Roots::default());
        let mut least = (wanted, "as much as a full context takes".to_owned());
        let part = memory.budget() / parts;
        if part < least.0 {
            least = (part, format!("1/{parts} of what is left: {}", memory.explain()));
        }
        if let Some(limit) = limit {
            let served = self.served();
            let parts = served.iter().map(|(component, (variant, host))| Part {
                component: *component,
                variant,
                host: *host,
            });
            let plan = MemoryPlan::of(&loader.package, &parts.collect::<Vec<_>>())?;
            let left = limit.saturating_sub(plan.held());
            if left < least.0 {
                least = (left, "what the model leaves of the memory limit".to_owned());
            }
        }
        Ok(least)
    }

    /// Counts what serves `component` from now on.
    pub(super) fn takes(&self, component: Component, host: Host, candidate: &Candidate) {
        let taken = (candidate.variant.clone(), host);
        self.served().insert(component, taken);
    }

    /// No longer counts what served `component`.
    pub(super) fn frees(&self, component: Component) {
        self.served().remove(&component);
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<Component, (String, Host)>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where what `report` tells of keeps the weights.
#[cfg(feature = "cli")]
pub(crate) fn host_of(report: &super::ComponentReport) -> Host {
    let mapped = report.compiled.as_ref().is_some_and(|compiled| compiled.packed && compiled.entry.is_some());
    if mapped { Host::ProcessorMapped } else { host(report.provider.provider, report.kernels.is_some()) }
}

/// Where a provider keeps the weights, which this program's own kernels read if they compute a part of the graph.
pub(crate) fn host(provider: Provider, own_kernels: bool) -> Host {
    match provider {
        Provider::Cpu if own_kernels => Host::ProcessorInPlace,
        Provider::Cpu | Provider::Xnnpack | Provider::OpenVino => Host::Processor,
        Provider::CoreMl | Provider::Nnapi | Provider::Qnn | Provider::WebGpu => Host::Unified,
        Provider::Cuda | Provider::TensorRt | Provider::TensorRtRtx | Provider::DirectMl => Host::Discrete,
    }
}

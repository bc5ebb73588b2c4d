//! Whether a candidate fits into memory, before anything is allocated for it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::chain::Loader;
use super::selection::Candidate;
use crate::error::Result;
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

impl MemoryGate {
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit, served: Mutex::default() }
    }

    /// Why `candidate` does not fit, if it does not: alone into what the machine has left, or with what serves already
    /// into what the user allows.
    pub(super) fn shortfall(
        &self,
        loader: &Loader,
        component: Component,
        candidate: &Candidate,
    ) -> Result<Option<String>> {
        // What is not whole is refused when it is opened, for that reason.
        let graph = loader.package.graph(component, &candidate.variant);
        if graph.is_none_or(|(graph, _)| loader.package.check_graph(graph).is_err()) {
            return Ok(None);
        }
        let part = Part { component, variant: &candidate.variant, host: host(candidate.target.provider) };
        let memory = Memory::probe(&Roots::default());
        let alone = MemoryPlan::of(&loader.package, &[part])?;
        if let Err(shortfall) = alone.fits(memory.budget(), &memory.explain()) {
            return Ok(Some(shortfall.to_string()));
        }
        let Some(limit) = self.limit else { return Ok(None) };
        let served = self.served();
        let others = served.iter().filter(|(other, _)| **other != component);
        let mut parts: Vec<Part<'_>> = others
            .map(|(component, (variant, host))| Part { component: *component, variant, host: *host })
            .collect();
        parts.push(part);
        let together = MemoryPlan::of(&loader.package, &parts)?;
        Ok(together.fits(limit, "the limit that was given").err().map(|shortfall| shortfall.to_string()))
    }

    /// Counts what serves `component` from now on.
    pub(super) fn takes(&self, component: Component, candidate: &Candidate) {
        let taken = (candidate.variant.clone(), host(candidate.target.provider));
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

/// Where a provider keeps the weights.
pub(crate) fn host(provider: Provider) -> Host {
    match provider {
        Provider::Cpu | Provider::Xnnpack | Provider::OpenVino => Host::Processor,
        Provider::CoreMl | Provider::Nnapi | Provider::Qnn | Provider::WebGpu => Host::Unified,
        Provider::Cuda | Provider::TensorRt | Provider::TensorRtRtx | Provider::DirectMl => Host::Discrete,
    }
}

//! A component of a loaded model.

use super::causal::Demotion;
use super::chain::{Chain, ComponentReport, Loader, Opened, Serving};
use super::goldens::Agreement;
use crate::error::{Error, Result};
use crate::package::Component;

/// A component while it serves, and what may take over from it.
#[derive(Debug)]
pub(super) struct Stage<T> {
    chain: Chain,
    /// `None` while it is not in memory.
    serving: Option<T>,
    report: ComponentReport,
}

impl<T: Serving> Stage<T> {
    pub(super) fn open(
        mut chain: Chain,
        loader: &Loader,
        check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
    ) -> Result<Self> {
        let (serving, report) = chain.serve(loader, check)?;
        Ok(Self { chain, serving: Some(serving), report })
    }

    /// What serves it, and what refused to.
    pub(super) fn report(&self) -> &ComponentReport {
        &self.report
    }

    /// What serves.
    ///
    /// # Errors
    /// [`Error::Stopped`] when it is not in memory: nothing could take over from what was taken out of service.
    pub(super) fn serving(&self) -> Result<&T> {
        self.serving.as_ref().ok_or_else(|| none_serves(self.report.component))
    }

    /// What serves, to be run.
    ///
    /// # Errors
    /// As [`Stage::serving`].
    pub(super) fn serving_mut(&mut self) -> Result<&mut T> {
        self.serving.as_mut().ok_or_else(|| none_serves(self.report.component))
    }

    /// What serves, loaded again if it was put to rest.
    pub(super) fn awake(&mut self, loader: &Loader, build: impl FnOnce(Opened) -> T) -> Result<&mut T> {
        let serving = match self.serving.take() {
            Some(serving) => serving,
            None => build(loader.reopen(&self.report)?),
        };
        Ok(self.serving.insert(serving))
    }

    /// Frees the graph, if memory is to be saved.
    pub(super) fn rest(&mut self, loader: &Loader) {
        if loader.options.low_memory {
            self.serving = None;
            loader.memory.frees(self.report.component);
        }
    }

    /// Goes on to the next candidate. When none serves, what served before goes on serving.
    pub(super) fn replace(
        &mut self,
        loader: &Loader,
        reason: &str,
        mut check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
    ) -> Result<Demotion> {
        loader.forget(self.report.stamp.take().as_ref());
        if self.chain.is_exhausted() && self.report.kernels.is_none() {
            let graph = self.report.component.name().to_owned();
            return Err(Error::Unsound { graph, reason: reason.to_owned() });
        }
        // Freed first: two of them may not fit.
        self.serving = None;
        loader.memory.frees(self.report.component);
        let refusal = self.chain.demote(&self.report, reason);
        match self.chain.serve(loader, &mut check) {
            Ok((serving, report)) => (self.serving, self.report) = (Some(serving), report),
            Err(error) => {
                let (serving, _) = check(loader.reopen(&self.report)?)?;
                self.serving = Some(serving);
                return Err(error);
            }
        }
        let ComponentReport { component, variant, provider, .. } = self.report.clone();
        Ok(Demotion { component, refusal, variant, provider })
    }
}

fn none_serves(component: Component) -> Error {
    Error::Stopped(format!("no {} serves any more", component.name()))
}

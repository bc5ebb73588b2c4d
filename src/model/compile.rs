//! Everything that chosen providers could serve, compiled ahead of its first use.

use std::collections::BTreeMap;

use serde::Serialize;

use super::chain::{Chain, Loader, Opened, Serving};
use super::compiled::CompiledReport;
use super::embed::TokenEmbedder;
use super::goldens::{Agreement, Goldens};
use super::rotary::RotaryTable;
use super::selection::{Candidate, Candidates, Preference, ProviderSelection};
use super::stamp::SelfCheck;
use super::{ComponentReport, ModelOptions, check_decoder, check_projector, check_vision, register};
use crate::compiled::CompiledCache;
use crate::error::{Error, Result};
use crate::package::{Component, ModelPackage};
use crate::runtime::{Provider, Refusal, Runtime, Target};

/// What became of one candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompileReport {
    /// The component.
    pub component: Component,
    /// The variant.
    pub variant: String,
    /// The provider.
    pub provider: Target,
    /// Whether it was built, and where it lies; `None` when it was refused, or compiles nothing that could be kept.
    pub compiled: Option<CompiledReport>,
    /// Why it does not serve.
    pub refused: Option<Refusal>,
}

/// Compiles, through the cache of `options`, every candidate of every component on the providers that
/// `options.providers` names, or on all that are here and keep what they compile; on the processor the best candidate
/// alone, whose weights are packed. Each is proved by its self-check and
/// then put out of memory; `done` hears of each at once.
///
/// # Errors
/// [`Error::Provider`] when no provider that is asked for keeps what it compiles, or the package has nothing for those
/// that do; [`Error::Cache`] when the cache cannot be written; otherwise as [`LlavaPhi::open`](super::LlavaPhi::open). That a candidate is refused is none.
pub fn compile(
    package: &ModelPackage,
    options: &ModelOptions,
    done: &mut dyn FnMut(&CompileReport),
) -> Result<Vec<CompileReport>> {
    register(options)?;
    let targets = targets(&options.providers)?;
    let always = ModelOptions { self_check: SelfCheck::Always, ..options.clone() };
    let loader = Loader::new(package, &always);
    let mut waiting = Vec::new();
    for (component, targets) in targets {
        // A head is proved with its decoder, where it is opened too.
        if component != Component::Head {
            let preference = Preference { targets, only: true };
            let candidates = Candidates::new(package, component, &options.variants, &preference)?;
            waiting.extend(worth_it(candidates.waiting).map(|candidate| (component, candidate)));
        }
    }
    let kept = |(component, candidate): &(Component, Candidate)| loader.keeps(*component, candidate);
    if !waiting.iter().any(kept) {
        let asked: Vec<String> = targets_of(&options.providers).iter().map(ToString::to_string).collect();
        let reason = if waiting.is_empty() {
            "the package has nothing for it to compile; export a variant for it, or name one with --variant"
        } else {
            "what it makes of this package is not worth keeping; --packed-weights kept keeps what lies on disk"
        };
        return Err(Error::Provider {
            name: asked.first().cloned().unwrap_or_else(|| "none".to_owned()),
            reason: reason.to_owned(),
        });
    }
    // Told before minutes are spent on what could not be kept.
    options.compiled.as_deref().map_or(Ok(()), CompiledCache::check_writable)?;
    let goldens = Goldens::open(package)?;
    let embedder = TokenEmbedder::open(package)?;
    let rotary = RotaryTable::open(package)?.map(std::sync::Arc::new);
    let mut reports = Vec::new();
    for (component, candidate) in waiting {
        let report = match component {
            Component::VisionEncoder => one(&loader, component, candidate, |o| check_vision(o, &goldens)),
            Component::Projector => one(&loader, component, candidate, |o| check_projector(o, &goldens)),
            Component::Decoder | Component::Head => one(&loader, component, candidate, |opened| {
                let mut head = None;
                check_decoder(opened, &loader, &goldens, &embedder, rotary.as_ref(), &mut head)
            }),
        }?;
        done(&report);
        reports.push(report);
    }
    Ok(reports)
}

/// All candidates but those of the processor after its best: it serves every variant, and each takes gigabytes.
fn worth_it(candidates: Vec<Candidate>) -> impl Iterator<Item = Candidate> {
    let mut first = true;
    candidates.into_iter().filter(move |candidate| {
        candidate.target.provider != Provider::Cpu || std::mem::replace(&mut first, false)
    })
}

/// The providers to compile for, by component.
fn targets(selection: &ProviderSelection) -> Result<BTreeMap<Component, Vec<Target>>> {
    let asked = targets_of(selection);
    if asked.is_empty() {
        let here = Runtime::started()?.compilers();
        if here.is_empty() {
            let reason =
                format!("no provider that compiles is here; there would be {}", keepers().join(", "));
            return Err(Error::Provider { name: "none".to_owned(), reason });
        }
        let here: Vec<Target> = here.into_iter().map(Target::from).collect();
        return Ok(Component::ALL.into_iter().map(|component| (component, here.clone())).collect());
    }
    if !asked.iter().any(|target| target.provider.keeps_compiled()) {
        let reason = format!("it compiles nothing that could be kept; name one of {}", keepers().join(", "));
        return Err(Error::Provider { name: asked[0].to_string(), reason });
    }
    let of = |component| (component, selection.preference(component).targets);
    Ok(Component::ALL.into_iter().map(of).collect())
}

/// Every provider that is asked for, each once.
fn targets_of(selection: &ProviderSelection) -> Vec<Target> {
    let mut targets = Vec::new();
    for target in Component::ALL.into_iter().flat_map(|component| selection.preference(component).targets) {
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    targets
}

fn keepers() -> Vec<&'static str> {
    let keep = Provider::ALL.iter().filter(|provider| provider.keeps_compiled());
    keep.map(|provider| provider.name()).collect()
}

/// Compiles and proves one candidate, and lets it go.
fn one<T: Serving>(
    loader: &Loader,
    component: Component,
    candidate: Candidate,
    check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
) -> Result<CompileReport> {
    let Candidate { variant, target } = candidate.clone();
    let report = |compiled, refused| CompileReport {
        component,
        variant: variant.clone(),
        provider: target,
        compiled,
        refused,
    };
    if !target.provider.keeps_compiled() || !loader.keeps(component, &candidate) {
        return Ok(report(None, None));
    }
    let mut chain = Chain::of(component, candidate);
    let served = chain.serve(loader, check);
    loader.memory.frees(component);
    match (served, chain.refused().last()) {
        (Ok((_, ComponentReport { compiled, .. })), _) => Ok(report(compiled, None)),
        (Err(Error::Cancelled), _) => Err(Error::Cancelled),
        (Err(_), Some(refusal)) => Ok(report(None, Some(refusal.clone()))),
        (Err(error), None) => Err(error),
    }
}

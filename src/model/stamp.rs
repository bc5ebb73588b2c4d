//! That a session computed what the goldens say, kept so that the next one need not compute it again.
//!
//! A stamp is an entry of a cache of its own beside the compiled graphs, under a key that has everything that could make
//! the results other ones: the package with the sizes and times of its files, provider, device and settings, ONNX
//! Runtime's library, the machine, this program. One that is damaged or was made under another key is not found.

use std::fs;

use serde::{Deserialize, Serialize};

use super::chain::Loader;
use super::compiled::{self, CompiledReport, CompiledState, Request};
use super::decision::day;
use super::goldens::Agreement;
use super::measure::MeasuredAgreement;
use crate::compiled::{CompiledCache, Entry, Found, Key, modified};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::package::manifest::HIDDEN_STATES;
use crate::package::{Component, FileSource};
use crate::runtime::Placement;

/// When a session has to compute the goldens before it serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SelfCheck {
    /// Unless one just like it did so before and its stamp was kept. Without a cache that is each time.
    #[default]
    Stamped,
    /// Each time that a model is loaded. What passes is stamped all the same.
    Always,
}

/// The kept result of a self-check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stamp {
    /// Its entry in the cache.
    pub entry: String,
    /// The day on which the goldens were computed, such as `2026-05-31`, in universal time.
    pub date: String,
    /// Whether it stands for the self-check of this load; otherwise that was run, and left it.
    pub used: bool,
}

/// What a stamp says.
#[derive(Clone, Debug)]
pub(super) struct Passed {
    pub(super) stamp: Stamp,
    pub(super) self_check: Vec<Agreement>,
    pub(super) placement: Option<Placement>,
    compiled: Option<Kept>,
}

/// The file of a stamp.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    self_check: Vec<MeasuredAgreement>,
    placement: Option<Placement>,
    compiled: Option<Kept>,
}

/// The compiled entry that was proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    entry: String,
    created: u64,
}

const DIRECTORY: &str = "proved";
const FILE: &str = "self-check.json";
/// Stamps are a few kilobytes.
const LIMIT: u64 = 4 << 20;

/// What a stamp of this candidate is kept under; `None` without a cache, and for what is proved only with another
/// component.
pub(super) fn key(loader: &Loader, request: &Request<'_>, variant: &str) -> Result<Option<Key>> {
    let alone = match request.component {
        Component::Head => false,
        Component::Decoder => !request.spec.outputs.contains_key(HIDDEN_STATES),
        Component::VisionEncoder | Component::Projector => true,
    };
    if loader.options.compiled.is_none() || !alone {
        return Ok(None);
    }
    let mut key = compiled::key(loader, request)?;
    let package = &loader.package;
    // A file that was written since counts as another one, whatever the manifest says that it should be.
    for (name, info) in &package.manifest().files {
        let facts = match package.file(name)? {
            FileSource::Memory(_) => String::new(),
            FileSource::Path(path) => path.metadata().map_or_else(
                |_| "missing".to_owned(),
                |meta| format!(" {} bytes, changed at {}", meta.len(), modified(&meta)),
            ),
        };
        key.files.insert(name.clone(), format!("{}{facts}", info.sha256));
    }
    let options = &loader.options;
    let own = [
        ("self-check.engine", env!("CARGO_PKG_VERSION").to_owned()),
        ("self-check.package", package.digest().to_owned()),
        ("self-check.variant", variant.to_owned()),
        ("self-check.threads", format!("{:?}", request.session.threads)),
        ("self-check.kernels", request.session.kernels.map_or_else(String::new, Kernels::identity)),
        ("self-check.prefill_chunk", format!("{:?}", options.prefill_chunk)),
    ];
    key.options.extend(own.map(|(name, value)| (name.to_owned(), value)));
    Ok(Some(key))
}

/// The stamp under `key`. That there is none, or none that can be read, is no error.
pub(super) fn find(loader: &Loader, key: &Key) -> Option<Passed> {
    if loader.options.self_check == SelfCheck::Always {
        return None;
    }
    let cache = cache(loader)?;
    let found = cache.find(key).or_else(|_| CompiledCache::read_only(cache.dir()).find(key));
    let entry = match found {
        Ok(Found::Whole(entry)) => entry,
        Ok(Found::Absent) => return None,
        Ok(Found::Damaged(why)) => {
            tracing::warn!("the self-check is run again: {why}");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "the self-check is run, since its stamps cannot be read");
            return None;
        }
    };
    let passed = read(&entry);
    if passed.is_none() {
        tracing::warn!(entry = %entry.dir.display(), "the self-check is run again: this is no stamp");
    }
    passed
}

fn read(entry: &Entry) -> Option<Passed> {
    let content: Content = serde_json::from_slice(&fs::read(entry.dir.join(FILE)).ok()?).ok()?;
    let agreements = content.self_check.iter().map(|one| {
        let what = Agreement::known(&one.what)?;
        Some(Agreement { what, distance: one.distance, tolerance: one.tolerance })
    });
    let self_check = agreements.collect::<Option<Vec<_>>>()?;
    if self_check.is_empty() || !self_check.iter().all(Agreement::passes) {
        return None;
    }
    let stamp = Stamp { entry: entry.record.key.digest(), date: day(entry.record.created), used: true };
    Some(Passed { stamp, self_check, placement: content.placement, compiled: content.compiled })
}

impl Passed {
    /// Whether it was the session's own compiled entry, or none, that was proved.
    pub(super) fn is_of(&self, report: Option<&CompiledReport>) -> bool {
        let built = report.is_some_and(|report| report.state == CompiledState::Built);
        !built && self.compiled == kept(report)
    }
}

fn kept(report: Option<&CompiledReport>) -> Option<Kept> {
    let report = report?;
    Some(Kept { entry: report.entry.clone()?, created: report.created })
}

/// Keeps that a session passed; `None` where it cannot be kept, which is logged.
pub(super) fn keep(
    loader: &Loader,
    key: &Key,
    self_check: &[Agreement],
    placement: Option<&Placement>,
    compiled: Option<&CompiledReport>,
) -> Option<Stamp> {
    let cache = cache(loader)?;
    let content = Content {
        self_check: self_check.iter().map(MeasuredAgreement::from).collect(),
        placement: placement.cloned(),
        compiled: kept(compiled),
    };
    let digest = key.digest();
    let write = || -> Result<Entry> {
        // One that is there says something older.
        cache.check_writable()?;
        cache.discard(&digest)?;
        cache.build(key, &mut || {}, |dir| {
            let failed =
                |e: std::io::Error| crate::error::Error::cache(dir, "a stamp cannot be written").because(e);
            let text = serde_json::to_vec_pretty(&content).map_err(|e| failed(e.into()))?;
            fs::write(dir.join(FILE), text).map_err(failed)
        })
    };
    match write() {
        Ok(entry) => Some(Stamp { entry: digest, date: day(entry.record.created), used: false }),
        Err(error) => {
            tracing::warn!(%error, "the next load repeats the self-check");
            None
        }
    }
}

/// Removes a stamp, so that the next session like the one that it stands for is checked.
pub(super) fn forget(loader: &Loader, digest: &str) {
    if let Some(cache) = cache(loader).filter(|cache| cache.dir().join(digest).exists()) {
        compiled::discard(&cache, digest);
    }
}

fn cache(loader: &Loader) -> Option<CompiledCache> {
    loader.options.compiled.as_deref().map(|cache| cache.below(DIRECTORY, LIMIT))
}

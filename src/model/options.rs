//! How a model is loaded.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::compiled::{NoticeSink, PackedWeights};
use super::decision::Decision;
use super::prefix::PrefixOptions;
use super::selection::{ProviderSelection, VariantSelection};
use super::stamp::SelfCheck;
use crate::compiled::CompiledCache;
use crate::kernels::Kernels;
use crate::runtime::Provider;

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Which variants serve; the manifest's order otherwise.
    pub variants: VariantSelection,
    /// Which providers serve; the manifest's order otherwise.
    pub providers: ProviderSelection,
    /// Libraries of providers that ONNX Runtime comes without. They are loaded when the model is opened, and stay for
    /// the life of the process.
    pub plugins: Vec<(Provider, PathBuf)>,
    /// Options of providers, by their own names; `runtime::options` has those that there are.
    pub provider_options: BTreeMap<Provider, BTreeMap<String, String>>,
    /// The most pieces into which a graph may fall on a provider that compiles it.
    pub max_partitions: usize,
    /// Threads for one graph; ONNX Runtime's own choice otherwise.
    pub threads: Option<usize>,
    /// The most positions that one run of the decoder reads; all at once otherwise.
    pub prefill_chunk: Option<usize>,
    /// Positions that an image takes, the rows chosen as [`visual_tokens`](super::visual_tokens) says; all that it has
    /// otherwise.
    pub visual_tokens: Option<usize>,
    /// Sequences that are to be answered at once; memory may allow fewer, see [`Room`](super::Room).
    pub parallel: usize,
    /// Keep the vision encoder and the projector in memory only while an image is encoded.
    pub low_memory: bool,
    /// The most bytes of memory that the model may take; what the machine has left bounds it in any case.
    pub memory_limit: Option<u64>,
    /// What was measured to be fastest here, tried first for each component for which nothing else is asked.
    pub decision: Option<Arc<Decision>>,
    /// Where what providers compile is kept for later sessions; each session compiles anew otherwise.
    pub compiled: Option<Arc<CompiledCache>>,
    /// What multiplies few-bit weights and attends to the cache on the processor; ONNX Runtime's own kernels otherwise.
    pub kernels: Option<Kernels>,
    /// What becomes of weights in the layout of the processor's kernels.
    pub packed_weights: PackedWeights,
    /// When sessions have to compute the goldens before they serve.
    pub self_check: SelfCheck,
    /// What is kept of prompts that were read.
    pub prefixes: PrefixOptions,
    /// Who is told what takes long, and what is not kept.
    pub notices: Option<NoticeSink>,
}

/// Positions of one run of the decoder, unless something else is asked for: more at once save little time (3 % of 640 on
/// two cores) and take memory with each position.
const PREFILL_CHUNK: usize = 512;

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            variants: VariantSelection::default(),
            providers: ProviderSelection::default(),
            plugins: Vec::new(),
            provider_options: BTreeMap::new(),
            max_partitions: 4,
            threads: None,
            prefill_chunk: Some(PREFILL_CHUNK),
            visual_tokens: None,
            parallel: 1,
            low_memory: false,
            memory_limit: None,
            decision: None,
            compiled: None,
            kernels: Kernels::here(),
            packed_weights: PackedWeights::default(),
            self_check: SelfCheck::default(),
            prefixes: PrefixOptions::default(),
            notices: None,
        }
    }
}

//! Embeddings and cache to logits.

use ndarray::{ArrayView2, Axis};

use super::kv_cache::{KvCache, PositionKey};
use crate::error::{Error, Result};
use crate::package::manifest::{DecoderSpec, KvSpec};
use crate::runtime::{Graph, Tensor};

/// The logits of one position: `[logits_width]` f32.
#[derive(Clone, Debug)]
pub struct Logits(Vec<f32>);

impl Logits {
    /// Logits that did not come from a graph, for models that are scripted in tests.
    pub fn new(values: Vec<f32>) -> Self {
        Self(values)
    }

    /// One number a token id, and more than the tokenizer has ids.
    pub fn values(&self) -> &[f32] {
        &self.0
    }

    /// The numbers, to be warped in place before sampling.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// The Phi decoder with its cache.
#[derive(Debug)]
pub struct Decoder {
    graph: Graph,
    spec: DecoderSpec,
    kv: KvSpec,
}

impl Decoder {
    pub(super) fn new(graph: Graph, spec: DecoderSpec, kv: KvSpec) -> Self {
        Self { graph, spec, kv }
    }

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    pub fn empty_cache(&self) -> Result<KvCache> {
        KvCache::new(&self.spec, self.kv)
    }

    /// Reads `embeds`, `[new, hidden]` f32, of which `keys` say what each row is, and gives the logits of the last row.
    /// `cache` grows by `new` positions.
    ///
    /// # Errors
    /// [`Error::TooLong`] before anything ran, when the context does not hold the new positions;
    /// [`Error::Graph`] when ONNX Runtime fails and [`Error::Cancelled`] when it was told to stop: the new positions are
    /// then forgotten.
    pub fn forward(
        &mut self,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
        cache: &mut KvCache,
    ) -> Result<Logits> {
        let needed = cache.len() + keys.len();
        if needed > self.spec.context {
            return Err(Error::TooLong { needed, capacity: self.spec.context });
        }
        cache.reserve(needed)?;
        let embeds = Tensor::from_array(&embeds.view().insert_axis(Axis(0)))?;
        let logits = cache.step(&mut self.graph, &embeds, keys)?;
        logits.f32s().map(|values| Logits(values.to_vec()))
    }
}

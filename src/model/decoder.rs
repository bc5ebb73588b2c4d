//! Embeddings and cache to logits.

use std::sync::Arc;

use ndarray::{ArrayView2, Axis};

use super::chain::Serving;
use super::head::Head;
use super::kv_cache::{KvCache, PositionKey};
use super::rotary::RotaryTable;
use crate::error::{Error, Result};
use crate::package::manifest::{DecoderSpec, HIDDEN_STATES, KvSpec};
use crate::runtime::{Graph, Outputs};

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
    head: Option<Head>,
    spec: DecoderSpec,
    kv: KvSpec,
    rotary: Option<Arc<RotaryTable>>,
    run: usize,
}

impl Decoder {
    /// `head` makes logits of the graph's hidden states, where it gives those; `run` is the most positions of one run.
    pub(super) fn new(
        graph: Graph,
        head: Option<Head>,
        spec: DecoderSpec,
        kv: KvSpec,
        rotary: Option<Arc<RotaryTable>>,
        run: usize,
    ) -> Self {
        let run = run.min(kv.chunk.unwrap_or(spec.context)).max(1);
        Self { graph, head, spec, kv, rotary, run }
    }

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    pub fn empty_cache(&self) -> Result<KvCache> {
        KvCache::new(&self.spec, self.kv, self.rotary.clone(), self.graph.cache_memory())
    }

    /// What makes logits of hidden states, if something has to.
    pub(super) fn head(&mut self) -> Option<&mut Head> {
        self.head.as_mut()
    }

    /// Positions that a cache can hold.
    pub fn capacity(&self) -> usize {
        self.spec.context.min(self.kv.capacity.unwrap_or(usize::MAX))
    }

    /// Reads `embeds`, `[new, hidden]` f32, of which `keys` say what each row is, and gives the logits of the last row.
    /// `cache` grows by `new` positions.
    ///
    /// # Errors
    /// [`Error::TooLong`] before anything ran, when the cache does not hold the new positions; [`Error::Request`] when
    /// there are none; [`Error::Graph`] when ONNX Runtime fails, [`Error::Cancelled`] when it was told to stop and
    /// [`Error::Unsound`] when the logits are not finite: the cache then holds what was read before the run that failed.
    pub fn forward(
        &mut self,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
        cache: &mut KvCache,
    ) -> Result<Logits> {
        let needed = cache.len() + keys.len();
        if needed > self.capacity() {
            return Err(Error::TooLong { needed, capacity: self.capacity() });
        }
        cache.reserve(needed)?;
        let mut last = None;
        let runs = embeds.axis_chunks_iter(Axis(0), self.run).zip(keys.chunks(self.run));
        for (rows, keys) in runs {
            last = Some((cache.step(&mut self.graph, &rows, keys)?, keys.len()));
        }
        let (outputs, rows) =
            last.ok_or_else(|| Error::Request("there is nothing to read; ask something".to_owned()))?;
        let logits = self.logits(outputs, rows)?;
        if let Some(place) = logits.0.iter().position(|value| !value.is_finite()) {
            let reason = format!("its logits are not finite numbers ({} at token {place})", logits.0[place]);
            return Err(Error::Unsound { graph: self.graph.name().to_owned(), reason });
        }
        Ok(logits)
    }

    /// The logits of the last of `rows` positions of a run.
    fn logits(&mut self, mut outputs: Outputs, rows: usize) -> Result<Logits> {
        match &mut self.head {
            None => Ok(Logits(outputs.take("logits")?.reals()?.into_owned())),
            Some(head) => {
                let hidden = outputs.take(HIDDEN_STATES)?;
                let last = rows.saturating_sub(1) * self.spec.hidden;
                head.logits(&hidden.reals()?[last..last + self.spec.hidden]).map(Logits)
            }
        }
    }
}

impl Serving for Decoder {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}

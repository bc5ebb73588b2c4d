//! Embeddings and cache to logits.

use std::sync::Arc;

use ndarray::{ArrayView2, Axis};

use super::chain::Serving;
use super::head::Head;
use super::kv_cache::{KvCache, PositionKey, RowLayout};
use super::rotary::RotaryTable;
use crate::error::{Error, Result};
use crate::package::manifest::{DecoderSpec, Dim, HIDDEN_STATES, KvSpec};
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

/// The dimension of `logits_index` in graphs that give the logits of as many positions as are asked for.
const ROWS: &str = "rows";

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

    /// What a position of a cache is made of.
    pub fn layout(&self) -> RowLayout {
        RowLayout::new(&self.spec, self.kv)
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
            last = Some((cache.step(&mut self.graph, &rows, keys, 1)?, keys.len()));
        }
        let (outputs, rows) = last.ok_or_else(nothing)?;
        self.logits(outputs, rows, 1)?.pop().ok_or_else(nothing)
    }

    /// The most positions that [`Decoder::forward_all`] reads; `None` where the graph gives the logits of one position a
    /// run.
    pub fn most_at_once(&self) -> Option<usize> {
        // Of hidden states the head makes logits, a row at a time.
        let index = self.graph.spec().inputs.get("logits_index");
        let of_several =
            index.is_some_and(|index| matches!(&index.shape[..], [Dim::Named(dim)] if dim == ROWS));
        (self.head.is_some() || of_several).then_some(self.run)
    }

    /// As [`Decoder::forward`], in one run, with the logits of every row.
    ///
    /// # Errors
    /// As [`Decoder::forward`], and [`Error::Request`] for more rows than [`Decoder::most_at_once`].
    pub fn forward_all(
        &mut self,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
        cache: &mut KvCache,
    ) -> Result<Vec<Logits>> {
        let needed = cache.len() + keys.len();
        if needed > self.capacity() {
            return Err(Error::TooLong { needed, capacity: self.capacity() });
        }
        let most = self.most_at_once().unwrap_or(1);
        if keys.is_empty() || keys.len() > most {
            let count = keys.len();
            return Err(Error::Request(format!(
                "{count} positions cannot be read in one run; give 1 to {most}"
            )));
        }
        cache.reserve(needed)?;
        let outputs = cache.step(&mut self.graph, embeds, keys, keys.len())?;
        self.logits(outputs, keys.len(), keys.len())
    }

    /// The logits of the last `wanted` of `rows` positions of a run.
    fn logits(&mut self, mut outputs: Outputs, rows: usize, wanted: usize) -> Result<Vec<Logits>> {
        let all: Vec<Logits> = match &mut self.head {
            None => {
                let logits = outputs.take("logits")?;
                let logits = logits.reals()?;
                logits.chunks_exact(self.spec.logits_width).map(|row| Logits(row.to_vec())).collect()
            }
            Some(head) => {
                let hidden = outputs.take(HIDDEN_STATES)?;
                let hidden = hidden.reals()?;
                let states = hidden.chunks_exact(self.spec.hidden).take(rows);
                states.skip(rows - wanted).map(|row| head.logits(row).map(Logits)).collect::<Result<_>>()?
            }
        };
        if all.len() != wanted {
            let found = all.len();
            return Err(Error::graph(
                self.graph.name(),
                format!("it gave {found} rows of logits for {wanted}"),
            ));
        }
        let broken =
            all.iter().flat_map(|logits| logits.0.iter().enumerate()).find(|(_, value)| !value.is_finite());
        if let Some((place, value)) = broken {
            let reason = format!("its logits are not finite numbers ({value} at token {place})");
            return Err(Error::Unsound { graph: self.graph.name().to_owned(), reason });
        }
        Ok(all)
    }
}

fn nothing() -> Error {
    Error::Request("there is nothing to read; ask something".to_owned())
}

impl Serving for Decoder {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}

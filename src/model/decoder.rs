//! Embeddings and cache to logits.

use std::sync::Arc;

use ndarray::{ArrayView2, Axis, s};

use super::chain::Serving;
use super::head::Head;
use super::kv_cache::{KvCache, PositionKey, RowLayout};
use super::rotary::RotaryTable;
use super::together::{Together, groups};
use crate::error::{Error, Result};
use crate::package::manifest::{DecoderSpec, Dim, HIDDEN_STATES, KvForm, KvSpec};
use crate::runtime::{Graph, Outputs, Slots};

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
    slots: Option<Slots>,
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
        Self { graph, head, spec, kv, rotary, run, slots: None }
    }

    /// Keeps the caches of up to `count` sequences beside each other from now on, so that one run reads all of them, or
    /// says why this graph cannot.
    ///
    /// # Errors
    /// As [`Slots::new`].
    pub(super) fn keep_together(&mut self, count: usize) -> Result<std::result::Result<(), String>> {
        if self.kv.form != KvForm::Shared || self.head.is_some() {
            let form = format!("{:?}", self.kv.form).to_lowercase();
            return Ok(Err(format!(
                "the decoder's cache is of the form {form}, of which a run reads one sequence"
            )));
        }
        let Self { spec, kv, .. } = self;
        let shape = [spec.kv_heads, spec.context, spec.head_dim];
        let memory = self.graph.cache_memory();
        self.slots = Some(Slots::new(memory, kv.dtype, self.layout().tensors, count, &shape)?);
        Ok(Ok(()))
    }

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    pub fn empty_cache(&self) -> Result<KvCache> {
        if let Some(slot) = self.slots.as_ref().and_then(Slots::take) {
            return KvCache::in_slot(&self.spec, self.kv, self.graph.cache_memory(), slot);
        }
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

    /// Reads one row of `embeds`, `[caches.len(), hidden]` f32, into each of `caches`, and gives the logits behind each,
    /// in as few runs as there can be. Each is what [`Decoder::forward`] gives of it alone.
    ///
    /// # Errors
    /// For each cache those of [`Decoder::forward`]; the others are not concerned.
    pub fn forward_each(
        &mut self,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
        caches: &mut [&mut KvCache],
    ) -> Vec<Result<Logits>> {
        let mut results: Vec<Option<Result<Logits>>> = caches.iter().map(|_| None).collect();
        let full = |cache: &KvCache| cache.len() >= self.capacity();
        let mut together: Vec<(usize, &mut KvCache)> = Vec::new();
        let mut alone: Vec<(usize, &mut KvCache)> = Vec::new();
        for (row, cache) in caches.iter_mut().enumerate() {
            let others = cache.slot().is_some() && !full(cache);
            if others { together.push((row, cache)) } else { alone.push((row, cache)) }
        }
        together.sort_by_key(|(_, cache)| cache.slot());
        if let Some(slots) = self.slots.take() {
            let context = self.capacity();
            let asked = together.iter().filter_map(|(_, cache)| cache.slot()).collect();
            for group in groups(asked, |slot| slots.used(slot) < context) {
                let inside = |cache: &KvCache| cache.slot().is_some_and(|slot| group.contains(&slot));
                let count = together.iter().filter(|(_, cache)| inside(cache)).count();
                let mut members: Vec<(usize, &mut KvCache)> = together.drain(..count).collect();
                let read = if count > 1 {
                    let mut run = Together { slots: &slots, group, members: &mut members };
                    let outputs = run.step(&mut self.graph, &self.spec, embeds, keys);
                    outputs.and_then(|outputs| self.rows(outputs, count))
                } else {
                    Err(nothing())
                };
                match read {
                    Ok(rows) => {
                        for ((row, _), logits) in members.iter().zip(rows) {
                            results[*row] = Some(self.finite(logits));
                        }
                    }
                    // What is wrong with one sequence must not end the others.
                    Err(error) => {
                        if count > 1 {
                            tracing::warn!(%error, count, "sequences are read one by one");
                        }
                        alone.append(&mut members);
                    }
                }
            }
            self.slots = Some(slots);
        }
        for (row, cache) in alone.into_iter().chain(together) {
            let embeds = embeds.slice(s![row..=row, ..]);
            results[row] = Some(self.forward(&embeds, &keys[row..=row], cache));
        }
        results.into_iter().map(|result| result.unwrap_or_else(|| Err(nothing()))).collect()
    }

    /// The logits of the last `wanted` of `rows` positions of a run.
    fn logits(&mut self, mut outputs: Outputs, rows: usize, wanted: usize) -> Result<Vec<Logits>> {
        let all = match &mut self.head {
            None => self.rows(outputs, wanted)?,
            Some(head) => {
                let hidden = outputs.take(HIDDEN_STATES)?;
                let hidden = hidden.reals()?;
                let states = hidden.chunks_exact(self.spec.hidden).take(rows);
                states.skip(rows - wanted).map(|row| head.logits(row).map(Logits)).collect::<Result<_>>()?
            }
        };
        all.into_iter().map(|logits| self.finite(logits)).collect()
    }

    /// The logits that a run gave for `wanted` positions.
    fn rows(&self, mut outputs: Outputs, wanted: usize) -> Result<Vec<Logits>> {
        let logits = outputs.take("logits")?;
        let logits = logits.reals()?;
        let all: Vec<Logits> =
            logits.chunks_exact(self.spec.logits_width).map(|row| Logits(row.to_vec())).collect();
        if all.len() == wanted {
            return Ok(all);
        }
        let found = all.len();
        Err(Error::graph(self.graph.name(), format!("it gave {found} rows of logits for {wanted}")))
    }

    fn finite(&self, logits: Logits) -> Result<Logits> {
        let Some((place, value)) = logits.0.iter().enumerate().find(|(_, value)| !value.is_finite()) else {
            return Ok(logits);
        };
        let reason = format!("its logits are not finite numbers ({value} at token {place})");
        Err(Error::Unsound { graph: self.graph.name().to_owned(), reason })
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

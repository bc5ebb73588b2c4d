//! The `concat` form: each step gives a new cache, the past with the new rows behind it.

use ndarray::ArrayView2;

use super::kv_cache::{CacheNames, KvStore, PRESENT, batch_of_one, last_index, mask, position_ids};
use crate::error::Result;
use crate::package::manifest::{DType, DecoderSpec};
use crate::runtime::{Graph, Outputs, Tensor};

/// Keys and values as `[1, kv_heads, past, head_dim]` tensors.
#[derive(Debug)]
pub(super) struct ConcatKv {
    names: CacheNames,
    caches: Vec<Tensor>,
    kv_heads: usize,
    head_dim: usize,
    dtype: DType,
}

impl ConcatKv {
    pub(super) fn new(spec: &DecoderSpec, dtype: DType) -> Result<Self> {
        let names = CacheNames::new(spec.layers, PRESENT);
        let shape = [1, spec.kv_heads, 0, spec.head_dim];
        let caches = names.past.iter().map(|_| Tensor::zeros(dtype, &shape)).collect::<Result<_>>()?;
        Ok(Self { names, caches, kv_heads: spec.kv_heads, head_dim: spec.head_dim, dtype })
    }

    /// Copies the first `used` positions to tensors of `total`.
    fn resize(&mut self, used: usize, total: usize) -> Result<()> {
        let shape = [1, self.kv_heads, total, self.head_dim];
        for cache in &mut self.caches {
            let mut kept = Tensor::zeros(self.dtype, &shape)?;
            kept.copy_rows(cache, used, 0)?;
            *cache = kept;
        }
        Ok(())
    }
}

impl KvStore for ConcatKv {
    fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        past: usize,
        wanted: usize,
    ) -> Result<Outputs> {
        let new = embeds.nrows();
        let position_ids = position_ids(past, new)?;
        let mask = mask(graph, new, past + new, |row, column| column <= past + row)?;
        let index = last_index(new, wanted)?;
        let embeds = batch_of_one(graph, embeds)?;
        let mut inputs = vec![
            ("inputs_embeds", &embeds),
            ("position_ids", &position_ids),
            ("attention_mask", &mask),
            ("logits_index", &index),
        ];
        inputs.extend(self.names.past.iter().map(String::as_str).zip(&self.caches));
        let mut outputs = graph.run(&inputs)?;
        self.caches = self.names.given.iter().map(|name| outputs.take(name)).collect::<Result<_>>()?;
        Ok(outputs)
    }

    fn truncate(&mut self, used: usize) -> Result<()> {
        self.resize(used, used)
    }

    fn tensors(&self) -> Result<&[Tensor], &'static str> {
        Ok(&self.caches)
    }

    fn open_rows(&mut self, used: usize, total: usize) -> Result<&mut [Tensor]> {
        self.resize(used, total)?;
        Ok(&mut self.caches)
    }
}

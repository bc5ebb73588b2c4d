//! The `concat` form: each step gives a new cache, the past with the new rows behind it.

use super::kv_cache::{CacheNames, KvStore};
use crate::error::{Error, Result};
use crate::package::manifest::{DType, DecoderSpec};
use crate::runtime::{Graph, Tensor};

/// What is added to the score of a position that may not be seen: far below any score, far from overflow.
const MASKED: f32 = -1e9;

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
        let names = CacheNames::new(spec.layers);
        let shape = [1, spec.kv_heads, 0, spec.head_dim];
        let caches = names.past.iter().map(|_| Tensor::zeros(dtype, &shape)).collect::<Result<_>>()?;
        Ok(Self { names, caches, kv_heads: spec.kv_heads, head_dim: spec.head_dim, dtype })
    }
}

impl KvStore for ConcatKv {
    fn reserve(&mut self, _positions: usize, _used: usize) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, graph: &mut Graph, embeds: &Tensor, past: usize, new: usize) -> Result<Tensor> {
        let total = past + new;
        let positions = (past..total).map(i64::try_from).collect::<Result<Vec<_>, _>>();
        let positions = positions.map_err(|_| Error::TooLong { needed: total, capacity: past })?;
        let mask = (past..total)
            .flat_map(|row| (0..total).map(move |column| if column <= row { 0.0 } else { MASKED }));
        let position_ids = Tensor::from_i64(&[1, new], positions)?;
        let mask = Tensor::from_f32(&[1, 1, new, total], mask.collect::<Vec<f32>>())?;
        let index = Tensor::from_i64(&[1], vec![i64::try_from(new).map_or(0, |new| new - 1)])?;
        let mut inputs = vec![
            ("inputs_embeds", embeds),
            ("position_ids", &position_ids),
            ("attention_mask", &mask),
            ("logits_index", &index),
        ];
        inputs.extend(self.names.past.iter().map(String::as_str).zip(&self.caches));
        let mut outputs = graph.run(&inputs)?;
        self.caches = self.names.present.iter().map(|name| outputs.take(name)).collect::<Result<_>>()?;
        outputs.take("logits")
    }

    fn truncate(&mut self, used: usize) -> Result<()> {
        let shape = [1, self.kv_heads, used, self.head_dim];
        for cache in &mut self.caches {
            let mut kept = Tensor::zeros(self.dtype, &shape)?;
            kept.copy_rows(cache, used)?;
            *cache = kept;
        }
        Ok(())
    }
}

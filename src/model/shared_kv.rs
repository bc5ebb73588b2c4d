//! The `shared` form: one full-length buffer a layer, which the graph writes in place.

use super::kv_cache::{CacheNames, KvStore};
use crate::error::{Error, Result};
use crate::package::manifest::{DType, DecoderSpec};
use crate::runtime::{Graph, Tensor};

/// Buffers grow in steps of this many positions: a full context is not paid for by a short answer, and an answer does
/// not copy its cache at every token.
const GROWTH: usize = 256;

/// Keys and values as `[1, kv_heads, capacity, head_dim]` tensors; rows from the used length on are not defined.
#[derive(Debug)]
pub(super) struct SharedKv {
    names: CacheNames,
    buffers: Vec<Tensor>,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    dtype: DType,
}

impl SharedKv {
    pub(super) fn new(spec: &DecoderSpec, dtype: DType) -> Self {
        Self {
            names: CacheNames::new(spec.layers),
            buffers: Vec::new(),
            capacity: 0,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            context: spec.context,
            dtype,
        }
    }
}

impl KvStore for SharedKv {
    fn reserve(&mut self, positions: usize, used: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        let capacity = positions.next_multiple_of(GROWTH).min(self.context.max(positions));
        let shape = [1, self.kv_heads, capacity, self.head_dim];
        let mut grown = Vec::with_capacity(self.names.past.len());
        // One buffer at a time, so that old and new never stand in memory together in full.
        let mut old = std::mem::take(&mut self.buffers).into_iter();
        for _ in 0..self.names.past.len() {
            let mut buffer = Tensor::zeros(self.dtype, &shape)?;
            if let Some(old) = old.next().filter(|_| used > 0) {
                buffer.copy_rows(&old, used)?;
            }
            grown.push(buffer);
        }
        self.buffers = grown;
        self.capacity = capacity;
        Ok(())
    }

    fn step(&mut self, graph: &mut Graph, embeds: &Tensor, past: usize, new: usize) -> Result<Tensor> {
        let total = i32::try_from(past + new)
            .map_err(|_| Error::TooLong { needed: past + new, capacity: self.context })?;
        let last = i64::try_from(new).map_or(0, |new| new - 1);
        let seqlens = Tensor::from_i32(&[1], vec![total - 1])?;
        let total = Tensor::from_i32(&[], vec![total])?;
        let index = Tensor::from_i64(&[1], vec![last])?;
        let inputs = [
            ("inputs_embeds", embeds),
            ("seqlens_k", &seqlens),
            ("total_sequence_length", &total),
            ("logits_index", &index),
        ];
        let names = self.names.past.iter().zip(&self.names.present);
        let mut in_place: Vec<(&str, &str, &mut Tensor)> = names
            .zip(&mut self.buffers)
            .map(|((past, present), buffer)| (past.as_str(), present.as_str(), buffer))
            .collect();
        graph.run_in_place(&inputs, &mut in_place)?.take("logits")
    }

    fn truncate(&mut self, _used: usize) -> Result<()> {
        // Rows past the used length are never read: `seqlens_k` says where the cache ends.
        Ok(())
    }
}

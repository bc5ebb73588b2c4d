//! The `shared` form: one full-length buffer a layer, which the graph writes in place.

use ndarray::ArrayView2;

use super::kv_cache::{CacheNames, KvStore, ON_DEVICE, PRESENT, batch_of_one, last_index};
use crate::error::{Error, Result};
use crate::package::manifest::{DType, DecoderSpec};
use crate::runtime::{CacheMemory, Graph, Outputs, Slot, Tensor};

/// Buffers grow in steps of this many positions: a full context is not paid for by a short answer, and an answer does
/// not copy its cache at every token.
const GROWTH: usize = 256;

/// Keys and values as `[1, kv_heads, capacity, head_dim]` tensors; rows from the used length on are not defined,
/// and never read: `seqlens_k` says where the cache ends.
#[derive(Debug)]
pub(super) struct SharedKv {
    names: CacheNames,
    buffers: Vec<Tensor>,
    capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    dtype: DType,
    memory: CacheMemory,
    /// What the buffers are a part of, where they lie beside those of other sequences.
    slot: Option<Slot>,
}

impl SharedKv {
    pub(super) fn new(spec: &DecoderSpec, dtype: DType, memory: CacheMemory) -> Self {
        Self {
            names: CacheNames::new(spec.layers, PRESENT),
            buffers: Vec::new(),
            capacity: 0,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            context: spec.context,
            dtype,
            memory,
            slot: None,
        }
    }

    /// As [`SharedKv::new`], with the buffers of a slot, which hold a whole context.
    pub(super) fn in_slot(spec: &DecoderSpec, dtype: DType, memory: CacheMemory, slot: Slot) -> Result<Self> {
        let buffers = slot.tensors()?;
        Ok(Self { buffers, capacity: spec.context, slot: Some(slot), ..Self::new(spec, dtype, memory) })
    }
}

impl KvStore for SharedKv {
    fn reserve(&mut self, positions: usize, used: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        if self.slot.is_some() {
            return Err(Error::TooLong { needed: positions, capacity: self.capacity });
        }
        // Rows can be copied to a larger buffer on the host only.
        let most = self.context.max(positions);
        let capacity =
            if self.memory.is_host() { positions.next_multiple_of(GROWTH).min(most) } else { most };
        let shape = [1, self.kv_heads, capacity, self.head_dim];
        let mut grown = Vec::with_capacity(self.names.past.len());
        // One buffer at a time, so that old and new never stand in memory together in full.
        let mut old = std::mem::take(&mut self.buffers).into_iter();
        for _ in 0..self.names.past.len() {
            let mut buffer = self.memory.zeros(self.dtype, &shape)?;
            if let Some(old) = old.next().filter(|_| used > 0) {
                buffer.copy_rows(&old, used, 0)?;
            }
            grown.push(buffer);
        }
        self.buffers = grown;
        self.capacity = capacity;
        Ok(())
    }

    fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        past: usize,
        wanted: usize,
    ) -> Result<Outputs> {
        let new = embeds.nrows();
        let total = i32::try_from(past + new)
            .map_err(|_| Error::TooLong { needed: past + new, capacity: self.context })?;
        let seqlens = Tensor::from_i32(&[1], [total - 1])?;
        let total = Tensor::from_i32(&[], [total])?;
        let index = last_index(new, wanted)?;
        let embeds = batch_of_one(graph, embeds)?;
        let inputs = [
            ("inputs_embeds", &embeds),
            ("seqlens_k", &seqlens),
            ("total_sequence_length", &total),
            ("logits_index", &index),
        ];
        let mut in_place = self.names.in_place(&mut self.buffers);
        graph.run_in_place(&inputs, &mut in_place)
    }

    fn slot(&self) -> Option<&Slot> {
        self.slot.as_ref()
    }

    fn tensors(&self) -> Result<&[Tensor], &'static str> {
        if self.memory.is_host() { Ok(&self.buffers) } else { Err(ON_DEVICE) }
    }

    fn open_rows(&mut self, used: usize, total: usize) -> Result<&mut [Tensor]> {
        self.reserve(total, used)?;
        Ok(&mut self.buffers)
    }
}

//! The `scatter` form: one buffer of fixed size a layer, into which the graph scatters the new rows.

use ndarray::ArrayView2;

use super::kv_cache::{
    CacheNames, KvStore, ON_DEVICE, PRESENT, batch_of_one, integer, last_index, mask, position_ids,
};
use crate::error::Result;
use crate::package::manifest::{DecoderSpec, KvSpec};
use crate::runtime::{CacheMemory, Graph, Outputs, Tensor};

/// Keys and values as `[1, kv_heads, capacity, head_dim]` tensors. Rows from the used length on are masked but
/// multiplied: they must be numbers, which zeros and what was read before are.
#[derive(Debug)]
pub(super) struct ScatterKv {
    names: CacheNames,
    buffers: Vec<Tensor>,
    capacity: usize,
    on_host: bool,
}

impl ScatterKv {
    pub(super) fn new(spec: &DecoderSpec, kv: KvSpec, memory: &CacheMemory) -> Result<Self> {
        let names = CacheNames::new(spec.layers, PRESENT);
        let capacity = kv.capacity.unwrap_or(spec.context);
        let shape = [1, spec.kv_heads, capacity, spec.head_dim];
        let buffers = names.past.iter().map(|_| memory.zeros(kv.dtype, &shape)).collect::<Result<_>>()?;
        Ok(Self { names, buffers, capacity, on_host: memory.is_host() })
    }
}

impl KvStore for ScatterKv {
    fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        past: usize,
        wanted: usize,
    ) -> Result<Outputs> {
        let new = embeds.nrows();
        let position_ids = position_ids(past, new)?;
        let write = Tensor::from_i64(&[1], [integer(past)?])?;
        let mask = mask(graph, new, self.capacity, |row, column| column <= past + row)?;
        let index = last_index(new, wanted)?;
        let embeds = batch_of_one(graph, embeds)?;
        let inputs = [
            ("inputs_embeds", &embeds),
            ("position_ids", &position_ids),
            ("write_indices", &write),
            ("attention_mask", &mask),
            ("logits_index", &index),
        ];
        let mut in_place = self.names.in_place(&mut self.buffers);
        graph.run_in_place(&inputs, &mut in_place)
    }

    fn tensors(&self) -> Result<&[Tensor], &'static str> {
        if self.on_host { Ok(&self.buffers) } else { Err(ON_DEVICE) }
    }

    fn open_rows(&mut self, _used: usize, _total: usize) -> Result<&mut [Tensor]> {
        Ok(&mut self.buffers)
    }
}

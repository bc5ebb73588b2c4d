//! The `delta` form: the graph reads a cache of fixed size and gives the new rows, which are copied in.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2, s};

use super::kv_cache::{CacheNames, KvStore, batch_of_one, last_index, mask};
use super::rotary::RotaryTable;
use crate::error::{Error, Result};
use crate::package::manifest::{DecoderSpec, KvSpec};
use crate::runtime::{Graph, Outputs, Tensor};

/// Keys and values as `[1, kv_heads, capacity, head_dim]` tensors.
///
/// Every run is of exactly `chunk` positions: shorter ones are padded, and what the padding gives is dropped.
#[derive(Debug)]
pub(super) struct DeltaKv {
    names: CacheNames,
    caches: Vec<Tensor>,
    rotary: Arc<RotaryTable>,
    capacity: usize,
    chunk: usize,
}

impl DeltaKv {
    pub(super) fn new(spec: &DecoderSpec, kv: KvSpec, rotary: Option<Arc<RotaryTable>>) -> Result<Self> {
        let (Some(rotary), Some(capacity), Some(chunk)) = (rotary, kv.capacity, kv.chunk) else {
            return Err(Error::graph(
                "decoder",
                "the manifest lacks its angles, capacity or chunk; export again",
            ));
        };
        let names = CacheNames::new(spec.layers, "new_key_values");
        let shape = [1, spec.kv_heads, capacity, spec.head_dim];
        let caches = names.past.iter().map(|_| Tensor::zeros(kv.dtype, &shape)).collect::<Result<_>>()?;
        Ok(Self { names, caches, rotary, capacity, chunk })
    }
}

impl KvStore for DeltaKv {
    fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        past: usize,
        wanted: usize,
    ) -> Result<Outputs> {
        let (new, chunk, capacity) = (embeds.nrows(), self.chunk, self.capacity);
        let mut padded = Array2::zeros((chunk, embeds.ncols()));
        padded.slice_mut(s![..new, ..]).assign(embeds);
        let embeds = batch_of_one(graph, &padded.view())?;
        let (cosines, sines) = self.rotary.rows(past, chunk);
        let angles = [1, 1, chunk, self.rotary.columns()];
        let cosines = Tensor::from_reals(graph.input_dtype("rope_cos"), &angles, &cosines)?;
        let sines = Tensor::from_reals(graph.input_dtype("rope_sin"), &angles, &sines)?;
        // Behind the cache's columns stand those of the chunk itself.
        let mask = mask(graph, chunk, capacity + chunk, |row, column| {
            column < past || (capacity..=capacity + row).contains(&column)
        })?;
        let index = last_index(new, wanted)?;
        let mut inputs = vec![
            ("inputs_embeds", &embeds),
            ("rope_cos", &cosines),
            ("rope_sin", &sines),
            ("attention_mask", &mask),
        ];
        if graph.spec().inputs.contains_key("logits_index") {
            inputs.push(("logits_index", &index));
        }
        inputs.extend(self.names.past.iter().map(String::as_str).zip(&self.caches));
        let mut outputs = graph.run(&inputs)?;
        for (name, cache) in self.names.given.iter().zip(&mut self.caches) {
            cache.copy_rows(&outputs.take(name)?, new, past)?;
        }
        Ok(outputs)
    }

    fn tensors(&self) -> Result<&[Tensor], &'static str> {
        Ok(&self.caches)
    }

    fn open_rows(&mut self, _used: usize, _total: usize) -> Result<&mut [Tensor]> {
        Ok(&mut self.caches)
    }
}

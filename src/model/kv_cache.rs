//! What the decoder has already read.

use std::sync::Arc;

use ndarray::{ArrayView2, Axis};

use super::concat_kv::ConcatKv;
use super::delta_kv::DeltaKv;
use super::rotary::RotaryTable;
use super::scatter_kv::ScatterKv;
use super::shared_kv::SharedKv;
use crate::error::{Error, Result};
use crate::package::manifest::{DType, DecoderSpec, KvForm, KvSpec};
use crate::runtime::{CacheMemory, Graph, Outputs, Tensor};
use crate::text::TokenId;

/// What stands at one position of a context. Equal keys in equal places mean equal cache rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionKey {
    /// A token.
    Token(TokenId),
    /// One row of an image.
    Image {
        /// SHA-256 of the image's pixel values.
        hash: [u8; 32],
        /// The row.
        row: usize,
    },
}

/// The keys and values of every position read so far, and what stands at each.
#[derive(Debug)]
pub struct KvCache {
    positions: Vec<PositionKey>,
    store: Box<dyn KvStore>,
}

/// One way to hand past keys and values to a decoder graph and to take the present ones back.
pub(super) trait KvStore: std::fmt::Debug + Send {
    /// Makes room for `positions` in all, keeping the first `used`.
    fn reserve(&mut self, positions: usize, used: usize) -> Result<()>;

    /// Runs `graph` over `embeds`, `[new, hidden]`, after `past` positions. What it gives of the new positions, but
    /// for keys and values, is returned.
    fn step(&mut self, graph: &mut Graph, embeds: &ArrayView2<'_, f32>, past: usize) -> Result<Outputs>;

    /// Forgets all but the first `used` positions.
    fn truncate(&mut self, used: usize) -> Result<()>;
}

impl KvCache {
    pub(super) fn new(
        spec: &DecoderSpec,
        kv: KvSpec,
        rotary: Option<Arc<RotaryTable>>,
        memory: &CacheMemory,
    ) -> Result<Self> {
        let store: Box<dyn KvStore> = match kv.form {
            KvForm::Shared => Box::new(SharedKv::new(spec, kv.dtype, memory.clone())),
            KvForm::Scatter => Box::new(ScatterKv::new(spec, kv, memory)?),
            KvForm::Delta => Box::new(DeltaKv::new(spec, kv, rotary)?),
            KvForm::Concat => Box::new(ConcatKv::new(spec, kv.dtype)?),
        };
        Ok(Self { positions: Vec::new(), store })
    }

    /// Positions read so far.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// How many positions at the start of `keys` this cache already holds.
    pub fn common_prefix(&self, keys: &[PositionKey]) -> usize {
        self.positions.iter().zip(keys).take_while(|(held, wanted)| held == wanted).count()
    }

    /// Forgets all but the first `positions`.
    pub(super) fn truncate(&mut self, positions: usize) -> Result<()> {
        self.positions.truncate(positions);
        self.store.truncate(positions)
    }

    /// Makes room for `positions` in all.
    pub(super) fn reserve(&mut self, positions: usize) -> Result<()> {
        self.store.reserve(positions, self.positions.len())
    }

    /// Reads `keys`, whose embeddings are `[keys.len(), hidden]`, in one run of `graph`, and gives what it says of
    /// them. After an error the new positions are forgotten.
    pub(super) fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
    ) -> Result<Outputs> {
        let outputs = self.store.step(graph, embeds, self.positions.len())?;
        self.positions.extend_from_slice(keys);
        Ok(outputs)
    }
}

/// The names of a decoder graph's cache inputs and outputs, in one order.
#[derive(Debug)]
pub(super) struct CacheNames {
    pub(super) past: Vec<String>,
    pub(super) given: Vec<String>,
}

impl CacheNames {
    /// Names for a graph that gives the whole present, or only its new rows, as `given` says.
    pub(super) fn new(layers: usize, given: &str) -> Self {
        let names = |prefix: &str| {
            (0..layers)
                .flat_map(|layer| ["key", "value"].map(|what| format!("{prefix}.{layer}.{what}")))
                .collect()
        };
        Self { past: names("past_key_values"), given: names(given) }
    }

    /// Each of `buffers` as the past that a graph reads and the present that it writes.
    pub(super) fn in_place<'a>(
        &'a self,
        buffers: &'a mut [Tensor],
    ) -> Vec<(&'a str, &'a str, &'a mut Tensor)> {
        let names = self.past.iter().zip(&self.given);
        names.zip(buffers).map(|((past, given), buffer)| (past.as_str(), given.as_str(), buffer)).collect()
    }
}

/// Prefix of the outputs that hold a whole cache.
pub(super) const PRESENT: &str = "present";

/// `embeds` with a batch of one, in the type that the graph takes.
pub(super) fn batch_of_one(graph: &Graph, embeds: &ArrayView2<'_, f32>) -> Result<Tensor> {
    Tensor::from_array(graph.input_dtype("inputs_embeds"), &embeds.insert_axis(Axis(0)))
}

/// `[1]`: which of `new` positions gives the logits, the last one.
pub(super) fn last_index(new: usize) -> Result<Tensor> {
    Tensor::from_i64(&[1], [integer(new)? - 1])
}

/// `[1, new]`: the positions after `past`.
pub(super) fn position_ids(past: usize, new: usize) -> Result<Tensor> {
    let positions = (past..past + new).map(integer).collect::<Result<Vec<i64>>>()?;
    Tensor::from_i64(&[1, new], positions)
}

/// A position as graphs take it.
pub(super) fn integer(position: usize) -> Result<i64> {
    i64::try_from(position).map_err(|_| Error::TooLong { needed: position, capacity: usize::MAX })
}

/// `[1, 1, rows, columns]` in the type that the graph takes: 0 where `seen(row, column)`, else what takes a position out
/// of the softmax.
pub(super) fn mask(
    graph: &Graph,
    rows: usize,
    columns: usize,
    seen: impl Fn(usize, usize) -> bool,
) -> Result<Tensor> {
    let dtype = graph.input_dtype("attention_mask");
    // Far below any score, and far from where the type, or a score added to it, overflows.
    let hidden = if dtype == DType::F16 { -1e4 } else { -1e9 };
    let cells = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    let values: Vec<f32> = cells.map(|(row, column)| if seen(row, column) { 0.0 } else { hidden }).collect();
    Tensor::from_reals(dtype, &[1, 1, rows, columns], &values)
}

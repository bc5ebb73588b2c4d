//! What the decoder has already read.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::concat_kv::ConcatKv;
use super::delta_kv::DeltaKv;
use super::rotary::RotaryTable;
use super::scatter_kv::ScatterKv;
use super::shared_kv::SharedKv;
use crate::error::{Error, Result};
use crate::package::manifest::{DType, DecoderSpec, KvForm, KvSpec};
use crate::runtime::{CacheMemory, Graph, Outputs, RowBytes, Slot, Tensor};
use crate::text::TokenId;

/// What stands at one position of a context. Equal keys in equal places mean equal cache rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PositionKey {
    /// A token.
    Token(TokenId),
    /// One row of an image.
    Image {
        /// SHA-256 of the image's pixel values, and of how rows were chosen where not all were.
        hash: [u8; 32],
        /// The row.
        row: usize,
    },
}

/// The keys and values of every position read so far, and what stands at each.
#[derive(Debug)]
pub struct KvCache {
    positions: Vec<PositionKey>,
    layout: RowLayout,
    store: Box<dyn KvStore>,
}

/// What one position of a cache is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowLayout {
    /// Tensors: the keys and the values of each layer.
    pub tensors: usize,
    /// Rows of one position in one tensor.
    pub heads: usize,
    /// Numbers in such a row.
    pub columns: usize,
    /// Type of the numbers.
    pub dtype: DType,
}

impl RowLayout {
    pub(super) fn new(spec: &DecoderSpec, kv: KvSpec) -> Self {
        let DecoderSpec { layers, kv_heads, head_dim, .. } = *spec;
        Self { tensors: 2 * layers, heads: kv_heads, columns: head_dim, dtype: kv.dtype }
    }

    /// Bytes of one position in one tensor.
    pub(super) fn row_bytes(self) -> usize {
        self.heads * self.columns * self.dtype.bytes()
    }

    /// Bytes of one position in all tensors.
    pub fn position_bytes(self) -> usize {
        self.tensors * self.row_bytes()
    }
}

/// Positions that were copied out of a cache: for each tensor and head, their rows.
#[derive(Clone, Debug)]
pub(super) struct Piece<'a> {
    /// The rows of `height` positions.
    pub(super) bytes: &'a [u8],
    pub(super) height: usize,
    /// Those that are wanted.
    pub(super) wanted: Range<usize>,
}

/// One way to hand past keys and values to a decoder graph and to take the present ones back.
pub(super) trait KvStore: std::fmt::Debug + Send {
    /// Makes room for `positions` in all, keeping the first `used`. A form whose size is fixed, or that grows by itself
    /// at each step, has nothing to do.
    fn reserve(&mut self, _positions: usize, _used: usize) -> Result<()> {
        Ok(())
    }

    /// Runs `graph` over `embeds`, `[new, hidden]`, after `past` positions. What it gives of the new positions, but
    /// for keys and values, is returned; logits of the last `wanted` positions.
    fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        past: usize,
        wanted: usize,
    ) -> Result<Outputs>;

    /// Forgets all but the first `used` positions. A form that tells its graph how many there are, or masks the others,
    /// may leave them where they are.
    fn truncate(&mut self, _used: usize) -> Result<()> {
        Ok(())
    }

    /// The slot of [`crate::runtime::Slots`] that it lies in, if it does.
    fn slot(&self) -> Option<&Slot> {
        None
    }

    /// The tensors that hold the rows, or why the host cannot read them. There may be none before the first room is
    /// made.
    fn tensors(&self) -> Result<&[Tensor], &'static str>;

    /// The tensors with room for `total` positions, of which the first `used` stay; the others are to be written.
    fn open_rows(&mut self, used: usize, total: usize) -> Result<&mut [Tensor]>;
}

/// Why rows of a cache in a provider's own memory are not copied.
pub(super) const ON_DEVICE: &str = "the decoder's cache lies in the provider's own memory";

impl KvCache {
    pub(super) fn new(
        spec: &DecoderSpec,
        kv: KvSpec,
        rotary: Option<Arc<RotaryTable>>,
        memory: &CacheMemory,
    ) -> Result<Self> {
        let layout = RowLayout::new(spec, kv);
        let store: Box<dyn KvStore> = match kv.form {
            KvForm::Shared => Box::new(SharedKv::new(spec, kv.dtype, memory.clone())),
            KvForm::Scatter => Box::new(ScatterKv::new(spec, kv, memory)?),
            KvForm::Delta => Box::new(DeltaKv::new(spec, kv, rotary)?),
            KvForm::Concat => Box::new(ConcatKv::new(spec, kv.dtype)?),
        };
        Ok(Self { positions: Vec::new(), layout, store })
    }

    /// A cache of the `shared` form in a slot beside others.
    pub(super) fn in_slot(spec: &DecoderSpec, kv: KvSpec, memory: &CacheMemory, slot: Slot) -> Result<Self> {
        let store = Box::new(SharedKv::in_slot(spec, kv.dtype, memory.clone(), slot)?);
        Ok(Self { positions: Vec::new(), layout: RowLayout::new(spec, kv), store })
    }

    /// Which slot it lies in, if it lies in one.
    pub(super) fn slot(&self) -> Option<usize> {
        self.store.slot().map(Slot::index)
    }

    /// A row was added for what `key` says.
    pub(super) fn grew(&mut self, key: PositionKey) {
        self.positions.push(key);
        self.tell();
    }

    /// Tells the slot how many rows it holds.
    fn tell(&self) {
        if let Some(slot) = self.store.slot() {
            slot.holds(self.positions.len());
        }
    }

    /// Adds the positions `range` of another cache, of which this one holds all before.
    pub(super) fn copy_from(&mut self, other: &Self, range: Range<usize>) -> Result<()> {
        let bytes = other.export(&range)?;
        let piece = Piece { bytes: &bytes, height: range.len(), wanted: 0..range.len() };
        self.import(&other.positions[range], &[piece])
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

    /// What stands at each position.
    pub fn positions(&self) -> &[PositionKey] {
        &self.positions
    }

    /// What a position is made of.
    pub fn layout(&self) -> RowLayout {
        self.layout
    }

    /// Why rows can be neither copied out nor in, if they cannot.
    pub(super) fn is_closed(&self) -> Option<&'static str> {
        self.store.tensors().err()
    }

    /// A copy of the positions `range`, for [`KvCache::import`].
    pub(super) fn export(&self, range: &Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(range.len().saturating_mul(self.layout.position_bytes())).map_err(|e| {
            Error::Request(format!("no memory to copy {} positions ({e}); close other programs", range.len()))
        })?;
        for tensor in self.store.tensors().map_err(|why| Error::graph("decoder", why))? {
            tensor.read_rows(range, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// Adds positions that were read before, of which `keys` say what each is, from `pieces` that hold so many. After
    /// an error the cache must be dropped.
    pub(super) fn import(&mut self, keys: &[PositionKey], pieces: &[Piece<'_>]) -> Result<()> {
        let (used, layout) = (self.positions.len(), self.layout);
        let total = used + keys.len();
        let foreign = || Error::graph("decoder", "what was read before does not fit its cache");
        let tensors = self.store.open_rows(used, total)?;
        if tensors.len() != layout.tensors
            || pieces.iter().map(|p| p.wanted.len()).sum::<usize>() != keys.len()
        {
            return Err(foreign());
        }
        for (index, tensor) in tensors.iter_mut().enumerate() {
            let mut at = used;
            for Piece { bytes, height, wanted } in pieces {
                let size = height * layout.row_bytes();
                let bytes = bytes.get(index * size..(index + 1) * size).ok_or_else(foreign)?;
                tensor.write_rows(at, RowBytes { bytes, height: *height }, wanted)?;
                at += wanted.len();
            }
        }
        self.positions.extend_from_slice(keys);
        self.tell();
        Ok(())
    }

    /// Forgets all but the first `positions`.
    pub(super) fn truncate(&mut self, positions: usize) -> Result<()> {
        self.positions.truncate(positions);
        self.tell();
        self.store.truncate(positions)
    }

    /// Makes room for `positions` in all.
    pub(super) fn reserve(&mut self, positions: usize) -> Result<()> {
        self.store.reserve(positions, self.positions.len())
    }

    /// Reads `keys`, whose embeddings are `[keys.len(), hidden]`, in one run of `graph`, and gives what it says of
    /// them, the logits of the last `wanted` among it. After an error the new positions are forgotten.
    pub(super) fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
        wanted: usize,
    ) -> Result<Outputs> {
        let outputs = self.store.step(graph, embeds, self.positions.len(), wanted)?;
        self.positions.extend_from_slice(keys);
        self.tell();
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

/// `[wanted]`: which of `new` positions give logits, the last ones.
pub(super) fn last_index(new: usize, wanted: usize) -> Result<Tensor> {
    let index = (new.saturating_sub(wanted)..new).map(integer).collect::<Result<Vec<i64>>>()?;
    Tensor::from_i64(&[wanted], index)
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

//! What the decoder has already read.

use super::concat_kv::ConcatKv;
use super::shared_kv::SharedKv;
use crate::error::Result;
use crate::package::manifest::{DecoderSpec, KvForm, KvSpec};
use crate::runtime::{Graph, Tensor};
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

    /// Runs `graph` over `embeds`, `[1, new, hidden]`, after `past` positions; gives the last position's logits.
    fn step(&mut self, graph: &mut Graph, embeds: &Tensor, past: usize, new: usize) -> Result<Tensor>;

    /// Forgets all but the first `used` positions.
    fn truncate(&mut self, used: usize) -> Result<()>;
}

impl KvCache {
    pub(super) fn new(spec: &DecoderSpec, kv: KvSpec) -> Result<Self> {
        let store: Box<dyn KvStore> = match kv.form {
            KvForm::Shared => Box::new(SharedKv::new(spec, kv.dtype)),
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

    /// Reads `keys`, whose embeddings are `[1, keys.len(), hidden]`, and gives the last position's logits,
    /// `[1, logits_width]`. After an error the new positions are forgotten.
    pub(super) fn step(
        &mut self,
        graph: &mut Graph,
        embeds: &Tensor,
        keys: &[PositionKey],
    ) -> Result<Tensor> {
        let logits = self.store.step(graph, embeds, self.positions.len(), keys.len())?;
        self.positions.extend_from_slice(keys);
        Ok(logits)
    }
}

/// The names of a decoder graph's cache inputs and outputs, in one order.
#[derive(Debug)]
pub(super) struct CacheNames {
    pub(super) past: Vec<String>,
    pub(super) present: Vec<String>,
}

impl CacheNames {
    pub(super) fn new(layers: usize) -> Self {
        let names = |prefix: &str| {
            (0..layers)
                .flat_map(|layer| ["key", "value"].map(|what| format!("{prefix}.{layer}.{what}")))
                .collect()
        };
        Self { past: names("past_key_values"), present: names("present") }
    }
}

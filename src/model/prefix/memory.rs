//! What was read before, in this process: rows and image embeddings, of which those go first that were used longest ago.
//!
//! Rows are kept in blocks of neighbouring positions, each under the digest of everything before it. Prompts that begin
//! alike therefore share blocks, and any prefix of what is kept can be used.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use super::super::kv_cache::{KvCache, Piece, PositionKey};
use super::super::projector::ImageEmbeds;
use super::scope::{Digest, after, is_image};
use crate::error::Result;

/// The most positions of a block: so many are read again at most where a text goes on that ended in a block.
const BLOCK: usize = 16;
/// What stands before the first position.
const ROOT: Digest = [0; 32];

/// Rows and embeddings with a limit on their bytes.
#[derive(Debug)]
pub(super) struct MemoryStore {
    limit: u64,
    used: u64,
    clock: u64,
    blocks: HashMap<Digest, Vec<Block>>,
    images: HashMap<Digest, Image>,
}

#[derive(Debug)]
struct Block {
    keys: Vec<PositionKey>,
    rows: Vec<u8>,
    start: usize,
    last_used: u64,
}

#[derive(Debug)]
struct Image {
    embeds: Arc<ImageEmbeds>,
    last_used: u64,
}

/// A block on the way from the first position, and how many of its positions are wanted.
struct Step {
    before: Digest,
    index: usize,
    positions: usize,
}

/// What can be let go.
enum Oldest {
    Block(Digest, usize),
    Image(Digest),
}

impl Block {
    fn bytes(&self) -> u64 {
        (self.rows.len() + size_of_val(&self.keys[..])) as u64
    }
}

impl Image {
    fn bytes(&self) -> u64 {
        size_of_val(self.embeds.rows().as_slice().unwrap_or_default()) as u64
    }
}

impl MemoryStore {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, used: 0, clock: 0, blocks: HashMap::new(), images: HashMap::new() }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes of everything that is kept.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// How many positions from the beginning of `keys` are kept.
    pub(super) fn longest(&self, keys: &[PositionKey]) -> usize {
        self.steps(keys).iter().map(|step| step.positions).sum()
    }

    /// Counts the way along `keys` as used now.
    pub(super) fn touch(&mut self, keys: &[PositionKey]) {
        self.clock += 1;
        for step in self.steps(keys) {
            if let Some(block) = self.blocks.get_mut(&step.before).and_then(|all| all.get_mut(step.index)) {
                block.last_used = self.clock;
            }
        }
    }

    /// The rows of the positions `from` to `to` of `keys`, which must be kept.
    pub(super) fn pieces(&self, keys: &[PositionKey], from: usize, to: usize) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for step in self.steps(&keys[..to]) {
            let block = &self.blocks[&step.before][step.index];
            let wanted = from.saturating_sub(block.start)..step.positions;
            if !wanted.is_empty() {
                pieces.push(Piece { bytes: &block.rows, height: block.keys.len(), wanted });
            }
        }
        pieces
    }

    /// Keeps the positions of `cache`, as far as they are not kept and the limit allows.
    pub(super) fn keep(&mut self, cache: &KvCache) -> Result<()> {
        let keys = cache.positions();
        self.touch(keys);
        let (mut at, mut before) = (0, ROOT);
        while at < keys.len() {
            let end = block_end(keys, at);
            let wanted = &keys[at..end];
            let there =
                self.blocks.get(&before).is_some_and(|all| all.iter().any(|b| b.keys.starts_with(wanted)));
            if !there {
                let bytes = cache.layout().position_bytes() * wanted.len() + size_of_val(wanted);
                if bytes as u64 > self.limit {
                    return Ok(());
                }
                self.drop_prefixes(&before, wanted);
                self.make_room(bytes as u64);
                // What made room may have been what this block goes on from.
                if self.longest(&keys[..at]) < at {
                    return Ok(());
                }
                let block = Block {
                    keys: wanted.to_vec(),
                    rows: cache.export(&(at..end))?,
                    start: at,
                    last_used: self.clock,
                };
                self.used += block.bytes();
                self.blocks.entry(before).or_default().push(block);
            }
            before = after(&before, wanted);
            at = end;
        }
        Ok(())
    }

    /// The embeddings of an image, if they are kept.
    pub(super) fn image(&mut self, pixels: &Digest) -> Option<Arc<ImageEmbeds>> {
        self.clock += 1;
        let image = self.images.get_mut(pixels)?;
        image.last_used = self.clock;
        Some(Arc::clone(&image.embeds))
    }

    /// Keeps the embeddings of an image, if the limit allows.
    pub(super) fn keep_image(&mut self, pixels: Digest, embeds: &Arc<ImageEmbeds>) {
        self.clock += 1;
        let image = Image { embeds: Arc::clone(embeds), last_used: self.clock };
        let bytes = image.bytes();
        if bytes > self.limit || self.images.contains_key(&pixels) {
            return;
        }
        self.make_room(bytes);
        self.used += bytes;
        self.images.insert(pixels, image);
    }

    /// The blocks along `keys`, as far as they are kept.
    fn steps(&self, keys: &[PositionKey]) -> Vec<Step> {
        let (mut steps, mut at, mut before) = (Vec::new(), 0, ROOT);
        while at < keys.len() {
            let rest = &keys[at..];
            let common = |block: &Block| block.keys.iter().zip(rest).take_while(|(a, b)| a == b).count();
            let all = self.blocks.get(&before).map(Vec::as_slice).unwrap_or_default();
            let best = all.iter().enumerate().map(|(index, block)| (common(block), index)).max();
            let Some((positions, index)) = best.filter(|(positions, _)| *positions > 0) else { break };
            steps.push(Step { before, index, positions });
            // Only whole blocks are gone on from.
            if positions < all[index].keys.len() || at + positions != block_end(keys, at) {
                break;
            }
            before = after(&before, &rest[..positions]);
            at += positions;
        }
        steps
    }

    /// Removes blocks that `wanted` begins with: it replaces them.
    fn drop_prefixes(&mut self, before: &Digest, wanted: &[PositionKey]) {
        let Some(all) = self.blocks.get_mut(before) else { return };
        let used = &mut self.used;
        all.retain(|block| {
            let goes = wanted.starts_with(&block.keys);
            *used -= if goes { block.bytes() } else { 0 };
            !goes
        });
        if all.is_empty() {
            self.blocks.remove(before);
        }
    }

    /// Lets go what was used longest ago, of a prefix its end first, until `bytes` more are within the limit.
    fn make_room(&mut self, bytes: u64) {
        while self.used.saturating_add(bytes) > self.limit {
            let blocks = self.blocks.iter().flat_map(|(before, all)| {
                all.iter()
                    .enumerate()
                    .map(|(index, b)| ((b.last_used, Reverse(b.start)), Oldest::Block(*before, index)))
            });
            let images = self
                .images
                .iter()
                .map(|(pixels, image)| ((image.last_used, Reverse(0)), Oldest::Image(*pixels)));
            match blocks.chain(images).min_by_key(|(age, _)| *age) {
                Some((_, Oldest::Block(before, index))) => {
                    let Some(all) = self.blocks.get_mut(&before) else { return };
                    self.used -= all.swap_remove(index).bytes();
                    if all.is_empty() {
                        self.blocks.remove(&before);
                    }
                }
                Some((_, Oldest::Image(pixels))) => {
                    self.used -= self.images.remove(&pixels).map_or(0, |image| image.bytes());
                }
                None => return,
            }
        }
    }
}

/// Where the block ends that begins at `at`: at the latest after [`BLOCK`] positions, and where an image begins or ends,
/// so that an image is found whole after any text. Nothing behind it but the end of `keys` moves it.
fn block_end(keys: &[PositionKey], at: usize) -> usize {
    let most = keys.len().min(at + BLOCK);
    let border = |place: &usize| {
        let (last, next) = (&keys[place - 1], &keys[*place]);
        is_image(last) != is_image(next) || matches!(next, PositionKey::Image { row: 0, .. })
    };
    (at + 1..most).find(border).unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(range: std::ops::Range<u32>) -> Vec<PositionKey> {
        range.map(PositionKey::Token).collect()
    }

    #[test]
    fn blocks_end_where_images_do_whatever_follows() {
        let mut keys = tokens(0..5);
        keys.extend((0..20).map(|row| PositionKey::Image { hash: [1; 32], row }));
        keys.extend((0..3).map(|row| PositionKey::Image { hash: [1; 32], row }));
        keys.extend(tokens(7..40));
        let mut ends = Vec::new();
        let mut at = 0;
        while at < keys.len() {
            at = block_end(&keys, at);
            ends.push(at);
        }
        assert_eq!(ends, [5, 21, 25, 28, 44, 60, 61]);
        assert_eq!(block_end(&keys[..23], 21), 23);
    }
}

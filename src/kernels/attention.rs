//! Attention of new positions over a cache, into which they are written first.
//!
//! The operator is ONNX Runtime's `GroupQueryAttention` with one buffer for past and present, of f32 or of 8 bits with a step
//! for each channel. Weights and sums are f32, and scores of keys of f32 are; queries meet keys of bytes as numbers of 16 bits,
//! whose products are exact. What a position is given does not depend on which other positions are
//! read with it: positions are seen in spans that begin at the same multiples in every call, and each adds up on its own.

use std::cell::RefCell;
use std::sync::Mutex;

use super::columns::Columns;
use super::{Kernels, Parallel};

/// Positions that are seen at once.
pub(super) const SPAN: usize = 64;

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionSizes {
    /// Sequences.
    pub batch: usize,
    /// New positions of each sequence.
    pub new: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, which divide those of queries.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Positions for which each sequence has room.
    pub capacity: usize,
}

/// Heads that lie one after another from column `first` on in rows of `width` numbers, a row for each new position.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `[batch * new, width]`.
    pub values: &'a [f32],
    /// Numbers of a row.
    pub width: usize,
    /// Where the first head begins in a row.
    pub first: usize,
}

impl<'a> Heads<'a> {
    fn get(&self, row: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.values[row * self.width + self.first + head * head_dim..][..head_dim]
    }

    fn are(&self, rows: usize, columns: usize) -> bool {
        self.values.len() == rows * self.width && self.first + columns <= self.width
    }
}

/// Cosines and sines by which the first numbers of a head are turned, in halves.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `[positions, half]`.
    pub cos: &'a [f32],
    /// `[positions, half]`.
    pub sin: &'a [f32],
    /// Half of the numbers that are turned.
    pub half: usize,
}

impl Rotation<'_> {
    fn turn(&self, head: &mut [f32], position: usize) {
        let at = position * self.half..(position + 1) * self.half;
        let (a, b) = head[..2 * self.half].split_at_mut(self.half);
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(&self.cos[at.clone()]).zip(&self.sin[at]) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// A number of a cache.
pub trait Held: Copy + Send + Sync + 'static {
    /// Whether it is a byte that counts steps; an f32 otherwise.
    const STEPS: bool;

    /// What stands for `value` where a step is `step`.
    fn hold(value: f32, step: f32) -> Self;
}

impl Held for f32 {
    const STEPS: bool = false;

    fn hold(value: f32, _: f32) -> Self {
        value
    }
}

impl Held for i8 {
    const STEPS: bool = true;

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "it is in the range of bytes"
    )]
    fn hold(value: f32, step: f32) -> Self {
        // The sum of 2^23 * 1.5 rounds to a whole number, ties to even, in its lower bits.
        ((value / step).clamp(-128.0, 127.0) + 12_582_912.0).to_bits() as i8
    }
}

/// One call.
#[derive(Debug)]
pub struct Attention<'a, T> {
    /// Its sizes.
    pub sizes: AttentionSizes,
    /// What scores are multiplied by.
    pub scale: f32,
    /// `heads` of them.
    pub queries: Heads<'a>,
    /// `kv_heads` of them.
    pub keys: Heads<'a>,
    /// `kv_heads` of them.
    pub values: Heads<'a>,
    /// How queries and keys are turned, unless they were.
    pub rotation: Option<Rotation<'a>>,
    /// What a step of keys and of values is, `[kv_heads, head_dim]` each, for caches of bytes.
    pub steps: Option<[&'a [f32]; 2]>,
    /// Positions of each sequence, the new ones included.
    pub lengths: &'a [usize],
    /// Keys and values, `[batch, kv_heads, capacity, head_dim]` each. The new positions are written.
    pub cache: [&'a mut [T]; 2],
}

impl<T: Held> Attention<'_, T> {
    /// Whether all sizes belong together.
    fn is_whole(&self) -> bool {
        let AttentionSizes { batch, new, heads, kv_heads, head_dim, capacity } = self.sizes;
        let rows = batch * new;
        let held = batch * kv_heads * capacity * head_dim;
        let positions = self.lengths.iter().copied().max().unwrap_or(0);
        new > 0
            && capacity > 0
            && kv_heads > 0
            && head_dim > 0
            && heads.is_multiple_of(kv_heads)
            // Bytes are read by fours, and summed in 32 bits.
            && (!T::STEPS || head_dim.is_multiple_of(4) && head_dim <= 256)
            && self.queries.are(rows, heads * head_dim)
            && self.keys.are(rows, kv_heads * head_dim)
            && self.values.are(rows, kv_heads * head_dim)
            && self.lengths.len() == batch
            && self.lengths.iter().all(|length| (new..=capacity).contains(length))
            && self.cache.iter().all(|cache| cache.len() == held)
            && self.rotation.is_none_or(|Rotation { cos, sin, half }| {
                2 * half <= head_dim && positions * half <= cos.len() && cos.len() == sin.len()
            })
            && self.steps.is_some() == T::STEPS
            && self.steps.iter().flatten().all(|steps| steps.len() == kv_heads * head_dim)
    }
}

/// What one thread works with for one head of keys.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// `[rows, padded]`: queries, which count steps of keys and hold the scale.
    pub(super) queries: Vec<f32>,
    /// `[rows, padded]`: what each row adds up of the values.
    pub(super) sums: Vec<f32>,
    /// The largest score of each row.
    pub(super) largest: Vec<f32>,
    /// The sum of each row's weights.
    pub(super) totals: Vec<f32>,
    /// What each row's queries are as whole numbers of 16 bits, offset to be above zero: `[rows, 2, padded]`, the upper bytes,
    /// then the lower. Where keys are bytes.
    pub(super) numbers: Vec<u8>,
    /// What 1 stands for in each row of them.
    pub(super) scales: Vec<f32>,
    /// `[head_dim, SPAN]`.
    pub(super) keys: Vec<f32>,
    /// `[head_dim / 4, SPAN]`: four neighbouring numbers of a key, where they are bytes.
    pub(super) fours: Vec<u32>,
    /// The sum of each key's numbers there.
    pub(super) key_sums: Vec<i32>,
    /// `[SPAN, padded]`.
    pub(super) values: Vec<f32>,
}

/// One head of keys, and the rows of queries that see it.
pub(super) struct Seen<'a, T> {
    /// `[length, head_dim]`.
    pub(super) keys: &'a [T],
    /// `[length, head_dim]`.
    pub(super) values: &'a [T],
    pub(super) head_dim: usize,
    /// Numbers of a row in [`Room`]: `head_dim` in whole registers.
    pub(super) padded: usize,
    /// Positions.
    pub(super) length: usize,
    /// New ones among them; row `i` of the queries is the new position `i % new`.
    pub(super) new: usize,
    pub(super) rows: usize,
}

impl Kernels {
    /// Writes the new positions into the cache, and what each sees of its sequence up to itself into `y`,
    /// `[batch, new, heads * head_dim]`. `None`, and nothing is written, when the sizes do not belong together.
    pub fn attend<T: Held>(
        self,
        parallel: &impl Parallel,
        attention: Attention<'_, T>,
        y: &mut [f32],
    ) -> Option<()> {
        thread_local! {
            static ROOM: RefCell<Room> = RefCell::default();
        }
        let AttentionSizes { batch, new, heads, kv_heads, head_dim, capacity } = attention.sizes;
        if !attention.is_whole() || y.len() != batch * new * heads * head_dim {
            return None;
        }
        let Attention { queries, keys, values, cache: [key_cache, value_cache], .. } = attention;
        let head = capacity * head_dim;
        let parts: Vec<_> = key_cache
            .chunks_exact_mut(head)
            .zip(value_cache.chunks_exact_mut(head))
            .map(Mutex::new)
            .collect();
        let (y, padded) = (Columns::new(y, heads * head_dim), self.whole_registers(head_dim));
        let group = heads / kv_heads;
        parallel.for_each(batch * kv_heads, &|part| {
            // Nobody else takes this part, and a thread that panicked would have ended the call.
            let Ok(mut held) = parts[part].lock() else { return };
            let (key_cache, value_cache) = &mut *held;
            let (sequence, kv_head) = (part / kv_heads, part % kv_heads);
            let length = attention.lengths[sequence];
            let past = length - new;
            let steps =
                attention.steps.map(|steps| steps.map(|steps| &steps[kv_head * head_dim..][..head_dim]));
            let step = |which: usize, at: usize| steps.map_or(1.0, |steps| steps[which][at]);
            let turn = |head: &mut [f32], position: usize| {
                if let Some(rotation) = &attention.rotation {
                    rotation.turn(head, position);
                }
            };
            let mut key = vec![0.0; head_dim];
            for i in 0..new {
                let (row, at) = (sequence * new + i, (past + i) * head_dim);
                key.copy_from_slice(keys.get(row, kv_head, head_dim));
                turn(&mut key, past + i);
                let value = values.get(row, kv_head, head_dim);
                for d in 0..head_dim {
                    key_cache[at + d] = T::hold(key[d], step(0, d));
                    value_cache[at + d] = T::hold(value[d], step(1, d));
                }
            }
            ROOM.with_borrow_mut(|room| {
                let rows = group * new;
                room.queries.clear();
                room.queries.resize(rows * padded, 0.0);
                for (i, to) in room.queries.chunks_exact_mut(padded).enumerate() {
                    let head = queries.get(sequence * new + i % new, kv_head * group + i / new, head_dim);
                    let to = &mut to[..head_dim];
                    to.copy_from_slice(head);
                    turn(to, past + i % new);
                    for (d, to) in to.iter_mut().enumerate() {
                        *to *= attention.scale * step(0, d);
                    }
                }
                let (keys, values) = (&key_cache[..length * head_dim], &value_cache[..length * head_dim]);
                self.see(&Seen { keys, values, head_dim, padded, length, new, rows }, room);
                for (i, (sums, total)) in room.sums.chunks_exact_mut(padded).zip(&room.totals).enumerate() {
                    for (d, sum) in sums.iter_mut().enumerate().take(head_dim) {
                        *sum = *sum / total * step(1, d);
                    }
                    let column = (kv_head * group + i / new) * head_dim;
                    y.write(sequence * new + i % new, column, &sums[..head_dim]);
                }
            });
        });
        Some(())
    }
}

#[cfg(test)]
mod tests;

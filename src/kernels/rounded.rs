//! Activations in 8 bits, with one scale a block of a row.

use std::sync::Mutex;

use super::Parallel;
use super::matrix::{Bits, Matrix};

/// Columns that are laid out together: what 64 bytes of 4-bit weights hold.
pub(super) const GROUP: usize = 128;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rounded rows. Where weights have 4 bits, each group of 128 columns has its even ones first, since a byte of weights
/// holds an even and an odd one. Columns beyond the last are zero.
///
/// Rows that are multiplied together form a tile, in which a unit of neighbouring columns of one row is followed by the same
/// columns of the next; what stands for rows beyond the last is not defined.
#[derive(Debug, Default)]
pub struct Rounded {
    /// `[tiles, stride / unit, tile, unit]`, from `start` on.
    pub(super) values: Vec<i8>,
    /// Where a cache line begins: a register of values that lies in two lines takes twice as long to load.
    pub(super) start: usize,
    /// `[tiles, blocks, tile]`.
    pub(super) scales: Vec<f32>,
    /// `[tiles, blocks, tile]`: what the zeros of the weights add to a block's sum, with the sign turned; where zeros
    /// differ, what a zero of 1 would.
    pub(super) offsets: Vec<i32>,
    pub(super) rows: usize,
    /// Rows of a tile.
    pub(super) tile: usize,
    pub(super) stride: usize,
    pub(super) blocks: usize,
}

impl Rounded {
    /// The values, without what lies before the first line.
    pub(super) fn values(&self) -> &[i8] {
        &self.values[self.start..]
    }

    /// Rounds `x`, `[rows, weights.columns]`, to be multiplied by `weights`, in tiles of `tile` rows and units of `unit`
    /// columns, which divides [`GROUP`].
    pub(super) fn fill(
        &mut self,
        parallel: &impl Parallel,
        x: &[f32],
        weights: &Matrix<'_>,
        [tile, unit]: [usize; 2],
    ) {
        let (columns, blocks) = (weights.columns(), weights.blocks());
        let stride = (blocks * weights.block()).next_multiple_of(GROUP);
        (self.rows, self.tile, self.stride, self.blocks) = (x.len() / columns, tile, stride, blocks);
        let tiles = self.rows.div_ceil(tile);
        self.values.resize(tiles * tile * stride + LINE, 0);
        self.start = self.values.as_ptr().align_offset(LINE).min(LINE);
        self.scales.resize(tiles * tile * blocks, 0.0);
        self.offsets.resize(tiles * tile * blocks, 0);
        let parts: Vec<_> = x
            .chunks(tile * columns)
            .zip(self.values[self.start..].chunks_mut(tile * stride))
            .zip(self.scales.chunks_mut(tile * blocks))
            .zip(self.offsets.chunks_mut(tile * blocks))
            .map(|(((x, values), scales), offsets)| Mutex::new((x, values, scales, offsets)))
            .collect();
        parallel.for_each(parts.len(), &|part| {
            // Nobody else takes this part, and a thread that panicked would have ended the call.
            let Ok(mut part) = parts[part].lock() else { return };
            let (x, values, scales, offsets) = &mut *part;
            let mut row =
                Row { values: vec![0; stride], scales: vec![0.0; blocks], offsets: vec![0; blocks] };
            for (i, x) in x.chunks_exact(columns).enumerate() {
                row.round(x, weights);
                row.put(i, [tile, unit], values, scales, offsets);
            }
        });
    }
}

/// One row, before it joins its tile.
struct Row {
    values: Vec<i8>,
    scales: Vec<f32>,
    offsets: Vec<i32>,
}

impl Row {
    /// Becomes row `i` of a tile.
    fn put(
        &self,
        i: usize,
        [tile, unit]: [usize; 2],
        values: &mut [i8],
        scales: &mut [f32],
        offsets: &mut [i32],
    ) {
        for (from, to) in self.values.chunks_exact(unit).zip(values.chunks_exact_mut(unit * tile)) {
            to[unit * i..][..unit].copy_from_slice(from);
        }
        for (from, to) in self.scales.iter().zip(scales.chunks_exact_mut(tile)) {
            to[i] = *from;
        }
        for (from, to) in self.offsets.iter().zip(offsets.chunks_exact_mut(tile)) {
            to[i] = *from;
        }
    }

    fn round(&mut self, x: &[f32], weights: &Matrix<'_>) {
        round_row(x, weights, &mut self.values, &mut self.scales, &mut self.offsets);
    }
}

fn round_row(x: &[f32], weights: &Matrix<'_>, values: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
    let (block, zero) = (weights.block(), weights.zero().unwrap_or(1));
    let mut natural = [0i8; 2 * GROUP];
    values[x.len() / GROUP * GROUP..].fill(0);
    let mut pending = 0;
    for (at, x) in x.chunks(block).enumerate() {
        // By their bits: what is no number is larger than all numbers, becomes the scale, and so shows in the product.
        let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits()));
        let largest = f32::from_bits(largest);
        let scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let to = &mut natural[pending..pending + block];
        let mut sum = 0i32;
        for (to, x) in to.iter_mut().zip(x) {
            // The sum of 2^23 * 1.5 rounds to a whole number, ties to even, in its lower bits.
            let bits = (x * inverse + 12_582_912.0).to_bits();
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_possible_wrap,
                reason = "it is from -127 to 127"
            )]
            let value = bits as i8;
            *to = value;
            sum += i32::from(value);
        }
        to[x.len()..].fill(0);
        (scales[at], offsets[at]) = (scale, -zero * sum);
        pending += block;
        if pending >= GROUP {
            let end = (at + 1) * block;
            lay_out(&natural[..pending], weights.bits(), &mut values[end - pending..end]);
            pending = 0;
        }
    }
    if pending > 0 {
        natural[pending..GROUP].fill(0);
        let end = values.len();
        lay_out(&natural[..GROUP], weights.bits(), &mut values[end - GROUP..]);
    }
}

/// Whole groups, in the order in which weights meet them.
fn lay_out(natural: &[i8], bits: Bits, values: &mut [i8]) {
    if bits == Bits::Eight {
        values.copy_from_slice(natural);
        return;
    }
    for (natural, values) in natural.chunks_exact(GROUP).zip(values.chunks_exact_mut(GROUP)) {
        let (even, odd) = values.split_at_mut(GROUP / 2);
        for ((pair, even), odd) in natural.chunks_exact(2).zip(even).zip(odd) {
            (*even, *odd) = (pair[0], pair[1]);
        }
    }
}

//! Many rows of activations: rows of weights are unpacked side by side, once for all of them.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi32, _mm512_mul_ps,
    _mm512_mullo_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::cell::RefCell;
use std::ops::Range;

use super::super::Product;
use super::super::matrix::{Bits, Matrix};
use super::super::rounded::{GROUP, Rounded};
use super::LANES;

/// Rows of weights in a panel.
pub(super) const PANEL: usize = 32;
/// Rows of activations whose sums fit into registers beside a panel's weights.
pub(super) const TILE: usize = 12;
/// Columns of a row of activations that one instruction multiplies.
pub(super) const UNIT: usize = 4;
/// Bytes of a row between what is unpacked and what is fetched.
const AHEAD: usize = 256;

/// Rows of weights side by side, of one thread.
#[derive(Debug, Default)]
struct Panel {
    /// `[quads, rows]`: four neighbouring weights of a row, one byte each.
    quads: Vec<u32>,
    /// `[blocks, rows]`.
    scales: Vec<f32>,
    /// `[blocks, rows]`.
    zeros: Vec<i32>,
}

/// `columns` of the product, at most a panel of them.
pub(super) fn multiply(product: &Product<'_>, columns: Range<usize>) {
    thread_local! {
        static PANELS: RefCell<Panel> = RefCell::default();
    }
    PANELS.with_borrow_mut(|panel| multiply_with(product, columns, panel));
}

fn multiply_with(product: &Product<'_>, columns: Range<usize>, panel: &mut Panel) {
    let Product { rounded, weights, bias, y } = product;
    // SAFETY: the instructions were found.
    unsafe { fill(weights, columns.clone(), panel) };
    let mut row = 0;
    while row < rounded.rows {
        let rows = (rounded.rows - row).min(TILE);
        let mut sums = [[0f32; PANEL]; TILE];
        if let Some(bias) = bias {
            for sums in &mut sums {
                sums[..columns.len()].copy_from_slice(&bias[columns.clone()]);
            }
        }
        let block = weights.block();
        macro_rules! tile {
            ($($rows:literal)*) => {
                match (weights.bits(), rows) {
                    // SAFETY: as above.
                    $((Bits::Four, $rows) => unsafe { tile::<$rows, true>(rounded, row, panel, block, &mut sums) },)*
                    $((Bits::Eight, $rows) => unsafe { tile::<$rows, false>(rounded, row, panel, block, &mut sums) },)*
                    _ => unreachable!("a tile has at most {TILE} rows"),
                }
            };
        }
        tile!(1 2 3 4 5 6 7 8 9 10 11 12);
        for (i, sums) in sums.iter().enumerate().take(rows) {
            y.write(row + i, columns.start, &sums[..columns.len()]);
        }
        row += rows;
    }
}

/// Unpacks `columns`, rows of the weights, into a panel; what it has room for beyond them is zero.
#[target_feature(enable = "avx512f,avx512bw")]
fn fill(weights: &Matrix<'_>, columns: Range<usize>, panel: &mut Panel) {
    let (block, blocks) = (weights.block(), weights.blocks());
    let quads = blocks * block / 4;
    // Only columns beyond the last row keep what was there, and they are not read.
    panel.quads.resize(quads * PANEL, 0);
    panel.scales.resize(blocks * PANEL, 0.0);
    panel.zeros.resize(blocks * PANEL, 0);
    for (lane, row) in columns.clone().enumerate() {
        for (b, scale) in weights.scales(row).iter().enumerate() {
            panel.scales[b * PANEL + lane] = *scale;
            panel.zeros[b * PANEL + lane] =
                if weights.zero().is_some() { 1 } else { weights.zero_point(row, b) };
        }
    }
    let four = weights.bits() == Bits::Four;
    let dwords = if four { quads / 2 } else { quads };
    let mask = _mm512_set1_epi32(0x0f0f_0f0f);
    for half in (0..PANEL).step_by(LANES) {
        for first in (0..dwords).step_by(LANES) {
            let count = (dwords - first).min(LANES);
            let some = u16::MAX >> (LANES - count);
            let mut square = [_mm512_setzero_si512(); LANES];
            for (row, to) in columns.clone().skip(half).zip(&mut square) {
                let from = &weights.row(row)[first * 4..][..count * 4];
                // SAFETY: reads `count` dwords. A prefetch may name any address.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(AHEAD).cast());
                    *to = _mm512_maskz_loadu_epi32(some, from.as_ptr().cast());
                }
            }
            transpose(&mut square);
            for (dword, lanes) in (first..).zip(square).take(count) {
                if four {
                    let (even, odd) = quads_of(dword, block);
                    store(&mut panel.quads, even * PANEL + half, _mm512_and_si512(lanes, mask));
                    store(
                        &mut panel.quads,
                        odd * PANEL + half,
                        _mm512_and_si512(_mm512_srli_epi32::<4>(lanes), mask),
                    );
                } else {
                    store(&mut panel.quads, dword * PANEL + half, lanes);
                }
            }
        }
    }
}

/// Where in a panel the even and the odd weights of a dword of 4-bit weights stand: block by block, and in the order of
/// [`Rounded`] within.
fn quads_of(dword: usize, block: usize) -> (usize, usize) {
    let run = block.min(GROUP) / 8;
    let even = dword / run * 2 * run + dword % run;
    (even, even + run)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u32], at: usize, lanes: __m512i) {
    let to = &mut to[at..][..LANES];
    // SAFETY: there is room for all lanes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), lanes) };
}

/// Turns 16 rows of dwords into columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; LANES]) {
    let mut pairs = *rows;
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut fours = pairs;
    for i in (0..LANES).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut eights = fours;
    for i in [0, 1, 2, 3, 8, 9, 10, 11] {
        eights[i] = _mm512_shuffle_i32x4::<0x88>(fours[i], fours[i + 4]);
        eights[i + 4] = _mm512_shuffle_i32x4::<0xdd>(fours[i], fours[i + 4]);
    }
    for i in 0..8 {
        rows[i] = _mm512_shuffle_i32x4::<0x88>(eights[i], eights[i + 8]);
        rows[i + 8] = _mm512_shuffle_i32x4::<0xdd>(eights[i], eights[i + 8]);
    }
}

/// Four bytes as one number, wherever they lie.
///
/// # Safety
/// All four must be readable.
#[inline]
unsafe fn four_at(bytes: *const i8) -> i32 {
    // SAFETY: an array of bytes has no alignment.
    i32::from_ne_bytes(unsafe { bytes.cast::<[u8; 4]>().read() })
}

/// Adds to `sums` the products of `ROWS` rows of activations from `row` on and a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
fn tile<const ROWS: usize, const FOUR: bool>(
    rounded: &Rounded,
    row: usize,
    panel: &Panel,
    block: usize,
    sums: &mut [[f32; PANEL]; TILE],
) {
    let Rounded { stride, blocks, .. } = *rounded;
    // Quads that follow each other both in a panel and in activations, and how often a block has such a run.
    let (run, runs) = if FOUR && block < GROUP { (block / 8, 2) } else { (block / 4, 1) };
    assert!(panel.quads.len() >= blocks * runs * run * PANEL);
    assert!(panel.scales.len() >= blocks * PANEL && panel.zeros.len() >= blocks * PANEL);
    let tile = row / TILE;
    let values = &rounded.values()[tile * TILE * stride..][..TILE * stride];
    let scales = &rounded.scales[tile * TILE * blocks..][..TILE * blocks];
    let offsets = &rounded.offsets[tile * TILE * blocks..][..TILE * blocks];
    for b in 0..blocks {
        // SAFETY: the panel has whole rows, as asserted.
        let (zero0, zero1) = unsafe {
            let zeros = panel.zeros.as_ptr().add(b * PANEL);
            (_mm512_loadu_si512(zeros.cast()), _mm512_loadu_si512(zeros.add(LANES).cast()))
        };
        let mut products = [[_mm512_setzero_si512(); 2]; ROWS];
        for i in 0..ROWS {
            let offset = _mm512_set1_epi32(offsets[b * TILE + i]);
            products[i] = [_mm512_mullo_epi32(zero0, offset), _mm512_mullo_epi32(zero1, offset)];
        }
        for r in 0..runs {
            let from = if runs == 1 {
                b * block
            } else {
                b * block / GROUP * GROUP + b * block % GROUP / 2 + r * GROUP / 2
            };
            assert!(from + run * 4 <= stride);
            for quad in 0..run {
                // SAFETY: as asserted, for the panel and for activations.
                unsafe {
                    let lanes = panel.quads.as_ptr().add(((b * runs + r) * run + quad) * PANEL);
                    let (low, high) =
                        (_mm512_loadu_si512(lanes.cast()), _mm512_loadu_si512(lanes.add(LANES).cast()));
                    let fours = values.as_ptr().add((from + quad * 4) * TILE);
                    for (i, [products0, products1]) in products.iter_mut().enumerate() {
                        let four = _mm512_set1_epi32(four_at(fours.add(i * 4)));
                        *products0 = _mm512_dpbusd_epi32(*products0, low, four);
                        *products1 = _mm512_dpbusd_epi32(*products1, high, four);
                    }
                }
            }
        }
        // SAFETY: as above; a row of `sums` is a panel wide.
        unsafe {
            let scale = panel.scales.as_ptr().add(b * PANEL);
            let (scale0, scale1) = (_mm512_loadu_ps(scale), _mm512_loadu_ps(scale.add(LANES)));
            for i in 0..ROWS {
                let scale = _mm512_set1_ps(scales[b * TILE + i]);
                let to = sums[i].as_mut_ptr();
                let [low, high] = products[i].map(|lanes| _mm512_cvtepi32_ps(lanes));
                let low = _mm512_fmadd_ps(low, _mm512_mul_ps(scale0, scale), _mm512_loadu_ps(to));
                let high =
                    _mm512_fmadd_ps(high, _mm512_mul_ps(scale1, scale), _mm512_loadu_ps(to.add(LANES)));
                _mm512_storeu_ps(to, low);
                _mm512_storeu_ps(to.add(LANES), high);
            }
        }
    }
}

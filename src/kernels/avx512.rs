//! For x86-64 with AVX-512 VNNI, whose one instruction multiplies 64 bytes and sums them by fours.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_maskz_loadu_epi32, _mm_maskz_loadu_ps, _mm_mul_ps, _mm_prefetch, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps128_ps512, _mm512_castsi128_si512, _mm512_cvtepi32_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi8,
    _mm512_maskz_loadu_epi32, _mm512_maskz_permutexvar_epi32, _mm512_mul_ps, _mm512_mullo_epi32,
    _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_srli_epi16, _mm512_srli_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::ops::Range;

use super::matrix::{Bits, Matrix};
use super::rounded::{GROUP, Rounded};
use super::{Panel, Product};

/// Rows of weights in a panel.
pub(super) const PANEL: usize = 32;
/// Dwords of a register.
const LANES: usize = 16;
/// Rows of activations whose sums fit into registers beside a panel's weights.
pub(super) const TILE: usize = 12;
/// Rows of activations that are multiplied at once where weights are not unpacked.
const FEW: usize = 4;
/// Bytes between what is multiplied and what is fetched.
const AHEAD: usize = 4096;

/// Whether this processor has all the instructions.
pub(super) fn is_here() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
}

/// `columns` of the product, at most a panel of them.
pub(super) fn many(product: &Product<'_>, columns: Range<usize>, panel: &mut Panel) {
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

/// `columns` of the product, where there are few rows.
pub(super) fn few(product: &Product<'_>, columns: Range<usize>) {
    let Product { rounded, weights, .. } = product;
    let whole = weights.zero().is_some() && weights.block().is_multiple_of(width(weights.bits()));
    for column in columns {
        let mut row = 0;
        while row < rounded.rows {
            let rows = (rounded.rows - row).min(FEW);
            macro_rules! dots {
                ($($rows:literal)*) => {
                    match (weights.bits(), rows) {
                        // SAFETY: the instructions were found.
                        $((Bits::Four, $rows) if whole => unsafe { whole_dots::<$rows, true>(product, row, column) },)*
                        $((Bits::Eight, $rows) if whole => unsafe { whole_dots::<$rows, false>(product, row, column) },)*
                        $((Bits::Four, $rows) => unsafe { dots::<$rows, true>(product, row, column) },)*
                        $((Bits::Eight, $rows) => unsafe { dots::<$rows, false>(product, row, column) },)*
                        _ => unreachable!("at most {FEW} rows at a time"),
                    }
                };
            }
            dots!(1 2 3 4);
            row += rows;
        }
    }
}

/// Columns that a register of weights holds.
const fn width(bits: Bits) -> usize {
    match bits {
        Bits::Four => GROUP,
        Bits::Eight => GROUP / 2,
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
                // SAFETY: reads `count` dwords.
                *to = unsafe { _mm512_maskz_loadu_epi32(some, from.as_ptr().cast()) };
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

/// As [`dots`], and the same sums in the same order, where all weights of a register are of one block and zero is the same
/// in all blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma")]
fn whole_dots<const ROWS: usize, const FOUR: bool>(product: &Product<'_>, row: usize, column: usize) {
    let Product { rounded, weights, bias, y } = product;
    let Rounded { stride, blocks, .. } = **rounded;
    let block = weights.block();
    let width = width(if FOUR { Bits::Four } else { Bits::Eight });
    let mask = _mm512_set1_epi8(0x0f);
    // Checked here, once.
    let values: [*const i8; ROWS] =
        std::array::from_fn(|i| rounded.values()[(row + i) * stride..][..stride].as_ptr());
    let scales: [*const f32; ROWS] =
        std::array::from_fn(|i| rounded.scales[(row + i) * blocks..][..blocks].as_ptr());
    let offsets: [*const i32; ROWS] =
        std::array::from_fn(|i| rounded.offsets[(row + i) * blocks..][..blocks].as_ptr());
    let (packed, factors) = (weights.row(column), weights.scales(column));
    // Groups of a block, as a shift: both sizes are powers of two, and a division would take longer than all else.
    let shift = (block / width).trailing_zeros();
    let groups = blocks << shift;
    assert!(packed.len() >= groups * 64 && stride >= groups * width && factors.len() >= blocks);
    let (mut evens, mut odds) = ([_mm512_setzero_ps(); ROWS], [_mm512_setzero_ps(); ROWS]);
    // No function: sums that are handed on by reference leave their registers.
    macro_rules! group {
        ($group:expr, $sums:ident) => {
            let group = $group;
            let b = group >> shift;
            let first = u16::from(group & ((1 << shift) - 1) == 0);
            // SAFETY: a whole register of weights and of activations for each group, as asserted; `b` is below `blocks`.
            // A prefetch may name any address.
            unsafe {
                let from = packed.as_ptr().add(group * 64);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
                let held = _mm512_loadu_si512(from.cast());
                let even = if FOUR { _mm512_and_si512(held, mask) } else { held };
                let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(held), mask);
                let factor = _mm512_set1_ps(*factors.get_unchecked(b));
                for i in 0..ROWS {
                    let from = values[i].add(group * width);
                    let mut dot = _mm512_maskz_loadu_epi32(first, offsets[i].add(b));
                    dot = _mm512_dpbusd_epi32(dot, even, _mm512_loadu_si512(from.cast()));
                    if FOUR {
                        dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(from.add(64).cast()));
                    }
                    let scale = _mm512_mul_ps(factor, _mm512_set1_ps(*scales[i].add(b)));
                    $sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, $sums[i]);
                }
            }
        };
    }
    for pair in 0..groups / 2 {
        group!(2 * pair, evens);
        group!(2 * pair + 1, odds);
    }
    if groups % 2 == 1 {
        group!(groups - 1, evens);
    }
    for i in 0..ROWS {
        let result = _mm512_reduce_add_ps(_mm512_add_ps(evens[i], odds[i]));
        y.write(row + i, column, &[result + bias.map_or(0.0, |bias| bias[column])]);
    }
}

/// The products of `ROWS` rows of activations from `row` on and row `column` of the weights.
///
/// Rows of weights are read one after another: several at once would be as many streams, each too short for the
/// processor to read ahead.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma")]
fn dots<const ROWS: usize, const FOUR: bool>(product: &Product<'_>, row: usize, column: usize) {
    let Product { rounded, weights, bias, y } = product;
    let Rounded { stride, blocks, .. } = **rounded;
    let block = weights.block();
    let width = width(if FOUR { Bits::Four } else { Bits::Eight });
    // Blocks that a register of weights holds.
    let per = (width / block).max(1);
    let lanes: [i32; LANES] = std::array::from_fn(|lane| i32::try_from(lane * per / LANES).unwrap_or(0));
    // SAFETY: sixteen dwords.
    let lanes = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
    // Offsets go to the first lane of each block.
    let firsts = match per {
        1 => 0x0001,
        2 => 0x0101,
        _ => 0x1111,
    };
    let mask = _mm512_set1_epi8(0x0f);
    let symmetric = weights.zero().is_some();
    let values: [&[i8]; ROWS] = std::array::from_fn(|i| &rounded.values()[(row + i) * stride..][..stride]);
    let scales: [&[f32]; ROWS] = std::array::from_fn(|i| &rounded.scales[(row + i) * blocks..][..blocks]);
    let offsets: [&[i32]; ROWS] = std::array::from_fn(|i| &rounded.offsets[(row + i) * blocks..][..blocks]);
    let (packed, factors) = (weights.row(column), weights.scales(column));
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for group in 0..(blocks * block).div_ceil(width) {
        let b = group * width / block;
        let some = u8::MAX >> (8 - per.min(blocks - b));
        let all = u64::MAX >> (64 - (packed.len() - group * 64).min(64));
        // SAFETY: masks keep every read inside its row; activations are padded to whole groups. A prefetch may name any
        // address.
        unsafe {
            let from = packed.as_ptr().add(group * 64);
            // The processor reads ahead within a page, and pages of a file are small.
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
            let held = _mm512_maskz_loadu_epi8(all, from.cast());
            let even = if FOUR { _mm512_and_si512(held, mask) } else { held };
            let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(held), mask);
            let factor = factors.as_ptr().add(b);
            _mm_prefetch::<_MM_HINT_T0>(factor.wrapping_byte_add(AHEAD / block * 8).cast());
            let factor = _mm_maskz_loadu_ps(some, factor);
            for i in 0..ROWS {
                let mut dot = _mm512_setzero_si512();
                // Once a block, however many registers it fills.
                if symmetric && (group * width).is_multiple_of(block) {
                    let offsets = _mm_maskz_loadu_epi32(some, offsets[i].as_ptr().add(b));
                    dot = _mm512_maskz_permutexvar_epi32(firsts, lanes, _mm512_castsi128_si512(offsets));
                }
                let from = values[i].as_ptr().add(group * width);
                dot = _mm512_dpbusd_epi32(dot, even, _mm512_loadu_si512(from.cast()));
                if FOUR {
                    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(from.add(64).cast()));
                }
                let scale = _mm_mul_ps(factor, _mm_maskz_loadu_ps(some, scales[i].as_ptr().add(b)));
                let scale = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scale));
                let sum = &mut sums[i][group % 2];
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, *sum);
            }
        }
    }
    for i in 0..ROWS {
        let mut result = _mm512_reduce_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]));
        if !symmetric {
            for b in 0..blocks {
                let zero = weights.zero_point(column, b) * offsets[i][b];
                #[allow(clippy::cast_precision_loss, reason = "a block's sum is far below 2^24")]
                let zero = zero as f32;
                result += zero * factors[b] * scales[i][b];
            }
        }
        y.write(row + i, column, &[result + bias.map_or(0.0, |bias| bias[column])]);
    }
}

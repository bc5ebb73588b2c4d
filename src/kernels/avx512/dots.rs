//! Few rows of activations and weights of any kind: one row of weights after another is read where it lies.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_maskz_loadu_epi32, _mm_maskz_loadu_ps, _mm_mul_ps, _mm_prefetch, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps128_ps512, _mm512_castsi128_si512, _mm512_cvtepi32_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi8,
    _mm512_maskz_permutexvar_epi32, _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_set1_epi8,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16,
};
use std::ops::Range;

use super::super::Product;
use super::super::matrix::Bits;
use super::super::rounded::Rounded;
use super::{LANES, width};

/// Rows of activations that are multiplied at once.
const ROWS: usize = 4;
/// Bytes between what is multiplied and what is fetched.
const AHEAD: usize = 4096;

/// `columns` of the product.
pub(super) fn multiply(product: &Product<'_>, columns: Range<usize>) {
    let Product { rounded, weights, .. } = product;
    for column in columns {
        for row in (0..rounded.rows).step_by(ROWS) {
            macro_rules! dots {
                ($($rows:literal)*) => {
                    match (weights.bits(), (rounded.rows - row).min(ROWS)) {
                        // SAFETY: the instructions were found.
                        $((Bits::Four, $rows) => unsafe { dots::<$rows, true>(product, row, column) },)*
                        $((Bits::Eight, $rows) => unsafe { dots::<$rows, false>(product, row, column) },)*
                        _ => unreachable!("at most {ROWS} rows at a time"),
                    }
                };
            }
            dots!(1 2 3 4);
        }
    }
}

/// The products of `ROWS` rows of activations from `row` on and row `column` of the weights.
///
/// Rows of weights are read one after another, so that what is fetched ahead is the next row where one ends.
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

//! Few rows of activations: four rows of weights share each register, and are read where they lie.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_load_ss, _mm_loadu_si128, _mm_prefetch, _mm_storeu_ps, _mm512_add_ps,
    _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castps512_ps128, _mm512_cvtepi32_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mask_broadcastss_ps,
    _mm512_maskz_compress_ps, _mm512_maskz_set1_epi32, _mm512_mul_ps, _mm512_permute_ps, _mm512_set1_epi8,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_srli_epi16,
};
use std::ops::Range;

use super::super::Product;
use super::super::matrix::{Bits, Matrix};
use super::super::rounded::Rounded;
use super::width;

/// Rows of weights that share a register.
const QUAD: usize = 4;
/// Rows of activations that are multiplied at once; with more the sums leave their registers.
pub(super) const TILE: usize = 8;
/// Bytes of a row of weights in a register.
pub(super) const UNIT: usize = 16;

/// Whether all weights of a register are of one block, zero is the same in all blocks, and rows come in fours.
pub(super) fn fit(weights: &Matrix<'_>) -> bool {
    weights.zero().is_some()
        && weights.block().is_multiple_of(width(weights.bits()))
        && weights.rows().is_multiple_of(QUAD)
}

/// `columns` of the product, a multiple of [`QUAD`].
pub(super) fn multiply(product: &Product<'_>, columns: Range<usize>) {
    let Product { rounded, weights, .. } = product;
    for column in columns.step_by(QUAD) {
        for row in (0..rounded.rows).step_by(rounded.tile) {
            macro_rules! quad {
                ($($rows:literal)*) => {
                    match (weights.bits(), (rounded.rows - row).min(rounded.tile)) {
                        // SAFETY: the instructions were found.
                        $((Bits::Four, $rows) => unsafe { quad::<$rows, true>(product, row, column) },)*
                        $((Bits::Eight, $rows) => unsafe { quad::<$rows, false>(product, row, column) },)*
                        _ => unreachable!("a tile has at most {TILE} rows"),
                    }
                };
            }
            quad!(1 2 3 4 5 6 7 8);
        }
    }
}

/// The products of `ROWS` rows of activations from `row` on, where a tile begins, and [`QUAD`] rows of the weights from
/// `column` on.
///
/// A register holds a part of each row of weights, so that one scaling serves all of them; each is summed in the same order
/// whatever `ROWS` is.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma")]
fn quad<const ROWS: usize, const FOUR: bool>(product: &Product<'_>, row: usize, column: usize) {
    let Product { rounded, weights, bias, y } = product;
    let Rounded { stride, blocks, tile, .. } = **rounded;
    let width = width(if FOUR { Bits::Four } else { Bits::Eight });
    let groups = weights.block() / width;
    let mask = _mm512_set1_epi8(0x0f);
    // Checked here, once.
    let values = rounded.values()[row * stride..][..tile * stride].as_ptr();
    let scales = rounded.scales[row * blocks..][..tile * blocks].as_ptr();
    let offsets = rounded.offsets[row * blocks..][..tile * blocks].as_ptr();
    let bytes = blocks * groups * 64;
    let packed: [*const u8; QUAD] = std::array::from_fn(|c| weights.row(column + c)[..bytes].as_ptr());
    let factors: [*const f32; QUAD] = std::array::from_fn(|c| weights.scales(column + c)[..blocks].as_ptr());
    assert!(ROWS <= tile && stride >= blocks * groups * width);
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for b in 0..blocks {
        // SAFETY: whole blocks of weights, of activations and of their scales, as asserted. A prefetch may name any address.
        unsafe {
            let mut dots = [_mm512_setzero_si512(); ROWS];
            for (i, dot) in dots.iter_mut().enumerate() {
                *dot = _mm512_maskz_set1_epi32(0x1111, *offsets.add(b * tile + i));
            }
            for group in b * groups..(b + 1) * groups {
                let mut held = [_mm512_setzero_si512(); QUAD];
                for c in 0..QUAD {
                    let from = packed[c].add(group * 64);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(QUAD * bytes).cast());
                    held[c] = _mm512_loadu_si512(from.cast());
                }
                for (part, held) in parts(held).into_iter().enumerate() {
                    let even = if FOUR { _mm512_and_si512(held, mask) } else { held };
                    let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(held), mask);
                    let from = values.add((group * width + part * UNIT) * tile);
                    for (i, dot) in dots.iter_mut().enumerate() {
                        let units = _mm512_broadcast_i32x4(_mm_loadu_si128(from.add(i * UNIT).cast()));
                        *dot = _mm512_dpbusd_epi32(*dot, even, units);
                    }
                    if FOUR {
                        let from = from.add(64 * tile);
                        for (i, dot) in dots.iter_mut().enumerate() {
                            let units = _mm512_broadcast_i32x4(_mm_loadu_si128(from.add(i * UNIT).cast()));
                            *dot = _mm512_dpbusd_epi32(*dot, odd, units);
                        }
                    }
                }
            }
            let mut factor = _mm512_setzero_ps();
            for (c, factors) in factors.iter().enumerate() {
                factor = _mm512_mask_broadcastss_ps(factor, 0xf << (4 * c), _mm_load_ss(factors.add(b)));
            }
            for i in 0..ROWS {
                let scale = _mm512_mul_ps(factor, _mm512_set1_ps(*scales.add(b * tile + i)));
                sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), scale, sums[i]);
            }
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        let pairs = _mm512_add_ps(sum, _mm512_permute_ps::<0b10_11_00_01>(sum));
        let fours = _mm512_add_ps(pairs, _mm512_permute_ps::<0b01_00_11_10>(pairs));
        let mut results = [0f32; QUAD];
        // SAFETY: writes the four lanes that are kept.
        unsafe {
            let kept = _mm512_maskz_compress_ps(0x1111, fours);
            _mm_storeu_ps(results.as_mut_ptr(), _mm512_castps512_ps128(kept));
        }
        if let Some(bias) = bias {
            for (result, bias) in results.iter_mut().zip(&bias[column..]) {
                *result += bias;
            }
        }
        y.write(row + i, column, &results);
    }
}

/// Turns registers of four rows into registers of 16 bytes of each.
#[inline]
#[target_feature(enable = "avx512f")]
fn parts(rows: [__m512i; QUAD]) -> [__m512i; QUAD] {
    let low =
        [_mm512_shuffle_i32x4::<0x44>(rows[0], rows[1]), _mm512_shuffle_i32x4::<0x44>(rows[2], rows[3])];
    let high =
        [_mm512_shuffle_i32x4::<0xee>(rows[0], rows[1]), _mm512_shuffle_i32x4::<0xee>(rows[2], rows[3])];
    [
        _mm512_shuffle_i32x4::<0x88>(low[0], low[1]),
        _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]),
        _mm512_shuffle_i32x4::<0x88>(high[0], high[1]),
        _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]),
    ]
}

//! Scores of queries, then their weights.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_add_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_ps,
    _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_sub_epi32, _mm512_sub_ps,
};

use super::super::super::attention::SPAN;
use super::super::LANES;
use super::{Scores, first, store};

/// Scores of `N` queries, `[N, padded]`, for all positions of a span.
#[target_feature(enable = "avx512f,fma")]
pub(super) fn score<const N: usize>(queries: &[f32], keys: &[f32], head_dim: usize, scores: &mut Scores) {
    const WIDE: usize = SPAN / LANES;
    let padded = queries.len() / N;
    assert!(padded >= head_dim && keys.len() >= head_dim * SPAN);
    let mut sums = [[_mm512_setzero_ps(); WIDE]; N];
    for d in 0..head_dim {
        // SAFETY: row `d` of the keys and number `d` of each query, as asserted.
        unsafe {
            let key: [__m512; WIDE] =
                std::array::from_fn(|i| _mm512_loadu_ps(keys.as_ptr().add(d * SPAN + i * LANES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = _mm512_set1_ps(*queries.get_unchecked(row * padded + d));
                for (sum, key) in sums.iter_mut().zip(key) {
                    *sum = _mm512_fmadd_ps(query, key, *sum);
                }
            }
        }
    }
    for (sums, scores) in sums.into_iter().zip(scores) {
        for (sum, at) in sums.into_iter().zip((0..).step_by(LANES)) {
            store(scores, at, sum);
        }
    }
}

/// Scores of `N` queries for all positions of a span of bytes.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn score_bytes<const N: usize>(
    (numbers, scales): (&[u8], &[f32]),
    (keys, key_sums): (&[u32], &[i32]),
    head_dim: usize,
    scores: &mut Scores,
) {
    /// Registers of positions beside the sums of all rows.
    const WIDE: usize = 2;
    let padded = numbers.len() / N / 2;
    assert!(padded >= head_dim && scales.len() >= N);
    assert!(keys.len() >= head_dim / 4 * SPAN && key_sums.len() >= SPAN);
    for at in (0..SPAN).step_by(WIDE * LANES) {
        let mut sums = [[[_mm512_setzero_si512(); WIDE]; 2]; N];
        for four in 0..head_dim / 4 {
            // SAFETY: dwords of a row of the keys and of each query's bytes, as asserted.
            unsafe {
                let key: [__m512i; WIDE] = std::array::from_fn(|i| {
                    _mm512_loadu_si512(keys.as_ptr().add(four * SPAN + at + i * LANES).cast())
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (part, sums) in sums.iter_mut().enumerate() {
                        let from = numbers.as_ptr().add((2 * row + part) * padded + 4 * four);
                        let bytes = _mm512_set1_epi32(from.cast::<i32>().read_unaligned());
                        for (sum, key) in sums.iter_mut().zip(key) {
                            *sum = _mm512_dpbusd_epi32(*sum, bytes, key);
                        }
                    }
                }
            }
        }
        for (row, [upper, lower]) in sums.into_iter().enumerate() {
            for i in 0..WIDE {
                let position = at + i * LANES;
                // SAFETY: a register of sums, as asserted.
                let key_sum = unsafe { _mm512_loadu_si512(key_sums.as_ptr().add(position).cast()) };
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper[i]), lower[i]);
                let sum = _mm512_sub_epi32(sum, _mm512_slli_epi32::<15>(key_sum));
                let lanes = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scales[row]));
                store(&mut scores[row], position, lanes);
            }
        }
    }
}

/// Turns the scores of one row, of which the first `visible` count, into weights relative to the largest score so far; gives
/// what earlier sums are to be multiplied by.
#[target_feature(enable = "avx512f,fma")]
pub(super) fn weigh(scores: &mut [f32; SPAN], visible: usize, largest: &mut f32, total: &mut f32) -> f32 {
    if visible == 0 {
        scores.fill(0.0);
        return 1.0;
    }
    let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut most = nothing;
    for (at, scores) in (0..).step_by(LANES).zip(scores.chunks_exact(LANES)) {
        let counted = first(visible.saturating_sub(at).min(LANES));
        // SAFETY: a whole register.
        let lanes = unsafe { _mm512_loadu_ps(scores.as_ptr()) };
        most = _mm512_max_ps(most, _mm512_mask_blend_ps(counted, nothing, lanes));
    }
    let before = *largest;
    *largest = before.max(_mm512_reduce_max_ps(most));
    let highest = _mm512_set1_ps(*largest);
    let mut sum = _mm512_setzero_ps();
    for (at, scores) in (0..).step_by(LANES).zip(scores.chunks_exact_mut(LANES)) {
        let counted = first(visible.saturating_sub(at).min(LANES));
        // SAFETY: a whole register.
        let lanes = unsafe { _mm512_loadu_ps(scores.as_ptr()) };
        let weights = _mm512_maskz_mov_ps(counted, exp(_mm512_sub_ps(lanes, highest)));
        sum = _mm512_add_ps(sum, weights);
        store(scores, 0, weights);
    }
    let mut scale = [0.0; LANES];
    if before > f32::NEG_INFINITY {
        store(&mut scale, 0, exp(_mm512_set1_ps(before - *largest)));
    }
    *total = *total * scale[0] + _mm512_reduce_add_ps(sum);
    scale[0]
}

/// e^x for x up to 0, within two units of the last place; what is below e^-87 is taken for that.
#[inline]
#[target_feature(enable = "avx512f,fma")]
fn exp(x: __m512) -> __m512 {
    /// ln 2 in two parts, the first of which has few bits, so that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// 1 / n!, from 7 down.
    const SERIES: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // In this order: what is no number stays none.
    let x = _mm512_max_ps(_mm512_set1_ps(-87.0), x);
    let twos = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(LN_2[0]), x);
    let rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(LN_2[1]), rest);
    let mut sum = _mm512_setzero_ps();
    for factor in SERIES {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    }
    _mm512_scalef_ps(sum, twos)
}

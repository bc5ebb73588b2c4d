//! Keys, values and queries as attention computes with them.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m128i, __m512, __m512i, _MM_HINT_T0, _mm_maskz_loadu_epi8, _mm_prefetch, _mm_storeu_si128,
    _mm512_add_epi32, _mm512_castsi128_si512, _mm512_castsi512_ps, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_inserti32x4,
    _mm512_loadu_ps, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_srli_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

use super::super::super::attention::{Held, SPAN};
use super::super::LANES;
use super::super::transpose::transpose;
use super::{first, store};

/// Turns positions, `[_, head_dim]`, into columns, `[head_dim, SPAN]`; those beyond the last are zero.
#[target_feature(enable = "avx512f")]
pub(super) fn load_keys<T: Held>(keys: &[T], head_dim: usize, to: &mut [f32]) {
    let count = keys.len() / head_dim;
    assert!(!T::STEPS && to.len() >= head_dim * SPAN && keys.len() == count * head_dim && count <= SPAN);
    for position in (0..SPAN).step_by(LANES) {
        for d in (0..head_dim).step_by(LANES) {
            let some = (head_dim - d).min(LANES);
            let mut square = [_mm512_setzero_si512(); LANES];
            for (i, row) in square.iter_mut().enumerate().take(count.saturating_sub(position)) {
                // SAFETY: `some` numbers of one position, as asserted. A prefetch may name any address.
                *row = unsafe {
                    let from = keys.as_ptr().add((position + i) * head_dim + d);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SPAN * head_dim).cast());
                    _mm512_maskz_loadu_epi32(first(some), from.cast())
                };
            }
            transpose(&mut square);
            for (i, lanes) in square.into_iter().enumerate().take(some) {
                store(to, (d + i) * SPAN + position, _mm512_castsi512_ps(lanes));
            }
        }
    }
}

/// Turns positions of bytes, `[_, head_dim]`, into columns of four each, `[head_dim / 4, SPAN]`, and sums each position; what
/// stands beyond the last is not defined.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn load_bytes<T: Held>(keys: &[T], head_dim: usize, to: &mut [u32], sums: &mut [i32]) {
    /// Bytes that are loaded at once.
    const UNIT: usize = 16;
    let count = keys.len() / head_dim;
    assert!(T::STEPS && keys.len() == count * head_dim && count <= SPAN);
    assert!(to.len() >= head_dim / 4 * SPAN && sums.len() >= SPAN);
    let ones = _mm512_set1_epi8(1);
    for position in (0..count).step_by(LANES) {
        let mut sum = _mm512_setzero_si512();
        for d in (0..head_dim).step_by(UNIT) {
            let some = first((head_dim - d).min(UNIT));
            let rows: [__m128i; LANES] = std::array::from_fn(|i| {
                // SAFETY: `some` bytes of one position, as asserted. A prefetch may name any address.
                unsafe {
                    let from = keys.as_ptr().add((position + i).min(count - 1) * head_dim + d);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SPAN * head_dim).cast());
                    _mm_maskz_loadu_epi8(some, from.cast())
                }
            });
            for (i, lanes) in fours(&rows).into_iter().enumerate().take((head_dim - d).min(UNIT) / 4) {
                sum = _mm512_dpbusd_epi32(sum, ones, lanes);
                let to = &mut to[(d / 4 + i) * SPAN + position..][..LANES];
                // SAFETY: there is room for all lanes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), lanes) };
            }
        }
        // SAFETY: there is room for all positions, as asserted.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(position).cast(), sum) };
    }
}

/// Columns of the dwords of 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn fours(rows: &[__m128i; LANES]) -> [__m512i; 4] {
    // Row `i`, then every fourth one after it.
    let [a, b, c, d]: [__m512i; 4] = std::array::from_fn(|i| {
        let lanes = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(rows[i]), rows[i + 4]);
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(lanes, rows[i + 8]), rows[i + 12])
    });
    let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (low_2, high_2) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(low, high),
        _mm512_unpackhi_epi64(low, high),
        _mm512_unpacklo_epi64(low_2, high_2),
        _mm512_unpackhi_epi64(low_2, high_2),
    ]
}

/// Rounds queries, `[rows, padded]`, to numbers of 16 bits: of each row the upper bytes, then the lower.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn round(queries: &[f32], padded: usize, numbers: &mut Vec<u8>, scales: &mut Vec<f32>) {
    numbers.resize(2 * queries.len(), 0);
    scales.clear();
    for (query, numbers) in queries.chunks_exact(padded).zip(numbers.chunks_exact_mut(2 * padded)) {
        // By their bits: what is no number is larger than all numbers, becomes the scale, and so shows in the scores.
        let largest = f32::from_bits(query.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits())));
        scales.push(largest / 32767.0);
        let inverse = _mm512_set1_ps(if largest > 0.0 { 32767.0 / largest } else { 0.0 });
        let (upper, lower) = numbers.split_at_mut(padded);
        let registers = query.chunks_exact(LANES).zip(upper.chunks_exact_mut(LANES));
        for ((query, upper), lower) in registers.zip(lower.chunks_exact_mut(LANES)) {
            // SAFETY: a register of numbers, and as many bytes.
            unsafe {
                let numbers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(query.as_ptr()), inverse));
                let numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(1 << 15));
                let bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(numbers));
                _mm_storeu_si128(upper.as_mut_ptr().cast(), bytes);
                _mm_storeu_si128(lower.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(numbers));
            }
        }
    }
}

/// Positions, `[_, head_dim]`, as `[_, padded]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn load_values<T: Held>(values: &[T], head_dim: usize, padded: usize, to: &mut [f32]) {
    let count = values.len() / head_dim;
    assert!(values.len() == count * head_dim && to.len() >= count * padded && padded >= head_dim);
    for position in 0..count {
        for at in (0..head_dim).step_by(LANES) {
            // SAFETY: numbers of one position, and room for whole registers of them, as asserted.
            unsafe {
                let lanes = load(values.as_ptr().add(position * head_dim + at), head_dim - at, head_dim);
                _mm512_storeu_ps(to.as_mut_ptr().add(position * padded + at), lanes);
            }
        }
    }
}

/// Up to a register of the `left` numbers at `from`, of positions of `head_dim` numbers. Those of the next span are fetched.
///
/// # Safety
/// As many must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn load<T: Held>(from: *const T, left: usize, head_dim: usize) -> __m512 {
    let some = first(left.min(LANES));
    // SAFETY: masked lanes are not read. A prefetch may name any address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SPAN * head_dim).cast());
        if T::STEPS {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, from.cast())))
        } else {
            _mm512_maskz_loadu_ps(some, from.cast())
        }
    }
}

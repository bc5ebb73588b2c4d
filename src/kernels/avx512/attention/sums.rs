//! Sums of values by their weights.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use super::super::super::attention::{Held, SPAN};
use super::super::LANES;
use super::loads::load;
use super::{ROWS, Scores, store};

/// Registers of a row that are computed at once.
const CHUNKS: usize = 5;

/// Adds to `C` registers of `N` sums, from number `at` on, the first `count` values by their weights. Values are rows of
/// `head_dim` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub(super) fn add<T: Held, const N: usize, const C: usize>(
    weights: &Scores,
    scales: &[f32; ROWS],
    count: usize,
    (values, head_dim): (&[T], usize),
    at: usize,
    to: &mut [f32],
) {
    let padded = to.len() / N;
    assert!(count <= SPAN && values.len() >= count * head_dim);
    assert!(at + C * LANES <= padded && at + (C - 1) * LANES < head_dim);
    let mut sums = [[_mm512_setzero_ps(); C]; N];
    // SAFETY: numbers from `at` to `at + C * LANES` of each sum, and as many as there are of each value, as asserted.
    unsafe {
        for (row, sums) in sums.iter_mut().enumerate() {
            let scale = _mm512_set1_ps(scales[row]);
            for (i, sum) in sums.iter_mut().enumerate() {
                let from = to.as_ptr().add(row * padded + at + i * LANES);
                *sum = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
            }
        }
        for position in 0..count {
            let value: [__m512; C] = std::array::from_fn(|i| {
                let at = at + i * LANES;
                load(values.as_ptr().add(position * head_dim + at), head_dim - at, head_dim)
            });
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = _mm512_set1_ps(*weights[row].get_unchecked(position));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = _mm512_fmadd_ps(weight, value, *sum);
                }
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (i, sum) in sums.into_iter().enumerate() {
            store(to, row * padded + at + i * LANES, sum);
        }
    }
}

/// [`add`] for all registers of `N` sums.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
pub(super) fn add_all<T: Held, const N: usize>(
    weights: &Scores,
    scales: &[f32; ROWS],
    count: usize,
    values: (&[T], usize),
    to: &mut [f32],
) {
    let registers = to.len() / N / LANES;
    for chunk in (0..registers).step_by(CHUNKS) {
        let at = chunk * LANES;
        match registers - chunk {
            1 => add::<T, N, 1>(weights, scales, count, values, at, to),
            2 => add::<T, N, 2>(weights, scales, count, values, at, to),
            3 => add::<T, N, 3>(weights, scales, count, values, at, to),
            4 => add::<T, N, 4>(weights, scales, count, values, at, to),
            _ => add::<T, N, CHUNKS>(weights, scales, count, values, at, to),
        }
    }
}

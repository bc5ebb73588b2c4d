//! Attention of rows of queries to one head, a span of positions at a time, with weights that follow the largest score so far.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

use std::arch::x86_64::{
    __m512, __m512i, __mmask16, _MM_HINT_T0, _mm_maskz_loadu_epi8, _mm_prefetch, _mm512_add_ps,
    _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps,
    _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps,
    _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_srai_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use super::super::attention::{Held, Room, SPAN, Seen};
use super::LANES;
use super::transpose::transpose;

/// Rows that are computed at once.
const ROWS: usize = 4;
/// Registers of a row that are computed at once.
const CHUNKS: usize = 5;

/// Scores of the rows of a tile, then their weights.
type Scores = [[f32; SPAN]; ROWS];

/// Fills the sums and totals of `room` with what the queries there see.
pub(in super::super) fn see<T: Held>(seen: &Seen<'_, T>, room: &mut Room) {
    let Seen { keys, values, head_dim, padded, length, new, rows } = *seen;
    let Room { queries, sums, largest, totals, keys: key_room, values: value_room } = room;
    sums.clear();
    sums.resize(rows * padded, 0.0);
    largest.clear();
    largest.resize(rows, f32::NEG_INFINITY);
    totals.clear();
    totals.resize(rows, 0.0);
    key_room.resize(head_dim * SPAN, 0.0);
    value_room.resize(SPAN * padded, 0.0);
    // Values that one tile of rows sees are read where they are held.
    let once = rows <= ROWS;
    for first in (0..length).step_by(SPAN) {
        let count = (length - first).min(SPAN);
        let span = first * head_dim..(first + count) * head_dim;
        let (keys, values) = (&keys[span.clone()], &values[span]);
        // SAFETY: the instructions were found.
        unsafe {
            load_keys(keys, head_dim, key_room);
            if !once {
                load_values(values, head_dim, padded, value_room);
            }
        }
        for row in (0..rows).step_by(ROWS) {
            let tile = (rows - row).min(ROWS);
            let visible: [usize; ROWS] = std::array::from_fn(|i| {
                let position = length - new + (row + i) % new;
                if i < tile { (position + 1).saturating_sub(first).min(count) } else { 0 }
            });
            let most = visible.into_iter().max().unwrap_or(0);
            if most == 0 {
                continue;
            }
            let queries = &queries[row * padded..][..tile * padded];
            let sums = &mut sums[row * padded..][..tile * padded];
            let mut scores: Scores = [[0.0; SPAN]; ROWS];
            let mut scales = [1.0; ROWS];
            macro_rules! tile {
                ($($rows:literal)*) => {
                    // SAFETY: as above.
                    match tile {
                        $($rows => unsafe {
                            score::<$rows>(queries, key_room, head_dim, &mut scores);
                            for (i, scores) in scores.iter_mut().enumerate().take($rows) {
                                let (largest, total) = (&mut largest[row + i], &mut totals[row + i]);
                                scales[i] = weigh(scores, visible[i], largest, total);
                            }
                            if once {
                                add_all::<T, $rows>(&scores, &scales, most, (values, head_dim), sums);
                            } else {
                                add_all::<f32, $rows>(&scores, &scales, most, (value_room, padded), sums);
                            }
                        },)*
                        _ => unreachable!("a tile has at most {ROWS} rows"),
                    }
                };
            }
            tile!(1 2 3 4);
        }
    }
}

/// Turns positions, `[_, head_dim]`, into columns, `[head_dim, SPAN]`; those beyond the last are zero.
#[target_feature(enable = "avx512f")]
fn load_keys<T: Held>(keys: &[T], head_dim: usize, to: &mut [f32]) {
    let per = if T::STEPS { 4 } else { 1 };
    let (count, dwords) = (keys.len() / head_dim, head_dim / per);
    assert!(to.len() >= head_dim * SPAN && keys.len() == count * dwords * per && count <= SPAN);
    for position in (0..SPAN).step_by(LANES) {
        for dword in (0..dwords).step_by(LANES) {
            let some = (dwords - dword).min(LANES);
            let mut square = [_mm512_setzero_si512(); LANES];
            for (i, row) in square.iter_mut().enumerate().take(count.saturating_sub(position)) {
                // SAFETY: `some` dwords of one position, as asserted. A prefetch may name any address.
                *row = unsafe {
                    let from = keys.as_ptr().add((position + i) * head_dim + dword * per);
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(SPAN * head_dim).cast());
                    _mm512_maskz_loadu_epi32(first(some), from.cast())
                };
            }
            transpose(&mut square);
            for (i, lanes) in square.into_iter().enumerate().take(some) {
                let d = (dword + i) * per;
                if T::STEPS {
                    for (byte, lanes) in bytes(lanes).into_iter().enumerate() {
                        store(to, (d + byte) * SPAN + position, lanes);
                    }
                } else {
                    store(to, d * SPAN + position, _mm512_castsi512_ps(lanes));
                }
            }
        }
    }
}

/// The four signed bytes of each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(lanes: __m512i) -> [__m512; 4] {
    [
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(lanes))),
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(lanes))),
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(lanes))),
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(lanes)),
    ]
}

/// Positions, `[_, head_dim]`, as `[_, padded]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_values<T: Held>(values: &[T], head_dim: usize, padded: usize, to: &mut [f32]) {
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
unsafe fn load<T: Held>(from: *const T, left: usize, head_dim: usize) -> __m512 {
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

/// Scores of `N` queries, `[N, padded]`, for all positions of a span.
#[target_feature(enable = "avx512f,fma")]
fn score<const N: usize>(queries: &[f32], keys: &[f32], head_dim: usize, scores: &mut Scores) {
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

/// Turns the scores of one row, of which the first `visible` count, into weights relative to the largest score so far; gives
/// what earlier sums are to be multiplied by.
#[target_feature(enable = "avx512f,fma")]
fn weigh(scores: &mut [f32; SPAN], visible: usize, largest: &mut f32, total: &mut f32) -> f32 {
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

/// Adds to `C` registers of `N` sums, from number `at` on, the first `count` values by their weights. Values are rows of
/// `head_dim` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
fn add<T: Held, const N: usize, const C: usize>(
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
fn add_all<T: Held, const N: usize>(
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

/// The first `count` lanes.
#[inline]
fn first(count: usize) -> __mmask16 {
    if count == 0 { 0 } else { u16::MAX >> (LANES - count) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32], at: usize, lanes: __m512) {
    let to = &mut to[at..][..LANES];
    // SAFETY: there is room for all lanes.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), lanes) };
}

//! Attention of rows of queries to one head, a span of positions at a time, with weights that follow the largest score so far.
#![allow(
    unsafe_code,
    reason = "the instructions are there only where they were found, and read memory by pointers"
)]

mod loads;
mod scores;
mod sums;

use std::arch::x86_64::{__m512, __mmask16, _mm512_storeu_ps};

use super::super::attention::{Held, Room, SPAN, Seen};
use super::LANES;
use loads::{load_bytes, load_keys, load_values, round};
use scores::{score, score_bytes, weigh};
use sums::add_all;

/// Rows that are computed at once.
const ROWS: usize = 4;

/// Scores of the rows of a tile, then their weights.
type Scores = [[f32; SPAN]; ROWS];

/// Fills the sums and totals of `room` with what the queries there see.
pub(in super::super) fn see<T: Held>(seen: &Seen<'_, T>, room: &mut Room) {
    let Seen { keys, values, head_dim, padded, length, new, rows } = *seen;
    let Room { queries, numbers, scales: query_scales, sums, largest, totals, .. } = room;
    let Room { keys: key_room, fours, key_sums, values: value_room, .. } = room;
    sums.clear();
    sums.resize(rows * padded, 0.0);
    largest.clear();
    largest.resize(rows, f32::NEG_INFINITY);
    totals.clear();
    totals.resize(rows, 0.0);
    value_room.resize(SPAN * padded, 0.0);
    if T::STEPS {
        fours.resize(head_dim / 4 * SPAN, 0);
        key_sums.resize(SPAN, 0);
        // SAFETY: the instructions were found.
        unsafe { round(queries, padded, numbers, query_scales) };
    } else {
        key_room.resize(head_dim * SPAN, 0.0);
    }
    // Values that one tile of rows sees are read where they are held.
    let once = rows <= ROWS;
    for first in (0..length).step_by(SPAN) {
        let count = (length - first).min(SPAN);
        let span = first * head_dim..(first + count) * head_dim;
        let (keys, values) = (&keys[span.clone()], &values[span]);
        // SAFETY: as above.
        unsafe {
            if T::STEPS {
                load_bytes(keys, head_dim, fours, key_sums);
            } else {
                load_keys(keys, head_dim, key_room);
            }
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
                            if T::STEPS {
                                let queries = (&numbers[2 * row * padded..][..2 * tile * padded], &query_scales[row..]);
                                score_bytes::<$rows>(queries, (fours, key_sums), head_dim, &mut scores);
                            } else {
                                score::<$rows>(queries, key_room, head_dim, &mut scores);
                            }
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

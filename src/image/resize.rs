//! Resamples a picture exactly as Pillow's bicubic does, computing only what is kept.
//!
//! Pillow works in two passes over bytes, one an axis, each with weights rounded to 22 fractional bits, and
//! rounds to a byte between them; `libImaging/Resample.c` is the rule. A pass that Pillow skips because
//! nothing changes has the weight one and gives the same bytes here. Sums of integers do not depend on their
//! order, so each row is resampled once and its share is added to every row of the result that it touches:
//! memory is the result's, whatever the picture's shape, and padding is never laid out.
//!
//! The weights are those of a build without fused multiply-add, as Pillow's wheels for x86-64 are.

use std::ops::Range;

use super::Rgb;
use super::geometry::{Axis, Order, Plan};

/// Fractional bits of a weight: 32 less 8 for the byte and 2 for overshoot.
const BITS: u32 = 22;
/// One half, so that the shift rounds.
const HALF: i32 = 1 << (BITS - 1);
/// Bytes of a pixel.
const CHANNELS: usize = 3;

/// Resamples `picture` into `plan.x.kept` x `plan.y.kept` pixels; padding has the colour `pad`.
///
/// Takes time in proportion to the pixels of the picture that are used, and memory in proportion to the result
/// and the longer side. A picture whose pixels end early is read as if `pad` followed.
pub(super) fn resize(picture: &Rgb, plan: &Plan, pad: [u8; CHANNELS]) -> Rgb {
    let source = Source { picture, stride: plan.x.picture as usize * CHANNELS };
    let (columns, rows) = (Kernel::new(&plan.x), Kernel::new(&plan.y));
    let pixels = match plan.order {
        Order::RowsFirst => rows_first(&source, &columns, &rows, pad),
        Order::ColumnsFirst => columns_first(&source, &columns, &rows, pad),
    };
    Rgb { width: plan.x.kept, height: plan.y.kept, pixels }
}

struct Source<'a> {
    picture: &'a Rgb,
    stride: usize,
}

impl Source<'_> {
    fn row(&self, at: usize) -> Option<&[u8]> {
        let start = at.checked_mul(self.stride)?;
        self.picture.pixels.get(start..start.checked_add(self.stride)?)
    }
}

fn rows_first(source: &Source, columns: &Kernel, rows: &Kernel, pad: [u8; CHANNELS]) -> Vec<u8> {
    let blank = columns.blank(pad);
    let width = blank.len();
    let mut sums = vec![HALF; rows.taps.len() * width];
    for (tap, sums) in rows.taps.iter().zip(sums.chunks_exact_mut(width)) {
        add(sums, &blank, tap.outside);
    }
    let mut line = vec![0; width];
    let mut oldest = 0;
    for row in rows.span() {
        match source.row(row) {
            Some(pixels) => columns.resample(pixels, pad, &mut line),
            None => line.copy_from_slice(&blank),
        }
        oldest += rows.taps[oldest..].iter().take_while(|tap| tap.pixels.end <= row).count();
        let touched = rows.taps[oldest..].iter().take_while(|tap| tap.pixels.start <= row);
        for (tap, sums) in touched.zip(sums[oldest * width..].chunks_exact_mut(width)) {
            add(sums, &line, rows.weights(tap)[row - tap.pixels.start]);
        }
    }
    sums.into_iter().map(to_byte).collect()
}

fn columns_first(source: &Source, columns: &Kernel, rows: &Kernel, pad: [u8; CHANNELS]) -> Vec<u8> {
    let blank: Vec<u8> = pad.into_iter().cycle().take(source.stride).collect();
    let width = columns.taps.len() * CHANNELS;
    let mut result = vec![0; rows.taps.len() * width];
    let mut sums = vec![0; source.stride];
    let mut line = vec![0; source.stride];
    for (tap, out) in rows.taps.iter().zip(result.chunks_exact_mut(width)) {
        sums.fill(HALF);
        add(&mut sums, &blank, tap.outside);
        for (row, &weight) in tap.pixels.clone().zip(rows.weights(tap)) {
            add(&mut sums, source.row(row).unwrap_or(&blank), weight);
        }
        for (byte, &sum) in line.iter_mut().zip(&sums) {
            *byte = to_byte(sum);
        }
        columns.resample(&line, pad, out);
    }
    result
}

fn add(sums: &mut [i32], line: &[u8], weight: i32) {
    if weight != 0 {
        for (sum, &byte) in sums.iter_mut().zip(line) {
            *sum += weight * i32::from(byte);
        }
    }
}

#[expect(clippy::cast_sign_loss, reason = "clamped to a byte")]
fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// The weights of one axis.
struct Kernel {
    taps: Vec<Tap>,
    weights: Vec<i32>,
}

/// What one pixel of the result is made of.
struct Tap {
    /// Pixels of the picture, without padding.
    pixels: Range<usize>,
    /// Where their weights begin.
    weights: usize,
    /// Sum of the weights that fall on padding.
    outside: i32,
}

impl Kernel {
    #[expect(clippy::cast_precision_loss, reason = "Pillow's box is of single precision")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "Pillow truncates, too")]
    fn new(axis: &Axis) -> Self {
        let scale = f64::from(axis.canvas as f32) / axis.scaled as f64;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let shrink = 1.0 / stretch;
        let inside = u64::from(axis.before)..u64::from(axis.before) + u64::from(axis.picture);

        let mut taps = Vec::with_capacity(axis.kept as usize);
        let mut weights = Vec::new();
        let mut exact = Vec::new();
        for kept in axis.first..axis.first + u64::from(axis.kept) {
            let center = (kept as f64 + 0.5) * scale;
            let low = (center - support + 0.5) as u64;
            let high = ((center + support + 0.5) as u64).min(axis.canvas.into());
            exact.clear();
            exact.extend((low..high).map(|at| bicubic((at as f64 - center + 0.5) * shrink)));
            let total: f64 = exact.iter().sum();

            let at = weights.len();
            let mut outside = 0;
            for (pixel, weight) in (low..high).zip(&exact) {
                let weight = fixed(if total == 0.0 { *weight } else { weight / total });
                if inside.contains(&pixel) { weights.push(weight) } else { outside += weight }
            }
            let first = low.clamp(inside.start, inside.end) - inside.start;
            let first = first as usize;
            taps.push(Tap { pixels: first..first + weights.len() - at, weights: at, outside });
        }
        Self { taps, weights }
    }

    /// Pixels of the picture that are used.
    fn span(&self) -> Range<usize> {
        let used = || self.taps.iter().map(|tap| &tap.pixels).filter(|pixels| !pixels.is_empty());
        used().map(|pixels| pixels.start).min().unwrap_or(0)
            ..used().map(|pixels| pixels.end).max().unwrap_or(0)
    }

    fn weights(&self, tap: &Tap) -> &[i32] {
        &self.weights[tap.weights..tap.weights + tap.pixels.len()]
    }

    /// A row of nothing but padding.
    fn blank(&self, pad: [u8; CHANNELS]) -> Vec<u8> {
        self.taps
            .iter()
            .map(|tap| tap.outside + self.weights(tap).iter().sum::<i32>())
            .flat_map(|total| pad.map(|byte| to_byte(HALF + total * i32::from(byte))))
            .collect()
    }

    fn resample(&self, row: &[u8], pad: [u8; CHANNELS], line: &mut [u8]) {
        let (row, _) = row.as_chunks::<CHANNELS>();
        let (line, _) = line.as_chunks_mut::<CHANNELS>();
        for (tap, out) in self.taps.iter().zip(line) {
            let mut sums = pad.map(|byte| HALF + tap.outside * i32::from(byte));
            for (pixel, &weight) in row[tap.pixels.clone()].iter().zip(self.weights(tap)) {
                for (sum, &byte) in sums.iter_mut().zip(pixel) {
                    *sum += weight * i32::from(byte);
                }
            }
            *out = sums.map(to_byte);
        }
    }
}

/// The bicubic filter with a = -0.5, its terms in Pillow's order.
fn bicubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    } else {
        0.0
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a weight is about one at most")]
fn fixed(weight: f64) -> i32 {
    (weight * f64::from(1 << BITS) + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::geometry::plan;
    use super::*;
    use crate::package::manifest::Fit;

    /// The greatest sum that any bytes can reach, as a share of what 32 bits hold.
    fn load(axis: &Axis) -> f64 {
        let kernel = Kernel::new(axis);
        let sums = kernel.taps.iter().map(|tap| {
            let inside: f64 = kernel.weights(tap).iter().map(|weight| f64::from(weight.abs())).sum();
            inside + f64::from(tap.outside.abs())
        });
        (sums.fold(0.0, f64::max) * 255.0 + f64::from(HALF)) / f64::from(i32::MAX)
    }

    #[test]
    fn no_sum_overflows_for_any_small_axis() {
        for (canvas, scaled) in (1..80).flat_map(|canvas| (1..80).map(move |scaled| (canvas, scaled))) {
            let whole = Axis {
                picture: canvas,
                before: 0,
                canvas,
                scaled: u64::from(scaled),
                first: 0,
                kept: scaled,
            };
            assert!(load(&whole) < 1.0, "{canvas} to {scaled}: {}", load(&whole));
        }
    }

    #[test]
    fn a_picture_of_the_right_size_is_not_changed() {
        let picture = Rgb { width: 7, height: 7, pixels: (0..147).collect() };
        for fit in [Fit::CenterCrop, Fit::Pad] {
            assert_eq!(resize(&picture, &plan(7, 7, 7, fit), [0; 3]), picture);
        }
    }

    proptest! {
        #[test]
        fn no_sum_overflows(width in 1..5000_u32, height in 1..5000_u32, size in 1..400_u32) {
            for fit in [Fit::CenterCrop, Fit::Pad] {
                let plan = plan(width, height, size, fit);
                prop_assert!(load(&plan.x) < 1.0 && load(&plan.y) < 1.0);
            }
        }

        #[test]
        fn one_colour_stays_that_colour(width in 1..90_u32, height in 1..90_u32, size in 1..40_u32, color: [u8; 3]) {
            let pixels = color.repeat((width * height) as usize);
            let picture = Rgb { width, height, pixels };
            for fit in [Fit::CenterCrop, Fit::Pad] {
                let result = resize(&picture, &plan(width, height, size, fit), color);
                prop_assert_eq!(result.pixels, color.repeat((size * size) as usize));
            }
        }
    }
}

//! Resamples a picture quickly rather than exactly, with vector instructions where the processor has them.
//!
//! The same filter with weights of fewer bits: a photograph differs from the reference by 1 level, seldom 2, on less than
//! 1 % of its bytes (`tests/images/photo.jpg` to sizes from 64 to 500). Padding is laid around the resampled picture instead
//! of being resampled with it, so a seam that falls within a pixel of the result becomes padding. The caller falls back on
//! the exact kernel where a picture cannot be resampled here.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use super::Rgb;
use super::geometry::{Axis, Plan};

/// Resamples `picture` into `plan.x.kept` x `plan.y.kept` pixels; padding has the colour `pad`.
///
/// `None` when the picture has too few pixels for its size, or covers no whole pixel of the result.
pub(super) fn resize(picture: &Rgb, plan: &Plan, pad: [u8; 3]) -> Option<Rgb> {
    // Typed, since the untyped interface compiles every kind of pixel into this crate: minutes instead of seconds.
    let source = TypedImageRef::<U8x3>::from_buffer(picture.width, picture.height, &picture.pixels).ok()?;
    let (x, y) = (Stretch::new(&plan.x), Stretch::new(&plan.y));
    if x.across == 0 || y.across == 0 {
        return None;
    }
    // Two calls, one an axis: where fast_image_resize 6.1.0 resamples both in one call, it drops weights of zero at
    // the ends of some rows, takes the first and last row's for the widest, and reads past the end of its buffer.
    let (top, rows) = y.rows(picture.height);
    let mut narrow = TypedImage::<U8x3>::new(x.across, rows);
    let mut resizer = Resizer::new();
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    let across = options.crop(x.from, top.into(), x.length, rows.into());
    resizer.resize_typed(&source, &mut narrow, &across).ok()?;
    let mut inner = TypedImage::<U8x3>::new(x.across, y.across);
    let down = options.crop(0.0, y.from - f64::from(top), x.across.into(), y.length);
    resizer.resize_typed(&narrow, &mut inner, &down).ok()?;

    let mut pixels = vec![pad; plan.x.kept as usize * plan.y.kept as usize];
    let rows = pixels.chunks_exact_mut(plan.x.kept as usize).skip(y.before as usize);
    for (row, line) in rows.zip(inner.pixels().chunks_exact(x.across as usize)) {
        for (pixel, new) in row[x.before as usize..].iter_mut().zip(line) {
            *pixel = new.0;
        }
    }
    Some(Rgb { width: plan.x.kept, height: plan.y.kept, pixels: pixels.into_flattened() })
}

/// Pillow's bicubic reaches two pixels of the larger side to either side.
const REACH: f64 = 2.0;

/// Which stretch of the picture becomes which stretch of the result, along one axis.
struct Stretch {
    from: f64,
    length: f64,
    before: u32,
    across: u32,
}

impl Stretch {
    /// The first line of the picture, `size` of them, that this stretch reads, and how many.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the picture")]
    fn rows(&self, size: u32) -> (u32, u32) {
        let reach = REACH * (self.length / f64::from(self.across)).max(1.0) + 1.0;
        let first = (self.from - reach).floor().max(0.0) as u32;
        let last = (self.from + self.length + reach).ceil().min(size.into()) as u32;
        (first, last - first)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rounded, and inside the result"
    )]
    #[expect(clippy::cast_precision_loss, reason = "sizes far beyond 2^52 cannot be held anyway")]
    fn new(axis: &Axis) -> Self {
        let scale = f64::from(axis.canvas) / axis.scaled as f64;
        if axis.canvas > axis.picture {
            let start = f64::from(axis.before);
            let before = ((start / scale).ceil() as u32).min(axis.kept);
            let end = (((start + f64::from(axis.picture)) / scale).floor() as u32).min(axis.kept);
            let across = end.saturating_sub(before);
            let from = (f64::from(before) * scale - start).max(0.0);
            let length = (f64::from(across) * scale).min(f64::from(axis.picture) - from);
            return Self { from, length, before, across };
        }
        let length = (f64::from(axis.kept) * scale).min(axis.picture.into());
        let from = (axis.first as f64 * scale).min(f64::from(axis.picture) - length);
        Self { from, length, before: 0, across: axis.kept }
    }
}

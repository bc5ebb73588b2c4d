//! Bytes to pixel values.
//!
//! `decode` -> [`Rgb`] -> `geometry` plans -> `resize` -> `[size, size, 3]` u8 -> `tensor` -> [`PixelValues`]
//!
//! The reference for every step is Pillow and the processor that the models were trained with.

mod container;
mod decode;
mod fast;
mod geometry;
mod gif;
mod resize;
mod source;
mod tensor;

use std::fmt;

use crate::error::{Error, Result};
use crate::package::manifest::{Filter, Fit, ImageSpec};

pub use decode::{Limits, decode};
pub use geometry::{Axis, Order, Plan, plan};
pub use source::{read_file, read_stream};
pub use tensor::PixelValues;

/// A picture of 8-bit red, green and blue, row by row without gaps.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rgb {
    /// Columns, at least one.
    pub width: u32,
    /// Rows, at least one.
    pub height: u32,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

impl Rgb {
    /// A picture from its bytes, `height * width * 3` of them.
    ///
    /// # Errors
    /// [`Error::Request`] when a side is zero or the number of bytes is another.
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self> {
        let expected = u128::from(width) * u128::from(height) * 3;
        if expected == 0 || pixels.len() as u128 != expected {
            let bytes = pixels.len();
            return Err(Error::Request(format!(
                "a picture of {width} x {height} pixels has {bytes} bytes where {expected}, and more than none, \
                 are needed; pass width, height and three bytes a pixel"
            )));
        }
        Ok(Self { width, height, pixels })
    }
}

impl fmt::Debug for Rgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rgb {{ {} x {}, {} bytes }}", self.width, self.height, self.pixels.len())
    }
}

/// How pictures are resampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resampler {
    /// Bit for bit as Pillow does.
    #[default]
    Exact,
    /// With vector instructions, for videos and thumbnails; bytes differ from what the model was trained on.
    Fast,
}

/// Turns pictures into what one model's vision encoder takes.
#[derive(Clone, Debug)]
pub struct Preprocessor {
    size: u32,
    fit: Fit,
    pad: [u8; 3],
    table: tensor::Table,
    resampler: Resampler,
}

impl Preprocessor {
    /// A preprocessor that follows a package's image recipe.
    pub fn new(spec: &ImageSpec) -> Self {
        let Filter::Bicubic = spec.filter;
        Self {
            size: spec.size,
            fit: spec.fit,
            pad: spec.pad_color,
            table: tensor::Table::new(spec),
            resampler: Resampler::Exact,
        }
    }

    /// The same preprocessor with another way of resampling.
    #[must_use]
    pub fn with_resampler(self, resampler: Resampler) -> Self {
        Self { resampler, ..self }
    }

    /// The picture as the encoder sees it: `[1, 3, size, size]` f32. `fit` overrides the recipe's own.
    ///
    /// Bit for bit what `CLIPImageProcessorPil` computes from the same RGB picture, unless [`Resampler::Fast`] is
    /// asked for.
    pub fn run(&self, rgb: &Rgb, fit: Option<Fit>) -> PixelValues {
        self.table.apply(&self.resized(rgb, fit))
    }

    /// The picture after resizing and before normalising: `size` x `size` pixels.
    pub fn resized(&self, rgb: &Rgb, fit: Option<Fit>) -> Rgb {
        let plan = plan(rgb.width, rgb.height, self.size, fit.unwrap_or(self.fit));
        let fast = || fast::resize(rgb, &plan, self.pad);
        let fast = if self.resampler == Resampler::Fast { fast() } else { None };
        fast.unwrap_or_else(|| resize::resize(rgb, &plan, self.pad))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(size: u32) -> ImageSpec {
        ImageSpec {
            size,
            fit: Fit::CenterCrop,
            filter: Filter::Bicubic,
            pad_color: [122, 116, 104],
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.25; 3],
        }
    }

    fn slope(width: u32, height: u32) -> Rgb {
        let byte = |n: u32| u8::try_from((n % (width * 3) / 3 + n / (width * 3)) % 256).unwrap();
        Rgb::new(width, height, (0..width * height * 3).map(byte).collect()).unwrap()
    }

    #[test]
    fn a_picture_needs_all_its_bytes() {
        assert!(Rgb::new(2, 1, vec![0; 6]).is_ok());
        for (width, height, bytes) in [(2, 1, 5), (0, 0, 0), (0, 1, 0), (u32::MAX, u32::MAX, 3)] {
            let error = Rgb::new(width, height, vec![0; bytes]).unwrap_err().to_string();
            assert!(error.contains(&format!("{width} x {height} pixels has {bytes} bytes")), "{error}");
        }
    }

    #[test]
    fn a_picture_that_ends_early_or_has_no_size_does_not_panic() {
        for resampler in [Resampler::Exact, Resampler::Fast] {
            let preprocessor = Preprocessor::new(&recipe(8)).with_resampler(resampler);
            for (width, height) in [(0, 0), (3, 0), (9, 5), (1, 1000), (1000, 1), (u32::MAX, 1)] {
                let rgb = Rgb { width, height, pixels: vec![1; 20] };
                assert_eq!(preprocessor.run(&rgb, None).shape(), [1, 3, 8, 8]);
            }
        }
    }

    #[test]
    fn every_shape_becomes_a_square_quickly_and_slowly() {
        for (width, height) in [(1, 1), (5000, 3), (3, 5000), (1, 70_000), (70_000, 1), (64, 48)] {
            for fit in [Fit::CenterCrop, Fit::Pad] {
                let exact = Preprocessor::new(&recipe(24));
                let fast = exact.clone().with_resampler(Resampler::Fast);
                for preprocessor in [exact, fast] {
                    let resized = preprocessor.resized(&slope(width, height), Some(fit));
                    assert_eq!((resized.width, resized.height, resized.pixels.len()), (24, 24, 24 * 24 * 3));
                }
            }
        }
    }

    #[test]
    fn the_fast_way_reads_a_long_line_of_which_one_pixel_is_kept() {
        // Found by the fuzz target image_geometry: the library read past its own buffer here.
        let line = Rgb::new(18_236, 1, vec![200; 18_236 * 3]).unwrap();
        let kept = Preprocessor::new(&recipe(35)).with_resampler(Resampler::Fast).resized(&line, None);
        assert!(kept.pixels.iter().all(|&byte| byte == 200), "{:?}", kept.pixels);
    }

    #[test]
    fn the_fast_way_differs_little_from_the_exact_one() {
        let exact = Preprocessor::new(&recipe(56));
        let fast = exact.clone().with_resampler(Resampler::Fast);
        for (width, height) in [(160, 120), (120, 160), (56, 56), (30, 40)] {
            let rgb = slope(width, height);
            let (a, b) = (exact.resized(&rgb, None), fast.resized(&rgb, None));
            let levels: u32 = a.pixels.iter().zip(&b.pixels).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
            assert!(levels < 56 * 56 * 3 / 4, "{width} x {height}: {levels} levels in all");
        }
    }
}

//! Turns bytes into the normalised pixel values that the encoder takes.

use ndarray::{Array4, ArrayView4};

use super::Rgb;
use crate::package::manifest::ImageSpec;

/// Pixel values of one image, `[1, 3, size, size]` f32: channels red, green, blue, then rows, then columns.
#[derive(Clone, Debug, PartialEq)]
pub struct PixelValues(Array4<f32>);

impl PixelValues {
    /// The values, `[1, 3, size, size]`.
    pub fn view(&self) -> ArrayView4<'_, f32> {
        self.0.view()
    }

    /// Always `[1, 3, size, size]`.
    pub fn shape(&self) -> [usize; 4] {
        self.0.dim().into()
    }

    /// The values themselves, in standard (row-major) layout.
    pub fn into_array(self) -> Array4<f32> {
        self.0
    }
}

/// For each channel, the value of every byte.
///
/// The reference multiplies by the factor in double precision, rounds to single, and subtracts the mean and
/// divides by the deviation in single precision; so does this, and equals it bit for bit.
#[derive(Clone, Debug)]
pub(super) struct Table([[f32; 256]; 3]);

impl Table {
    /// Computes the table of an image recipe.
    #[expect(clippy::cast_possible_truncation, reason = "the reference rounds to single precision here")]
    pub(super) fn new(spec: &ImageSpec) -> Self {
        Self([0, 1, 2].map(|channel| {
            let (mean, std) = (spec.mean[channel] as f32, spec.std[channel] as f32);
            let mut byte = 0.0;
            [(); 256].map(|()| {
                let value = ((byte * spec.rescale) as f32 - mean) / std;
                byte += 1.0;
                value
            })
        }))
    }

    /// Looks every byte of a picture up. A picture whose pixels end early is completed with the value of zero.
    pub(super) fn apply(&self, rgb: &Rgb) -> PixelValues {
        let (width, height) = (rgb.width as usize, rgb.height as usize);
        let (pixels, _) = rgb.pixels.as_chunks::<3>();
        let mut values = Vec::with_capacity(3 * width * height);
        for (channel, table) in self.0.iter().enumerate() {
            values.extend(pixels.iter().take(width * height).map(|pixel| table[usize::from(pixel[channel])]));
            values.resize((channel + 1) * width * height, table[0]);
        }
        let values = Array4::from_shape_vec((1, 3, height, width), values);
        PixelValues(values.expect("three channels of height x width values were just made"))
    }
}

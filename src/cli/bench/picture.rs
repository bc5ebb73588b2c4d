//! A picture for measuring, for when nobody gives one.

use image::{ExtendedColorType, codecs::jpeg::JpegEncoder};

use crate::error::{Error, Result};

/// Columns and rows, as of a small photograph.
pub(super) const SIZE: (u32, u32) = (1024, 768);

/// A JPEG of slopes with grain over them, which take as long to decode as a photograph's.
pub(super) fn jpeg() -> Result<Vec<u8>> {
    let (width, height) = SIZE;
    let mut pixels = Vec::new();
    for row in 0..height {
        for column in 0..width {
            let grain = (row * width + column).wrapping_mul(2_654_435_761) >> 28;
            for part in [row / 4, column / 5, (row + column) / 8] {
                pixels.push((part + grain).to_le_bytes()[0]);
            }
        }
    }
    let mut file = Vec::new();
    JpegEncoder::new_with_quality(&mut file, 90)
        .encode(&pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(|e| {
            Error::Request(format!("the picture for measuring cannot be made ({e}); give --image"))
        })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, decode};

    #[test]
    fn the_picture_is_one_that_the_program_reads() {
        let rgb = decode("picture", &jpeg().unwrap(), &Limits::default()).unwrap();
        assert_eq!((rgb.width, rgb.height), SIZE);
        assert!(rgb.pixels.iter().any(|value| *value != rgb.pixels[0]));
    }
}

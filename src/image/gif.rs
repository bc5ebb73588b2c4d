//! Reads the first frame of a GIF with its colours, also where it is transparent or does not fill the screen.

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};
use image::ImageError;
use image::ImageFormat;
use image::error::{DecodingError as ImageDecodingError, ImageFormatHint};

use crate::error::{Error, Result};

/// Width, height and RGB of the first frame on its screen, which grows when the frame does not fit.
///
/// As in Pillow, what the frame leaves free has the transparent colour, or the palette's first.
pub(super) fn first_frame(
    bytes: &[u8],
    check: impl Fn(u32, u32) -> Result<()>,
    explain: impl Fn(ImageError) -> Error,
) -> Result<(u32, u32, Vec<u8>)> {
    let fail = |cause: DecodingError| {
        explain(ImageError::Decoding(ImageDecodingError::new(
            ImageFormatHint::Exact(ImageFormat::Gif),
            cause,
        )))
    };
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    // Sizes are checked below; a frame takes one byte a pixel.
    options.set_memory_limit(MemoryLimit::Unlimited);
    let mut decoder = options.read_info(bytes).map_err(fail)?;
    let screen = (usize::from(decoder.width()), usize::from(decoder.height()));
    check(decoder.width().into(), decoder.height().into())?;

    let frame = decoder
        .next_frame_info()
        .map_err(fail)?
        .ok_or_else(|| fail(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (across, down) = (usize::from(frame.width), usize::from(frame.height));
    let fill = frame.transparent.unwrap_or(0);
    let local = frame.palette.clone();
    let (width, height) = (screen.0.max(left + across), screen.1.max(top + down));
    let size = |pixels: usize| u32::try_from(pixels).expect("a GIF's side is a sum of two 16-bit numbers");
    check(size(width), size(height))?;

    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(fail)?;
    let palette = local.as_deref().or_else(|| decoder.global_palette());
    let color = |index: u8| match palette {
        Some(palette) => palette.as_chunks::<3>().0.get(usize::from(index)).copied().unwrap_or_default(),
        None => [index; 3],
    };
    let colors: [[u8; 3]; 256] = std::array::from_fn(|index| color(u8::try_from(index).unwrap_or_default()));

    let mut pixels = vec![colors[usize::from(fill)]; width * height];
    if across > 0 {
        for (row, line) in indices.chunks_exact(across).zip(pixels.chunks_exact_mut(width).skip(top)) {
            for (pixel, &index) in line[left..].iter_mut().zip(row) {
                *pixel = colors[usize::from(index)];
            }
        }
    }
    Ok((size(width), size(height), pixels.into_flattened()))
}

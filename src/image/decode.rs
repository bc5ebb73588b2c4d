//! Reads an encoded image into RGB as Pillow's `exif_transpose` and `convert("RGB")` do.
//!
//! Alpha is dropped, not composited, whatever lies below it. A palette becomes its colours. Of 16 bits a colour
//! keeps the upper eight, but grey is cut off at 255, as Pillow's mode `I;16` does. An animation gives its first
//! frame. JPEG and lossy WebP differ from Pillow's decoders by a few levels, since their transforms round
//! differently; everything else is equal.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, GenericImageView, ImageDecoder, ImageError, ImageFormat, ImageReader, RgbImage};

use super::{Rgb, container, gif};
use crate::error::{Error, Result, size};

/// The longest side that is read, in pixels: resampling takes 16 bytes a pixel of it.
const MAX_SIDE: u32 = 1 << 20;

/// How large an image may be. Both are checked before anything is allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the encoded image.
    pub max_bytes: u64,
    /// Pixels of the decoded image; one takes up to 16 bytes while it is decoded.
    pub max_pixels: u64,
}

impl Default for Limits {
    /// 64 MiB and 100 million pixels.
    fn default() -> Self {
        Self { max_bytes: 64 << 20, max_pixels: 100_000_000 }
    }
}

/// Reads a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM image. `name` is what errors call it.
///
/// # Errors
/// [`Error::Image`] when `bytes` are empty, more than allowed, no image, a format that is not read here, more
/// pixels than allowed, truncated or damaged.
pub fn decode(name: &str, bytes: &[u8], limits: &Limits) -> Result<Rgb> {
    let fail = |reason: String| Error::image(name, reason);
    if bytes.is_empty() {
        return Err(fail("it holds no bytes; check that the file or pipe is complete".into()));
    }
    if bytes.len() as u64 > limits.max_bytes {
        return Err(fail(format!(
            "it has {} bytes and the limit is {}; raise the limit on bytes or use a smaller file",
            bytes.len(),
            limits.max_bytes
        )));
    }
    let format = image::guess_format(bytes).map_err(|cause| {
        fail("it is no image that is known here; use JPEG, PNG, WebP, GIF, BMP, TIFF or PNM".into())
            .because(cause)
    })?;
    let named = format!("{format:?}").to_uppercase();
    if format == ImageFormat::Jpeg && !container::jpeg_is_complete(bytes) {
        return Err(fail("this JPEG has no end marker, so it is truncated; fetch or save it again".into()));
    }

    let check = |width: u32, height: u32| check_size(name, width, height, limits);
    let explain = |cause: ImageError| explain(name, &named, cause);
    let (width, height, pixels, orientation) = if format == ImageFormat::Gif {
        let (width, height, pixels) = gif::first_frame(bytes, check, explain)?;
        (width, height, pixels, Orientation::NoTransforms)
    } else {
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut memory = image::Limits::no_limits();
        memory.max_alloc = Some(limits.max_pixels.saturating_mul(16).saturating_add(limits.max_bytes));
        reader.limits(memory);
        let mut decoder = reader.into_decoder().map_err(explain)?;
        let (width, height) = decoder.dimensions();
        check(width, height)?;
        if matches!(
            decoder.original_color_type(),
            image::ExtendedColorType::Cmyk8 | image::ExtendedColorType::Cmyk16
        ) {
            return Err(fail(format!(
                "this {named} is CMYK, which is read from JPEG only; convert it to RGB"
            )));
        }
        check_bytes(name, decoder.total_bytes(), limits)?;
        let orientation = orientation(&mut decoder, format, bytes);
        let picture = DynamicImage::from_decoder(decoder).map_err(explain)?;
        let (width, height) = picture.dimensions();
        let pixels = to_rgb(picture, format, container::is_16_bit_grey_png(bytes)).ok_or_else(|| {
            fail(format!("this {named} has floating-point samples; convert it to 8-bit RGB"))
        })?;
        (width, height, pixels, orientation)
    };

    let picture = RgbImage::from_raw(width, height, pixels).ok_or_else(|| {
        fail(format!("this {named} has fewer pixels than its header says; fetch or save it again"))
    })?;
    let mut picture = DynamicImage::ImageRgb8(picture);
    picture.apply_orientation(orientation);
    let (width, height) = picture.dimensions();
    Rgb::new(width, height, picture.into_rgb8().into_raw())
        .map_err(|cause| fail(format!("this {named} has no pixels; fetch or save it again")).because(cause))
}

fn check_size(name: &str, width: u32, height: u32, limits: &Limits) -> Result<()> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.max_pixels {
        let limit = limits.max_pixels;
        return Err(Error::image(
            name,
            format!(
                "it has {width} x {height} = {pixels} pixels and the limit is {limit}; \
                 raise the limit on pixels or shrink the image"
            ),
        ));
    }
    if width.max(height) > MAX_SIDE {
        let reason =
            format!("it has {width} x {height} pixels and no side may exceed {MAX_SIDE}; crop the image");
        return Err(Error::image(name, reason));
    }
    Ok(())
}

/// Refuses pixels that take more memory than the most of them in 8-bit RGB with transparency would.
fn check_bytes(name: &str, bytes: u64, limits: &Limits) -> Result<()> {
    let most = limits.max_pixels.saturating_mul(4);
    if bytes > most {
        let (bytes, most) = (size(bytes), size(most));
        let reason = format!(
            "its pixels take {bytes} and the limit on pixels allows {most}; save it with 8 bits a sample, \
             raise the limit on pixels or shrink the image"
        );
        return Err(Error::image(name, reason));
    }
    Ok(())
}

/// What a decoder's failure means to the user.
fn explain(name: &str, format: &str, cause: ImageError) -> Error {
    let reason = match &cause {
        ImageError::Unsupported(_) => {
            format!("this kind of {format} is not read here; convert it to an 8-bit RGB PNG or a JPEG")
        }
        ImageError::Limits(_) => {
            format!(
                "this {format} takes more memory than its pixels need; raise the limit on pixels or save it again"
            )
        }
        _ => format!("this {format} is truncated or damaged; fetch or save it again"),
    };
    Error::image(name, reason).because(cause)
}

/// Where Pillow looks for the orientation: EXIF, then XMP.
fn orientation(decoder: &mut impl ImageDecoder, format: ImageFormat, bytes: &[u8]) -> Orientation {
    let exif = match format {
        // An eXIf chunk may follow the pixels, where the decoder has not been yet.
        ImageFormat::Png => container::png_exif(bytes).map(<[u8]>::to_vec),
        ImageFormat::Tiff => return decoder.orientation().unwrap_or(Orientation::NoTransforms),
        _ => decoder.exif_metadata().ok().flatten(),
    };
    let exif = exif.as_deref().map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif));
    exif.and_then(Orientation::from_exif_chunk)
        .or_else(|| {
            container::xmp_orientation(&decoder.xmp_metadata().ok()??).and_then(Orientation::from_exif)
        })
        .unwrap_or(Orientation::NoTransforms)
}

/// `None` for samples that are no integers.
fn to_rgb(picture: DynamicImage, format: ImageFormat, grey_is_cut_off: bool) -> Option<Vec<u8>> {
    #[expect(clippy::cast_possible_truncation, reason = "the upper byte, or at most 255")]
    let byte = |sample: u16, cut_off: bool| match format {
        _ if cut_off => sample.min(255) as u8,
        ImageFormat::Pnm => ((u32::from(sample) + 128) / 257) as u8,
        _ => (sample >> 8) as u8,
    };
    Some(match picture {
        DynamicImage::ImageRgb8(picture) => picture.into_raw(),
        DynamicImage::ImageRgba8(picture) => picture.pixels().flat_map(|p| [p[0], p[1], p[2]]).collect(),
        DynamicImage::ImageLuma8(picture) => picture.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(picture) => picture.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageRgb16(picture) => {
            picture.pixels().flat_map(|p| [p[0], p[1], p[2]]).map(|s| byte(s, false)).collect()
        }
        DynamicImage::ImageRgba16(picture) => {
            picture.pixels().flat_map(|p| [p[0], p[1], p[2]]).map(|s| byte(s, false)).collect()
        }
        DynamicImage::ImageLuma16(picture) => picture.pixels().flat_map(|p| [byte(p[0], true); 3]).collect(),
        DynamicImage::ImageLumaA16(picture) => {
            picture.pixels().flat_map(|p| [byte(p[0], grey_is_cut_off); 3]).collect()
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(bytes: &[u8], limits: &Limits) -> String {
        decode("cat.png", bytes, limits).unwrap_err().to_string()
    }

    /// A PNG header that promises `width` x `height` pixels and brings none.
    fn bomb(width: u32, height: u32) -> Vec<u8> {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend(width.to_be_bytes());
        png.extend(height.to_be_bytes());
        png.extend([8, 2, 0, 0, 0, 0, 0, 0, 0]);
        png
    }

    #[test]
    fn bad_input_is_one_sentence_with_name_value_and_way_out() {
        let limits = Limits { max_bytes: 100, max_pixels: 1000 };
        for (bytes, expected) in [
            (&b""[..], "image cat.png: it holds no bytes; check that the file or pipe is complete"),
            (
                &[7; 101],
                "image cat.png: it has 101 bytes and the limit is 100; raise the limit on bytes or use a smaller file",
            ),
            (
                b"hello, world",
                "image cat.png: it is no image that is known here; use JPEG, PNG, WebP, GIF, BMP, TIFF or PNM",
            ),
            (
                b"P6 40 30 255\n",
                "image cat.png: it has 40 x 30 = 1200 pixels and the limit is 1000; raise the limit on pixels or shrink the image",
            ),
            (b"P6 4 4 255\n123", "image cat.png: this PNM is truncated or damaged; fetch or save it again"),
            (
                &[0xff, 0xd8, 0xff, 0xe0],
                "image cat.png: this JPEG has no end marker, so it is truncated; fetch or save it again",
            ),
            (
                b"\0\0\x01\0\x01\0",
                "image cat.png: this kind of ICO is not read here; convert it to an 8-bit RGB PNG or a JPEG",
            ),
        ] {
            assert_eq!(reason(bytes, &limits), expected);
        }
    }

    #[test]
    fn a_decompression_bomb_is_refused_by_its_header() {
        let mut gif = b"GIF89a\xff\xff\xff\xff\0\0\0,".to_vec();
        gif.extend([0, 0, 0, 0, 255, 255, 255, 255, 0, 2, 0]);
        let bmp = [
            b"BM".as_slice(),
            &[0; 8],
            &[54, 0, 0, 0, 40, 0, 0, 0],
            &[255, 255, 0, 0, 255, 255, 0, 0, 1, 0, 24, 0],
            &[0; 24],
        ];
        for bytes in [b"P6 100000 100000 255\n".to_vec(), gif, bmp.concat()] {
            let reason = reason(&bytes, &Limits::default());
            assert!(reason.contains("pixels and the limit is 100000000; raise"), "{reason}");
        }
        let reason = reason(b"P5 2000000 1 255\n", &Limits::default());
        assert!(reason.contains("2000000 x 1 pixels and no side may exceed 1048576"), "{reason}");
        // The checksum of this header is wrong, which is found first.
        assert!(decode("", &bomb(1 << 30, 1 << 30), &Limits::default()).is_err());
    }

    #[test]
    fn no_prefix_of_a_file_and_no_flipped_byte_panics() {
        let mut pnm = b"P6 3 2 255\n".to_vec();
        pnm.extend(0..18);
        for at in 0..pnm.len() {
            assert!(decode("", &pnm[..at], &Limits::default()).is_err(), "{at} bytes");
            let mut flipped = pnm.clone();
            flipped[at] ^= 0x55;
            let _ = decode("", &flipped, &Limits::default());
        }
    }
}

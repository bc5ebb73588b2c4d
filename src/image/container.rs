//! Finds in encoded bytes what the decoders do not tell: whether a JPEG is whole, and how a picture is turned.

/// Whether a JPEG's markers lead to its end marker.
///
/// The decoder paints what is missing grey and says nothing; Pillow refuses such a file.
pub(super) fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    loop {
        let Some(at) = rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff))
        else {
            return false;
        };
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        match marker {
            0xd9 => return true,
            // Restarts, start of image and a marker for private use have no length.
            0x01 | 0xd0..=0xd8 => {}
            _ => match rest {
                [high, low, ..] => {
                    let length = usize::from(u16::from_be_bytes([*high, *low]));
                    let Some(after) = rest.get(length..) else { return false };
                    rest = after;
                }
                _ => return false,
            },
        }
    }
}

/// The eXIf chunk of a PNG, before or after its pixels.
pub(super) fn png_exif(bytes: &[u8]) -> Option<&[u8]> {
    png_chunks(bytes).find(|(kind, _)| kind == b"eXIf").map(|(_, body)| body)
}

/// Whether this is a PNG of 16-bit grey without alpha of its own.
pub(super) fn is_16_bit_grey_png(bytes: &[u8]) -> bool {
    let header = png_chunks(bytes).next().filter(|(kind, _)| kind == b"IHDR");
    header.is_some_and(|(_, body)| body.get(8..10) == Some(&[16, 0]))
}

fn png_chunks(bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    let mut rest = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n").unwrap_or_default();
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk()?;
        let (kind, after) = after.split_first_chunk()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let body = after.get(..length)?;
        rest = after.get(length + 4..).unwrap_or_default();
        Some((*kind, body))
    })
}

/// The orientation that XMP names, as EXIF numbers it.
pub(super) fn xmp_orientation(xmp: &[u8]) -> Option<u8> {
    const KEY: &[u8] = b"tiff:Orientation";
    xmp.windows(KEY.len() + 3).filter_map(|window| window.strip_prefix(KEY)).find_map(|value| match value {
        [b'=', b'"', digit @ b'0'..=b'9'] | [b'>', digit @ b'0'..=b'9', _] => Some(digit - b'0'),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jpeg_is_complete_when_its_markers_lead_to_the_end_marker() {
        let jpeg = b"\xff\xd8\xff\xe1\0\x04\xff\xd9\xff\xda\0\x02pixels\xff\0\xff\xd0\xff\xff\xd9";
        assert!(jpeg_is_complete(jpeg));
        for end in 0..jpeg.len() {
            assert!(!jpeg_is_complete(&jpeg[..end]), "{end} bytes");
        }
        assert!(!jpeg_is_complete(b"\xff\xd8\xff\xe1\xff\xff\xff\xd9"), "a length beyond the end");
    }

    #[test]
    fn xmp_gives_the_orientation_as_attribute_or_element() {
        assert_eq!(xmp_orientation(br#"<x tiff:Orientation="6"/>"#), Some(6));
        assert_eq!(xmp_orientation(b"<tiff:Orientation>8</tiff:Orientation>"), Some(8));
        assert_eq!(xmp_orientation(b"<tiff:Orientation/>"), None);
        assert_eq!(xmp_orientation(b""), None);
    }

    #[test]
    fn chunks_end_where_a_png_does() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\x02eXIfMMcrc!\0\0\0\xffIDAT";
        assert_eq!(png_exif(png), Some(&b"MM"[..]));
        assert_eq!(png_chunks(png).count(), 1);
        assert_eq!(png_exif(b"no PNG"), None);
    }
}

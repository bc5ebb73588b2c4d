//! No bytes panic the decoders, and any picture of any shape becomes a square.
//!
//! The first bytes choose the size, the fit and a shape; the rest is read as an encoded image and as pixels.

#![no_main]

use libfuzzer_sys::fuzz_target;
use llava_phi::image::{Limits, Preprocessor, Resampler, Rgb, decode};
use llava_phi::package::manifest::{Filter, Fit, ImageSpec};

const LIMITS: Limits = Limits { max_bytes: 1 << 16, max_pixels: 1 << 16 };

fuzz_target!(|bytes: &[u8]| {
    let Some((&[size, choice, width, height], rest)) = bytes.split_first_chunk() else { return };
    let fit = if choice & 1 == 0 { Fit::CenterCrop } else { Fit::Pad };
    let resampler = if choice & 2 == 0 { Resampler::Exact } else { Resampler::Fast };
    let spec = ImageSpec {
        size: u32::from(size % 48) + 1,
        fit,
        filter: Filter::Bicubic,
        pad_color: [122, 116, 104],
        rescale: 1.0 / 255.0,
        mean: [0.5; 3],
        std: [0.25; 3],
    };
    let preprocessor = Preprocessor::new(&spec).with_resampler(resampler);
    let side = spec.size as usize;

    // A shape up to 255 x 255, or very long, whose pixels are the input again and again.
    let stretch = if choice & 4 == 0 { 1 } else { 97 };
    let (width, height) = (u32::from(width).max(1) * stretch, u32::from(height).max(1));
    if width * height <= 1 << 16 && !rest.is_empty() {
        let pixels = rest.iter().copied().cycle().take((width * height * 3) as usize).collect();
        let rgb = Rgb::new(width, height, pixels).expect("as many bytes as pixels need");
        assert_eq!(preprocessor.run(&rgb, None).shape(), [1, 3, side, side]);
    }
    if let Ok(rgb) = decode("fuzz", rest, &LIMITS) {
        assert_eq!(rgb.pixels.len() as u64, u64::from(rgb.width) * u64::from(rgb.height) * 3);
        let values = preprocessor.run(&rgb, None);
        assert_eq!(values.shape(), [1, 3, side, side]);
        assert!(values.view().iter().all(|value| value.is_finite()));
    }
});

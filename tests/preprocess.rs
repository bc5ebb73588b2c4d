//! Pixels equal Pillow's and transformers', from file to tensor.
//!
//! `tests/reference/image.py` makes the hashes. JPEG and lossy WebP decoders differ by design; for those the
//! difference from Pillow's decoder is bounded, and the resize is certified from decoded pixels.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{env, fmt::Write, fs, path::Path};

use llava_phi::image::{Limits, PixelValues, Preprocessor, Resampler, Rgb, decode};
use llava_phi::package::manifest::{Filter, Fit, ImageSpec};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Goldens {
    resize: Vec<Resize>,
    #[serde(default)]
    decode: Vec<Decode>,
}

#[derive(Deserialize)]
struct Resize {
    #[serde(default)]
    file: Option<String>,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    width: u32,
    #[serde(default)]
    height: u32,
    size: u32,
    fit: Fit,
    u8: String,
    f32: String,
}

#[derive(Deserialize)]
struct Decode {
    file: String,
    #[serde(default)]
    width: u32,
    #[serde(default)]
    height: u32,
    #[serde(default)]
    u8: String,
    #[serde(default)]
    refused: Option<String>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("reference/image.json")).unwrap()
}

/// CLIP's recipe, as a manifest gives it.
fn recipe(size: u32, fit: Fit) -> ImageSpec {
    ImageSpec {
        size,
        fit,
        filter: Filter::Bicubic,
        pad_color: [122, 116, 104],
        rescale: 1.0 / 255.0,
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    Sha256::digest(bytes).iter().for_each(|byte| write!(text, "{byte:02x}").unwrap());
    text
}

fn hex_values(values: &PixelValues) -> String {
    hex(&values.view().iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

/// The same bytes as `synthetic` in `image.py`.
fn synthetic(kind: &str, width: u32, height: u32) -> Rgb {
    let byte = |index: u32| {
        let (channel, pixel) = (index % 3, index / 3);
        let (x, y) = (pixel % width, pixel / width);
        let value = match kind {
            "noise" => {
                let mut value = index
                    .wrapping_mul(2_654_435_761)
                    .wrapping_add(width.wrapping_mul(31).wrapping_add(height));
                value ^= value >> 15;
                value = value.wrapping_mul(2_246_822_519);
                value ^= value >> 13;
                value >> 24
            }
            "edges" => ((x / 5 + y / 3 + channel) % 2) * 255,
            _ => (x * (channel + 2) / 3 + y * (4 - channel) / 2) % 256,
        };
        u8::try_from(value).unwrap()
    };
    Rgb::new(width, height, (0..width * height * 3).map(byte).collect()).unwrap()
}

fn check(rgb: &Rgb, golden: &Resize) -> Result<(), String> {
    let preprocessor = Preprocessor::new(&recipe(golden.size, golden.fit));
    let resized = preprocessor.resized(rgb, None);
    let what = format!("{} x {} {} to {} {:?}", rgb.width, rgb.height, golden.kind, golden.size, golden.fit);
    if (resized.width, resized.height) != (golden.size, golden.size) || hex(&resized.pixels) != golden.u8 {
        return Err(format!("{what}: bytes differ"));
    }
    let values = preprocessor.run(rgb, None);
    if hex_values(&values) == golden.f32 { Ok(()) } else { Err(format!("{what}: values differ")) }
}

#[test]
fn resized_pictures_equal_pillow_bit_for_bit() {
    let goldens = goldens().resize;
    assert!(goldens.len() >= 2 * 200, "only {} goldens", goldens.len());
    let faults: Vec<_> = goldens
        .iter()
        .filter_map(|golden| check(&synthetic(&golden.kind, golden.width, golden.height), golden).err())
        .collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), goldens.len(), faults.join("\n"));
}

#[test]
#[ignore = "needs the folder that `tests/reference/image.py --photos DIR` makes, in LLAVA_PHI_PHOTOS"]
fn photographs_equal_pillow_bit_for_bit() {
    let folder = env::var("LLAVA_PHI_PHOTOS").expect("LLAVA_PHI_PHOTOS names the folder");
    let folder = Path::new(&folder);
    let text = fs::read_to_string(folder.join("photos.json")).unwrap();
    let goldens: Goldens = serde_json::from_str(&text).unwrap();
    for golden in &goldens.resize {
        let name = golden.file.as_deref().unwrap();
        let rgb = decode(name, &fs::read(folder.join(name)).unwrap(), &Limits::default()).unwrap();
        check(&rgb, golden).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        let exact = Preprocessor::new(&recipe(golden.size, golden.fit));
        let fast = exact.clone().with_resampler(Resampler::Fast);
        let (max, mean) = difference(&exact.resized(&rgb, None), &fast.resized(&rgb, None));
        println!(
            "{name} {} {:?}: the fast way differs by {max}, {mean:.3} in the mean",
            golden.size, golden.fit
        );
    }
    println!("{} results of photographs are equal", goldens.resize.len());
}

/// Greatest and mean difference of two pictures in levels.
fn difference(a: &Rgb, b: &Rgb) -> (u8, f64) {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let levels: Vec<u8> = a.pixels.iter().zip(&b.pixels).map(|(a, b)| a.abs_diff(*b)).collect();
    let sum: f64 = levels.iter().map(|level| f64::from(*level)).sum();
    (levels.iter().copied().max().unwrap(), sum / f64::from(u32::try_from(levels.len()).unwrap()))
}

#[test]
fn files_are_read_as_pillow_reads_them() {
    let mut faults = Vec::new();
    for golden in goldens().decode {
        let bytes = fs::read(Path::new("tests/images").join(&golden.file)).unwrap();
        let rgb = decode(&golden.file, &bytes, &Limits::default());
        let reference = Path::new("tests/images/decoded").join(format!("{}.png", golden.file));
        let fault = match (rgb, golden.refused) {
            (Ok(_), Some(_)) => "Pillow refuses it".to_owned(),
            (Err(error), None) if golden.file == "cmyk.tiff" || golden.file == "palette.tiff" => {
                assert!(error.to_string().contains("convert it to"), "{error}");
                continue;
            }
            (Err(error), None) => format!("refused: {error:?}"),
            (Ok(rgb), None) if reference.exists() => {
                let pillow = decode("", &fs::read(reference).unwrap(), &Limits::default()).unwrap();
                let (max, mean) = difference(&rgb, &pillow);
                println!("{}: at most {max} levels, {mean:.3} in the mean", golden.file);
                // Decoders of JPEG round and smooth differently; PNM rounds halves up here, to even there.
                if max <= 4 && mean <= 0.4 {
                    continue;
                }
                format!("differs by {max} levels, {mean:.3} in the mean")
            }
            (Ok(rgb), None) if (rgb.width, rgb.height) != (golden.width, golden.height) => format!("{rgb:?}"),
            (Ok(rgb), None) if hex(&rgb.pixels) != golden.u8 => "bytes differ".to_owned(),
            (Ok(_), None) | (Err(_), Some(_)) => continue,
        };
        faults.push(format!("{}: {fault}", golden.file));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

//! Times the exact resize beside the fast one: `cargo bench --bench preprocess`.

use divan::Bencher;
use llava_phi::image::{Preprocessor, Resampler, Rgb};
use llava_phi::package::manifest::{Filter, Fit, ImageSpec};

const SIZES: [(u32, u32); 3] = [(640, 480), (1024, 768), (4000, 3000)];
const WAYS: [Resampler; 2] = [Resampler::Exact, Resampler::Fast];

fn main() {
    divan::main();
}

fn picture((width, height): (u32, u32)) -> Rgb {
    let bytes = (0..width * height * 3).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]);
    Rgb::new(width, height, bytes.collect()).expect("three bytes a pixel were made")
}

fn preprocessor(fit: Fit) -> Preprocessor {
    Preprocessor::new(&ImageSpec {
        size: 336,
        fit,
        filter: Filter::Bicubic,
        pad_color: [122, 116, 104],
        rescale: 1.0 / 255.0,
        mean: [0.48, 0.46, 0.41],
        std: [0.27, 0.26, 0.28],
    })
}

fn cases() -> impl Iterator<Item = ((u32, u32), Resampler)> {
    SIZES.into_iter().flat_map(|size| WAYS.map(|way| (size, way)))
}

struct Case((u32, u32), Resampler);

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {} {:?}", self.0.0, self.0.1, self.1)
    }
}

#[divan::bench(args = cases().map(|(size, way)| Case(size, way)), sample_count = 20, sample_size = 1)]
fn center_crop(bencher: Bencher, case: &Case) {
    let (rgb, preprocessor) = (picture(case.0), preprocessor(Fit::CenterCrop).with_resampler(case.1));
    bencher.bench_local(|| preprocessor.resized(&rgb, None));
}

#[divan::bench(args = cases().map(|(size, way)| Case(size, way)), sample_count = 20, sample_size = 1)]
fn pad(bencher: Bencher, case: &Case) {
    let (rgb, preprocessor) = (picture(case.0), preprocessor(Fit::Pad).with_resampler(case.1));
    bencher.bench_local(|| preprocessor.resized(&rgb, None));
}

#[divan::bench(sample_count = 20, sample_size = 1)]
fn normalize(bencher: Bencher) {
    let (rgb, preprocessor) = (picture((336, 336)), preprocessor(Fit::CenterCrop));
    bencher.bench_local(|| preprocessor.run(&rgb, None));
}

//! The miniature model, opened for benchmarks.

use std::path::PathBuf;

use llava_phi::image::Rgb;
use llava_phi::model::{LlavaPhi, ModelOptions};
use llava_phi::package::ModelPackage;
use llava_phi::runtime::{LibraryOptions, Runtime};

/// The package inside the crate.
pub(crate) fn package() -> ModelPackage {
    ModelPackage::embedded().expect("the crate has a package")
}

/// ONNX Runtime as the program finds it.
pub(crate) fn start() {
    let value = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let library = LibraryOptions {
        environment: value("ORT_DYLIB_PATH"),
        python_environment: value("VIRTUAL_ENV"),
        ..LibraryOptions::default()
    };
    Runtime::start(&library, &mut |_| {}).expect("ONNX Runtime can be found");
}

/// The model on one thread of the processor, from the variant that the package prefers there.
pub(crate) fn open(package: &ModelPackage) -> LlavaPhi {
    let providers = "only:cpu".parse().expect("the processor is a provider");
    let options = ModelOptions { providers, threads: Some(1), ..ModelOptions::default() };
    LlavaPhi::open(package, &options).expect("the model opens")
}

/// A picture of noise; another one for each `number`.
pub(crate) fn picture(number: u32) -> Rgb {
    let (width, height) = (64, 48);
    let bytes = (0..width * height * 3).map(|n| (n + number).wrapping_mul(2_654_435_761).to_be_bytes()[0]);
    Rgb::new(width, height, bytes.collect()).expect("three bytes a pixel were made")
}

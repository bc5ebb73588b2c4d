//! The embedded model, opened for tests, and pictures for it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use llava_phi::{
    chat::{
        conversation::{Message, Part},
        template,
    },
    engine::{Engine, EngineOptions, Request},
    generate::params::GenerateParams,
    image::Rgb,
    model::{LlavaPhi, ModelOptions, selection::VariantSelection},
    package::ModelPackage,
    runtime::{LibraryOptions, Runtime},
};
use serde::Deserialize;

/// The variants of the embedded package.
pub(crate) const VARIANTS: [&str; 2] = ["cpu-int4", "portable-f32"];

pub(crate) fn package() -> &'static ModelPackage {
    static PACKAGE: OnceLock<ModelPackage> = OnceLock::new();
    PACKAGE.get_or_init(|| ModelPackage::embedded().unwrap())
}

/// ONNX Runtime as the program finds it; the first test that needs it may fetch it.
pub(crate) fn library() -> LibraryOptions {
    let value = |name: &str| std::env::var_os(name).map(PathBuf::from);
    LibraryOptions {
        environment: value("ORT_DYLIB_PATH"),
        python_environment: value("VIRTUAL_ENV"),
        ..LibraryOptions::default()
    }
}

/// An engine that nobody else uses; what its cache holds is known.
pub(crate) fn open(variant: &str, threads: usize) -> Engine {
    open_in(package(), variant, threads)
}

/// As [`open`], in a package of the test's own.
pub(crate) fn open_in(package: &ModelPackage, variant: &str, threads: usize) -> Engine {
    let model = options(variant, threads);
    Engine::open(package, &EngineOptions { library: library(), model, ..EngineOptions::default() }).unwrap()
}

/// An engine that all tests share.
pub(crate) fn engine(variant: &str) -> &'static Engine {
    static ENGINES: [OnceLock<Engine>; 2] = [const { OnceLock::new() }; 2];
    let index = VARIANTS.iter().position(|known| *known == variant).unwrap();
    ENGINES[index].get_or_init(|| open(variant, 1))
}

/// A model without an engine, to walk its stages.
pub(crate) fn model(variant: &str, prefill_chunk: Option<usize>) -> LlavaPhi {
    Runtime::start(&library(), &mut |_| {}).unwrap();
    LlavaPhi::open(package(), &ModelOptions { prefill_chunk, ..options(variant, 1) }).unwrap()
}

/// Every component that it has from `variant`, on the processor.
pub(crate) fn options(variant: &str, threads: usize) -> ModelOptions {
    ModelOptions {
        variants: VariantSelection::of(variant),
        providers: "cpu".parse().unwrap(),
        threads: Some(threads),
        ..ModelOptions::default()
    }
}

/// A question about `images`, which stand before it.
pub(crate) fn question(engine: &Engine, images: &[&Drawing], text: &str) -> Request {
    let parts = (0..images.len()).map(Part::Image).chain([Part::Text(text.to_owned())]);
    let pieces = template::render(&engine.facts().template, None, &[Message::user(parts)]).unwrap();
    let images = images.iter().map(|image| engine.prepare_image("drawing", &image.file(), None).unwrap());
    Request::new(engine.prompt(&pieces).unwrap(), images.collect(), GenerateParams::default())
}

/// A picture of shapes on a plain ground, of whole numbers only: `tests/reference/tiny.py` draws the same.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Drawing {
    width: u32,
    height: u32,
    background: [u8; 3],
    shapes: Vec<Shape>,
}

#[derive(Clone, Debug, Deserialize)]
struct Shape {
    kind: Kind,
    color: [u8; 3],
    x: i64,
    y: i64,
    radius: i64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Circle,
    Square,
    Triangle,
}

impl Drawing {
    pub(crate) fn red_circle() -> Self {
        Self::of(Kind::Circle, [200, 30, 40])
    }

    pub(crate) fn blue_square() -> Self {
        Self::of(Kind::Square, [40, 60, 200])
    }

    fn of(kind: Kind, color: [u8; 3]) -> Self {
        let shape = Shape { kind, color, x: 30, y: 34, radius: 13 };
        Self { width: 64, height: 64, background: [230, 228, 235], shapes: vec![shape] }
    }

    pub(crate) fn rgb(&self) -> Rgb {
        let pixels =
            (0..self.height).flat_map(|y| (0..self.width).map(move |x| (i64::from(x), i64::from(y))));
        let pixels = pixels.flat_map(|(x, y)| {
            let top = self.shapes.iter().rev().find(|shape| shape.covers(x, y));
            top.map_or(self.background, |shape| shape.color)
        });
        Rgb::new(self.width, self.height, pixels.collect()).unwrap()
    }

    /// The drawing as an image file.
    pub(crate) fn file(&self) -> Vec<u8> {
        let mut file = format!("P6\n{} {}\n255\n", self.width, self.height).into_bytes();
        file.extend(self.rgb().pixels);
        file
    }
}

impl Shape {
    fn covers(&self, x: i64, y: i64) -> bool {
        let (dx, dy, radius) = (x - self.x, y - self.y, self.radius);
        match self.kind {
            Kind::Circle => dx * dx + dy * dy <= radius * radius,
            Kind::Square => dx.abs().max(dy.abs()) <= radius,
            Kind::Triangle => dy.abs() <= radius && 2 * dx.abs() <= dy + radius,
        }
    }
}

/// Copies a directory and all below it.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// How far `found` is from `wanted`: the L2 norm of the difference, by the L2 norm of `wanted`.
pub(crate) fn distance(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let pairs = || found.iter().zip(wanted).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    norm(&mut pairs().map(|(a, b)| a - b)) / norm(&mut pairs().map(|(_, b)| b))
}

/// The id of the highest logit; of equal ones the lowest.
pub(crate) fn highest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    u32::try_from(best).unwrap()
}

/// The program without anything of the user's own around it.
pub(crate) fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llava-phi"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LLAVA_PHI_") {
            command.env_remove(name);
        }
    }
    command.env_remove("ORT_DYLIB_PATH").env_remove("VIRTUAL_ENV").env("LLAVA_PHI_OFFLINE", "1");
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// The same, told where ONNX Runtime is.
pub(crate) fn program() -> Command {
    let mut command = bare();
    if let Some(library) = library_path() {
        command.env("ORT_DYLIB_PATH", library);
    }
    command
}

/// ONNX Runtime as these tests find it.
pub(crate) fn library_path() -> Option<&'static Path> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || Runtime::start(&library(), &mut |_| {}).unwrap().library().path.clone();
    LIBRARY.get_or_init(find).as_deref()
}

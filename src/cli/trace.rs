//! `llava-phi trace`: one image through every stage, with what comes out of each.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ndarray::{ArrayD, ArrayView1, ArrayViewD};

use super::context::Context;
use super::figures::milliseconds;
use super::generation::check_question;
use super::model::ModelArguments;
use super::npy::{self, Element};
use crate::chat::conversation::{Message, Part};
use crate::chat::template;
use crate::engine::ModelFacts;
use crate::error::Error;
use crate::generate::params::GenerateParams;
use crate::generate::sequence::{Next, Sequence};
use crate::image::{self, Preprocessor};
use crate::model::embed::Run;
use crate::model::vision::ImageInput;
use crate::model::{CausalModel as _, LlavaPhi, position_keys};
use crate::text::{Span, TokenId};

/// What `trace` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The image file, `-` for standard input
    image: OsString,

    /// The question
    question: String,

    /// Write every stage to this directory as `.npy` files
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,

    /// The most tokens of the answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,

    #[command(flatten)]
    model: ModelArguments,
}

pub(super) fn run(arguments: &Arguments, given: &Context) -> anyhow::Result<ExitCode> {
    check_question(&arguments.question)?;
    let package = arguments.model.package()?;
    let runtime = given.start_runtime()?;
    let facts = ModelFacts::new(&package)?;
    let mut model = LlavaPhi::open(&package, &arguments.model.model_options(given, runtime, &package)?)?;
    if let Some(report) = arguments.model.visual_tokens(&package)? {
        writeln!(io::stderr(), "notice: {report}")?;
    }
    let preprocessor = Preprocessor::new(&package.manifest().image);
    let fit = arguments.model.fit();

    let limits = arguments.model.limits();
    let (file, reading) = timed(|| arguments.model.read_image(&arguments.image));
    let (name, bytes) = file?;
    let (rgb, decoding) = timed(|| image::decode(&name, &bytes, &limits));
    let rgb = rgb?;
    // An image that is refused leaves no half of a table.
    let mut walk = Walk::new(arguments.dump.as_deref())?;
    walk.took = reading;
    walk.line("file", &format!("[{}]", bytes.len()), "bytes", "")?;
    walk.took = decoding;
    walk.stage("rgb", &picture(&rgb)?.view())?;
    let resized = walk.time(|| preprocessor.resized(&rgb, fit));
    walk.stage("resized", &picture(&resized)?.view())?;
    let pixels = walk.time(|| preprocessor.run(&rgb, fit));
    walk.stage("pixel_values", &pixels.view().into_dyn())?;

    let features = walk.time(|| model.vision()?.encode(&pixels.view()))?;
    walk.stage("patch_features", &features.view().into_dyn())?;
    let visual_tokens = model.visual_tokens();
    let features = if let Some(attention) = features.attention().filter(|_| !visual_tokens.is_all()) {
        walk.took = Duration::ZERO;
        walk.stage("cls_attention", &attention.into_dyn())?;
        let chosen = walk.time(|| features.chosen(visual_tokens))?;
        walk.stage("visual_tokens", &chosen.view().into_dyn())?;
        chosen
    } else {
        features
    };
    let embeds = walk.time(|| model.projector()?.project(&features.view()))?;
    walk.stage("image_embeds", &embeds.rows().into_dyn())?;

    let message = Message::user([Part::Image(0), Part::Text(arguments.question.clone())]);
    let pieces = template::render(&facts.template, None, &[message])?;
    let prompt = walk.time(|| facts.tokenizer.prompt(&pieces))?;
    let ids: Vec<TokenId> = prompt.token_ids().collect();
    walk.stage("token_ids", &ArrayView1::from(&ids).into_dyn())?;

    let runs: Vec<Run<'_>> = prompt
        .spans()
        .iter()
        .map(|span| match span {
            Span::Text(ids) => Run::Tokens(ids),
            Span::Image(_) => Run::Image { embeds: &embeds, rows: 0..embeds.rows().nrows() },
        })
        .collect();
    let inputs = walk.time(|| model.embedder().splice(&runs))?;
    walk.stage("inputs_embeds", &inputs.view().into_dyn())?;

    let images = [Arc::new(ImageInput::new(pixels))];
    let keys = position_keys(&prompt, &images, visual_tokens)?;
    let mut cache = model.empty_cache()?;
    let mut logits = walk.time(|| model.decoder()?.forward(&inputs.view(), &keys, &mut cache))?;
    walk.stage("logits", &ArrayView1::from(logits.values()).into_dyn())?;

    let room = facts.context - cache.len().min(facts.context);
    let params = GenerateParams::default();
    let limit = arguments.max_new_tokens.min(room);
    let mut answer = Sequence::new(&facts.tokenizer, &params, ids, facts.eos.clone(), limit)?;
    walk.time(|| {
        while let Next::Read(token) = answer.advance(logits.values_mut())?.next {
            logits = model.decode(token, &mut cache)?;
        }
        Ok::<_, Error>(())
    })?;
    walk.stage("answer_ids", &ArrayView1::from(answer.tokens()).into_dyn())?;
    writeln!(walk.out, "{}", answer.text())?;
    Ok(ExitCode::SUCCESS)
}

/// RGB bytes as `[height, width, 3]`.
fn picture(rgb: &image::Rgb) -> anyhow::Result<ArrayD<u8>> {
    let shape = [rgb.height as usize, rgb.width as usize, 3];
    ArrayD::from_shape_vec(&shape[..], rgb.pixels.clone())
        .context("the picture has another size than its pixels")
}

/// Runs `work` and tells how long it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let result = work();
    (result, begin.elapsed())
}

/// Prints each stage and keeps its tensor when asked to.
struct Walk<'a> {
    out: io::Stdout,
    dump: Option<&'a Path>,
    took: Duration,
    number: usize,
}

impl<'a> Walk<'a> {
    fn new(dump: Option<&'a Path>) -> anyhow::Result<Self> {
        if let Some(directory) = dump {
            fs::create_dir_all(directory).map_err(|e| {
                Error::Request(format!(
                    "{} cannot be made a directory ({e}); give --dump another one",
                    directory.display()
                ))
            })?;
        }
        let out = io::stdout();
        let mut walk = Self { out, dump, took: Duration::ZERO, number: 0 };
        writeln!(
            walk.out,
            "{:<15} {:<20} {:<6} {:>10} {:>10} {:>10} {:>9}",
            "stage", "shape", "dtype", "min", "mean", "max", "ms"
        )?;
        Ok(walk)
    }

    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (result, took) = timed(work);
        self.took = took;
        result
    }

    fn stage<T: Number>(&mut self, name: &str, values: &ArrayViewD<'_, T>) -> anyhow::Result<()> {
        let numbers = || values.iter().map(|value| value.to_f64());
        let count = numbers().map(|_| 1.0).sum::<f64>();
        let range = if count > 0.0 {
            format!(
                "{:>10.4} {:>10.4} {:>10.4}",
                numbers().fold(f64::INFINITY, f64::min),
                numbers().sum::<f64>() / count,
                numbers().fold(f64::NEG_INFINITY, f64::max)
            )
        } else {
            String::new()
        };
        self.line(name, &format!("{:?}", values.shape()), T::NAME, &range)?;
        if let Some(directory) = self.dump {
            let path = directory.join(format!("{:02}-{name}.npy", self.number));
            let failed = || format!("{} cannot be written", path.display());
            let mut file = BufWriter::new(File::create(&path).with_context(failed)?);
            npy::write(values, &mut file).with_context(failed)?;
            file.flush().with_context(failed)?;
        }
        self.number += 1;
        Ok(())
    }

    fn line(&mut self, name: &str, shape: &str, dtype: &str, range: &str) -> io::Result<()> {
        let time = milliseconds(self.took);
        writeln!(self.out, "{name:<15} {shape:<20} {dtype:<6} {range:<32} {time:>9.3}")
    }
}

/// A number that a stage is made of.
trait Number: Element {
    const NAME: &'static str;
    fn to_f64(self) -> f64;
}

macro_rules! number {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            const NAME: &'static str = stringify!($ty);
            fn to_f64(self) -> f64 {
                self.into()
            }
        }
    )*};
}

number!(u8, u32, f32);

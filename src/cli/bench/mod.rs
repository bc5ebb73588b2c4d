//! `llava-phi bench`: how long each stage takes here, and how much memory.

mod picture;
mod table;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Write as _},
    num::NonZeroUsize,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::context::Context;
use super::figures::{self, Served};
use super::interrupt;
use super::model::ModelArguments;
use crate::chat::conversation::{Message, Part};
use crate::chat::template;
use crate::engine::ModelFacts;
use crate::engine::bench::{self, Figures, Measurement, MemoryMarks, Scene, Subject, What, Wishes};
use crate::engine::cancel::CancelToken;
use crate::image::Preprocessor;
use crate::machine::{Machine, Processor, Roots};
use crate::model::prefix::PrefixOptions;
use crate::model::{CausalModel as _, LlavaPhi, ModelOptions};
use crate::runtime::Runtime;
use crate::text::{Span, TokenId};

/// Between two drawings of the bar.
const TICK: Duration = Duration::from_millis(200);
/// The number of the JSON object's form: another one when a key changes its meaning or goes.
const SCHEMA: u32 = 1;

const RULE: &str = "\
load counts from the package's directory to a model that passed its self-check, as cold as the files are; it is measured \
once, since a second load in one process is another thing. A first token is counted from the pixel values of a picture \
that nothing knows, a second question from the tokens of another question about it. A decode step reads one token and \
chooses the likeliest; none ends the answer. Depth 0 is an empty cache (for `ahead` one position). Only ratios of runs that were taken in turn on \
a quiet machine mean much: `busy` says what share of all processors others took meanwhile.

The JSON object keeps every sample; its keys stay, more may come.";

/// What `bench` takes.
#[derive(Debug, clap::Args)]
#[command(after_long_help = RULE)]
pub(super) struct Arguments {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Measure only these; `load` is measured in any case
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    only: Vec<Wanted>,

    /// Positions of the prompts that are read; 128 and 640 otherwise, where they fit
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    lengths: Option<Vec<usize>>,

    /// Positions behind which tokens are decoded; 0 and 700 otherwise, where they fit
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    depths: Option<Vec<usize>>,

    /// Tokens that are decoded at each depth
    #[arg(long, value_name = "N", default_value = "16")]
    steps: NonZeroUsize,

    /// Text tokens of a question about a picture, those of the template among them
    #[arg(long, value_name = "N", default_value_t = 64)]
    text: usize,

    /// How often each thing is measured
    #[arg(long, value_name = "N", default_value = "5")]
    repetitions: NonZeroUsize,

    /// How often each thing is done before that, without counting
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: usize,

    /// Begin no repetition but the first of each thing once this is spent, load aside
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    budget: u64,

    /// An image file to preprocess and to ask about; a picture that the program makes otherwise
    #[arg(long, value_name = "FILE")]
    image: Option<OsString>,

    #[command(flatten)]
    model: ModelArguments,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Nothing but the load
    Load,
    /// An image file to pixel values
    Preprocess,
    /// An image through the encoder and the projector
    Encode,
    /// Prompts of several lengths
    Prefill,
    /// Tokens at several depths
    Decode,
    /// A first question about a picture
    FirstToken,
    /// A second question about it
    SecondQuestion,
    /// 1, 2, 4 and 8 tokens in one run at several depths, as --lookup reads them; not unless it is named
    Ahead,
    /// A token of each of 1, 2, 4 and 8 sequences in one run at several depths, as `serve` reads them; not unless it is
    /// named
    Together,
    /// The whole context
    Context,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: u32,
    versions: Versions<'a>,
    machine: MachineFacts<'a>,
    package: PackageFacts<'a>,
    settings: Settings<'a>,
    providers: BTreeMap<&'static str, Served<'a>>,
    #[serde(flatten)]
    figures: &'a Figures,
}

#[derive(Debug, Serialize)]
struct Versions<'a> {
    llava_phi: &'a str,
    onnx_runtime: &'a str,
    /// How ONNX Runtime was found.
    library: String,
}

#[derive(Debug, Serialize)]
struct MachineFacts<'a> {
    os: &'a str,
    arch: &'a str,
    processor: &'a Processor,
}

#[derive(Debug, Serialize)]
struct PackageFacts<'a> {
    name: &'a str,
    context: usize,
    tokens_per_image: usize,
}

#[derive(Debug, Serialize)]
struct Settings<'a> {
    repetitions: usize,
    warm_up: usize,
    budget_s: u64,
    steps: usize,
    text_tokens: usize,
    picture: &'a str,
    picture_bytes: usize,
    model: figures::ModelSettings,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let mut marks = MemoryMarks::start();
    let wishes = arguments.wishes();
    let (picture, file) = if let Some(path) = &arguments.image {
        arguments.model.read_image(path)?
    } else {
        let (width, height) = picture::SIZE;
        (format!("made, JPEG of {width} x {height}"), picture::jpeg()?)
    };

    let begin = Instant::now();
    let runtime = context.start_runtime()?;
    let started = begin.elapsed();
    let begin = Instant::now();
    let package = arguments.model.package()?;
    let options = ModelOptions {
        // What was kept of a prompt would be measured instead of reading it.
        prefixes: PrefixOptions { memory: Some(0), directory: None },
        parallel: wishes.parallel(),
        ..arguments.model.model_options(context, runtime, &package)?
    };
    let settings = figures::ModelSettings::new(&options);
    let mut facts = ModelFacts::new(&package)?;
    let mut model = LlavaPhi::open(&package, &options)?;
    let loaded = begin.elapsed();
    marks.mark("load");

    facts.context = facts.context.min(model.capacity()?);
    facts.read_of_images(&package, model.visual_tokens());
    context.tell_visual_tokens(&facts);
    let reports = model.reports();
    let (before, after) = around(&facts)?;
    let scene = Scene { picture, file, limits: arguments.model.limits(), before, after };
    let preprocessor = Preprocessor::new(&package.manifest().image);
    let token = CancelToken::new();
    let bar = bar()?;
    let measured = interrupt::cancels(&token, || {
        bench::measure(model, (&facts, &preprocessor), &scene, &wishes, marks, &token, &mut |step| {
            bar.set_length(step.jobs as u64);
            bar.set_position(step.job as u64);
            bar.set_message(format!("{}, run {}", step.name, step.done + 1));
        })
    });
    bar.finish_and_clear();
    let mut figures = measured?;
    let load = [Measurement::once(What::Runtime, started), Measurement::once(What::Load, loaded)];
    figures.measurements.splice(0..0, load);

    let machine = Machine::probe(&Roots::default());
    let report = Report {
        schema: SCHEMA,
        versions: versions(runtime),
        machine: MachineFacts { os: machine.os, arch: machine.arch, processor: &machine.processor },
        package: PackageFacts {
            name: &facts.name,
            context: facts.context,
            tokens_per_image: facts.tokens_per_image,
        },
        settings: Settings {
            repetitions: wishes.repetitions,
            warm_up: wishes.warm_up,
            budget_s: arguments.budget,
            steps: wishes.steps,
            text_tokens: wishes.text,
            picture: &scene.picture,
            picture_bytes: scene.file.len(),
            model: settings,
        },
        providers: figures::providers(&reports),
        figures: &figures,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        table::write(&mut out, &report)?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn wishes(&self) -> Wishes {
        let subject = |part: &Wanted| {
            Some(match part {
                Wanted::Load => return None,
                Wanted::Preprocess => Subject::Preprocess,
                Wanted::Encode => Subject::Encode,
                Wanted::Prefill => Subject::Prefill,
                Wanted::Decode => Subject::Decode,
                Wanted::FirstToken => Subject::FirstToken,
                Wanted::SecondQuestion => Subject::SecondQuestion,
                Wanted::Ahead => Subject::Ahead,
                Wanted::Together => Subject::Together,
                Wanted::Context => Subject::Context,
            })
        };
        let subjects = match &self.only[..] {
            [] => Subject::USUAL.to_vec(),
            parts => parts.iter().filter_map(subject).collect(),
        };
        Wishes {
            subjects,
            lengths: self.lengths.clone(),
            depths: self.depths.clone(),
            steps: self.steps.get(),
            text: self.text,
            repetitions: self.repetitions.get(),
            warm_up: self.warm_up,
            budget: Duration::from_secs(self.budget),
        }
    }
}

fn versions(runtime: &Runtime) -> Versions<'_> {
    Versions {
        llava_phi: env!("CARGO_PKG_VERSION"),
        onnx_runtime: runtime.version(),
        library: runtime.library().origin.to_string(),
    }
}

/// The tokens that the template puts before a picture, and those behind it without a question.
fn around(facts: &ModelFacts) -> anyhow::Result<(Vec<TokenId>, Vec<TokenId>)> {
    let message = Message::user([Part::Image(0)]);
    let prompt = facts.tokenizer.prompt(&template::render(&facts.template, None, &[message])?)?;
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut seen = false;
    for span in prompt.spans() {
        match span {
            Span::Image(_) => seen = true,
            Span::Text(ids) if seen => after.extend(ids),
            Span::Text(ids) => before.extend(ids),
        }
    }
    Ok((before, after))
}

/// A line on standard error, where that is a terminal.
fn bar() -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {elapsed}")
            .context("the bar's template is wrong")?,
    );
    // One run may take a minute; a bar that stands still looks like a fault.
    bar.enable_steady_tick(TICK);
    Ok(bar)
}

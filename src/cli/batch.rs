//! `llava-phi batch`: many questions, JSON lines in, JSON lines out.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::context::Context;
use super::figures::{Answer, Outside};
use super::form::constrained;
use super::generation::{self, GenerationArguments};
use super::interrupt;
use super::model::ModelArguments;
use crate::engine::Engine;
use crate::error::Error;
use crate::generate::params::GenerateParams;
use crate::generate::sequence::FinishReason;
use crate::model::vision::ImageInput;

/// What `batch` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// JSON lines, each `{"id": ..., "question": "...", "images": ["path", ...]}`
    questions: PathBuf,

    /// Where the answers go, one JSON line each; questions whose id is there already are not asked again
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Tell how likely each token of the answer was, and the N likeliest in its place, at most 20
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    generation: GenerationArguments,
}

/// One line of the questions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    id: Value,
    #[serde(rename = "question")]
    text: String,
    #[serde(default)]
    images: Vec<PathBuf>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let params = arguments.generation.params(arguments.logprobs)?;
    let form = arguments.generation.form.spec()?;
    let questions = read_questions(&arguments.questions)?;
    let answered = answered_ids(&arguments.output)?;
    let mut output = OpenOptions::new().create(true).append(true).open(&arguments.output).map_err(|e| {
        let path = arguments.output.display();
        Error::Request(format!("{path} cannot be written ({e}); give --output another file"))
    })?;
    let engine = arguments.model.open_engine(context)?;
    let params = constrained(params, form.as_ref(), &engine)?;
    let open: Vec<&Question> =
        questions.iter().filter(|question| !answered.contains(&question.id.to_string())).collect();
    let progress = ProgressBar::new(open.len() as u64).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} {eta}")
            .context("the bar's template is wrong")?,
    );

    let mut last_images = LastImages::default();
    let mut failures = 0_usize;
    for question in &open {
        let result = ask(arguments, &engine, question, &params, &mut last_images);
        let mut line = match result {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(ExitCode::from(super::INTERRUPTED)),
            Err(error) => {
                failures += 1;
                json!({ "error": super::sentence(&error) })
            }
        };
        line["id"] = question.id.clone();
        // In one piece, so that a batch that is killed leaves no half of a line.
        output
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("{} cannot be written", arguments.output.display()))?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    if failures > 0 {
        return Err(Error::Request(format!(
            "{failures} of {} questions have no answer; their lines in {} say why",
            open.len(),
            arguments.output.display()
        ))
        .into());
    }
    Ok(ExitCode::SUCCESS)
}

/// The images of the last question: those of one image are usually asked one after another.
#[derive(Debug, Default)]
struct LastImages {
    paths: Vec<PathBuf>,
    images: Vec<Arc<ImageInput>>,
}

/// Asks one question; `None` when Ctrl-C stopped it.
fn ask(
    arguments: &Arguments,
    engine: &Engine,
    question: &Question,
    params: &GenerateParams,
    last: &mut LastImages,
) -> anyhow::Result<Option<Value>> {
    generation::check_question(&question.text)?;
    let begin = Instant::now();
    if last.paths != question.images {
        let paths: Vec<OsString> = question.images.iter().map(OsString::from).collect();
        last.images = arguments.model.images(engine, &paths)?;
        last.paths.clone_from(&question.images);
    }
    let images = last.images.clone();
    let outside = Outside { load: Duration::ZERO, preprocess: begin.elapsed() };
    let request = arguments.generation.request(engine, images, &question.text, params.clone())?;
    let completion = interrupt::cancels(&request.cancel.clone(), || engine.generate(request)?.complete())?;
    if completion.finish_reason == FinishReason::Cancelled {
        return Ok(None);
    }
    let reports = engine.reports();
    let answer = Answer::new(&completion, outside, &reports, engine.facts());
    Ok(Some(serde_json::to_value(answer)?))
}

fn read_questions(path: &Path) -> anyhow::Result<Vec<Question>> {
    let unreadable =
        |e: io::Error| Error::Request(format!("{} cannot be read ({e}); check the path", path.display()));
    let file = File::open(path).map_err(unreadable)?;
    let mut questions = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(unreadable)?;
        if line.trim().is_empty() {
            continue;
        }
        let question = serde_json::from_str(&line).map_err(|e| {
            Error::Request(format!(
                "{} line {}: {e}; a line is {{\"id\": 1, \"question\": \"...\", \"images\": [\"path\"]}}",
                path.display(),
                number + 1
            ))
        })?;
        questions.push(question);
    }
    Ok(questions)
}

/// The ids that have an answer already, so that a stopped batch goes on where it stopped.
fn answered_ids(path: &Path) -> anyhow::Result<HashSet<String>> {
    let Ok(file) = File::open(path) else { return Ok(HashSet::new()) };
    let mut ids = HashSet::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|e| {
            Error::Request(format!("{} cannot be read ({e}); give --output another file", path.display()))
        })?;
        let answer: Value = serde_json::from_str(&line).map_err(|_| {
            Error::Request(format!("{} holds something else than answers; give another file", path.display()))
        })?;
        if answer.get("error").is_none() {
            ids.insert(answer["id"].to_string());
        }
    }
    Ok(ids)
}

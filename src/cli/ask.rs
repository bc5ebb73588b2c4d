//! `llava-phi ask`: one question, one answer.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use anyhow::Context as _;

use super::context::Context;
use super::figures::{self, Answer, Outside};
use super::form::constrained;
use super::generation::{self, GenerationArguments};
use super::interrupt;
use super::live::Live;
use super::model::{ModelArguments, STDIN};
use crate::engine::event::Completion;
use crate::engine::{Engine, Request};
use crate::error::{Error, Result};
use crate::generate::sequence::FinishReason;

/// What `ask` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Image files, `-` for standard input, and last of all the question
    #[arg(required = true, value_name = "IMAGES AND QUESTION")]
    words: Vec<OsString>,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Tell how likely each token of the answer was, and the N likeliest in its place, at most 20
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    generation: GenerationArguments,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let (question, images) = question_of(&arguments.words)?;
    let params = arguments.generation.params(arguments.logprobs)?;
    let form = arguments.generation.form.spec()?;
    let engine = arguments.model.open_engine(context)?;
    let params = constrained(params, form.as_ref(), &engine)?;

    let begin = Instant::now();
    let images = arguments.model.images(&engine, images)?;
    let outside = Outside { load: engine.load_time(), preprocess: begin.elapsed() };

    let request = arguments.generation.request(&engine, images, question, params)?;
    let cancel = request.cancel.clone();
    let completion = interrupt::cancels(&cancel, || answer(&engine, request, !arguments.json))?;

    let reports = engine.reports();
    if arguments.json {
        let answer = Answer::new(&completion, outside, &reports, engine.facts());
        let json = serde_json::to_string(&answer).context("the answer has no JSON form")?;
        writeln!(io::stdout(), "{json}")?;
    } else {
        writeln!(io::stdout())?;
        figures::print(&mut io::stderr(), &completion, outside, &reports)?;
    }
    Ok(match completion.finish_reason {
        FinishReason::Cancelled => ExitCode::from(super::INTERRUPTED),
        FinishReason::Stop | FinishReason::Length => ExitCode::SUCCESS,
    })
}

/// The question is the last word; everything before it is an image.
fn question_of(words: &[OsString]) -> Result<(&str, &[OsString])> {
    let (question, images) =
        words.split_last().ok_or_else(|| Error::Request("there is no question; ask something".to_owned()))?;
    let question = question.to_str().ok_or_else(|| {
        Error::Request("the question is not UTF-8 text; the question comes last, after the images".to_owned())
    })?;
    generation::check_question(question)?;
    if question == STDIN || Path::new(question).is_file() {
        return Err(Error::Request(format!(
            "{question} is an image and there is no question; the question comes last, after the images"
        )));
    }
    Ok((question, images))
}

/// Runs `request`, writing text to standard output as it comes when `stream` is set.
fn answer(engine: &Engine, request: Request, stream: bool) -> anyhow::Result<Completion> {
    let answer = engine.generate(request)?;
    if !stream {
        return Ok(answer.complete()?);
    }
    let mut live = Live::new();
    let completion = answer.complete_with(|event| live.show(event))?;
    live.finish()?;
    Ok(completion)
}

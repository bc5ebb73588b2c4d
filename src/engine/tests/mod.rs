//! What the engine promises, with a model that follows a script.

mod ahead;
mod answers;
mod broken;
mod cancelled;
mod choices;
mod threads;
mod together;

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::cancel::CancelToken;
use super::event::{Completion, Event};
use super::stream::GenerationStream;
use super::testing::{BROKEN, Call, Log, ScriptedModel, until_cancelled};
use super::{Engine, ModelFacts, Request};
use crate::error::{Error, Result};
use crate::generate::constraint::{Constraint, ConstraintSpec};
use crate::generate::params::{GenerateParams, Sampling};
use crate::generate::sequence::FinishReason;
use crate::image::{Limits, Preprocessor, Rgb};
use crate::model::Room;
use crate::model::cancel::Canceler;
use crate::model::vision::ImageInput;
use crate::package::ModelPackage;
use crate::text::{Piece, Prompt, TokenId};

/// Positions that the context of the tests holds, and that an image takes.
const CONTEXT: usize = 100;
const IMAGE: usize = 10;

fn facts() -> ModelFacts {
    let facts = ModelFacts::new(&ModelPackage::embedded().unwrap()).unwrap();
    ModelFacts { context: CONTEXT, tokens_per_image: IMAGE, ..facts }
}

fn engine(script: impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static) -> (Engine, Log) {
    let facts = facts();
    let (model, log) = ScriptedModel::new(facts.tokenizer.vocabulary(), script);
    let preprocessor = Preprocessor::new(&ModelPackage::embedded().unwrap().manifest().image);
    let engine = Engine::with_model(model, facts, preprocessor, Limits::default()).unwrap();
    (engine, log)
}

/// Says `text` to every prompt and ends.
fn saying(text: &str) -> impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static {
    let facts = facts();
    let tokens = facts.tokenizer.encode(text).unwrap();
    let mut said = 0;
    move |call, _| {
        said = if call.is_prefill() { 0 } else { said + 1 };
        Ok(tokens.get(said).copied().unwrap_or(facts.eos[0]))
    }
}

fn letter(text: &str) -> TokenId {
    facts().tokenizer.encode(text).unwrap()[0]
}

fn image() -> Arc<ImageInput> {
    let package = ModelPackage::embedded().unwrap();
    let rgb = Rgb::new(1, 1, vec![1, 2, 3]).unwrap();
    Arc::new(ImageInput::new(Preprocessor::new(&package.manifest().image).run(&rgb, None)))
}

/// A prompt of so many tokens.
fn tokens(length: usize) -> Prompt {
    facts().tokenizer.prompt(&[Piece::Tokens(vec![5; length])]).unwrap()
}

fn request(prompt: Prompt) -> Request {
    Request::new(prompt, Vec::new(), GenerateParams::default())
}

fn ask(engine: &Engine) -> Result<Completion> {
    engine.generate(request(tokens(3)))?.complete()
}

fn at_most(max_new_tokens: usize) -> GenerateParams {
    GenerateParams { max_new_tokens: Some(max_new_tokens), ..GenerateParams::default() }
}

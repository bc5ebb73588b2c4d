//! The reply to a chat or a completion, whole or in chunks.

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::error::Answer;
use super::generation::Generation;
use super::models::Offered;
use super::sse::{self, Chunks};
use super::state::{self, AppState};
use super::usage::{self, Spent};
use crate::engine::event::Completion;
use crate::generate::sequence::{Delta, FinishReason};

/// What an endpoint writes of answers beside what [`ended`] does; each value is an object.
pub(super) trait Choices: Default + Send + 'static {
    /// What the identifier of a reply begins with.
    const ID: &'static str;
    /// `object` of a reply that is sent whole.
    const WHOLE: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;

    /// An answer that is sent whole.
    fn whole(completion: &Completion, logprobs: bool) -> Value;
    /// What comes before an answer that is sent in chunks, if anything does.
    fn begin() -> Option<Value>;
    /// More of answer `index`.
    fn more(&mut self, index: usize, delta: &Delta, logprobs: bool) -> Value;
    /// What stands where more of an answer would, at its end.
    fn end() -> Value;
}

/// What all parts of a reply have in common.
#[derive(Debug)]
pub(super) struct Reply {
    id: String,
    created: u64,
    model: String,
    /// Answers to each prompt.
    each: usize,
    logprobs: bool,
}

impl Reply {
    /// A reply of `model` with `each` answers to each prompt.
    pub(super) fn new<C: Choices>(state: &AppState, model: &Offered, each: usize, logprobs: bool) -> Self {
        let (id, created) = (state.id(C::ID), state::now());
        Self { id, created, model: model.name.clone(), each, logprobs }
    }

    /// Answers with what `generation` makes; `stream` is what [`sse::asked`] says.
    ///
    /// # Errors
    /// As [`Generation::complete`].
    pub(super) async fn send<C: Choices>(
        self,
        generation: Generation,
        stream: Option<bool>,
    ) -> Answer<Response> {
        let Some(include_usage) = stream else {
            return Ok(Json(self.whole::<C>(&generation.complete().await?)).into_response());
        };
        let (spent, choices) = (Spent::default(), C::default());
        Ok(sse::response(generation, Streamed { reply: self, include_usage, spent, choices }))
    }

    fn whole<C: Choices>(&self, completions: &[Completion]) -> Value {
        let choice = |(index, completion): (usize, &Completion)| {
            with(ended(index, completion), C::whole(completion, self.logprobs))
        };
        let choices: Vec<Value> = completions.iter().enumerate().map(choice).collect();
        let mut whole = self.part(C::WHOLE, &choices);
        whole["usage"] = Spent::of(completions, self.each).json();
        whole
    }

    fn part(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// A reply in chunks.
struct Streamed<C> {
    reply: Reply,
    include_usage: bool,
    spent: Spent,
    choices: C,
}

impl<C: Choices> Streamed<C> {
    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.reply.part(C::CHUNK, &[choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// A chunk after which more comes.
    fn open(&self, index: usize, more: Value) -> Value {
        self.chunk(with(json!({"index": index, "logprobs": null, "finish_reason": null}), more))
    }
}

impl<C: Choices> Chunks for Streamed<C> {
    fn begin(&mut self) -> Vec<Value> {
        let begun = |index| C::begin().map(|begin| self.open(index, begin));
        (0..self.reply.each).filter_map(begun).collect()
    }

    fn more(&mut self, index: usize, delta: Delta) -> Vec<Value> {
        let more = self.choices.more(index, &delta, self.reply.logprobs);
        vec![self.open(index, more)]
    }

    fn finish(&mut self, index: usize, completion: Completion) -> Vec<Value> {
        self.spent.add(index, self.reply.each, &completion.usage);
        vec![self.chunk(with(ended(index, &completion), C::end()))]
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut chunk = self.reply.part(C::CHUNK, &[]);
        chunk["usage"] = self.spent.json();
        vec![chunk]
    }
}

/// The end of an answer: why, and as extensions how long it took and how likely each choice was.
fn ended(index: usize, completion: &Completion) -> Value {
    let mut told = json!({
        "index": index,
        "logprobs": null,
        "finish_reason": match completion.finish_reason {
            FinishReason::Length => "length",
            // Nobody is told of an answer that was given up on.
            FinishReason::Stop | FinishReason::Cancelled => "stop",
        },
        "timings": usage::timings(completion),
    });
    if let Some(choices) = &completion.choices {
        let choice =
            |(text, probability): &(String, f64)| json!({"choice": text, "probability": probability});
        told["choice_probabilities"] = choices.iter().map(choice).collect();
    }
    told
}

/// The members of both objects; those of `more` win.
fn with(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

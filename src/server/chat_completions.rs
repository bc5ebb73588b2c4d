//! `POST /v1/chat/completions`: questions with images in OpenAI's form.

use std::{collections::BTreeMap, mem};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::choosing::{self, Choosing};
use super::error::{Answer, ApiError};
use super::generation::Generation;
use super::json::Body;
use super::limits::ServerLimits;
use super::log::Entry;
use super::logprobs;
use super::messages::{Conversation, Messages};
use super::models::{Model, Offered};
use super::pictures::{self, Picture};
use super::response_format::{Form, ResponseFormat};
use super::sse::{self, Chunks, StreamOptions};
use super::state::{self, AppState};
use super::texts::Texts;
use super::usage::{self, Spent};
use crate::engine::event::Completion;
use crate::engine::{Priority, Request};
use crate::generate::constraint::{Constraint, ConstraintSpec};
use crate::generate::params::GenerateParams;
use crate::generate::sequence::{Delta, FinishReason};

/// A question in OpenAI's form. A parameter that is not listed here is refused by name; `null` is as if it were not there.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Asked {
    /// The model's name, as `/v1/models` lists it.
    model: String,
    /// The chat so far.
    messages: Messages,
    /// Send the answer as server-sent events while it is made.
    stream: bool,
    /// How it is sent.
    stream_options: Option<StreamOptions>,
    /// The most tokens of the answer; what the context leaves otherwise.
    max_tokens: Option<usize>,
    /// The same as `max_tokens`.
    max_completion_tokens: Option<usize>,
    /// Sample at this temperature. 0 takes the likeliest token, and so does leaving out this and every cut.
    temperature: Option<f32>,
    /// Sample among the likeliest tokens that together have this probability.
    top_p: Option<f32>,
    /// Extension: sample among this many of the likeliest tokens.
    top_k: Option<usize>,
    /// Extension: sample among tokens that are at least this likely, relative to the likeliest.
    min_p: Option<f32>,
    /// Extension: divide the score of tokens that occurred by this; 1 changes nothing.
    repetition_penalty: Option<f32>,
    /// Subtract this from the score of a token for each time that it occurred in the answer.
    frequency_penalty: Option<f32>,
    /// Subtract this from the score of tokens that occurred in the answer.
    presence_penalty: Option<f32>,
    /// Add this to the scores of these tokens, by their numbers.
    logit_bias: BTreeMap<String, f32>,
    /// Tell how likely each token was.
    logprobs: bool,
    /// Tell this many of the likeliest tokens in each place too.
    top_logprobs: Option<usize>,
    /// Seed of the draws; the same seed gives the same answer. Answer `i` of `n` is drawn with `seed + i`.
    seed: Option<i64>,
    /// Texts that end the answer and are not part of it.
    stop: Option<Texts>,
    /// Answers to give; 1 otherwise. At temperature 0 they are alike.
    n: Option<usize>,
    /// What the answer has to look like.
    response_format: Option<ResponseFormat>,
    /// Extension: the answer is one of these texts, and how likely each is is told.
    choice: Option<Vec<String>>,
    /// Extension: this regular expression matches the whole answer.
    regex: Option<String>,
    /// Extension: this grammar, in the form of Lark, produces the answer.
    grammar: Option<String>,
    /// Extension: `low`, `normal` or `high`: who goes first where several wait.
    priority: Priority,
    /// Only `["text"]`, which is what the model gives.
    modalities: Option<Vec<Modality>>,
    /// Who asks. It changes nothing, and is neither kept nor logged.
    #[allow(dead_code)] // Only read to refuse what is no text; so are the next two.
    user: Option<String>,
    /// As `user`.
    #[allow(dead_code)]
    safety_identifier: Option<String>,
    /// Notes of the client's own. They change nothing, and are neither kept nor logged.
    #[allow(dead_code)]
    metadata: Option<BTreeMap<String, String>>,
    /// Only `false`: nothing is stored.
    store: bool,
}

/// What an answer can be made of.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Modality {
    /// Text.
    Text,
}

/// What is asked, read from its form.
pub(super) struct Question {
    pub(super) chat: Conversation,
    pub(super) pictures: Vec<Picture>,
    pub(super) params: GenerateParams,
    pub(super) count: usize,
    pub(super) form: Option<(&'static str, ConstraintSpec)>,
    pub(super) priority: Priority,
}

/// Answers a question.
pub(super) async fn answer(
    State(state): State<AppState>,
    entry: Entry,
    Body(asked): Body<Asked>,
) -> Answer<Response> {
    let model = state.models()?.get(&asked.model)?;
    let stream = sse::asked(asked.stream, asked.stream_options.as_ref())?;
    let mut question = asked.read(&state.options().limits)?;
    question.gather(&state, &entry).await?;
    let (each, logprobs) = (question.count, question.params.logprobs.is_some());
    let generation = Generation::start(&state, &model, entry, move |model| question.requests(model)).await?;
    let id = state.id("chatcmpl-");
    let reply = Reply { id, created: state::now(), model, each, logprobs };
    Ok(match stream {
        Some(include_usage) => {
            sse::response(generation, Streamed { reply, include_usage, spent: Spent::default() })
        }
        None => Json(reply.whole(&generation.complete().await?)).into_response(),
    })
}

impl Asked {
    fn read(self, limits: &ServerLimits) -> Answer<Question> {
        if self.store {
            return Err(ApiError::value("store", "store is true and nothing is stored here; leave it out"));
        }
        if self.modalities.is_some_and(|modalities| modalities.is_empty()) {
            return Err(ApiError::value(
                "modalities",
                "modalities are empty; the model gives text, leave it out",
            ));
        }
        let max_tokens = match (self.max_tokens, self.max_completion_tokens) {
            (Some(one), Some(other)) if one != other => {
                return Err(ApiError::value(
                    "max_tokens",
                    format!("max_tokens is {one} and max_completion_tokens {other}; give one of them"),
                ));
            }
            (one, other) => one.or(other),
        };
        let logprobs = match (self.logprobs, self.top_logprobs) {
            (true, top) => Some(top.unwrap_or_default()),
            (false, None) => None,
            (false, Some(_)) => {
                return Err(ApiError::value("top_logprobs", "top_logprobs need logprobs to be true"));
            }
        };
        let count = choosing::count(self.n, 1, limits)?;
        let choosing = Choosing {
            max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias,
            logprobs,
            seed: self.seed,
            stop: self.stop,
        };
        let params = choosing.params(limits)?;
        let Self { response_format, choice, regex, grammar, priority, .. } = self;
        let form = Form { response_format, choice, regex, grammar }.spec()?;
        let chat = Conversation::new(self.messages, limits)?;
        Ok(Question { chat, pictures: Vec::new(), params, count, form, priority })
    }
}

impl Question {
    /// Brings the images here that are elsewhere.
    pub(super) async fn gather(&mut self, state: &AppState, entry: &Entry) -> Answer<()> {
        self.pictures = pictures::gather(state, entry, mem::take(&mut self.chat.images)).await?;
        Ok(())
    }

    /// Decodes the images and encodes the text, once for all answers.
    pub(super) fn requests(self, model: &Model) -> Answer<Vec<Request>> {
        let Self { chat, pictures, mut params, count, form, priority } = self;
        let engine = &model.engine;
        let image = |(number, picture): (usize, &Picture)| {
            let bytes = picture.bytes(number)?;
            let image = engine.prepare_image(&number.to_string(), &bytes, model.fit);
            image.map_err(|error| ApiError::from(error).about("messages"))
        };
        let images = (1..).zip(&pictures).map(image).collect::<Answer<Vec<_>>>()?;
        let prompt = engine.prompt(&chat.pieces(&engine.facts().template)?)?;
        params.constraint = constraint(model, form)?;
        let request = |params| Request { priority, ..Request::new(prompt.clone(), images.clone(), params) };
        Ok(choosing::each(&params, count).map(request).collect())
    }
}

/// Compiles what an answer has to look like.
pub(super) fn constraint(
    model: &Model,
    form: Option<(&'static str, ConstraintSpec)>,
) -> Answer<Option<Constraint>> {
    let compile = |(name, spec): (&str, ConstraintSpec)| {
        let compiled = Constraint::new(&model.engine.facts().tokenizer, &spec);
        compiled.map_err(|error| ApiError::from(error).about(name))
    };
    form.map(compile).transpose()
}

/// What all parts of a reply have in common.
#[derive(Debug)]
struct Reply {
    id: String,
    created: u64,
    model: Offered,
    each: usize,
    logprobs: bool,
}

impl Reply {
    fn whole(&self, completions: &[Completion]) -> Value {
        let choice = |(index, completion): (usize, &Completion)| {
            let mut choice = ended(index, completion);
            choice["message"] = json!({"role": "assistant", "content": completion.text, "refusal": null});
            choice["logprobs"] = self.logprobs.then(|| logprobs::chat(&completion.logprobs)).into();
            choice
        };
        let choices: Vec<Value> = completions.iter().enumerate().map(choice).collect();
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            "usage": Spent::of(completions, self.each).json(),
        })
    }

    fn chunk(&self, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        })
    }
}

/// The end of an answer: why, and as extensions how long it took and how likely each choice was.
pub(super) fn ended(index: usize, completion: &Completion) -> Value {
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

/// A reply in chunks.
struct Streamed {
    reply: Reply,
    include_usage: bool,
    spent: Spent,
}

impl Streamed {
    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.reply.chunk(&[choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for Streamed {
    fn begin(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        let choice = |index| json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        (0..self.reply.each).map(|index| self.chunk(choice(index))).collect()
    }

    fn more(&mut self, index: usize, delta: Delta) -> Vec<Value> {
        vec![self.chunk(json!({
            "index": index,
            "delta": {"content": delta.text},
            "logprobs": self.reply.logprobs.then(|| logprobs::chat(&delta.logprobs)),
            "finish_reason": null,
        }))]
    }

    fn finish(&mut self, index: usize, completion: Completion) -> Vec<Value> {
        self.spent.add(index, self.reply.each, &completion.usage);
        let mut choice = ended(index, &completion);
        choice["delta"] = json!({});
        vec![self.chunk(choice)]
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut chunk = self.reply.chunk(&[]);
        chunk["usage"] = self.spent.json();
        vec![chunk]
    }
}

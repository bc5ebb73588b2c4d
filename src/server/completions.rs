//! `POST /v1/completions`: text that the model goes on with, in OpenAI's older form.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::chat_completions::{constraint, ended};
use super::choosing::{self, Choosing};
use super::error::{Answer, ApiError};
use super::generation::Generation;
use super::json::Body;
use super::limits::ServerLimits;
use super::log::Entry;
use super::logprobs::Offsets;
use super::models::{Model, Offered};
use super::response_format::Form;
use super::sse::{self, Chunks, StreamOptions};
use super::state::{self, AppState};
use super::texts::Texts;
use super::usage::Spent;
use crate::engine::event::Completion;
use crate::engine::{Priority, Request};
use crate::generate::constraint::ConstraintSpec;
use crate::generate::params::GenerateParams;
use crate::generate::sequence::Delta;
use crate::text::Piece;

/// Tokens of an answer unless the request says so, as in OpenAI's API.
const MAX_TOKENS: usize = 16;

/// Text to go on with. The model reads it as it is, without the layout of a chat, and white space at the beginning of what
/// it adds is left out. A parameter that is not listed here is refused by name; `null` is as if it were not there.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Asked {
    /// The model's name, as `/v1/models` lists it.
    model: String,
    /// What the model reads; each of several is answered.
    prompt: Texts,
    /// Send the answer as server-sent events while it is made.
    stream: bool,
    /// How it is sent.
    stream_options: Option<StreamOptions>,
    /// The most tokens of the answer; 16 otherwise.
    max_tokens: Option<usize>,
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
    /// Tell how likely each token was, and this many of the likeliest in its place.
    logprobs: Option<usize>,
    /// Seed of the draws; the same seed gives the same answer. Answer `i` to a prompt is drawn with `seed + i`.
    seed: Option<i64>,
    /// Texts that end the answer and are not part of it.
    stop: Option<Texts>,
    /// Answers to give to each prompt; 1 otherwise. At temperature 0 they are alike.
    n: Option<usize>,
    /// Extension: the answer is one of these texts, and how likely each is is told.
    choice: Option<Vec<String>>,
    /// Extension: this regular expression matches the whole answer.
    regex: Option<String>,
    /// Extension: this grammar, in the form of Lark, produces the answer.
    grammar: Option<String>,
    /// Extension: `low`, `normal` or `high`: who goes first where several wait.
    priority: Priority,
    /// Only `false`: the prompt is not sent back.
    echo: bool,
    /// Who asks. It changes nothing, and is neither kept nor logged.
    #[allow(dead_code)] // Only read to refuse what is no text.
    user: Option<String>,
}

/// What is asked, read from its form.
struct Texted {
    prompts: Vec<String>,
    params: GenerateParams,
    each: usize,
    form: Option<(&'static str, ConstraintSpec)>,
    priority: Priority,
}

/// Goes on with texts.
pub(super) async fn answer(
    State(state): State<AppState>,
    entry: Entry,
    Body(asked): Body<Asked>,
) -> Answer<Response> {
    let model = state.models()?.get(&asked.model)?;
    let stream = sse::asked(asked.stream, asked.stream_options.as_ref())?;
    let texted = asked.read(&state.options().limits)?;
    let (each, answers) = (texted.each, texted.each * texted.prompts.len());
    let logprobs = texted.params.logprobs.is_some();
    let generation = Generation::start(&state, &model, entry, move |model| texted.requests(model)).await?;
    let reply = Reply { id: state.id("cmpl-"), created: state::now(), model, each, logprobs };
    let Some(include_usage) = stream else {
        return Ok(Json(reply.whole(&generation.complete().await?)).into_response());
    };
    let offsets = (0..answers).map(|_| Offsets::default()).collect();
    Ok(sse::response(generation, Streamed { reply, include_usage, spent: Spent::default(), offsets }))
}

impl Asked {
    fn read(self, limits: &ServerLimits) -> Answer<Texted> {
        if self.echo {
            return Err(ApiError::unsupported("echo", ""));
        }
        let prompts = self.prompt.into_vec();
        if prompts.is_empty() {
            return Err(ApiError::value("prompt", "there is no prompt; give text to go on with"));
        }
        let chars = prompts.iter().map(|prompt| prompt.chars().count()).sum::<usize>();
        if chars > limits.prompt_chars {
            let most = limits.prompt_chars;
            let told = format!("the prompt has more than {most} characters; shorten it");
            return Err(ApiError::value("prompt", told).coded("prompt_too_long"));
        }
        let each = choosing::count(self.n, prompts.len(), limits)?;
        let choosing = Choosing {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias,
            logprobs: self.logprobs,
            seed: self.seed,
            stop: self.stop,
        };
        let params = choosing.params(limits).map_err(|error| error.renamed("top_logprobs", "logprobs"))?;
        let Self { choice, regex, grammar, priority, .. } = self;
        let form = Form { response_format: None, choice, regex, grammar }.spec()?;
        Ok(Texted { prompts, params, each, form, priority })
    }
}

impl Texted {
    fn requests(self, model: &Model) -> Answer<Vec<Request>> {
        let Self { prompts, mut params, each, form, priority } = self;
        let engine = &model.engine;
        params.constraint = constraint(model, form)?;
        let mut requests = Vec::new();
        for text in prompts {
            let prompt =
                engine.prompt(&[Piece::Text(text)]).map_err(|e| ApiError::from(e).about("prompt"))?;
            // As many as fit, where nobody asked for a number.
            let room = engine.facts().context.saturating_sub(prompt.tokens()).max(1);
            let most = params.max_new_tokens.unwrap_or(MAX_TOKENS.min(room));
            let params = GenerateParams { max_new_tokens: Some(most), ..params.clone() };
            let request = |params| Request { priority, ..Request::new(prompt.clone(), Vec::new(), params) };
            requests.extend(choosing::each(&params, each).map(request));
        }
        Ok(requests)
    }
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
            choice["text"] = completion.text.clone().into();
            choice["logprobs"] = self.logprobs.then(|| Offsets::default().tell(&completion.logprobs)).into();
            choice
        };
        let choices: Vec<Value> = completions.iter().enumerate().map(choice).collect();
        let mut whole = self.chunk(&choices);
        whole["usage"] = Spent::of(completions, self.each).json();
        whole
    }

    fn chunk(&self, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        })
    }
}

/// A reply in chunks.
struct Streamed {
    reply: Reply,
    include_usage: bool,
    spent: Spent,
    offsets: Vec<Offsets>,
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
        Vec::new()
    }

    fn more(&mut self, index: usize, delta: Delta) -> Vec<Value> {
        let logprobs = self.offsets.get_mut(index).filter(|_| self.reply.logprobs);
        let logprobs = logprobs.map(|offsets| offsets.tell(&delta.logprobs));
        let choice = json!({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": null});
        vec![self.chunk(choice)]
    }

    fn finish(&mut self, index: usize, completion: Completion) -> Vec<Value> {
        self.spent.add(index, self.reply.each, &completion.usage);
        let mut choice = ended(index, &completion);
        choice["text"] = "".into();
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

//! `POST /v1/chat/completions`: questions with images in OpenAI's form.

use std::{collections::BTreeMap, mem};

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::choosing::{self, Choosing};
use super::common::Common;
use super::error::{Answer, ApiError, LENGTH};
use super::generation::Generation;
use super::json::{Body, Parts};
use super::limits::ServerLimits;
use super::log::Entry;
use super::logprobs;
use super::messages::{Conversation, Messages};
use super::models::Model;
use super::pictures::{self, Picture};
use super::reply::{Choices, Reply};
use super::response_format::{self, ResponseFormat};
use super::state::AppState;
use crate::engine::event::Completion;
use crate::engine::{Priority, Request};
use crate::generate::constraint::ConstraintSpec;
use crate::generate::params::GenerateParams;
use crate::generate::sequence::Delta;

/// A question in OpenAI's form. A parameter that is not listed here is refused by name; `null` is as if it were not there.
pub(super) type Asked = Parts<Own, Common, Choosing>;

/// What only a chat has.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Own {
    /// The chat so far.
    messages: Messages,
    /// The same as `max_tokens`.
    max_completion_tokens: Option<usize>,
    /// Tell how likely each token was.
    logprobs: bool,
    /// Tell this many of the likeliest tokens in each place too.
    top_logprobs: Option<usize>,
    /// What the answer has to look like.
    response_format: Option<ResponseFormat>,
    /// Only `["text"]`, which is what the model gives.
    modalities: Option<Vec<Modality>>,
    /// As `user`.
    #[allow(dead_code)] // Only read to refuse what is no text; so is the next one.
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
    let Parts(own, common, choosing) = asked;
    let model = state.models()?.get(common.model.as_deref())?;
    let stream = common.stream()?;
    let length = if choosing.max_tokens.is_some() { LENGTH } else { "max_completion_tokens" };
    let named = move |error: ApiError| error.renamed(LENGTH, length);
    let mut question = own.read(common, choosing, &state.options().limits).map_err(named)?;
    question.gather(&state, &entry).await?;
    let (each, logprobs) = (question.count, question.params.logprobs.is_some());
    let generation = Generation::start(&state, &model, entry, move |model| question.requests(model)).await;
    let generation = generation.map_err(named)?;
    Reply::new::<Chat>(&state, &model, each, logprobs).send::<Chat>(generation, stream).await
}

impl Own {
    fn read(self, common: Common, mut choosing: Choosing, limits: &ServerLimits) -> Answer<Question> {
        if self.store {
            return Err(ApiError::value("store", "store is true and nothing is stored here; leave it out"));
        }
        if self.modalities.is_some_and(|modalities| modalities.is_empty()) {
            return Err(ApiError::value(
                "modalities",
                "modalities are empty; the model gives text, leave it out",
            ));
        }
        choosing.max_tokens = match (choosing.max_tokens, self.max_completion_tokens) {
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
        let (count, priority) = (common.count(1, limits)?, common.priority);
        let params = choosing.params(logprobs, limits)?;
        let form = common.form(self.response_format)?;
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
        choosing::check(&params, model)?;
        let engine = &model.engine;
        let image = |(number, picture): (usize, &Picture)| {
            let bytes = picture.bytes(number)?;
            let image = engine.prepare_image(&number.to_string(), &bytes, model.fit);
            image.map_err(|error| ApiError::from(error).about("messages"))
        };
        let images = (1..).zip(&pictures).map(image).collect::<Answer<Vec<_>>>()?;
        let prompt = engine.prompt(&chat.pieces(&engine.facts().template)?)?;
        params.constraint = response_format::compiled(model, form)?;
        choosing::blame(&params)?;
        let request = |params| Request { priority, ..Request::new(prompt.clone(), images.clone(), params) };
        Ok(choosing::each(&params, count).map(request).collect())
    }
}

/// Answers as the messages of a chat.
#[derive(Default)]
struct Chat;

impl Choices for Chat {
    const ID: &'static str = "chatcmpl-";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn whole(completion: &Completion, logprobs: bool) -> Value {
        json!({
            "message": {"role": "assistant", "content": completion.text, "refusal": null},
            "logprobs": logprobs.then(|| logprobs::chat(&completion.logprobs)),
        })
    }

    fn begin() -> Option<Value> {
        Some(json!({"delta": {"role": "assistant", "content": "", "refusal": null}}))
    }

    fn more(&mut self, _: usize, delta: &Delta, logprobs: bool) -> Value {
        json!({
            "delta": {"content": delta.text},
            "logprobs": logprobs.then(|| logprobs::chat(&delta.logprobs)),
        })
    }

    fn end() -> Value {
        json!({"delta": {}})
    }
}

//! `POST /v1/responses`: questions with images in OpenAI's newer form. Nothing is stored: a chat is sent whole each time.

mod events;
mod input;
mod reply;

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chat_completions::Question;
use super::choosing::Choosing;
use super::error::{Answer, ApiError, CHAT, LENGTH};
use super::generation::Generation;
use super::json::Body;
use super::limits::ServerLimits;
use super::log::Entry;
use super::messages::Conversation;
use super::models::Model;
use super::sse;
use super::state::AppState;
use crate::engine::Priority;
use crate::generate::constraint::ConstraintSpec;
use events::Streamed;
use input::Input;
use reply::Reply;

/// A question in OpenAI's newer form. A parameter that is not listed here is refused by name; `null` is as if it were not
/// there.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Asked {
    /// The model's name, as `/v1/models` lists it; may be left out where one is served and not a directory of them.
    model: Option<String>,
    /// The question, or the chat so far.
    input: Input,
    /// What holds for the whole chat, before what `input` says of that; it takes the place of the model's own.
    instructions: Option<String>,
    /// The most tokens of the answer; what the context leaves otherwise.
    max_output_tokens: Option<usize>,
    /// Sample at this temperature. 0 takes the likeliest token, and so does leaving out this and `top_p`.
    temperature: Option<f32>,
    /// Sample among the likeliest tokens that together have this probability.
    top_p: Option<f32>,
    /// What the answer looks like.
    text: Option<TextConfig>,
    /// Send the answer as server-sent events while it is made.
    stream: bool,
    /// How it is sent.
    stream_options: Option<StreamOptions>,
    /// Only `false`: nothing is stored.
    store: bool,
    /// Only `disabled`: a chat that is too long is refused, never cut.
    #[allow(dead_code)] // Only read to refuse what is something else.
    truncation: Option<Truncation>,
    /// What is told beside the answer.
    include: Vec<Include>,
    /// With `include`: tell this many of the likeliest tokens in each place too.
    top_logprobs: Option<usize>,
    /// Notes of the client's own. They come back with the answer, and are neither kept nor logged.
    metadata: Option<BTreeMap<String, String>>,
    /// Who asks. It changes nothing, and is neither kept nor logged.
    user: Option<String>,
    /// As `user`.
    safety_identifier: Option<String>,
}

/// What an answer looks like.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct TextConfig {
    /// Its form.
    #[serde(default)]
    format: TextFormat,
}

/// The form of an answer.
#[derive(Clone, Debug, Deserialize, Serialize)]
// Braces, since serde ignores what stands beside the tag of a variant without them.
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum TextFormat {
    /// As the model likes.
    Text {},
    /// Any JSON object.
    JsonObject {},
    /// JSON that a schema describes.
    JsonSchema {
        /// What the client calls it. It changes nothing: the model is not shown it.
        name: String,
        /// What the client says of it. It changes nothing: the model is not shown it.
        #[serde(default)]
        description: Option<String>,
        /// The schema.
        schema: Value,
        /// Whether the schema is followed to the letter. It always is.
        #[serde(default)]
        strict: Option<bool>,
    },
}

impl TextFormat {
    /// What the engine is asked for.
    fn spec(self) -> Answer<Option<ConstraintSpec>> {
        match self {
            Self::Text {} => Ok(None),
            Self::JsonObject {} => Ok(Some(ConstraintSpec::JsonObject)),
            Self::JsonSchema { name, .. } if name.is_empty() => {
                Err(ApiError::value("text.format", "the schema's name is empty; give it one"))
            }
            Self::JsonSchema { schema, .. } => Ok(Some(ConstraintSpec::JsonSchema(schema))),
        }
    }
}

impl Default for TextFormat {
    fn default() -> Self {
        Self::Text {}
    }
}

/// How an answer is sent while it is made.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    /// Only `false`: events are sent as they are, without padding.
    #[serde(default)]
    include_obfuscation: bool,
}

/// What is told beside an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Include {
    /// How likely each token was.
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
}

/// What becomes of a chat that is too long.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Truncation {
    /// It is refused.
    Disabled,
}

/// Answers a question.
pub(super) async fn answer(
    State(state): State<AppState>,
    entry: Entry,
    Body(asked): Body<Asked>,
) -> Answer<Response> {
    let model = state.models()?.get(asked.model.as_deref())?;
    asked.check()?;
    let stream = asked.stream;
    let reply = Reply::new(&state, &model, &asked);
    let mut question = asked.read(&state.options().limits)?;
    question.gather(&state, &entry).await.map_err(of_input)?;
    let prepare = move |model: &Model| question.requests(model);
    let generation = Generation::start(&state, &model, entry, prepare).await.map_err(of_input)?;
    if stream {
        return Ok(sse::response(generation, Streamed::new(reply)));
    }
    let completions = generation.complete().await?;
    let completion = completions.first().ok_or_else(ApiError::internal)?;
    Ok(Json(reply.whole(completion)).into_response())
}

impl Asked {
    /// Refuses what this server cannot do, by name.
    fn check(&self) -> Answer<()> {
        if self.store {
            return Err(ApiError::value("store", "store is true and nothing is stored here; leave it out"));
        }
        if self.top_logprobs.is_some() && !self.wants_logprobs() {
            let why = "top_logprobs need include to hold message.output_text.logprobs";
            return Err(ApiError::value("top_logprobs", why));
        }
        match &self.stream_options {
            Some(_) if !self.stream => {
                let why = "stream_options need stream to be true; leave one out";
                Err(ApiError::value("stream_options", why))
            }
            Some(options) if options.include_obfuscation => {
                let why = "include_obfuscation is true and events are never padded here; leave it out";
                Err(ApiError::value("stream_options", why))
            }
            _ => Ok(()),
        }
    }

    fn wants_logprobs(&self) -> bool {
        self.include.contains(&Include::Logprobs)
    }

    /// What is asked, and how it is answered.
    fn read(self, limits: &ServerLimits) -> Answer<Question> {
        if self.max_output_tokens == Some(0) {
            let why = "max_output_tokens is 0, which leaves no answer; give at least 1";
            return Err(ApiError::value("max_output_tokens", why));
        }
        let choosing = Choosing {
            max_tokens: self.max_output_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            ..Choosing::default()
        };
        let logprobs = self.wants_logprobs().then(|| self.top_logprobs.unwrap_or_default());
        let params = choosing.params(logprobs, limits)?;
        let form = self.text.unwrap_or_default().format.spec()?.map(|spec| ("text.format", spec));
        let chat = Conversation::new(self.input.into_messages()?, limits).map_err(of_input)?;
        let chat = chat.instructed(self.instructions.as_deref(), limits)?;
        Ok(Question { chat, pictures: Vec::new(), params, count: 1, form, priority: Priority::default() })
    }
}

/// A fault by the names of this endpoint.
fn of_input(error: ApiError) -> ApiError {
    error.renamed(CHAT, "input").renamed(LENGTH, "max_output_tokens")
}

//! `POST /v1/completions`: text that the model goes on with, in OpenAI's older form.

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::choosing::{self, Choosing};
use super::common::Common;
use super::error::{Answer, ApiError, CHAT};
use super::generation::Generation;
use super::json::{Body, Parts};
use super::limits::ServerLimits;
use super::log::Entry;
use super::logprobs::Offsets;
use super::models::Model;
use super::reply::{Choices, Reply};
use super::response_format;
use super::state::AppState;
use super::texts::Texts;
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
pub(super) type Asked = Parts<Own, Common, Choosing>;

/// What only a completion has.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Own {
    /// What the model reads; each of several is answered.
    prompt: Texts,
    /// Tell how likely each token was, and this many of the likeliest in its place.
    logprobs: Option<usize>,
    /// Only `false`: the prompt is not sent back.
    echo: bool,
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
    let Parts(own, common, choosing) = asked;
    let model = state.models()?.get(common.model.as_deref())?;
    let stream = common.stream()?;
    let texted = own.read(common, choosing, &state.options().limits)?;
    let (each, logprobs) = (texted.each, texted.params.logprobs.is_some());
    let generation = Generation::start(&state, &model, entry, move |model| texted.requests(model)).await;
    let generation = generation.map_err(|error| error.renamed(CHAT, "prompt"))?;
    Reply::new::<Text>(&state, &model, each, logprobs).send::<Text>(generation, stream).await
}

impl Own {
    fn read(self, common: Common, choosing: Choosing, limits: &ServerLimits) -> Answer<Texted> {
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
        let (each, priority) = (common.count(prompts.len(), limits)?, common.priority);
        let params = choosing.params(self.logprobs, limits);
        let params = params.map_err(|error| error.renamed("top_logprobs", "logprobs"))?;
        Ok(Texted { prompts, params, each, form: common.form(None)?, priority })
    }
}

impl Texted {
    fn requests(self, model: &Model) -> Answer<Vec<Request>> {
        let Self { prompts, mut params, each, form, priority } = self;
        choosing::check(&params, model)?;
        let engine = &model.engine;
        params.constraint = response_format::compiled(model, form)?;
        choosing::blame(&params)?;
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

/// Answers as text, with what each has told of its tokens.
#[derive(Default)]
struct Text(Vec<Offsets>);

impl Choices for Text {
    const ID: &'static str = "cmpl-";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = Self::WHOLE;

    fn whole(completion: &Completion, logprobs: bool) -> Value {
        let logprobs = logprobs.then(|| Offsets::default().tell(&completion.logprobs));
        json!({"text": completion.text, "logprobs": logprobs})
    }

    fn begin() -> Option<Value> {
        None
    }

    fn more(&mut self, index: usize, delta: &Delta, logprobs: bool) -> Value {
        if self.0.len() <= index {
            self.0.resize_with(index + 1, Offsets::default);
        }
        let logprobs = logprobs.then(|| self.0[index].tell(&delta.logprobs));
        json!({"text": delta.text, "logprobs": logprobs})
    }

    fn end() -> Value {
        json!({"text": ""})
    }
}

//! A response in OpenAI's newer form, from its beginning to its end.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::models::Offered;
use super::super::state::{self, AppState};
use super::super::{logprobs, usage};
use super::{Asked, TextConfig};
use crate::engine::event::{Completion, Usage};
use crate::generate::logprobs::TokenLogprobs;
use crate::generate::sequence::FinishReason;

/// How far a response is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Progress<'a> {
    /// Nothing of the answer is there.
    Begun,
    /// The answer is there.
    Ended(&'a Completion),
    /// There will be no answer.
    Failed(&'a ApiError),
}

/// What all parts of a reply have in common.
#[derive(Debug)]
pub(super) struct Reply {
    id: String,
    /// The name of the one message of the answer.
    pub(super) item: String,
    created: u64,
    model: Offered,
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    text: TextConfig,
    top_logprobs: Option<usize>,
    metadata: BTreeMap<String, String>,
    user: Option<String>,
    safety_identifier: Option<String>,
}

impl Reply {
    pub(super) fn new(state: &AppState, model: &Offered, asked: &Asked) -> Self {
        Self {
            id: state.id("resp_"),
            item: state.id("msg_"),
            created: state::now(),
            model: model.clone(),
            instructions: asked.instructions.clone(),
            max_output_tokens: asked.max_output_tokens,
            temperature: asked.temperature,
            top_p: asked.top_p,
            text: asked.text.clone().unwrap_or_default(),
            top_logprobs: asked.top_logprobs,
            metadata: asked.metadata.clone().unwrap_or_default(),
            user: asked.user.clone(),
            safety_identifier: asked.safety_identifier.clone(),
        }
    }

    /// The response to a request that is not streamed.
    pub(super) fn whole(&self, completion: &Completion) -> Value {
        self.response(Progress::Ended(completion))
    }

    /// The response as far as it is.
    pub(super) fn response(&self, progress: Progress<'_>) -> Value {
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "background": false,
            "error": null,
            "incomplete_details": null,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "model": self.model.name,
            "output": [],
            "parallel_tool_calls": false,
            "previous_response_id": null,
            "safety_identifier": self.safety_identifier,
            "store": false,
            "temperature": self.temperature,
            "text": self.text,
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": self.top_logprobs,
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": null,
            "user": self.user,
        });
        match progress {
            Progress::Begun => {}
            Progress::Ended(completion) => {
                let status = status(completion);
                response["status"] = status.into();
                if status == "incomplete" {
                    response["incomplete_details"] = json!({"reason": "max_output_tokens"});
                }
                response["output"] = json!([self.message(Some(completion))]);
                response["usage"] = spent(&completion.usage);
                response["timings"] = usage::timings(completion);
            }
            Progress::Failed(error) => {
                response["status"] = "failed".into();
                response["error"] = json!({
                    "code": "server_error",
                    "message": error.body()["error"]["message"],
                });
            }
        }
        response
    }

    /// The message that holds the answer, which is empty until there is one.
    pub(super) fn message(&self, completion: Option<&Completion>) -> Value {
        let content: Vec<Value> =
            completion.map(|completion| part(&completion.text, &completion.logprobs)).into_iter().collect();
        json!({
            "id": self.item,
            "type": "message",
            "status": completion.map_or("in_progress", status),
            "role": "assistant",
            "content": content,
        })
    }
}

/// The text of an answer as a part of its message.
pub(super) fn part(text: &str, tokens: &[TokenLogprobs]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": likely(tokens)})
}

/// How likely tokens were, in the form of chats.
pub(super) fn likely(tokens: &[TokenLogprobs]) -> Value {
    logprobs::chat(tokens)["content"].take()
}

/// How an answer ended. Nobody is told of one that was given up on.
pub(super) fn status(completion: &Completion) -> &'static str {
    match completion.finish_reason {
        FinishReason::Length => "incomplete",
        FinishReason::Stop | FinishReason::Cancelled => "completed",
    }
}

/// OpenAI's `usage`. `image_tokens` is an extension: positions of images, which `input_tokens` holds as well.
fn spent(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            // What is read is kept for the next prompt that begins like this one.
            "cache_write_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

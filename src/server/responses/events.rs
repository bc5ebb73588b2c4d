//! A response as the events of OpenAI's newer form, numbered from 0.

use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::sse::Chunks;
use super::reply::{self, Progress, Reply};
use crate::engine::event::Completion;
use crate::generate::logprobs::TokenLogprobs;
use crate::generate::sequence::Delta;

/// A reply in events.
pub(super) struct Streamed {
    reply: Reply,
    number: u64,
}

impl Streamed {
    pub(super) fn new(reply: Reply) -> Self {
        Self { reply, number: 0 }
    }

    /// An event with its name and number.
    fn event(&mut self, kind: &str, mut event: Value) -> Value {
        event["type"] = kind.into();
        event["sequence_number"] = self.number.into();
        self.number += 1;
        event
    }

    /// An event about the one part of the one message.
    fn of_part(&mut self, kind: &str, name: &str, value: Value) -> Value {
        let mut event = json!({"item_id": self.reply.item, "output_index": 0, "content_index": 0});
        event[name] = value;
        self.event(kind, event)
    }

    /// An event about the text of that part.
    fn of_text(&mut self, kind: &str, name: &str, text: String, tokens: &[TokenLogprobs]) -> Value {
        let mut event = self.of_part(kind, name, text.into());
        event["logprobs"] = reply::likely(tokens);
        event
    }

    /// An event about the whole response.
    fn of_response(&mut self, kind: &str, progress: Progress<'_>) -> Value {
        let response = self.reply.response(progress);
        self.event(kind, json!({"response": response}))
    }
}

impl Chunks for Streamed {
    const NAMED: bool = true;

    fn begin(&mut self) -> Vec<Value> {
        let item = self.reply.message(None);
        vec![
            self.of_response("response.created", Progress::Begun),
            self.of_response("response.in_progress", Progress::Begun),
            self.event("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.of_part("response.content_part.added", "part", reply::part("", &[])),
        ]
    }

    fn more(&mut self, _: usize, delta: Delta) -> Vec<Value> {
        vec![self.of_text("response.output_text.delta", "delta", delta.text, &delta.logprobs)]
    }

    fn finish(&mut self, _: usize, completion: Completion) -> Vec<Value> {
        let item = self.reply.message(Some(&completion));
        let last = format!("response.{}", reply::status(&completion));
        vec![
            self.of_text("response.output_text.done", "text", completion.text.clone(), &completion.logprobs),
            self.of_part(
                "response.content_part.done",
                "part",
                reply::part(&completion.text, &completion.logprobs),
            ),
            self.event("response.output_item.done", json!({"output_index": 0, "item": item})),
            self.of_response(&last, Progress::Ended(&completion)),
        ]
    }

    fn end(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Value> {
        vec![self.of_response("response.failed", Progress::Failed(error))]
    }
}

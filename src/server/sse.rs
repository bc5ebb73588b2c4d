//! Answers as server-sent events, while they are made.

use std::{convert::Infallible, time::Duration};

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use serde_json::Value;

use super::error::{Answer, ApiError};
use super::generation::Generation;
use crate::engine::event::{Completion, Event};
use crate::generate::sequence::Delta;

/// How an endpoint writes the chunks of its answers.
pub(super) trait Chunks: Send + 'static {
    /// Whether chunks are events with names, their `type`, of which the last one tells the end. Others are not, and
    /// `[DONE]` follows them.
    const NAMED: bool = false;

    /// What comes before the answers.
    fn begin(&mut self) -> Vec<Value>;
    /// More of answer `index`; empty when there is nothing to tell.
    fn more(&mut self, index: usize, delta: Delta) -> Vec<Value>;
    /// The end of answer `index`.
    fn finish(&mut self, index: usize, completion: Completion) -> Vec<Value>;
    /// What comes after all answers.
    fn end(&mut self) -> Vec<Value>;
    /// What comes in place of the rest when there will be none.
    fn fail(&mut self, error: &ApiError) -> Vec<Value> {
        vec![error.body()]
    }
}

/// Silence after which a comment is sent, which shows whether the client is there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How an answer is sent while it is made.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    /// Send what the answer cost before the end.
    #[serde(default)]
    include_usage: bool,
}

/// Whether the answer is sent while it is made, and if so whether what it cost is sent too.
///
/// # Errors
/// When there are options and nothing is sent.
pub(super) fn asked(stream: bool, options: Option<&StreamOptions>) -> Answer<Option<bool>> {
    match (stream, options) {
        (true, options) => Ok(Some(options.is_some_and(|options| options.include_usage))),
        (false, None) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::value("stream_options", "stream_options need stream to be true; leave them out"))
        }
    }
}

enum Step<C> {
    Begin(Generation, C),
    Next(Generation, C, Vec<bool>),
    End,
}

/// The response that sends `generation` as it comes. An answer that fails ends with an error in place of a chunk, and
/// without `[DONE]`.
pub(super) fn response<C: Chunks>(generation: Generation, chunks: C) -> Response {
    let batches = stream::unfold(Step::Begin(generation, chunks), |step| async {
        match step {
            Step::Begin(generation, mut chunks) => {
                let batch = data::<C>(chunks.begin());
                Some((batch, Step::Next(generation, chunks, Vec::new())))
            }
            Step::Next(generation, chunks, told) => Some(next(generation, chunks, told).await),
            Step::End => None,
        }
    });
    let events = batches.flat_map(stream::iter).map(Ok::<_, Infallible>);
    let mut response =
        Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("waiting")).into_response();
    // Proxies that gather a response before they pass it on would hold it back.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// What the next event of the engine sends. `told` says of each answer whether some of it was sent.
async fn next<C: Chunks>(
    mut generation: Generation,
    mut chunks: C,
    mut told: Vec<bool>,
) -> (Vec<Sent>, Step<C>) {
    let batch = match generation.next().await {
        None => {
            let mut batch = data::<C>(chunks.end());
            if !C::NAMED {
                batch.push(Sent::default().data("[DONE]"));
            }
            return (batch, Step::End);
        }
        Some(Err(error)) => return (data::<C>(chunks.fail(&error)), Step::End),
        Some(Ok((index, Event::Text(delta)))) => {
            if told.len() <= index {
                told.resize(index + 1, false);
            }
            told[index] = true;
            chunks.more(index, delta)
        }
        Some(Ok((index, Event::Restarted(_)))) => {
            // What was sent cannot be taken back, and the answer that begins anew may be another.
            if told.get(index).copied().unwrap_or_default() {
                tracing::error!("an answer began anew after some of it was sent");
                return (data::<C>(chunks.fail(&ApiError::internal())), Step::End);
            }
            Vec::new()
        }
        Some(Ok((index, Event::Finished(completion)))) => chunks.finish(index, *completion),
    };
    (data::<C>(batch), Step::Next(generation, chunks, told))
}

fn data<C: Chunks>(values: Vec<Value>) -> Vec<Sent> {
    let sent = |value: Value| {
        let sent = match value["type"].as_str() {
            Some(name) if C::NAMED => Sent::default().event(name),
            _ => Sent::default(),
        };
        sent.data(value.to_string())
    };
    values.into_iter().map(sent).collect()
}

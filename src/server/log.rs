//! One line of log a request, which never holds what was asked or answered.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Instant,
};

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::error::{Answer, ApiError};
use super::metrics::Metrics;
use super::otel::Trace;
use super::state::AppState;

/// What the log will say of a request. It is written when the last of its clones is gone: after the last byte of an
/// answer that is sent while it is made.
#[derive(Clone, Debug)]
pub(super) struct Entry(Arc<Line>);

#[derive(Debug)]
struct Line {
    method: Method,
    path: String,
    arrived: Instant,
    status: AtomicU16,
    metrics: Metrics,
    trace: Option<Trace>,
    prompt: AtomicUsize,
    completion: AtomicUsize,
}

impl Entry {
    /// When the request's headers had been read.
    pub(super) fn arrived(&self) -> Instant {
        self.0.arrived
    }

    /// The span of the request, if anybody wants it.
    pub(super) fn trace(&self) -> Option<Trace> {
        self.0.trace.clone()
    }

    /// Counts an answer.
    pub(super) fn add(&self, prompt_tokens: usize, completion_tokens: usize) {
        self.0.prompt.fetch_add(prompt_tokens, Ordering::Relaxed);
        self.0.completion.fetch_add(completion_tokens, Ordering::Relaxed);
    }

    /// What it came to, where that is not what the response began with.
    pub(super) fn ended(&self, status: StatusCode) {
        self.0.status.store(status.as_u16(), Ordering::Relaxed);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let status = *self.status.get_mut();
        self.metrics.answered(&self.path, status);
        if let Some(trace) = &self.trace {
            trace.ended(self.method.as_str(), &self.path, status);
        }
        tracing::info!(
            method = %self.method,
            path = self.path,
            status = self.status.get_mut(),
            ms = u64::try_from(self.arrived.elapsed().as_millis()).unwrap_or(u64::MAX),
            prompt_tokens = self.prompt.get_mut(),
            completion_tokens = self.completion.get_mut(),
            "request"
        );
    }
}

impl FromRequestParts<AppState> for Entry {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Answer<Self> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

/// Logs a request.
pub(super) async fn log(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    // Only the path's pattern: the path itself, and what follows it, may hold anything.
    let path = request.extensions().get::<MatchedPath>().map_or("-", MatchedPath::as_str).to_owned();
    let entry = Entry(Arc::new(Line {
        method: request.method().clone(),
        path,
        arrived: Instant::now(),
        // What the log says of a client that leaves before there is a response.
        status: AtomicU16::new(499),
        metrics: state.metrics().clone(),
        trace: state.traces().request(request.headers()),
        prompt: AtomicUsize::new(0),
        completion: AtomicUsize::new(0),
    }));
    request.extensions_mut().insert(entry.clone());
    let response = next.run(request).await;
    entry.ended(response.status());
    response
}

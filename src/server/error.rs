//! What a client is told when something went wrong: one table from [`ErrorKind`] to status, type and code.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::{Error, ErrorKind};

/// The result of everything that answers a client.
pub(super) type Answer<T> = Result<T, ApiError>;

/// An error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after: Option<u64>,
}

/// The longest message that a client is sent, in characters: a parser may repeat what it could not read.
const MESSAGE: usize = 500;

/// Seconds after which a client may ask again when there is no room now.
const RETRY_BUSY: u64 = 1;

/// Seconds after which a client may ask again while the model loads or another replica takes over.
const RETRY_AWAY: u64 = 5;

/// The parameter that holds what the model reads, as chats call it.
pub(super) const CHAT: &str = "messages";

/// The parameter that bounds an answer, as most endpoints call it.
pub(super) const LENGTH: &str = "max_tokens";

/// `type` of what the caller can mend.
const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(MESSAGE) {
            message.truncate(end);
            message.push_str("...");
        }
        Self { status, kind, code: None, param: None, message, retry_after: None }
    }

    /// A request that the caller can mend.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, message)
    }

    /// A parameter whose value cannot be used.
    pub(super) fn value(param: &str, message: impl Into<String>) -> Self {
        Self::invalid(message).about(param).coded("invalid_value")
    }

    /// A parameter that this server does not know or does not support.
    pub(super) fn unsupported(param: &str, why: &str) -> Self {
        let message = format!("{param} is not supported{why}; leave it out");
        Self::invalid(message).about(param).coded("unsupported_parameter")
    }

    /// A body that is no JSON object.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::invalid(message).coded("malformed_json")
    }

    /// A body whose media type is another.
    pub(super) fn media_type() -> Self {
        let message = "the body must be JSON; send the header `Content-Type: application/json`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, message).coded("unsupported_media_type")
    }

    /// A body that is compressed.
    pub(super) fn content_encoding() -> Self {
        let message = "the body is encoded; send it as it is, without the header `Content-Encoding`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, message).coded("unsupported_content_encoding")
    }

    /// A body of more than `limit` bytes.
    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes; send fewer or smaller images");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message).coded("body_too_large")
    }

    /// A body that does not arrive.
    pub(super) fn slow() -> Self {
        let message = "the body did not arrive in time; send it faster or in smaller pieces";
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, message).coded("request_timeout")
    }

    /// No key, or a wrong one.
    pub(super) fn unauthorized() -> Self {
        let message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, INVALID, message).coded("invalid_api_key")
    }

    /// A host that this server is not.
    pub(super) fn misdirected() -> Self {
        let message = "the Host header names another machine; without keys only local addresses are answered";
        Self::new(StatusCode::MISDIRECTED_REQUEST, INVALID, message).coded("wrong_host")
    }

    /// No such path.
    pub(super) fn not_found() -> Self {
        let message = "there is no such path; /v1/chat/completions answers questions";
        Self::new(StatusCode::NOT_FOUND, INVALID, message).coded("unknown_url")
    }

    /// A path that cannot be read.
    pub(super) fn path() -> Self {
        Self::invalid("the path is not UTF-8; check how it is escaped").coded("invalid_path")
    }

    /// A path that knows other methods.
    pub(super) fn method() -> Self {
        let message = "this path does not take this method; see the Allow header";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, message).coded("method_not_allowed")
    }

    /// No such model.
    pub(super) fn no_model(name: &str) -> Self {
        let message = format!("there is no model {name:?}; /v1/models lists those that there are");
        Self::new(StatusCode::NOT_FOUND, INVALID, message).about("model").coded("model_not_found")
    }

    /// No model is named, and which of `names` is meant cannot be known.
    pub(super) fn unnamed_model(names: &[&str]) -> Self {
        let message = format!("the request names no model; give as model one of {}", names.join(", "));
        Self::new(StatusCode::NOT_FOUND, INVALID, message).about("model").coded("model_not_found")
    }

    /// Too many requests at once.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { retry_after: Some(RETRY_BUSY), ..error.coded("rate_limit_exceeded") }
    }

    /// The model is not there yet, or this server is going away.
    pub(super) fn away(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message);
        Self { retry_after: Some(RETRY_AWAY), ..error.coded("service_unavailable") }
    }

    /// The server ended before the answer did.
    pub(super) fn going() -> Self {
        Self::away("the server is shutting down; ask another one, or again later")
    }

    /// An answer that took longer than it may.
    pub(super) fn deadline() -> Self {
        let message = "the answer took longer than a request may; ask for fewer tokens";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message).coded("deadline_exceeded")
    }

    /// A fault of this server. What it was stands in the log.
    pub(super) fn internal() -> Self {
        let message = "the server failed to answer; its log says why";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).coded("internal_error")
    }

    /// The same, about a parameter.
    pub(super) fn about(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// The same, about `param` where the caller can mend it and it is about nothing yet.
    pub(super) fn or_about(self, param: &str) -> Self {
        let open = self.param.is_none() && self.status == StatusCode::BAD_REQUEST;
        if open { self.about(param) } else { self }
    }

    /// The same, where it is about `one`, which the endpoint calls `other`.
    pub(super) fn renamed(self, one: &str, other: &str) -> Self {
        if self.param.as_deref() == Some(one) { self.about(other) } else { self }
    }

    /// The same, with a code that a program can tell apart.
    pub(super) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The HTTP status.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// The body.
    pub(super) fn body(&self) -> serde_json::Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<Error> for ApiError {
    /// The table. What the caller cannot mend is logged here and told without details.
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::Request => {
                let told = Self::invalid(error.to_string());
                match error {
                    Error::TooLong { .. } => told.coded("context_length_exceeded"),
                    Error::NoRoom { .. } => told.about(LENGTH).coded("invalid_value"),
                    Error::Image { .. } => told.coded("invalid_image"),
                    _ => told.coded("invalid_value"),
                }
            }
            // A request is only cancelled under a client that waits when the server ends.
            ErrorKind::Cancelled => Self::going(),
            ErrorKind::Busy => Self::busy(error.to_string()),
            ErrorKind::Deadline => Self::deadline(),
            ErrorKind::Package | ErrorKind::Provider | ErrorKind::Runtime => {
                tracing::error!(error = %error, "a request failed");
                Self::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(error: Error, status: u16, kind: &str, code: &str) {
        let told = ApiError::from(error);
        assert_eq!(told.status().as_u16(), status);
        let body = told.body();
        assert_eq!(
            (body["error"]["type"].as_str(), body["error"]["code"].as_str()),
            (Some(kind), Some(code))
        );
    }

    #[test]
    fn every_kind_of_error_has_a_status_a_type_and_a_code() {
        check(Error::Request("no".to_owned()), 400, INVALID, "invalid_value");
        check(Error::image("image 1", "no"), 400, INVALID, "invalid_image");
        check(Error::TooLong { needed: 2, capacity: 1 }, 400, INVALID, "context_length_exceeded");
        check(Error::package("p", "no"), 500, "server_error", "internal_error");
        check(Error::library("no"), 500, "server_error", "internal_error");
        check(Error::graph("decoder", "no"), 500, "server_error", "internal_error");
        check(Error::Stopped("no".to_owned()), 500, "server_error", "internal_error");
        check(Error::Busy { waiting: 1, limit: 1 }, 429, "rate_limit_error", "rate_limit_exceeded");
        check(Error::Deadline, 504, "timeout_error", "deadline_exceeded");
        check(Error::Cancelled, 503, "service_unavailable_error", "service_unavailable");
    }

    #[test]
    fn what_the_caller_cannot_mend_is_told_without_details() {
        let told = ApiError::from(Error::package("/secret/place", "broken"));
        assert!(!told.body().to_string().contains("secret"));
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let told = ApiError::invalid("ö".repeat(9000));
        assert_eq!(told.message.chars().count(), MESSAGE + 3);
    }
}

//! Whether the server is there, and whether it takes requests.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;

use super::state::AppState;

/// `GET /health`: 200 once the model was opened, which is after its self-check; 503 before. Never asks for a key.
pub(super) async fn health(State(state): State<AppState>) -> Response {
    told(state.loaded_models().is_some(), "the model is being loaded and checked")
}

/// `GET /ready`: 200 while requests are taken; 503 before the model was opened and once the server ends.
pub(super) async fn ready(State(state): State<AppState>) -> Response {
    if state.is_draining() {
        return told(false, "the server is shutting down");
    }
    told(state.loaded_models().is_some(), "the model is being loaded and checked")
}

fn told(well: bool, reason: &str) -> Response {
    if well {
        return Json(json!({"status": "ok"})).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "unavailable", "reason": reason})))
        .into_response()
}

//! Which path is answered by what, and what stands before all of them.

use std::any::Any;

use axum::Router;
use axum::middleware;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::error::ApiError;
use super::state::AppState;
use super::{
    auth, chat_completions, completions, headers, health, log, metrics, model_list, openapi, page, responses,
    status,
};

/// The whole server but its connections. Layers that are added later stand further out.
pub(super) fn router(state: AppState) -> Router {
    let routes = Router::new()
        .route("/", get(page::page))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::openapi))
        .route("/v1/status", get(status::status))
        .route("/v1/models", get(model_list::list))
        .route("/v1/models/{name}", get(model_list::one))
        .route("/v1/chat/completions", post(chat_completions::answer))
        .route("/v1/responses", post(responses::answer))
        .route("/v1/completions", post(completions::answer))
        .fallback(async || ApiError::not_found())
        .method_not_allowed_fallback(async || ApiError::method())
        .layer(middleware::from_fn_with_state(state.clone(), auth::check))
        .layer(CatchPanicLayer::custom(panicked));
    // Outside of the keys: a page that may ask is told so before it sends one, and why when it sends a wrong one.
    headers::guard(routes, &state.options().origins)
        .layer(middleware::from_fn_with_state(state.clone(), log::log))
        .with_state(state)
}

/// The answer of a handler that panicked. What it said may hold what a client sent, so that nobody is told.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    tracing::error!("a handler panicked");
    ApiError::internal().into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_without_what_it_said() {
        let panics = async || -> &'static str { panic!("what a client sent") };
        let router = Router::new().route("/", get(panics)).layer(CatchPanicLayer::custom(panicked));
        let response = router.oneshot(Request::new(Body::empty())).await.unwrap();
        assert_eq!(response.status().as_u16(), 500);
        let body = to_bytes(response.into_body(), 10_000).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["code"], "internal_error");
        assert!(!body.to_string().contains("client"), "{body}");
    }
}

//! `/v1/models`: which models there are.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::{Answer, ApiError};
use super::models::{Condition, Offer};
use super::state::AppState;

/// `GET /v1/models`.
pub(super) async fn list(State(state): State<AppState>) -> Answer<Json<Value>> {
    Ok(Json(json!({"object": "list", "data": state.models()?.each(shown)})))
}

/// `GET /v1/models/{name}`.
pub(super) async fn one(
    State(state): State<AppState>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Value>> {
    let Path(name) = name.map_err(|_| ApiError::path())?;
    let wanted = |offer: &Offer, condition: Condition<'_>| {
        if offer.name == name { Some(shown(offer, condition)) } else { None }
    };
    let found = state.models()?.each(wanted).into_iter().flatten().next();
    found.map(Json).ok_or_else(|| ApiError::no_model(&name))
}

/// OpenAI's form, and as an extension the positions of the context and of an image: those of the manifest where the model
/// is not open, and `null` where that cannot be read either.
fn shown(offer: &Offer, condition: Condition<'_>) -> Value {
    let positions = match condition {
        Condition::Ready(model) => {
            let facts = model.engine.facts();
            Some((facts.context, facts.tokens_per_image))
        }
        _ => offer.positions,
    };
    json!({
        "id": offer.name,
        "object": "model",
        "created": offer.created,
        "owned_by": "llava-phi",
        "context_length": positions.map(|(context, _)| context),
        "tokens_per_image": positions.map(|(_, image)| image),
    })
}

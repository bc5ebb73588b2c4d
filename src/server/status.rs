//! `GET /v1/status`: what serves, what it takes and what it may take, for whoever runs the server.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};

use super::error::Answer;
use super::limits::ServerLimits;
use super::models::{Condition, Model, Offer};
use super::state::AppState;
use crate::machine::{Resident, Roots};
use crate::model::ComponentReport;
use crate::model::goldens::Agreement;
use crate::runtime::Refusal;

/// What serves a component. Where files lie is not told.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names)] // These are the keys of the JSON object.
struct Component<'a> {
    component: &'static str,
    variant: &'a str,
    provider: String,
    threads: Option<usize>,
    refused: &'a [Refusal],
    self_check: &'a [Agreement],
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<&'a crate::model::OwnKernels>,
}

/// Tells how the server is.
pub(super) async fn status(State(state): State<AppState>) -> Answer<Json<Value>> {
    let options = state.options();
    let models = state.loaded_models();
    let show = |offer: &Offer, condition: Condition<'_>| match condition {
        Condition::Ready(model) => shown(&state, model),
        Condition::Unloaded => json!({"id": offer.name, "created": offer.created, "state": "unloaded"}),
        Condition::Loading => json!({"id": offer.name, "created": offer.created, "state": "loading"}),
        Condition::Failed(why) => {
            json!({"id": offer.name, "created": offer.created, "state": "failed", "reason": why})
        }
    };
    let models: Vec<Value> = models.map(|models| models.each(show)).unwrap_or_default();
    let state_name = match (state.is_draining(), models.is_empty()) {
        (true, _) => "ending",
        (false, true) => "loading",
        (false, false) => "ready",
    };
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "status": state_name,
        "uptime_seconds": state.uptime().as_secs(),
        "models": models,
        "memory": Resident::now(&Roots::default()),
        "limits": limits(&options.limits),
        "safety": {
            "keys": !options.keys.is_empty(),
            "tls": options.tls.is_some(),
            "image_hosts": options.image_hosts.len(),
            "origins": options.origins.len(),
        },
    })))
}

/// A model that is open.
fn shown(state: &AppState, model: &Model) -> Value {
    let facts = model.engine.facts();
    let reports = model.engine.reports();
    let prefixes = state.metrics().prefixes(&model.name).map(|kept| {
        json!({
            "memory_limit": kept.memory_limit,
            "memory_used": kept.memory_used,
            "decided_by": kept.decided_by,
            "on_disk": kept.directory.is_some(),
            "refused": kept.refused,
        })
    });
    json!({
        "id": model.name,
        "state": "ready",
        "package": facts.name,
        "created": model.created,
        "load_seconds": model.engine.load_time().as_secs_f64(),
        "context_length": facts.context,
        "tokens_per_image": facts.tokens_per_image,
        "visual_tokens": facts.visual_tokens,
        "prefixes": prefixes,
        "load": model.engine.load(),
        "components": reports.iter().map(component).collect::<Vec<_>>(),
    })
}

fn component(report: &ComponentReport) -> Component<'_> {
    Component {
        component: report.component.name(),
        variant: &report.variant,
        provider: report.provider.to_string(),
        threads: report.threads,
        refused: &report.refused,
        self_check: &report.self_check,
        kernels: report.kernels.as_ref(),
    }
}

fn limits(limits: &ServerLimits) -> Value {
    json!({
        "body_bytes": limits.body_bytes,
        "buffered_bytes": limits.buffered_bytes,
        "images": limits.images,
        "prompt_chars": limits.prompt_chars,
        "answers": limits.answers,
        "stop_strings": limits.stop_strings,
        "connections": limits.connections,
        "requests": limits.requests,
        "request_seconds": limits.request_time.as_secs_f64(),
        "header_seconds": limits.header_time.as_secs_f64(),
        "stall_seconds": limits.stall_time.as_secs_f64(),
    })
}

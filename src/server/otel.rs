//! Spans of requests for an OpenTelemetry collector: OTLP over HTTP, in JSON. What was asked or answered is in none.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use reqwest::{Client, Url};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::tls;
use crate::engine::event::{Completion, Timings};
use crate::error::{Error, Result};

/// Spans that wait to be sent; more are dropped, so that a collector that is away costs nothing.
const QUEUE: usize = 4096;

/// Spans of one message, and how long the first one waits for others.
const BATCH: (usize, Duration) = (512, Duration::from_secs(2));

/// Until the collector has taken a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where spans are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint(Url);

impl OtlpEndpoint {
    /// Reads the address of a collector, such as `http://localhost:4318`; `/v1/traces` is added where it has no path.
    ///
    /// # Errors
    /// [`Error::Request`] for anything but an http or https URL.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |why: &str| {
            Error::Request(format!(
                "--otlp-endpoint {text}: {why}; give a collector such as http://localhost:4318"
            ))
        };
        let mut url = Url::parse(text).map_err(|e| fail(&e.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(fail("this is neither http nor https"));
        }
        if url.path() == "/" {
            url.set_path("/v1/traces");
        }
        Ok(Self(url))
    }
}

enum Message {
    Span(Value),
    Flush(oneshot::Sender<()>),
}

/// Takes spans and sends them on, or drops them where nobody wants any. Clones send together.
#[derive(Clone, Debug, Default)]
pub(super) struct Traces(Option<mpsc::Sender<Message>>);

impl Traces {
    /// Sends to `endpoint`, within the runtime that this is called in.
    ///
    /// # Errors
    /// [`Error::Request`] when no client can be made.
    pub(super) fn start(endpoint: Option<&OtlpEndpoint>) -> Result<Self> {
        let Some(OtlpEndpoint(url)) = endpoint else { return Ok(Self::default()) };
        tls::install_provider();
        let client = Client::builder().no_proxy().timeout(PATIENCE).build();
        let client = client
            .map_err(|e| Error::Request(format!("spans cannot be sent: {e}; leave out --otlp-endpoint")))?;
        let (sender, spans) = mpsc::channel(QUEUE);
        tokio::spawn(send(client, url.clone(), spans));
        Ok(Self(Some(sender)))
    }

    /// A request that begins now, in the trace that its headers name or in one of its own; `None` where nobody wants it.
    pub(super) fn request(&self, headers: &HeaderMap) -> Option<Trace> {
        let parent = headers.get("traceparent").and_then(|value| parse_parent(value.to_str().ok()?));
        if self.0.is_none() || parent.is_some_and(|parent| !parent.sampled) {
            return None;
        }
        let id =
            parent.map_or_else(|| (u128::from(random()) << 64) | u128::from(random()), |parent| parent.trace);
        let parent = parent.map(|parent| parent.span);
        Some(Trace { traces: self.clone(), id, span: random(), parent, begin: SystemTime::now() })
    }

    /// Waits until what was taken so far is sent.
    pub(super) async fn flush(&self) {
        let (done, sent) = oneshot::channel();
        if let Some(sender) = &self.0
            && sender.send(Message::Flush(done)).await.is_ok()
        {
            // The task ends with the runtime; then there is nothing to wait for.
            let _ = timeout(PATIENCE, sent).await;
        }
    }
}

/// The span of one request. Clones are the same.
#[derive(Clone, Debug)]
#[allow(clippy::struct_field_names)] // The word of the standard.
pub(super) struct Trace {
    traces: Traces,
    id: u128,
    span: u64,
    parent: Option<u64>,
    begin: SystemTime,
}

impl Trace {
    /// The request has ended; `route` is the route and never the path.
    pub(super) fn ended(&self, method: &str, route: &str, status: u16) {
        let attributes = json!([
            text("http.request.method", method),
            text("http.route", route),
            number("http.response.status_code", u64::from(status)),
        ]);
        let mut span =
            self.span(&format!("{method} {route}"), self.span, self.parent, (self.begin, SystemTime::now()));
        span["kind"] = json!(2);
        span["attributes"] = attributes;
        if status >= 500 {
            span["status"] = json!({"code": 2});
        }
        self.send(span);
    }

    /// An answer of `model` ended now; its stages stand below it.
    pub(super) fn answered(&self, model: &str, provider: &str, completion: &Completion) {
        let Completion { usage, timings, .. } = completion;
        let Timings { queue, lost, restore, vision, prefill, decode, .. } = *timings;
        let end = SystemTime::now();
        let begin = end - (queue + timings.first_token() + decode);
        let answer = random();
        let mut span = self.span("answer", answer, Some(self.span), (begin, end));
        span["attributes"] = json!([
            text("gen_ai.request.model", model),
            text("llava_phi.provider", provider),
            number("gen_ai.usage.input_tokens", usage.prompt_tokens as u64),
            number("gen_ai.usage.output_tokens", usage.completion_tokens as u64),
            number("llava_phi.cached_tokens", usage.cached_tokens as u64),
            number("llava_phi.image_tokens", usage.image_tokens as u64),
        ]);
        self.send(span);
        let mut from = begin;
        let stages = [
            ("queue", queue),
            ("lost", lost),
            ("restore", restore),
            ("vision", vision),
            ("prefill", prefill),
            ("decode", decode),
        ];
        for (name, took) in stages {
            if !took.is_zero() {
                self.send(self.span(name, random(), Some(answer), (from, from + took)));
            }
            from += took;
        }
    }

    fn span(
        &self,
        name: &str,
        id: u64,
        parent: Option<u64>,
        (begin, end): (SystemTime, SystemTime),
    ) -> Value {
        let nanos =
            |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
        json!({
            "traceId": format!("{:032x}", self.id),
            "spanId": format!("{id:016x}"),
            "parentSpanId": parent.map(|id| format!("{id:016x}")).unwrap_or_default(),
            "name": name,
            "kind": 1,
            "startTimeUnixNano": nanos(begin),
            "endTimeUnixNano": nanos(end),
        })
    }

    fn send(&self, span: Value) {
        if let Some(sender) = &self.traces.0 {
            // A queue that is full means that the collector is away, which is told where it is noticed.
            let _ = sender.try_send(Message::Span(span));
        }
    }
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

/// OTLP writes whole numbers as text.
fn number(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

/// A number that is not 0, which would mean none.
fn random() -> u64 {
    RandomState::new().hash_one(0).max(1)
}

/// What a request says of the trace that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parent {
    trace: u128,
    span: u64,
    sampled: bool,
}

/// Reads `00-TRACE-SPAN-FLAGS`; what is not that counts as nothing, as the standard has it.
fn parse_parent(text: &str) -> Option<Parent> {
    let mut parts = text.split('-');
    let mut hex = |length: usize| {
        let part = parts.next().filter(|part| part.len() == length)?;
        let lower = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        lower.then(|| u128::from_str_radix(part, 16).ok()).flatten()
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let more = parts.next().is_some();
    if version == 0xff || trace == 0 || span == 0 || (version == 0 && more) {
        return None;
    }
    Some(Parent { trace, span: u64::try_from(span).ok()?, sampled: flags & 1 == 1 })
}

/// Gathers spans and sends them until the last sender is gone.
async fn send(client: Client, url: Url, mut spans: mpsc::Receiver<Message>) {
    let mut reached = true;
    while let Some(first) = spans.recv().await {
        let deadline = Instant::now() + BATCH.1;
        let (mut batch, mut waiting) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Span(span) => batch.push(span),
                Message::Flush(done) => waiting.push(done),
            }
            if batch.len() >= BATCH.0 || !waiting.is_empty() {
                break;
            }
            next = timeout_at(deadline, spans.recv()).await.ok().flatten();
        }
        if !batch.is_empty() {
            let count = batch.len();
            let sent = client.post(url.clone()).json_body(&message(&batch)).send().await;
            let taken = sent.is_ok_and(|response| response.status().is_success());
            if reached && !taken {
                tracing::warn!(
                    spans = count,
                    "the collector of spans takes none; they are dropped until it does"
                );
            }
            reached = taken;
        }
        for done in waiting {
            // Whoever waited may have left.
            let _ = done.send(());
        }
    }
}

/// Spans as the collector reads them.
fn message(spans: &[Value]) -> Value {
    json!({"resourceSpans": [{
        "resource": {"attributes": [text("service.name", "llava-phi"), text("service.version", env!("CARGO_PKG_VERSION"))]},
        "scopeSpans": [{"scope": {"name": "llava_phi::server"}, "spans": spans}],
    }]})
}

/// A body of JSON, which `reqwest` sends without help only when it is built to.
trait JsonBody {
    fn json_body(self, value: &Value) -> Self;
}

impl JsonBody for reqwest::RequestBuilder {
    fn json_body(self, value: &Value) -> Self {
        self.header("content-type", "application/json").body(value.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::extract::State;
    use axum::http::HeaderValue;
    use axum::routing::post;

    use super::*;
    use crate::engine::event::Usage;
    use crate::generate::sequence::FinishReason;
    use crate::model::prefix::PrefixReport;

    type Received = Arc<Mutex<Vec<Value>>>;

    /// A collector, and what it received.
    async fn collector() -> (OtlpEndpoint, Received) {
        let received = Received::default();
        let take = async |State(received): State<Received>, body: String| {
            received.lock().unwrap().push(serde_json::from_str(&body).unwrap());
        };
        let router = Router::new().route("/v1/traces", post(take)).with_state(Arc::clone(&received));
        let handle: axum_server::Handle<std::net::SocketAddr> = axum_server::Handle::new();
        let server = axum_server::bind(([127, 0, 0, 1], 0).into()).handle(handle.clone());
        tokio::spawn(server.serve(router.into_make_service()));
        let port = handle.listening().await.unwrap().port();
        (OtlpEndpoint::parse(&format!("http://127.0.0.1:{port}")).unwrap(), received)
    }

    fn parent(value: &str) -> HeaderMap {
        HeaderMap::from_iter([("traceparent".parse().unwrap(), HeaderValue::from_str(value).unwrap())])
    }

    fn completion() -> Completion {
        let ms = Duration::from_millis;
        Completion {
            text: "secret".to_owned(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            choices: None,
            finish_reason: FinishReason::Stop,
            usage: Usage { prompt_tokens: 7, completion_tokens: 3, ..Usage::default() },
            timings: Timings {
                queue: ms(1),
                vision: ms(2),
                prefill: ms(3),
                decode: ms(4),
                ..Timings::default()
            },
            demotions: Vec::new(),
            prefixes: PrefixReport::default(),
        }
    }

    #[tokio::test]
    async fn a_request_and_its_answer_arrive_as_spans_of_the_callers_trace() {
        let (endpoint, received) = collector().await;
        let traces = Traces::start(Some(&endpoint)).unwrap();
        let trace =
            traces.request(&parent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")).unwrap();
        trace.answered("tiny", "cpu", &completion());
        trace.ended("POST", "/v1/chat/completions", 500);
        traces.flush().await;
        let received = received.lock().unwrap();
        let all: Vec<&Value> = received
            .iter()
            .flat_map(|one| one["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap())
            .collect();
        let of = |name: &str| {
            *all.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("{name}: {all:?}"))
        };
        assert!(all.iter().all(|span| span["traceId"] == "0af7651916cd43dd8448eb211c80319c"), "{all:?}");
        let request = of("POST /v1/chat/completions");
        assert_eq!((&request["parentSpanId"], &request["kind"]), (&json!("b7ad6b7169203331"), &json!(2)));
        assert_eq!(request["status"]["code"], 2);
        let answer = of("answer");
        assert_eq!(answer["parentSpanId"], request["spanId"]);
        let nanos = |span: &Value, name: &str| span[name].as_str().unwrap().parse::<u128>().unwrap();
        assert_eq!(nanos(answer, "endTimeUnixNano") - nanos(answer, "startTimeUnixNano"), 10_000_000);
        for (name, took) in [("queue", 1), ("vision", 2), ("prefill", 3), ("decode", 4)] {
            let stage = of(name);
            assert_eq!(stage["parentSpanId"], answer["spanId"]);
            assert_eq!(
                nanos(stage, "endTimeUnixNano") - nanos(stage, "startTimeUnixNano"),
                took * 1_000_000,
                "{name}"
            );
        }
        assert_eq!(of("decode")["endTimeUnixNano"], answer["endTimeUnixNano"]);
        assert_eq!(all.len(), 6);
        assert!(!format!("{received:?}").contains("secret"));
    }

    #[tokio::test]
    async fn a_collector_that_is_away_costs_nothing_but_its_spans() {
        let endpoint = OtlpEndpoint::parse("http://127.0.0.1:1").unwrap();
        let traces = Traces::start(Some(&endpoint)).unwrap();
        for _ in 0..QUEUE * 2 {
            traces.request(&HeaderMap::new()).unwrap().ended("GET", "/health", 200);
        }
        traces.flush().await;
    }

    #[tokio::test]
    async fn nobody_is_traced_who_does_not_want_to_be() {
        assert!(Traces::start(None).unwrap().request(&HeaderMap::new()).is_none());
        let (endpoint, _) = collector().await;
        let traces = Traces::start(Some(&endpoint)).unwrap();
        assert!(traces.request(&parent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")).is_none());
        assert!(traces.request(&HeaderMap::new()).is_some());
    }

    #[test]
    fn a_parent_that_is_none_counts_as_nothing() {
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        for text in [format!("00-{trace}-{span}-01"), format!("01-{trace}-{span}-03-more")] {
            assert!(parse_parent(&text).is_some_and(|parent| parent.sampled), "{text}");
        }
        for text in [
            String::new(),
            "00".to_owned(),
            format!("ff-{trace}-{span}-01"),
            format!("00-{trace}-{span}-01-more"),
            format!("00-{}-{span}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-+{}-{span}-01", &trace[1..]),
            format!("00-{trace}-{span}-1"),
            format!("00-{trace}-{span}"),
        ] {
            assert_eq!(parse_parent(&text), None, "{text}");
        }
    }

    #[test]
    fn an_endpoint_is_a_url_of_the_web() {
        let url = |text: &str| OtlpEndpoint::parse(text).map(|endpoint| endpoint.0.to_string());
        assert_eq!(url("http://localhost:4318").unwrap(), "http://localhost:4318/v1/traces");
        assert_eq!(url("https://a.example/otlp").unwrap(), "https://a.example/otlp");
        for text in ["", "localhost:4318", "grpc://a", "a"] {
            assert!(url(text).unwrap_err().to_string().starts_with(&format!("--otlp-endpoint {text}: ")));
        }
    }
}

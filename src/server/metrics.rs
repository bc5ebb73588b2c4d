//! `GET /metrics`: what the server counts and measures, in the text format that Prometheus reads.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::error::{Answer, ApiError};
use super::models::Tally;
use super::otel::Trace;
use super::state::AppState;
use crate::engine::EngineLoad;
use crate::engine::event::{Completion, Event};
use crate::error::Result;
use crate::generate::sequence::FinishReason;
use crate::machine::{Resident, Roots};
use crate::model::ComponentReport;
use crate::model::prefix::PrefixReport;

/// The media type of [`Metrics::text`].
pub(super) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Gives what was counted.
pub(super) async fn metrics(State(state): State<AppState>) -> Answer<impl IntoResponse> {
    let text = state.metrics().text().map_err(|_| ApiError::internal())?;
    Ok(([(CONTENT_TYPE, MEDIA_TYPE)], text))
}

/// Names and values of labels. No value comes from a request, so that their number is bounded.
type Labels = Vec<(&'static str, String)>;

/// A histogram for each set of labels.
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// A counter for each set of labels.
type Counters = Family<Labels, Counter>;

/// Seconds until something begins, or until an answer is complete.
const WAITS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Seconds between two tokens.
const STEPS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

/// A model as it is now.
#[derive(Clone, Debug)]
pub(super) struct Served {
    /// What clients call it.
    pub(super) model: String,
    /// What serves each component.
    pub(super) reports: Arc<[ComponentReport]>,
    /// What the engine is busy with, and what it has done.
    pub(super) load: EngineLoad,
}

/// The models as they are now.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Those that are open.
    pub(super) served: Vec<Served>,
    /// How often each came and went, by its name.
    pub(super) tallies: Vec<(String, Tally)>,
}

/// Gives the models as they are now.
type Source = Box<dyn Fn() -> Seen + Send + Sync>;

/// Everything that is counted. Clones count together.
#[derive(Clone)]
pub(super) struct Metrics(Arc<Inner>);

struct Inner {
    registry: Mutex<Registry>,
    requests: Counters,
    answers: Counters,
    prompt: Counters,
    images: Counters,
    cached: Counters,
    written: Counters,
    queue: Histograms,
    first_token: Histograms,
    between_tokens: Histograms,
    whole: Histograms,
    prefixes: Mutex<BTreeMap<String, PrefixReport>>,
}

impl Metrics {
    /// Nothing counted yet; `source` is asked at each reading.
    pub(super) fn new(source: impl Fn() -> Seen + Send + Sync + 'static) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Now(Box::new(source))));
        let own = registry.sub_registry_with_prefix("llava_phi");
        let mut counter = |name: &str, help: &str| {
            let counters = Counters::default();
            own.register(name, help, counters.clone());
            counters
        };
        let requests =
            counter("requests", "Requests by endpoint and status; 429 are those refused for want of room");
        let answers = counter("answers", "Answers that came to an end, by why");
        let prompt = counter("prompt_positions", "Positions of prompts, those of images included");
        let images = counter("image_positions", "Positions of images in prompts");
        let cached = counter(
            "cached_positions",
            "Positions of prompts that were not read again, by where they came from",
        );
        let written = counter("completion_tokens", "Tokens of answers");
        let mut histogram = |name: &str, help: &str, constructor: fn() -> Histogram| {
            let histograms = Histograms::new_with_constructor(constructor);
            own.register(name, help, histograms.clone());
            histograms
        };
        let waits: fn() -> Histogram = || Histogram::new(WAITS);
        let steps: fn() -> Histogram = || Histogram::new(STEPS);
        let queue = histogram("queue_seconds", "From the request to the engine's first work for it", waits);
        let first_token = histogram(
            "first_token_seconds",
            "From the request to the first token, the queue included",
            waits,
        );
        let between_tokens = histogram(
            "between_tokens_seconds",
            "Between two pieces of an answer, which are its tokens but for those that add no text by themselves",
            steps,
        );
        let whole = histogram("answer_seconds", "From the request to the end of its answer", waits);
        let registry = Mutex::new(registry);
        Self(Arc::new(Inner {
            registry,
            requests,
            answers,
            prompt,
            images,
            cached,
            written,
            queue,
            first_token,
            between_tokens,
            whole,
            prefixes: Mutex::default(),
        }))
    }

    /// Counts a request that was answered; `endpoint` is the route, never the path that was asked for.
    pub(super) fn answered(&self, endpoint: &str, status: u16) {
        let labels = vec![("endpoint", endpoint.to_owned()), ("status", status.to_string())];
        self.0.requests.get_or_create(&labels).inc();
    }

    /// Counts an answer of `model`, whose decoder `provider` runs.
    fn completed(&self, model: &str, provider: &str, completion: &Completion) {
        let Completion { usage, timings, finish_reason, .. } = completion;
        let labels = vec![("model", model.to_owned()), ("provider", provider.to_owned())];
        let with = |name, value: &str| [&labels[..], &[(name, value.to_owned())]].concat();
        let inner = &*self.0;
        inner.answers.get_or_create(&with("finish_reason", finish_name(*finish_reason))).inc();
        add(&inner.prompt, &labels, usage.prompt_tokens);
        add(&inner.images, &labels, usage.image_tokens);
        add(&inner.written, &labels, usage.completion_tokens);
        let from = usage.cached_from;
        for (place, positions) in [
            ("working", from.working),
            ("memory", from.memory),
            ("package", from.package),
            ("disk", from.disk),
        ] {
            add(&inner.cached, &with("from", place), positions);
        }
        let observe = |histograms: &Histograms, time: Duration| {
            histograms.get_or_create(&labels).observe(time.as_secs_f64());
        };
        let first_token = timings.queue + timings.first_token();
        observe(&inner.queue, timings.queue);
        if usage.completion_tokens > 0 {
            observe(&inner.first_token, first_token);
        }
        observe(&inner.whole, first_token + timings.decode);
    }

    /// Measures one answer by its events.
    pub(super) fn watch(&self, model: &str, provider: &str, trace: Option<Trace>) -> Watch {
        let labels = vec![("model", model.to_owned()), ("provider", provider.to_owned())];
        let between = self.0.between_tokens.get_or_create_owned(&labels);
        Watch {
            metrics: self.clone(),
            model: model.to_owned(),
            provider: provider.to_owned(),
            between,
            trace,
            last: None,
        }
    }

    /// What is kept of prompts for `model`, as its last answer said; `None` before the first.
    pub(super) fn prefixes(&self, model: &str) -> Option<PrefixReport> {
        self.kept().get(model).cloned()
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, PrefixReport>> {
        self.0.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything as text of the type [`MEDIA_TYPE`].
    ///
    /// # Errors
    /// When a value cannot be written, which no value of ours does.
    pub(super) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        let registry = self.0.registry.lock().unwrap_or_else(PoisonError::into_inner);
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// What measures one answer, seeing all that happens to it.
#[derive(Debug)]
pub(super) struct Watch {
    metrics: Metrics,
    model: String,
    provider: String,
    between: Histogram,
    trace: Option<Trace>,
    last: Option<Instant>,
}

impl Watch {
    /// The next thing that happened, now.
    pub(super) fn see(&mut self, event: &Result<Event>) {
        match event {
            Ok(Event::Text(_)) => {
                let now = Instant::now();
                if let Some(last) = self.last.replace(now) {
                    self.between.observe((now - last).as_secs_f64());
                }
            }
            Ok(Event::Restarted(_)) => self.last = None,
            Ok(Event::Finished(completion)) => {
                self.metrics.completed(&self.model, &self.provider, completion);
                if let Some(trace) = &self.trace {
                    trace.answered(&self.model, &self.provider, completion);
                }
                self.metrics.kept().insert(self.model.clone(), completion.prefixes.clone());
            }
            Err(_) => {}
        }
    }
}

fn add(counters: &Counters, labels: &Labels, count: usize) {
    counters.get_or_create(labels).inc_by(count as u64);
}

fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
    }
}

/// A name without its prefix, what it says, and where it stands.
type Figure<T> = (&'static str, &'static str, fn(&EngineLoad) -> T);

/// What an engine is busy with.
const NOW: [Figure<usize>; 5] = [
    ("waiting", "Requests that were not begun", |load| load.waiting),
    ("active", "Requests that were begun and are not over", |load| load.active),
    ("parallel", "Requests that can be active at once", |load| load.parallel),
    ("positions", "Positions that the active requests may come to hold", |load| load.positions),
    ("positions_limit", "Positions that they may hold together", |load| load.positions_limit),
];

/// What an engine has done. Tokens by steps is how many requests a step served.
const SINCE: [Figure<u64>; 6] = [
    ("completed", "Requests that ended, however they did", |load| load.completed),
    ("refused", "Requests that were not taken since too many waited", |load| load.refused),
    ("images_encoded", "Images that were encoded", |load| load.encoded),
    ("prompt_pieces", "Pieces of prompts that were read", |load| load.pieces),
    ("steps", "Steps in which one or more requests were decoded", |load| load.steps),
    ("step_tokens", "Tokens that these steps read", |load| load.step_tokens),
];

/// What is not counted but looked up at each reading.
struct Now(Source);

impl fmt::Debug for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Now").finish_non_exhaustive()
    }
}

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Seen { served: models, tallies } = (self.0)();
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        write(&mut encoder, "llava_phi_build", "The version that runs", [(version, ConstGauge::new(1_u64))])?;
        let open = [(Vec::new(), ConstGauge::new(models.len() as u64))];
        write(&mut encoder, "llava_phi_models_loaded", "Models that are open", open)?;
        let loads = tallies.iter().flat_map(|(model, tally)| {
            [("loaded", tally.loaded), ("failed", tally.failed), ("no_room", tally.no_room)].map(
                |(result, count)| {
                    let labels = vec![("model", model.clone()), ("result", result.to_owned())];
                    (labels, ConstCounter::new(count))
                },
            )
        });
        write(
            &mut encoder,
            "llava_phi_model_loads",
            "Attempts to open a model, by what came of them",
            loads,
        )?;
        let unloads = tallies
            .iter()
            .map(|(model, tally)| (vec![("model", model.clone())], ConstCounter::new(tally.unloaded)));
        write(&mut encoder, "llava_phi_model_unloads", "Models that were closed to make room", unloads)?;
        let component = |model: &str, report: &ComponentReport| {
            vec![
                ("model", model.to_owned()),
                ("component", report.component.name().to_owned()),
                ("variant", report.variant.clone()),
                ("provider", report.provider.to_string()),
            ]
        };
        let components = models.iter().flat_map(|served| {
            served.reports.iter().map(|report| (component(&served.model, report), ConstGauge::new(1_u64)))
        });
        write(&mut encoder, "llava_phi_component", "What serves each component of a model", components)?;
        let refused = models.iter().flat_map(|served| {
            served.reports.iter().map(|report| {
                let labels =
                    vec![("model", served.model.clone()), ("component", report.component.name().to_owned())];
                (labels, ConstGauge::new(report.refused.len() as u64))
            })
        });
        write(
            &mut encoder,
            "llava_phi_refused_candidates",
            "Variants and providers that do not serve",
            refused,
        )?;
        for (name, help, of) in NOW {
            let values =
                models.iter().map(|served| (labels(served), ConstGauge::new(of(&served.load) as u64)));
            write(&mut encoder, &format!("llava_phi_{name}"), help, values)?;
        }
        for (name, help, of) in SINCE {
            let values = models.iter().map(|served| (labels(served), ConstCounter::new(of(&served.load))));
            write(&mut encoder, &format!("llava_phi_{name}"), help, values)?;
        }
        if let Some(resident) = Resident::now(&Roots::default()) {
            let bytes = resident.anonymous + resident.file_backed;
            let help = "Bytes of memory that the process holds";
            write(
                &mut encoder,
                "process_resident_memory_bytes",
                help,
                [(Vec::new(), ConstGauge::new(bytes))],
            )?;
        }
        Ok(())
    }
}

fn labels(served: &Served) -> Labels {
    vec![("model", served.model.clone())]
}

fn write<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (Labels, M)>,
) -> fmt::Result {
    let mut values = values.into_iter().peekable();
    let Some((_, first)) = values.peek() else { return Ok(()) };
    let help = format!("{help}.");
    let mut metric = encoder.encode_descriptor(name, &help, None, first.metric_type())?;
    for (labels, value) in values {
        value.encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::event::{Timings, Usage};
    use crate::generate::sequence::Delta;
    use crate::model::Demotion;
    use crate::model::prefix::CachedFrom;
    use crate::package::Component;
    use crate::runtime::{Refusal, Step, Target};

    fn nothing() -> Seen {
        Seen::default()
    }

    fn completion(tokens: usize) -> Completion {
        let seconds = Duration::from_secs;
        Completion {
            text: "secret words".to_owned(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            choices: None,
            finish_reason: FinishReason::Length,
            usage: Usage {
                prompt_tokens: 30,
                image_tokens: 16,
                cached_tokens: 9,
                cached_from: CachedFrom { working: 0, memory: 7, package: 2, disk: 0 },
                completion_tokens: tokens,
                lookup: None,
            },
            timings: Timings {
                queue: seconds(1),
                prefill: seconds(2),
                decode: seconds(4),
                ..Timings::default()
            },
            demotions: Vec::new(),
            prefixes: PrefixReport::default(),
        }
    }

    /// What stands behind `line`.
    fn value<'a>(text: &'a str, line: &str) -> &'a str {
        let line =
            text.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("{line} in\n{text}"));
        line.trim()
    }

    /// The rules that Prometheus holds a text to: each metric is described once, before its values, without gaps.
    fn check(text: &str) {
        let mut described: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap();
                assert!(!described.contains(&name), "{name} is described twice\n{text}");
                described.push(name);
            } else if !line.starts_with('#') {
                let now = described.last().unwrap();
                assert!(line.starts_with(now), "{line} stands under {now}\n{text}");
                let (_, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
            }
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn requests_are_counted_by_endpoint_and_status() {
        let metrics = Metrics::new(nothing);
        metrics.answered("/v1/chat/completions", 200);
        metrics.clone().answered("/v1/chat/completions", 200);
        metrics.answered("/v1/chat/completions", 429);
        let text = metrics.text().unwrap();
        check(&text);
        let count = |status| {
            let labels = format!("{{endpoint=\"/v1/chat/completions\",status=\"{status}\"}}");
            value(&text, &format!("llava_phi_requests_total{labels}")).to_owned()
        };
        assert_eq!([count(200), count(429)], ["2", "1"]);
    }

    #[test]
    fn an_answer_is_counted_with_its_times_its_positions_and_none_of_its_words() {
        let metrics = Metrics::new(nothing);
        metrics.completed("tiny", "cpu", &completion(5));
        let text = metrics.text().unwrap();
        check(&text);
        assert!(!text.contains("secret"), "{text}");
        let of = |name: &str| value(&text, &format!("llava_phi_{name}{{model=\"tiny\",provider=\"cpu\"}}"));
        assert_eq!(of("queue_seconds_sum"), "1.0");
        assert_eq!(of("first_token_seconds_sum"), "3.0");
        assert_eq!(of("answer_seconds_sum"), "7.0");
        assert_eq!(of("prompt_positions_total"), "30");
        assert_eq!(of("image_positions_total"), "16");
        assert_eq!(of("completion_tokens_total"), "5");
        let from = |place: &str| {
            let labels = format!("{{model=\"tiny\",provider=\"cpu\",from=\"{place}\"}}");
            value(&text, &format!("llava_phi_cached_positions_total{labels}")).to_owned()
        };
        assert_eq!(["working", "memory", "package", "disk"].map(from), ["0", "7", "2", "0"]);
        assert!(text.contains("finish_reason=\"length\"} 1"), "{text}");
    }

    #[test]
    fn an_answer_without_tokens_has_no_first_one() {
        let metrics = Metrics::new(nothing);
        metrics.completed("tiny", "cpu", &completion(0));
        let text = metrics.text().unwrap();
        assert!(!text.contains("first_token_seconds_count"), "{text}");
        assert!(text.contains("answer_seconds_count"), "{text}");
    }

    #[test]
    fn the_time_between_the_pieces_of_an_answer_is_measured_but_for_those_that_are_void() {
        let metrics = Metrics::new(nothing);
        let mut watch = metrics.watch("tiny", "cpu", None);
        let text = || Ok(Event::Text(Delta { text: "secret".to_owned(), logprobs: Vec::new() }));
        let refusal = Refusal {
            provider: Target::default(),
            variant: "first".to_owned(),
            step: Step::Serving,
            reason: "no".to_owned(),
        };
        let variant = "second".to_owned();
        let demotion =
            Demotion { component: Component::Decoder, refusal, variant, provider: Target::default() };
        let events = [
            text(),
            text(),
            Ok(Event::Restarted(Box::new(demotion))),
            text(),
            text(),
            text(),
            Ok(Event::Finished(Box::new(completion(5)))),
        ];
        for event in &events {
            watch.see(event);
        }
        let text = metrics.text().unwrap();
        check(&text);
        let of = |name: &str| value(&text, &format!("llava_phi_{name}{{model=\"tiny\",provider=\"cpu\"}}"));
        assert_eq!(of("between_tokens_seconds_count"), "3");
        assert_eq!(of("completion_tokens_total"), "5");
        assert_eq!(metrics.prefixes("tiny"), Some(PrefixReport::default()));
        assert_eq!(metrics.prefixes("other"), None);
    }

    #[test]
    fn the_load_of_several_models_stands_under_one_description() {
        let metrics = Metrics::new(move || {
            let served = |model: &str, load| Served { model: model.to_owned(), reports: Arc::new([]), load };
            let served = vec![
                served("one", EngineLoad { waiting: 3, steps: 70, ..EngineLoad::default() }),
                served("a \"quoted\"\\\nname", EngineLoad { steps: 8, ..EngineLoad::default() }),
            ];
            let tally = Tally { loaded: 2, no_room: 1, unloaded: 1, ..Tally::default() };
            Seen { served, tallies: vec![("one".to_owned(), tally)] }
        });
        let text = metrics.text().unwrap();
        check(&text);
        assert!(text.contains("llava_phi_waiting{model=\"one\"} 3\n"), "{text}");
        assert!(text.contains("llava_phi_steps_total{model=\"one\"} 70\n"), "{text}");
        for line in [
            "llava_phi_models_loaded{} 2\n",
            "llava_phi_model_loads_total{model=\"one\",result=\"loaded\"} 2\n",
            "llava_phi_model_loads_total{model=\"one\",result=\"no_room\"} 1\n",
            "llava_phi_model_loads_total{model=\"one\",result=\"failed\"} 0\n",
            "llava_phi_model_unloads_total{model=\"one\"} 1\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in {text}");
        }
        assert!(text.contains(r#"llava_phi_steps_total{model="a \"quoted\"\\\nname"} 8"#), "{text}");
    }
}

//! What an answer took: for a person on standard error, for a program in JSON.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

use serde::Serialize;

use crate::engine::ModelFacts;
use crate::engine::event::Completion;
use crate::generate::lookup::Figures;
use crate::generate::sequence::{FinishReason, TokenLogprobs};
use crate::model::compiled::CompiledReport;
use crate::model::goldens::Agreement;
use crate::model::prefix::{CachedFrom, PrefixReport};
use crate::model::stamp::Stamp;
use crate::model::visual_tokens::VisualTokensReport;
use crate::model::{ComponentReport, Demotion, ModelOptions, OwnKernels};
use crate::package::Component;
use crate::runtime::{Placement, Refusal};
use crate::text::TokenId;

/// One answer as a JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Answer<'a> {
    text: &'a str,
    token_ids: &'a [TokenId],
    finish_reason: FinishReason,
    #[serde(skip_serializing_if = "<[TokenLogprobs]>::is_empty")]
    logprobs: &'a [TokenLogprobs],
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<Vec<Choice<'a>>>,
    usage: Positions,
    timings_ms: TimingsMs,
    providers: BTreeMap<&'static str, Served<'a>>,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    visual_tokens: Option<&'a VisualTokensReport>,
    prefixes: &'a PrefixReport,
    #[serde(skip_serializing_if = "<[Demotion]>::is_empty")]
    demotions: &'a [Demotion],
}

/// One of the texts of which the answer had to be one, and its share of the probability of all.
#[derive(Debug, Serialize)]
struct Choice<'a> {
    text: &'a str,
    probability: f64,
}

/// Positions that were read and written.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names)] // These are the keys of the JSON object.
struct Positions {
    prompt_tokens: usize,
    image_tokens: usize,
    cached_tokens: usize,
    cached_from: CachedFrom,
    completion_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    lookup: Option<Figures>,
}

/// What ran a component.
#[derive(Debug, Serialize)]
pub(super) struct Served<'a> {
    provider: String,
    variant: &'a str,
    threads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuned: Option<&'a str>,
    refused: &'a [Refusal],
    placement: Option<&'a Placement>,
    self_check: &'a [Agreement],
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<&'a OwnKernels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stamp: Option<&'a Stamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compiled: Option<&'a CompiledReport>,
}

impl Served<'_> {
    /// Provider, variant and threads, for a person.
    pub(super) fn line(&self) -> String {
        let threads =
            self.threads.map_or_else(|| "as many as it likes".to_owned(), |count| count.to_string());
        let refused: Vec<_> = self.refused.iter().map(|refusal| format!(" (not {refusal})")).collect();
        format!("{} {}, threads: {threads}{}", self.provider, self.variant, refused.concat())
    }
}

/// How a model was loaded, as far as its speed depends on it.
#[derive(Debug, Serialize)]
pub(super) struct ModelSettings {
    threads: Option<usize>,
    prefill_chunk: Option<usize>,
    low_memory: bool,
    memory_limit: Option<u64>,
    visual_tokens: Option<usize>,
    provider_options: BTreeMap<String, BTreeMap<String, String>>,
}

impl ModelSettings {
    pub(super) fn new(options: &ModelOptions) -> Self {
        let given = options.provider_options.iter();
        Self {
            threads: options.threads,
            prefill_chunk: options.prefill_chunk,
            low_memory: options.low_memory,
            memory_limit: options.memory_limit,
            visual_tokens: options.visual_tokens,
            provider_options: given.map(|(provider, given)| (provider.to_string(), given.clone())).collect(),
        }
    }
}

/// Milliseconds of each step.
#[derive(Debug, Serialize)]
struct TimingsMs {
    load: f64,
    preprocess: f64,
    restore: f64,
    vision: f64,
    prefill: f64,
    decode: f64,
    total: f64,
}

/// Times outside the engine.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outside {
    /// Opening the engine; zero for an answer after the first.
    pub(super) load: Duration,
    /// Reading, decoding and resizing images.
    pub(super) preprocess: Duration,
}

impl<'a> Answer<'a> {
    pub(super) fn new(
        completion: &'a Completion,
        outside: Outside,
        reports: &'a [ComponentReport],
        facts: &'a ModelFacts,
    ) -> Self {
        let Completion { timings, usage, .. } = completion;
        let total = outside.load + outside.preprocess + timings.first_token() + timings.decode;
        Self {
            text: &completion.text,
            token_ids: &completion.token_ids,
            finish_reason: completion.finish_reason,
            logprobs: &completion.logprobs,
            choices: completion.choices.as_ref().map(|choices| {
                choices.iter().map(|(text, probability)| Choice { text, probability: *probability }).collect()
            }),
            usage: Positions {
                prompt_tokens: usage.prompt_tokens,
                image_tokens: usage.image_tokens,
                cached_tokens: usage.cached_tokens,
                cached_from: usage.cached_from,
                completion_tokens: usage.completion_tokens,
                lookup: usage.lookup,
            },
            timings_ms: TimingsMs {
                load: milliseconds(outside.load),
                preprocess: milliseconds(outside.preprocess),
                restore: milliseconds(timings.restore),
                vision: milliseconds(timings.vision),
                prefill: milliseconds(timings.prefill),
                decode: milliseconds(timings.decode),
                total: milliseconds(total),
            },
            providers: providers(reports),
            model: &facts.name,
            visual_tokens: facts.visual_tokens.as_ref(),
            prefixes: &completion.prefixes,
            demotions: &completion.demotions,
        }
    }
}

/// What ran each component.
pub(super) fn providers(reports: &[ComponentReport]) -> BTreeMap<&'static str, Served<'_>> {
    reports.iter().map(|report| (short_name(report.component), served(report))).collect()
}

fn served(report: &ComponentReport) -> Served<'_> {
    Served {
        provider: report.provider.to_string(),
        variant: &report.variant,
        threads: report.threads,
        tuned: report.tuned.as_deref(),
        refused: &report.refused,
        placement: report.placement.as_ref(),
        self_check: &report.self_check,
        kernels: report.kernels.as_ref(),
        stamp: report.stamp.as_ref(),
        compiled: report.compiled.as_ref(),
    }
}

fn short_name(component: Component) -> &'static str {
    match component {
        Component::VisionEncoder => "vision",
        Component::Projector => "projector",
        Component::Decoder => "decoder",
        Component::Head => "head",
    }
}

/// Rounded to a microsecond: more digits are noise.
pub(super) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Where cached positions came from, unless the last request left all of them.
fn sources(from: &CachedFrom) -> String {
    let parts = [
        ("the last request", from.working),
        ("memory", from.memory),
        ("the package", from.package),
        ("disk", from.disk),
    ];
    if from.total() == from.working {
        return String::new();
    }
    let told =
        parts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{count} from {name}"));
    format!(": {}", told.collect::<Vec<_>>().join(", "))
}

/// Writes one line about an answer.
pub(super) fn print(
    out: &mut impl Write,
    completion: &Completion,
    outside: Outside,
    reports: &[ComponentReport],
) -> io::Result<()> {
    let Completion { usage, timings, .. } = completion;
    write!(
        out,
        "first token {:.0} ms (load {:.0}, image {:.0}, prompt {:.0})",
        milliseconds(outside.load + outside.preprocess + timings.first_token()),
        milliseconds(outside.load),
        milliseconds(outside.preprocess + timings.vision),
        milliseconds(timings.restore + timings.prefill)
    )?;
    if let Some(speed) = timings.tokens_per_second(usage.completion_tokens) {
        write!(out, ", {speed:.1} tokens/s")?;
    }
    write!(out, ", {} + {} tokens", usage.prompt_tokens, usage.completion_tokens)?;
    if usage.cached_tokens > 0 {
        write!(out, " ({} not read again{})", usage.cached_tokens, sources(&usage.cached_from))?;
    }
    for (place, (text, probability)) in completion.choices.iter().flatten().enumerate() {
        write!(out, "{} {text} {probability:.3}", if place == 0 { "; choices" } else { "," })?;
    }
    if let Some(Figures { guessed, right }) = usage.lookup {
        write!(out, ", {right} of {guessed} guessed tokens right")?;
    }
    for report in reports {
        let component = short_name(report.component);
        write!(out, "; {component} {} {}", report.provider, report.variant)?;
        if let Some(date) = &report.tuned {
            let threads = report.threads.map_or_else(String::new, |count| format!(", threads {count}"));
            write!(out, " (tuned on {date}{threads})")?;
        }
        if let Some(compiled) = &report.compiled {
            write!(out, " ({compiled})")?;
        }
        for refusal in &report.refused {
            write!(out, " (not {refusal})")?;
        }
    }
    writeln!(out)
}

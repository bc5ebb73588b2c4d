//! How fast one candidate computes, how near to the goldens, in how much memory.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ndarray::{Array2, s};
use serde::{Deserialize, Serialize};

use super::chain::{Chain, ComponentReport, Loader, Opened};
use super::decoder::Decoder;
use super::embed::TokenEmbedder;
use super::goldens::{Agreement, Goldens};
use super::kv_cache::PositionKey;
use super::rotary::RotaryTable;
use super::selection::Candidate;
use super::stamp::SelfCheck;
use super::{ModelOptions, check_decoder, check_projector, check_vision, register};
use crate::error::{Error, Result};
use crate::machine::{Resident, ResidentWatch, Roots};
use crate::package::{Component, ModelPackage};
use crate::runtime::Step;
use crate::text::TokenId;

/// Decode steps that stand for an answer where decoders are compared.
pub const ANSWER_STEPS: u32 = 64;
/// Positions of a prompt with one image and a question about it.
const PROMPT: usize = 640;
/// How often each thing is measured; medians are reported.
const REPETITIONS: usize = 5;
/// No repetition is begun after so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a decoder is given to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Positions of the prompt.
    pub positions: usize,
    /// Tokens that are decoded behind it.
    pub steps: usize,
}

/// What came of one candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Outcome {
    /// It passed the self-check, and this is what it took.
    Measured(Figures),
    /// It does not serve.
    Refused {
        /// How far it came: a step of the selection, or `process` when what measured it ended.
        step: String,
        /// Why it does not serve.
        reason: String,
    },
}

/// What one candidate took. Times are medians, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Making the session, with the plan of its memory before.
    pub load_ms: f64,
    /// One run over the golden image; `None` for a decoder.
    pub run_ms: Option<f64>,
    /// What a decoder took; `None` for others.
    pub decoder: Option<DecoderFigures>,
    /// Peaks of the process that measured this and nothing else, ONNX Runtime's own memory among them; `None` where
    /// the system does not tell.
    pub memory: Option<Resident>,
    /// What the self-check compared.
    pub agreement: Vec<MeasuredAgreement>,
}

/// What a decoder took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderFigures {
    /// Positions of the prompt.
    pub positions: usize,
    /// Reading the prompt into an empty cache.
    pub prefill_ms: f64,
    /// Tokens that were decoded behind the prompt.
    pub steps: usize,
    /// One of them.
    pub decode_ms: f64,
    /// The head that made the logits, where the decoder's graph does not.
    pub head: Option<HeadChoice>,
}

/// What made logits of a decoder's hidden states.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadChoice {
    /// The variant.
    pub variant: String,
    /// The provider, with its device.
    pub provider: String,
}

/// How far a result was from its golden.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredAgreement {
    /// What was compared.
    pub what: String,
    /// The relative L2 distance.
    pub distance: f64,
    /// The largest distance that passes.
    pub tolerance: f64,
}

impl From<&Agreement> for MeasuredAgreement {
    fn from(&Agreement { what, distance, tolerance }: &Agreement) -> Self {
        Self { what: what.to_owned(), distance, tolerance }
    }
}

impl Figures {
    /// By what candidates are compared, in milliseconds: one run, or for a decoder the prompt and [`ANSWER_STEPS`]
    /// decode steps.
    pub fn cost_ms(&self) -> f64 {
        let answer =
            |decoder: &DecoderFigures| decoder.decode_ms.mul_add(f64::from(ANSWER_STEPS), decoder.prefill_ms);
        self.run_ms.or_else(|| self.decoder.as_ref().map(answer)).unwrap_or(f64::INFINITY)
    }
}

impl Workload {
    /// A prompt with an image and `steps` tokens behind it, or as long a prompt as every decoder of `package` has room
    /// for, so that all of them do the same.
    ///
    /// # Errors
    /// [`Error::Request`] when `steps` leave no room for a prompt.
    pub fn new(package: &ModelPackage, steps: usize) -> Result<Self> {
        let manifest = package.manifest();
        let decoders = manifest.variants.values().filter_map(|variant| variant.decoder.as_ref());
        let capacities = decoders.filter_map(|decoder| decoder.kv.capacity);
        let room = capacities.fold(manifest.decoder.context, usize::min);
        match room.checked_sub(steps).filter(|left| *left > 0 && steps > 0) {
            Some(left) => Ok(Self { positions: left.min(PROMPT), steps }),
            None => Err(Error::Request(format!(
                "{steps} decode steps do not leave room for a prompt in {room} positions; give 1 to {}",
                room.saturating_sub(1)
            ))),
        }
    }
}

/// Loads `candidate` for `component` and measures it. Meant for a process of its own, whose memory is then all its.
///
/// # Errors
/// [`Error::Package`] when what every candidate needs is damaged. What is wrong with this candidate is an outcome.
pub fn measure(
    package: &ModelPackage,
    options: &ModelOptions,
    component: Component,
    candidate: Candidate,
    work: Workload,
) -> Result<Outcome> {
    if let Err(error @ Error::Provider { .. }) = register(options) {
        return Ok(Outcome::Refused { step: Step::Build.to_string(), reason: error.to_string() });
    }
    let options = ModelOptions { self_check: SelfCheck::Always, ..options.clone() };
    let loader = Loader::new(package, &options);
    let goldens = Goldens::open(package)?;
    let watch = ResidentWatch::start(&Roots::default());
    let mut chain = Chain::of(component, candidate);
    let measured = match component {
        Component::VisionEncoder => vision(&mut chain, &loader, &goldens),
        Component::Projector => projector(&mut chain, &loader, &goldens),
        Component::Decoder => decoder(&mut chain, &loader, &goldens, work),
        Component::Head => Err(Error::Request("a head is measured with its decoder".to_owned())),
    };
    let memory = watch.and_then(ResidentWatch::stop);
    match (measured, chain.refused().last()) {
        (Ok(figures), _) => Ok(Outcome::Measured(Figures { memory, ..figures })),
        (Err(Error::Cancelled), _) => Err(Error::Cancelled),
        (Err(_), Some(refusal)) => {
            Ok(Outcome::Refused { step: refusal.step.to_string(), reason: refusal.reason.clone() })
        }
        // It serves and then fails at the same work as in an answer.
        (Err(error @ (Error::Graph { .. } | Error::Unsound { .. })), None) => {
            Ok(Outcome::Refused { step: Step::Serving.to_string(), reason: error.to_string() })
        }
        (Err(error), None) => Err(error),
    }
}

fn vision(chain: &mut Chain, loader: &Loader, goldens: &Goldens) -> Result<Figures> {
    let clock = LoadClock::new();
    let (mut encoder, report) = chain.serve(loader, |opened| check_vision(clock.opened(opened), goldens))?;
    let run = repeated(|| timed(|| encoder.encode(&goldens.pixel_values.view())))?;
    Ok(figures(&clock, &report, Some(run), None))
}

fn projector(chain: &mut Chain, loader: &Loader, goldens: &Goldens) -> Result<Figures> {
    let clock = LoadClock::new();
    let (mut projector, report) =
        chain.serve(loader, |opened| check_projector(clock.opened(opened), goldens))?;
    let run = repeated(|| timed(|| projector.project(&goldens.patch_features.view())))?;
    Ok(figures(&clock, &report, Some(run), None))
}

fn decoder(chain: &mut Chain, loader: &Loader, goldens: &Goldens, work: Workload) -> Result<Figures> {
    let embedder = TokenEmbedder::open(&loader.package)?;
    let rotary = RotaryTable::open(&loader.package)?.map(Into::into);
    let (clock, mut head) = (LoadClock::new(), None);
    let (mut decoder, report) = chain.serve(loader, |opened| {
        check_decoder(clock.opened(opened), loader, goldens, &embedder, rotary.as_ref(), &mut head)
    })?;
    // Rows of an image in turn: a prompt is mostly that.
    let image = goldens.image_embeds.slice(s![0, .., ..]);
    let prompt = Array2::from_shape_fn((work.positions, image.ncols()), |(row, column)| {
        image[(row % image.nrows(), column)]
    });
    let tokens: Vec<TokenId> = goldens
        .next_tokens
        .iter()
        .chain(&goldens.tokens_after)
        .chain(&goldens.tokens_before)
        .copied()
        .collect();
    let mut answer = Answer { decoder: &mut decoder, embedder: &embedder, prompt, tokens, steps: work.steps };
    // The first one of this length allocates, and compiles on some providers.
    answer.read()?;
    let mut steps = Vec::new();
    let prefill = repeated(|| {
        let (prefill, decoded) = answer.read()?;
        steps.extend(decoded);
        Ok(prefill)
    })?;
    let head = head.map(|report: ComponentReport| HeadChoice {
        variant: report.variant,
        provider: report.provider.to_string(),
    });
    let decoder = DecoderFigures {
        positions: work.positions,
        prefill_ms: milliseconds(prefill),
        steps: work.steps,
        decode_ms: milliseconds(median(&mut steps)),
        head,
    };
    Ok(figures(&clock, &report, None, Some(decoder)))
}

/// One prompt and what is decoded behind it.
struct Answer<'a> {
    decoder: &'a mut Decoder,
    embedder: &'a TokenEmbedder,
    prompt: Array2<f32>,
    tokens: Vec<TokenId>,
    steps: usize,
}

impl Answer<'_> {
    /// Reads the prompt and decodes; gives how long the prompt and each step took.
    fn read(&mut self) -> Result<(Duration, Vec<Duration>)> {
        // What stands there is not looked up: the cache is dropped at the end.
        let keys = vec![PositionKey::Token(0); self.prompt.nrows()];
        let begin = Instant::now();
        let mut cache = self.decoder.empty_cache()?;
        self.decoder.forward(&self.prompt.view(), &keys, &mut cache)?;
        let prefill = begin.elapsed();
        let mut steps = Vec::with_capacity(self.steps);
        for token in self.tokens.iter().cycle().take(self.steps) {
            steps.push(timed(|| {
                let row = self.embedder.embed(&[*token])?;
                self.decoder.forward(&row.view(), &[PositionKey::Token(*token)], &mut cache)
            })?);
        }
        Ok((prefill, steps))
    }
}

/// How long it takes until a graph is open.
struct LoadClock {
    begin: Instant,
    took: Cell<Duration>,
}

impl LoadClock {
    fn new() -> Self {
        Self { begin: Instant::now(), took: Cell::default() }
    }

    fn opened(&self, opened: Opened) -> Opened {
        self.took.set(self.begin.elapsed());
        opened
    }
}

fn figures(
    clock: &LoadClock,
    report: &ComponentReport,
    run: Option<Duration>,
    decoder: Option<DecoderFigures>,
) -> Figures {
    Figures {
        load_ms: milliseconds(clock.took.get()),
        run_ms: run.map(milliseconds),
        decoder,
        memory: None,
        agreement: report.self_check.iter().map(MeasuredAgreement::from).collect(),
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let begin = Instant::now();
    work().map(|_| begin.elapsed())
}

/// The median of what `once` gives, which is called a few times as long as patience lasts.
fn repeated(mut once: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let begin = Instant::now();
    let mut times = vec![once()?];
    while times.len() < REPETITIONS && begin.elapsed() < PATIENCE {
        times.push(once()?);
    }
    Ok(median(&mut times))
}

/// The middle one; of two in the middle the longer, and nothing of nothing.
fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Rounded to a microsecond: more digits are noise.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_costs_its_prompt_and_an_answer() {
        let decoder =
            DecoderFigures { positions: 640, prefill_ms: 100.0, steps: 8, decode_ms: 2.0, head: None };
        let figures = Figures {
            load_ms: 1.0,
            run_ms: None,
            decoder: Some(decoder),
            memory: None,
            agreement: Vec::new(),
        };
        assert!((figures.cost_ms() - 228.0).abs() < 1e-9);
        assert!((Figures { run_ms: Some(3.0), decoder: None, ..figures }.cost_ms() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn a_workload_fits_into_the_smallest_cache() {
        let package = ModelPackage::embedded().unwrap();
        let context = package.manifest().decoder.context;
        let work = Workload::new(&package, 8).unwrap();
        assert_eq!(work, Workload { positions: PROMPT.min(context - 8), steps: 8 });
        for steps in [0, context, usize::MAX] {
            let error = Workload::new(&package, steps).unwrap_err().to_string();
            assert!(error.ends_with(&format!("give 1 to {}", context - 1)), "{error}");
        }
    }

    #[test]
    fn an_outcome_is_one_object_that_can_be_read_again() {
        let refused = Outcome::Refused { step: "commit".to_owned(), reason: "no \"such\" node".to_owned() };
        let text = serde_json::to_string(&refused).unwrap();
        assert_eq!(text, r#"{"status":"refused","step":"commit","reason":"no \"such\" node"}"#);
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), refused);
        let decoder = DecoderFigures { positions: 1, prefill_ms: 1.5, steps: 1, decode_ms: 0.1, head: None };
        let measured = Outcome::Measured(Figures {
            load_ms: 0.25,
            run_ms: None,
            decoder: Some(decoder),
            memory: Some(Resident { peak: 3, anonymous: 2, file_backed: 1 }),
            agreement: Vec::new(),
        });
        let text = serde_json::to_string(&measured).unwrap();
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), measured);
    }

    #[test]
    fn a_median_is_in_the_middle() {
        let of = |times: &[u64]| {
            let mut times: Vec<Duration> = times.iter().copied().map(Duration::from_millis).collect();
            median(&mut times).as_millis()
        };
        assert_eq!((of(&[5, 1, 9]), of(&[4]), of(&[2, 1]), of(&[])), (5, 4, 2, 0));
    }
}

//! How long each stage of a loaded model takes, and how much memory is held behind it.

mod plan;
mod samples;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::ModelFacts;
use super::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::generate::params::GenerateParams;
use crate::generate::sampler::Sampler;
use crate::image::{Limits, Preprocessor, Rgb, decode};
use crate::machine::{Busy, BusyWatch, Resident, ResidentWatch, Roots};
use crate::model::decoder::Logits;
use crate::model::kv_cache::KvCache;
use crate::model::vision::ImageInput;
use crate::model::{CausalModel, LlavaPhi};
use crate::text::{Piece, Prompt, TokenId};
use plan::Job;

pub use plan::{Subject, Wishes};
pub use samples::{Measurement, Summary, What};

/// A picture, and the text that the package's template puts around it and a question.
#[derive(Clone, Debug)]
pub struct Scene {
    /// What the image is called, for errors.
    pub picture: String,
    /// An image file's bytes.
    pub file: Vec<u8>,
    /// What the file may take.
    pub limits: Limits,
    /// Tokens before the picture.
    pub before: Vec<TokenId>,
    /// Tokens behind the question, up to where the model answers.
    pub after: Vec<TokenId>,
}

/// What came of a measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// What was measured, in order.
    pub measurements: Vec<Measurement>,
    /// What was usual and left out, and why.
    pub left_out: Vec<String>,
    /// Memory behind each thing that was measured; empty where the system does not tell.
    pub memory: Vec<MemoryMark>,
    /// Who had the processors meanwhile; `None` where the system does not tell.
    pub busy: Option<Busy>,
}

/// What the process holds at one moment, and the most that it held until then, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryMark {
    /// Behind what.
    pub after: String,
    /// What only this process has, now.
    pub anonymous: u64,
    /// Pages of mapped files, now.
    pub file_backed: u64,
    /// The peak of both together.
    pub peak: u64,
    /// The highest of the first that was seen.
    pub peak_anonymous: u64,
    /// The highest of the second that was seen.
    pub peak_file_backed: u64,
}

/// How far a measurement has come.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// What is done now.
    pub name: &'a str,
    /// How often it was done before, warming up included.
    pub done: usize,
    /// Things that were measured before this one.
    pub job: usize,
    /// Things that are measured in all.
    pub jobs: usize,
}

/// Follows the memory of this process from where it was made.
#[derive(Debug)]
pub struct MemoryMarks {
    roots: Roots,
    watch: Option<ResidentWatch>,
    highest: Resident,
    marks: Vec<MemoryMark>,
}

impl MemoryMarks {
    /// Begins to watch.
    pub fn start() -> Self {
        let roots = Roots::default();
        let watch = ResidentWatch::start(&roots);
        Self { roots, watch, highest: Resident::default(), marks: Vec::new() }
    }

    /// Notes what is held now, behind `name`.
    pub fn mark(&mut self, name: &str) {
        let seen = self.watch.take().and_then(ResidentWatch::stop);
        self.watch = ResidentWatch::start(&self.roots);
        let Some((seen, now)) = seen.zip(Resident::now(&self.roots)) else { return };
        self.highest = self.highest.or_higher(seen).or_higher(now);
        self.marks.push(MemoryMark {
            after: name.to_owned(),
            anonymous: now.anonymous,
            file_backed: now.file_backed,
            peak: self.highest.peak,
            peak_anonymous: self.highest.anonymous,
            peak_file_backed: self.highest.file_backed,
        });
    }
}

/// Measures `model` as `wishes` say, on this thread. `marks` may hold what was noted while it was loaded; `progress` hears
/// of every repetition before it begins. Tokens are chosen greedily, and one that would end an answer does not.
///
/// # Errors
/// [`Error::Request`] for wishes that cannot be met, before anything runs; [`Error::Cancelled`] once `cancel` was used;
/// otherwise those of the model.
pub fn measure(
    model: LlavaPhi,
    (facts, preprocessor): (&ModelFacts, &Preprocessor),
    scene: &Scene,
    wishes: &Wishes,
    mut marks: MemoryMarks,
    cancel: &CancelToken,
    progress: &mut dyn FnMut(Step<'_>),
) -> Result<Figures> {
    let template = scene.before.len() + scene.after.len();
    let (jobs, left_out) = wishes.jobs(facts.context, facts.tokens_per_image, template)?;
    let roots = Roots::default();
    let busy = BusyWatch::start(&roots);
    let canceler = model.canceler();
    let mut bench = Bench::new(model, facts, preprocessor, scene, wishes)?;
    let begin = Instant::now();
    let mut measurements = Vec::new();
    let measured = cancel.during(canceler, || {
        for (number, job) in jobs.iter().enumerate() {
            let name = job.name();
            // What is left is shared by what is left to do, so that one thing does not take the time of all others.
            let left = wishes.budget.saturating_sub(begin.elapsed());
            let share = left / u32::try_from(jobs.len() - number).unwrap_or(u32::MAX);
            let mut tell = |done| {
                progress(Step { name: &name, done, job: number, jobs: jobs.len() });
                if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
            };
            let pace = Pace { begin: Instant::now(), share, wishes, tell: &mut tell };
            measurements.extend(bench.job(*job, pace)?);
            marks.mark(&name);
        }
        Ok(())
    });
    measured?;
    let busy = busy.and_then(|watch| watch.stop(&roots));
    Ok(Figures { measurements, left_out, memory: marks.marks, busy })
}

/// When a thing was measured often enough.
struct Pace<'a> {
    begin: Instant,
    share: Duration,
    wishes: &'a Wishes,
    tell: &'a mut dyn FnMut(usize) -> Result<()>,
}

impl Pace<'_> {
    /// Calls `once` for the warm-up and then for each repetition; gives what it gave, apart. Time is kept for one
    /// repetition at least.
    fn run<T>(self, mut once: impl FnMut() -> Result<T>) -> Result<(Vec<T>, Vec<T>)> {
        let (mut warm_up, mut samples) = (Vec::new(), Vec::new());
        for done in 0..self.wishes.warm_up.saturating_add(self.wishes.repetitions) {
            let late = self.begin.elapsed() >= self.share;
            if late && !samples.is_empty() {
                break;
            }
            (self.tell)(done)?;
            if done < self.wishes.warm_up && !(late && done > 0) {
                warm_up.push(once()?);
            } else {
                samples.push(once()?);
            }
        }
        Ok((warm_up, samples))
    }
}

/// The model with what is given to it.
struct Bench<'a> {
    model: LlavaPhi,
    cache: KvCache,
    facts: &'a ModelFacts,
    preprocessor: &'a Preprocessor,
    scene: &'a Scene,
    wishes: &'a Wishes,
    picture: Rgb,
    /// How many texts and pictures were made: no two are equal.
    made: u32,
}

impl<'a> Bench<'a> {
    fn new(
        mut model: LlavaPhi,
        facts: &'a ModelFacts,
        preprocessor: &'a Preprocessor,
        scene: &'a Scene,
        wishes: &'a Wishes,
    ) -> Result<Self> {
        let cache = model.empty_cache()?;
        let picture = decode(&scene.picture, &scene.file, &scene.limits)?;
        Ok(Self { model, cache, facts, preprocessor, scene, wishes, picture, made: 0 })
    }

    fn job(&mut self, job: Job, pace: Pace<'_>) -> Result<Vec<Measurement>> {
        match job {
            Job::Preprocess => {
                let (warm_up, samples) = pace.run(|| timed(|| self.preprocess()))?;
                Ok(vec![Measurement::new(What::Preprocess, None, None, &warm_up, &samples)])
            }
            Job::Encode => self.encode(pace),
            Job::FirstToken => self.first_token(pace),
            Job::SecondQuestion => self.second_question(pace),
            Job::Prefill(positions) => {
                let (warm_up, samples) = pace.run(|| self.prefill(positions).map(|(took, _)| took))?;
                Ok(vec![Measurement::new(What::Prefill, Some(positions), Some(0), &warm_up, &samples)])
            }
            Job::Decode(depth) => {
                let mut state = None;
                let (warm_up, samples) = pace.run(|| self.decode_at(depth, &mut state))?;
                let (warm_up, samples) = (warm_up.concat(), samples.concat());
                Ok(vec![Measurement::new(What::Decode, Some(1), Some(depth), &warm_up, &samples)])
            }
            Job::Ahead(tokens, depth) => {
                let prompt = self.text(depth.max(1));
                self.read(&given(&[Piece::Tokens(prompt)])?)?;
                let next = self.text(tokens);
                let (warm_up, samples) = pace.run(|| {
                    let took = timed(|| self.model.decode_all(&next, &mut self.cache))?;
                    self.model.forget(tokens, &mut self.cache)?;
                    Ok(took)
                })?;
                Ok(vec![Measurement::new(What::Ahead, Some(tokens), Some(depth), &warm_up, &samples)])
            }
            Job::Together(count, depth) => {
                let mut caches = self.sequences(count, depth.max(1))?;
                let (warm_up, samples) = pace.run(|| self.step_together(&mut caches, depth.max(1)))?;
                let (warm_up, samples) = (warm_up.concat(), samples.concat());
                Ok(vec![Measurement::new(What::Together, Some(count), Some(depth), &warm_up, &samples)])
            }
            Job::Context(positions) => {
                let (warm_up, samples) = pace.run(|| {
                    let (took, logits) = self.prefill(positions)?;
                    Ok((took, self.decode(logits)?))
                })?;
                let (reading, decoding): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
                let (warm_reading, warm_decoding): (Vec<_>, Vec<_>) = warm_up.into_iter().unzip();
                let prefill = (What::ContextPrefill, Some(positions), Some(0));
                let decode = (What::ContextDecode, Some(1), Some(positions));
                Ok(vec![
                    Measurement::new(prefill.0, prefill.1, prefill.2, &warm_reading, &reading),
                    Measurement::new(
                        decode.0,
                        decode.1,
                        decode.2,
                        &warm_decoding.concat(),
                        &decoding.concat(),
                    ),
                ])
            }
        }
    }

    fn preprocess(&self) -> Result<ImageInput> {
        let rgb = decode(&self.scene.picture, &self.scene.file, &self.scene.limits)?;
        Ok(ImageInput::new(self.preprocessor.run(&rgb, None)))
    }

    fn encode(&mut self, pace: Pace<'_>) -> Result<Vec<Measurement>> {
        let image = self.preprocess()?;
        let (warm_up, samples) = pace.run(|| {
            let begin = Instant::now();
            let features = self.model.vision()?.encode(&image.pixels().view())?;
            let encode = begin.elapsed();
            let project = timed(|| self.model.projector()?.project(&features.view()))?;
            self.model.rest();
            Ok((encode, project))
        })?;
        let (encode, project): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
        let (warm_encode, warm_project): (Vec<_>, Vec<_>) = warm_up.into_iter().unzip();
        Ok(vec![
            Measurement::new(What::Encode, None, None, &warm_encode, &encode),
            Measurement::new(What::Project, None, None, &warm_project, &project),
        ])
    }

    fn first_token(&mut self, pace: Pace<'_>) -> Result<Vec<Measurement>> {
        let mut read = 0;
        let (warm_up, samples) = pace.run(|| {
            let image = self.another_picture();
            self.forget()?;
            let (took, positions, _) = self.ask(&image)?;
            read = positions;
            Ok(took)
        })?;
        Ok(vec![Measurement::new(What::FirstToken, Some(read), Some(0), &warm_up, &samples)])
    }

    fn second_question(&mut self, pace: Pace<'_>) -> Result<Vec<Measurement>> {
        let image = self.another_picture();
        self.ask(&image)?;
        let (mut read, mut cached) = (0, 0);
        let (warm_up, samples) = pace.run(|| {
            let (took, positions, before) = self.ask(&image)?;
            (read, cached) = (positions, before);
            Ok(took)
        })?;
        Ok(vec![Measurement::new(What::SecondQuestion, Some(read), Some(cached), &warm_up, &samples)])
    }

    /// A question about `image` that was not asked before: how long to the first token, how many positions were read for
    /// it, and how many stood in the cache.
    fn ask(&mut self, image: &Arc<ImageInput>) -> Result<(Duration, usize, usize)> {
        let Scene { before, after, .. } = self.scene;
        let question = self.text(self.wishes.text.saturating_sub(before.len() + after.len()));
        let pieces = [
            Piece::Tokens(before.clone()),
            Piece::Image(0),
            Piece::Tokens(question),
            Piece::Tokens(after.clone()),
        ];
        let prompt = given(&pieces)?;
        let begin = Instant::now();
        let mut prefill = self.model.prefill(&prompt, &[Arc::clone(image)], &mut self.cache)?;
        self.pick(&mut prefill.logits)?;
        let took = begin.elapsed();
        Ok((took, prompt.positions(self.facts.tokens_per_image) - prefill.cached, prefill.cached))
    }

    /// Reads a text of `positions` tokens that shares none with what was read before; also the logits behind it.
    fn prefill(&mut self, positions: usize) -> Result<(Duration, Logits)> {
        let prompt = given(&[Piece::Tokens(self.text(positions))])?;
        self.read(&prompt)
    }

    fn read(&mut self, prompt: &Prompt) -> Result<(Duration, Logits)> {
        let begin = Instant::now();
        let mut prefill = self.model.prefill(prompt, &[], &mut self.cache)?;
        self.pick(&mut prefill.logits)?;
        Ok((begin.elapsed(), prefill.logits))
    }

    /// Makes the cache hold nothing that anything else begins with.
    fn forget(&mut self) -> Result<()> {
        self.prefill(1).map(|_| ())
    }

    /// Decodes behind `depth` positions, of which `state` remembers what they were.
    fn decode_at(&mut self, depth: usize, state: &mut Option<Prompt>) -> Result<Vec<Duration>> {
        if depth == 0 {
            self.model.forget(self.cache.len(), &mut self.cache)?;
            let Some(&token) = self.text(1).first() else { return Ok(Vec::new()) };
            return self.decode_from(token, self.wishes.steps);
        }
        let prompt = match state.take() {
            Some(prompt) => prompt,
            None => given(&[Piece::Tokens(self.text(depth))])?,
        };
        // Later times only its last position is read again.
        let (_, logits) = self.read(&prompt)?;
        *state = Some(prompt);
        self.decode(logits)
    }

    /// As many caches of `depth` positions.
    fn sequences(&mut self, count: usize, depth: usize) -> Result<Vec<KvCache>> {
        let prompt = given(&[Piece::Tokens(self.text(depth))])?;
        let mut caches: Vec<KvCache> = Vec::with_capacity(count);
        for _ in 0..count {
            let mut cache = self.model.empty_cache()?;
            let others: Vec<&KvCache> = caches.iter().collect();
            let mut reading = self.model.begin(&prompt, &[], &mut cache, &others)?;
            while self.model.read_on(&mut reading, usize::MAX, &mut cache)?.is_none() {}
            caches.push(cache);
        }
        Ok(caches)
    }

    /// Steps of all sequences together, behind `depth` positions.
    fn step_together(&mut self, caches: &mut [KvCache], depth: usize) -> Result<Vec<Duration>> {
        for cache in caches.iter_mut() {
            self.model.forget(cache.len() - depth, cache)?;
        }
        let mut tokens = self.text(caches.len());
        let mut took = Vec::with_capacity(self.wishes.steps);
        for _ in 0..self.wishes.steps {
            let begin = Instant::now();
            let read = self.model.decode_each(&tokens, &mut caches.iter_mut().collect::<Vec<_>>());
            for (token, logits) in tokens.iter_mut().zip(read) {
                *token = self.pick(&mut logits?)?;
            }
            took.push(begin.elapsed());
        }
        Ok(took)
    }

    fn decode(&mut self, mut logits: Logits) -> Result<Vec<Duration>> {
        let token = self.pick(&mut logits)?;
        self.decode_from(token, self.wishes.steps)
    }

    fn decode_from(&mut self, mut token: TokenId, steps: usize) -> Result<Vec<Duration>> {
        let mut took = Vec::with_capacity(steps);
        for _ in 0..steps {
            let begin = Instant::now();
            let mut logits = self.model.decode(token, &mut self.cache)?;
            token = self.pick(&mut logits)?;
            took.push(begin.elapsed());
        }
        Ok(took)
    }

    /// The likeliest token; one that would end an answer counts as any other.
    fn pick(&self, logits: &mut Logits) -> Result<TokenId> {
        Sampler::new(&GenerateParams::default(), self.facts.tokenizer.vocabulary())?
            .pick(logits.values_mut(), &[])
    }

    /// Tokens that begin otherwise than those before.
    fn text(&mut self, length: usize) -> Vec<TokenId> {
        self.made = self.made.wrapping_add(1);
        let vocabulary = u32::try_from(self.facts.tokenizer.vocabulary()).unwrap_or(u32::MAX).max(1);
        let ids = (0_u32..).map(|place| place.wrapping_mul(2_654_435_761).rotate_left(15));
        ids.map(|id| id.wrapping_add(self.made) % vocabulary).take(length).collect()
    }

    /// A picture that no cache knows.
    fn another_picture(&mut self) -> Arc<ImageInput> {
        self.made = self.made.wrapping_add(1);
        let [number, more, ..] = self.made.to_le_bytes();
        let mut picture = self.picture.clone();
        let half = picture.pixels.len() / 2;
        // Enough of the middle that no resizing makes it as it was.
        for pixel in picture.pixels[half..].chunks_exact_mut(3) {
            pixel[0] = pixel[0].wrapping_add(number);
            pixel[1] = pixel[1].wrapping_add(more);
        }
        Arc::new(ImageInput::new(self.preprocessor.run(&picture, None)))
    }
}

/// A prompt of tokens and images alone.
fn given(pieces: &[Piece]) -> Result<Prompt> {
    Prompt::new(pieces, |_| Ok(Vec::new()))
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let begin = Instant::now();
    work().map(|_| begin.elapsed())
}

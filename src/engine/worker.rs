//! The thread that owns the model and answers one request after another.

use std::{
    ops::ControlFlow,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::ahead::Ahead;
use super::event::{Completion, Event, Sink, Timings, Usage};
use super::{ModelFacts, Reports, Request};
use crate::error::{Error, Result};
use crate::generate::lookup::Lookup;
use crate::generate::sequence::{Advance, FinishReason, Next, Sequence};
use crate::generate::watchdog::Watchdog;
use crate::model::CausalModel;
use crate::model::prefix::PrefixReport;
use crate::package::Component;

/// A request that passed its checks, and where its events go.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) limit: usize,
    pub(super) sink: Sink,
    pub(super) submitted: Instant,
}

/// Answers jobs until every sender is gone.
pub(super) fn work<M: CausalModel>(
    mut model: M,
    facts: &ModelFacts,
    reports: &Reports,
    jobs: &mpsc::Receiver<Job>,
) {
    // What the last request read, so that a follow-up reads only what is new. The model keeps what others read.
    let mut idle: Option<M::Cache> = None;
    for mut job in jobs {
        let queue = job.submitted.elapsed();
        let cancel = job.request.cancel.clone();
        let canceler = model.canceler();
        canceler.reset();
        let result = cancel.during(
            move || canceler.cancel(),
            || {
                let cache = idle.take().map_or_else(|| model.empty_cache(), Ok)?;
                let (result, cache) = answer(&mut model, facts, reports, &mut job, cache, queue);
                idle = cache;
                result
            },
        );
        let event = result.map(|completion| Event::Finished(Box::new(completion)));
        // Nobody is left to tell when the sink breaks here: the job is over either way.
        let _ = (job.sink)(event);
    }
}

/// Answers one job, from the beginning again whenever what computes it has to be replaced. The cache comes back unless
/// its content is in doubt.
fn answer<M: CausalModel>(
    model: &mut M,
    facts: &ModelFacts,
    reports: &Reports,
    job: &mut Job,
    mut cache: M::Cache,
    queue: Duration,
) -> (Result<Completion>, Option<M::Cache>) {
    let begin = Instant::now();
    let mut demotions = Vec::new();
    let mut timings = Timings { queue, ..Timings::default() };
    loop {
        let (graph, reason) = match attempt(model, facts, job, cache, timings) {
            (Err(Error::Unsound { graph, reason }), _) => (graph, reason),
            (result, cache) => {
                let prefixes = model.prefixes();
                return (result.map(|completion| Completion { demotions, prefixes, ..completion }), cache);
            }
        };
        tracing::warn!(graph, "taken out of service: {reason}");
        let replaced =
            model.demote(&graph, &reason).and_then(|demotion| Ok((demotion, model.empty_cache()?)));
        reports.set(model.reports());
        match replaced {
            Ok((demotion, fresh)) => {
                demotions.push(demotion.clone());
                let _ = (job.sink)(Ok(Event::Restarted(Box::new(demotion))));
                cache = fresh;
            }
            Err(error) => return (Err(error), None),
        }
        timings.lost = begin.elapsed();
    }
}

/// Reads the prompt and answers it.
fn attempt<M: CausalModel>(
    model: &mut M,
    facts: &ModelFacts,
    job: &mut Job,
    mut cache: M::Cache,
    mut timings: Timings,
) -> (Result<Completion>, Option<M::Cache>) {
    let Request { prompt, images, params, .. } = &job.request;
    let mut usage = Usage {
        prompt_tokens: prompt.positions(facts.tokens_per_image),
        image_tokens: prompt.images() * facts.tokens_per_image,
        ..Usage::default()
    };
    let ids = prompt.token_ids().collect();
    let mut sequence = match Sequence::new(&facts.tokenizer, params, ids, facts.eos.clone(), job.limit) {
        Ok(sequence) => sequence,
        Err(error) => return (Err(error), Some(cache)),
    };

    let mut ahead = match Ahead::new(model, params.lookup.map(Lookup::new)) {
        Ok(ahead) => ahead,
        Err(error) => return (Err(error), Some(cache)),
    };

    let mut logits = match model.prefill(prompt, images, &mut cache) {
        Ok(prefill) => {
            (usage.cached_tokens, usage.cached_from) = (prefill.cached, prefill.from);
            timings.restore = prefill.restore;
            (timings.vision, timings.prefill) = (prefill.vision, prefill.decoder);
            tracing::debug!(positions = usage.prompt_tokens, cached = prefill.cached, "prompt read");
            prefill.logits
        }
        Err(Error::Cancelled) => {
            return (Ok(complete(&sequence, FinishReason::Cancelled, usage, timings)), Some(cache));
        }
        Err(error) => return (Err(error), None),
    };
    let begin = Instant::now();
    let mut watchdog = Watchdog::default();
    let reason = loop {
        let Advance { text, next } = match sequence.advance(logits.values_mut()) {
            Ok(advance) => advance,
            Err(error) => return (Err(error), None),
        };
        let broken = !text.is_empty() && (job.sink)(Ok(Event::Text(text))) == ControlFlow::Break(());
        let token = match next {
            Next::Finish(reason) => break reason,
            Next::Read(_) if broken || job.request.cancel.is_cancelled() => break FinishReason::Cancelled,
            Next::Read(token) => token,
        };
        if watchdog.barks(sequence.tokens()) {
            match model.recheck() {
                Ok(true) => {}
                Ok(false) => return (Err(looped()), None),
                Err(Error::Cancelled) => break FinishReason::Cancelled,
                Err(error) => return (Err(error), None),
            }
        }
        let left = job.limit.saturating_sub(sequence.tokens().len());
        logits = match ahead.read(model, token, &mut cache, (sequence.history(), left)) {
            Ok(logits) => logits,
            Err(Error::Cancelled) => break FinishReason::Cancelled,
            Err(error) => return (Err(error), None),
        };
    };
    timings.decode = begin.elapsed();
    usage.lookup = match ahead.end(model, &mut cache) {
        Ok(guesses) => guesses,
        Err(error) => return (Err(error), None),
    };
    if reason == FinishReason::Cancelled {
        match sequence.finish(reason) {
            Ok(Advance { text, .. }) if !text.is_empty() => {
                let _ = (job.sink)(Ok(Event::Text(text)));
            }
            _ => {}
        }
    }
    (Ok(complete(&sequence, reason, usage, timings)), Some(cache))
}

fn looped() -> Error {
    let reason =
        "the answer goes round in circles, and it no longer computes what its goldens say".to_owned();
    Error::Unsound { graph: Component::Decoder.name().to_owned(), reason }
}

fn complete(sequence: &Sequence, finish_reason: FinishReason, usage: Usage, timings: Timings) -> Completion {
    let token_ids = sequence.tokens().to_vec();
    let usage = Usage { completion_tokens: token_ids.len(), ..usage };
    let text = sequence.text().to_owned();
    let (demotions, prefixes) = (Vec::new(), PrefixReport::default());
    Completion { text, token_ids, finish_reason, usage, timings, demotions, prefixes }
}

/// The thread that owns the model.
#[derive(Debug)]
pub(super) struct Worker {
    /// Both are `None` once it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Queues a job.
    pub(super) fn send(&self, job: Job) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(Error::Stopped("its thread has ended".to_owned())) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        // A sink may hold the last engine, and it is dropped on the thread itself.
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        {
            // A thread that panicked has told its requests already.
            let _ = thread.join();
        }
    }
}

/// Starts the thread.
pub(super) fn start<M: CausalModel + 'static>(
    model: M,
    facts: Arc<ModelFacts>,
    reports: Reports,
) -> Result<Worker> {
    let (sender, jobs) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("llava-phi engine".to_owned())
        .spawn(move || work(model, &facts, &reports, &jobs))
        .map_err(|e| Error::Stopped(format!("its thread cannot be started: {e}")))?;
    Ok(Worker { jobs: Some(sender), thread: Some(thread) })
}

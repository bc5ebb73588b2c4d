//! One request from its submission to its end.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::ahead::Ahead;
use super::choices::{self, Decision};
use super::event::{Completion, Event, Sink, Timings, Usage};
use super::{ModelFacts, Request};
use crate::error::{Error, Result};
use crate::generate::constraint::Constraint;
use crate::generate::lookup::Lookup;
use crate::generate::sequence::{Advance, FinishReason, Next, Sequence, TokenLogprobs};
use crate::generate::watchdog::Watchdog;
use crate::model::decoder::Logits;
use crate::model::prefix::PrefixReport;
use crate::model::{CausalModel, Demotion, Prefill};
use crate::text::TokenId;

/// A request that passed its checks, and where its events go.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) limit: usize,
    pub(super) sink: Sink,
    pub(super) submitted: Instant,
}

/// A request in the engine's hands.
pub(super) struct Entry<M: CausalModel> {
    pub(super) job: Job,
    pub(super) state: State<M>,
    /// What was read for it; `None` before anything was.
    pub(super) cache: Option<M::Cache>,
    /// From the moment that its prompt is begun.
    pub(super) answer: Option<Box<Answer>>,
    begun: Option<Instant>,
    timings: Timings,
    usage: Usage,
    demotions: Vec<Demotion>,
    text: String,
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
    choices: Option<Vec<(String, f64)>>,
}

/// How far a request has come.
pub(super) enum State<M: CausalModel> {
    /// Nothing was done for it, or all must be done again.
    Fresh,
    /// Its prompt is being read.
    Reading(M::Reading),
    /// Its answer is being made.
    Answering,
}

/// An answer while it is made.
pub(super) struct Answer {
    sequence: Sequence,
    ahead: Ahead,
    watchdog: Watchdog,
    begin: Instant,
    /// What was said last, for the model to read.
    pub(super) token: TokenId,
    limit: usize,
}

impl Answer {
    /// Has the model read what was said last.
    pub(super) fn read<M: CausalModel>(&mut self, model: &mut M, cache: &mut M::Cache) -> Result<Logits> {
        let left = self.limit.saturating_sub(self.sequence.tokens().len());
        self.ahead.read(model, self.token, cache, (self.sequence.history(), left))
    }
}

/// What became of a request after a step.
#[derive(Debug)]
pub(super) enum After {
    /// It goes on.
    On,
    /// It goes on, and looks as if the model no longer computes what it should.
    Suspicious,
    /// It is over.
    Over(FinishReason),
}

impl<M: CausalModel> Entry<M> {
    pub(super) fn new(job: Job, facts: &ModelFacts) -> Self {
        let prompt = &job.request.prompt;
        let usage = Usage {
            prompt_tokens: prompt.positions(facts.tokens_per_image),
            image_tokens: prompt.images() * facts.tokens_per_image,
            ..Usage::default()
        };
        Self {
            job,
            state: State::Fresh,
            cache: None,
            answer: None,
            begun: None,
            timings: Timings::default(),
            usage,
            demotions: Vec::new(),
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            choices: None,
        }
    }

    /// Positions of its prompt.
    pub(super) fn prompt_positions(&self) -> usize {
        self.usage.prompt_tokens
    }

    /// Positions that it may come to hold.
    pub(super) fn positions(&self) -> usize {
        self.usage.prompt_tokens.saturating_add(self.job.limit)
    }

    /// Work on it begins, unless it has.
    pub(super) fn begin(&mut self) {
        if self.begun.is_none() {
            self.begun = Some(Instant::now());
            self.timings.queue = self.job.submitted.elapsed();
        }
    }

    /// Whether work on it has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Why it must not go on, if that is so.
    pub(super) fn given_up(&self) -> Option<Result<FinishReason>> {
        if self.job.request.cancel.is_cancelled() {
            return Some(Ok(FinishReason::Cancelled));
        }
        let late = self.job.request.deadline.is_some_and(|deadline| deadline <= Instant::now());
        late.then_some(Err(Error::Deadline))
    }

    /// Whether nothing but what it says next is needed of the model.
    pub(super) fn is_plain(&self) -> bool {
        self.job.request.params.lookup.is_none()
    }

    /// Makes ready for the answer, so that what cannot be done is refused before the prompt is read.
    pub(super) fn prepare(&mut self, model: &M, facts: &ModelFacts) -> Result<()> {
        let params = &self.job.request.params;
        let ids = self.job.request.prompt.token_ids().collect();
        let sequence = Sequence::new(&facts.tokenizer, params, ids, facts.eos.clone(), self.job.limit)?;
        let ahead = Ahead::new(model, params.lookup.map(Lookup::new))?;
        let (watchdog, begin, limit) = (Watchdog::default(), Instant::now(), self.job.limit);
        self.answer = Some(Box::new(Answer { sequence, ahead, watchdog, begin, token: 0, limit }));
        Ok(())
    }

    /// The prompt was read: the answer begins.
    pub(super) fn begin_answer(
        &mut self,
        model: &mut M,
        facts: &ModelFacts,
        prefill: Prefill,
    ) -> Result<After> {
        (self.usage.cached_tokens, self.usage.cached_from) = (prefill.cached, prefill.from);
        let Prefill { restore, vision, decoder, .. } = prefill;
        self.timings = Timings { restore, vision, prefill: decoder, ..self.timings };
        tracing::debug!(positions = self.usage.prompt_tokens, cached = prefill.cached, "prompt read");
        self.state = State::Answering;
        if let Some(answer) = &mut self.answer {
            answer.begin = Instant::now();
        }
        let mut logits = prefill.logits;
        let request = &self.job.request;
        let texts = request.params.constraint.as_ref().and_then(Constraint::choices);
        let (Some(texts), Some(cache)) = (texts, &mut self.cache) else {
            return self.say(logits.values_mut());
        };
        let room = (cache, self.usage.prompt_tokens);
        let decision = request
            .cancel
            .during(model.canceler(), || choices::decide(model, facts, request, room, (texts, logits)))?;
        self.settle(decision)
    }

    /// Gives out an answer that was decided on as a whole.
    fn settle(&mut self, decision: Decision) -> Result<After> {
        let Decision { tokens, logprobs, choices } = decision;
        let Some(answer) = &mut self.answer else { return Ok(After::On) };
        let Advance { delta, next } = answer.sequence.settle(&tokens, logprobs)?;
        self.choices = Some(choices);
        if !delta.is_empty() {
            // The answer is complete whether anybody listens or not.
            let _ = (self.job.sink)(Ok(Event::Text(delta)));
        }
        Ok(After::Over(match next {
            Next::Finish(reason) => reason,
            Next::Read(_) => FinishReason::Stop,
        }))
    }

    /// Chooses the next token of the answer.
    pub(super) fn say(&mut self, logits: &mut [f32]) -> Result<After> {
        let Some(answer) = &mut self.answer else { return Ok(After::On) };
        let Advance { delta, next } = answer.sequence.advance(logits)?;
        let broken = !delta.is_empty() && (self.job.sink)(Ok(Event::Text(delta))) == ControlFlow::Break(());
        match next {
            Next::Finish(reason) => Ok(After::Over(reason)),
            Next::Read(_) if broken || self.job.request.cancel.is_cancelled() => {
                Ok(After::Over(FinishReason::Cancelled))
            }
            Next::Read(token) => {
                answer.token = token;
                let barks = answer.watchdog.barks(answer.sequence.tokens());
                Ok(if barks { After::Suspicious } else { After::On })
            }
        }
    }

    /// All that was done for it is void, since `demotion` took place.
    pub(super) fn restart(&mut self, demotion: &Demotion) {
        self.cache = None;
        self.answer = None;
        self.state = State::Fresh;
        self.demotions.push(demotion.clone());
        let _ = (self.job.sink)(Ok(Event::Restarted(Box::new(demotion.clone()))));
        self.timings.lost = self.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
    }

    /// Stops the answer: what was read ahead is taken out of the cache, and what was held back is said.
    pub(super) fn stop(&mut self, model: &mut M, reason: FinishReason) -> Result<()> {
        let state = std::mem::replace(&mut self.state, State::Fresh);
        let (State::Answering, Some(answer)) = (state, self.answer.take()) else { return Ok(()) };
        let Answer { mut sequence, ahead, begin, .. } = *answer;
        self.timings.decode = begin.elapsed();
        if let Some(cache) = &mut self.cache {
            self.usage.lookup = ahead.end(model, cache)?;
        }
        if reason == FinishReason::Cancelled
            && let Ok(Advance { delta, .. }) = sequence.finish(reason)
            && !delta.is_empty()
        {
            let _ = (self.job.sink)(Ok(Event::Text(delta)));
        }
        sequence.text().clone_into(&mut self.text);
        self.tokens = sequence.tokens().to_vec();
        self.logprobs = sequence.logprobs().to_vec();
        Ok(())
    }

    /// Tells how it ended; nobody is left to tell when the sink breaks here.
    pub(super) fn tell(mut self, end: Result<FinishReason>, prefixes: PrefixReport) {
        let event = end.map(|finish_reason| {
            let usage = Usage { completion_tokens: self.tokens.len(), ..self.usage };
            Event::Finished(Box::new(Completion {
                text: self.text,
                token_ids: self.tokens,
                logprobs: self.logprobs,
                choices: self.choices,
                finish_reason,
                usage,
                timings: self.timings,
                demotions: self.demotions,
                prefixes,
            }))
        });
        let _ = (self.job.sink)(event);
    }
}

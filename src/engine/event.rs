//! What a request gives back: pieces of text, then a completion.

use std::{ops::ControlFlow, time::Duration};

use serde::Serialize;

use crate::error::Result;
use crate::generate::lookup::Figures;
use crate::generate::sequence::{Delta, FinishReason, TokenLogprobs};
use crate::model::Demotion;
use crate::model::prefix::{CachedFrom, PrefixReport};
use crate::text::TokenId;

/// Takes the events of one request, in order; `Break` stops it.
pub type Sink = Box<dyn FnMut(Result<Event>) -> ControlFlow<()> + Send>;

/// One thing that happened to a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// More of the answer.
    Text(Delta),
    /// What computed the answer gave what is no number, and was taken out of service. The text so far is void: the
    /// prompt is read again by what serves instead, and the answer begins anew.
    Restarted(Box<Demotion>),
    /// The answer is complete; nothing follows.
    Finished(Box<Completion>),
}

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The whole text.
    pub text: String,
    /// The tokens of the answer, without the one that ended it.
    pub token_ids: Vec<TokenId>,
    /// How likely the tokens were, those that a stop string cut off left out; empty unless it was asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// The texts of which the answer had to be one, in the order given, each with its share of the probability of all; they
    /// add up to 1.
    pub choices: Option<Vec<(String, f64)>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What was read and written.
    pub usage: Usage,
    /// How long it took.
    pub timings: Timings,
    /// What was taken out of service on the way.
    pub demotions: Vec<Demotion>,
    /// What is kept of prompts now.
    pub prefixes: PrefixReport,
}

/// What a request read and wrote, in positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Positions of the prompt, those of images included.
    pub prompt_tokens: usize,
    /// Positions of images.
    pub image_tokens: usize,
    /// Positions of the prompt that had been read before and were not read again.
    pub cached_tokens: usize,
    /// Where those came from.
    pub cached_from: CachedFrom,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// What looking ahead came to; `None` when nobody asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lookup: Option<Figures>,
}

/// How long the steps of a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for the engine's thread.
    pub queue: Duration,
    /// Finding what was read before, and copying it.
    pub restore: Duration,
    /// Encoding and projecting images.
    pub vision: Duration,
    /// The decoder reading the prompt.
    pub prefill: Duration,
    /// From the first token to the end of the answer.
    pub decode: Duration,
    /// What was done for this answer before it began anew.
    pub lost: Duration,
}

impl Timings {
    /// From the start of the work to the first token.
    pub fn first_token(&self) -> Duration {
        self.lost + self.restore + self.vision + self.prefill
    }

    /// Tokens a second after the first one, when there are any.
    pub fn tokens_per_second(&self, completion_tokens: usize) -> Option<f64> {
        let seconds = self.decode.as_secs_f64();
        (completion_tokens > 1 && seconds > 0.0).then(|| {
            let steps = u32::try_from(completion_tokens - 1).unwrap_or(u32::MAX);
            f64::from(steps) / seconds
        })
    }
}

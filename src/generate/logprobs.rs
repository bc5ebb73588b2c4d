//! How likely each token of an answer was, told together with its text.
//!
//! ```text
//! tokens    " r" "ed" " sq" "u" "are"        stop string "qu"
//! text out            r ed   s                the tokens from "u" on are no part of the answer
//! ```

use std::collections::VecDeque;

use serde::Serialize;

use crate::text::{TokenId, Tokenizer};

/// The least that is told: minus infinity has no JSON form, and `OpenAI`'s API tells this of what is as good as impossible.
const LOWEST: f64 = -9999.0;

/// A token of an answer, and how likely it was in its place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprobs {
    /// The token.
    pub id: TokenId,
    /// What it adds to the text; may begin or end inside a character.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability, at least -9999; see [`super::params::GenerateParams::logprobs`].
    pub logprob: f32,
    /// The likeliest tokens in its place, the likeliest first; as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// What it would have added to the text.
    pub bytes: Vec<u8>,
    /// As [`TokenLogprobs::logprob`].
    pub logprob: f32,
}

/// The probabilities that logits stand for.
#[derive(Clone, Copy, Debug)]
pub struct Distribution<'a> {
    logits: &'a [f32],
    highest: f64,
    /// The logarithm of the sum of the exponentials of their distances from the highest.
    total: f64,
}

impl<'a> Distribution<'a> {
    /// That of `logits`, none of which is infinity or not a number. Computed in f64 with an exponential of one
    /// implementation, so that it is the same on every platform.
    pub fn new(logits: &'a [f32]) -> Self {
        let highest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|logit| libm::exp(f64::from(*logit) - highest)).sum();
        Self { logits, highest, total: libm::log(sum) }
    }

    /// The natural logarithm of the probability of `id`, minus infinity for an id that is no token.
    pub fn logprob(&self, id: TokenId) -> f64 {
        let logit = usize::try_from(id).ok().and_then(|id| self.logits.get(id));
        logit.map_or(f64::NEG_INFINITY, |logit| f64::from(*logit) - self.highest - self.total)
    }

    /// The `count` likeliest tokens, the likeliest first, the lower id of equal ones.
    fn likeliest(&self, count: usize) -> Vec<TokenId> {
        let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
        for (id, logit) in (0..).zip(self.logits) {
            if best.len() == count && best.last().is_none_or(|(_, least)| logit <= least) {
                continue;
            }
            let place = best.partition_point(|(_, other)| other >= logit);
            best.insert(place, (id, *logit));
            best.truncate(count);
        }
        best.into_iter().map(|(id, _)| id).collect()
    }

    /// What is told of `id`, beside the `count` likeliest.
    pub fn tell(&self, id: TokenId, count: usize, tokenizer: &Tokenizer) -> TokenLogprobs {
        let token = |id| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default().to_vec();
            TokenLogprob { id, bytes, logprob: told(self.logprob(id)) }
        };
        let TokenLogprob { id, bytes, logprob } = token(id);
        TokenLogprobs { id, bytes, logprob, top: self.likeliest(count).into_iter().map(token).collect() }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "digits that nobody can use")]
fn told(logprob: f64) -> f32 {
    logprob.max(LOWEST) as f32
}

/// Tokens whose text is not given out yet.
#[derive(Debug, Default)]
pub(super) struct Held {
    tokens: VecDeque<(Extent, TokenLogprobs)>,
}

/// Which bytes of the text a token has a part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Of the text, the bytes before its first character.
    pub(super) start: usize,
    /// The bytes up to the end of its last one; for one that is not whole yet, more than those before it.
    pub(super) end: usize,
}

impl Held {
    pub(super) fn push(&mut self, extent: Extent, token: TokenLogprobs) {
        self.tokens.push_back((extent, token));
    }

    /// The tokens whose text lies within the first `given` bytes.
    pub(super) fn up_to(&mut self, given: usize) -> Vec<TokenLogprobs> {
        let ready = self.tokens.iter().take_while(|(extent, _)| extent.end <= given).count();
        self.tokens.drain(..ready).map(|(_, token)| token).collect()
    }

    /// The tokens with a part in the first `given` bytes; the others are cut off.
    pub(super) fn before(&mut self, given: usize) -> Vec<TokenLogprobs> {
        self.tokens.drain(..).filter(|(extent, _)| extent.start < given).map(|(_, token)| token).collect()
    }

    /// All of them.
    pub(super) fn rest(&mut self) -> Vec<TokenLogprobs> {
        self.tokens.drain(..).map(|(_, token)| token).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_to_one_and_the_likeliest_come_first() {
        let logits = [1.0, f32::NEG_INFINITY, 3.0, -2.0, 3.0, 90.0_f32.ln()];
        let distribution = Distribution::new(&logits);
        let sum: f64 = (0..6).map(|id| distribution.logprob(id).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert_eq!(distribution.likeliest(4), [5, 2, 4, 0]);
        assert_eq!(distribution.likeliest(0), [0; 0]);
        assert_eq!(distribution.likeliest(9), [5, 2, 4, 0, 3, 1]);
        assert_eq!(told(distribution.logprob(1)).to_bits(), (-9999.0_f32).to_bits());
        assert!(distribution.logprob(6).is_infinite());
    }

    #[test]
    fn logits_far_from_zero_do_not_overflow() {
        for offset in [-3e38_f32, 3e38] {
            let logits = [offset, offset];
            assert!((Distribution::new(&logits).logprob(1) - 0.5_f64.ln()).abs() < 1e-9);
        }
    }
}

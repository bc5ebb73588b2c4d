//! Logits to a token, the same one on every platform.
//!
//! ```text
//! logits ─ repetition penalty ─ frequency and presence penalty ─ bias ─> greedy: the highest
//!                                                                    └> temperature ─ top-k ─ top-p ─ min-p ─> draw
//! ```
//!
//! The order and the meaning of each step are those of `transformers`; frequency and presence penalty and the bias, which
//! it lacks, are those of `OpenAI`'s API. Where tokens are equally likely the
//! lower id goes first, also at the edge of a cut, where `transformers` keeps or drops them together.

use std::cmp::Ordering;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use super::params::{GenerateParams, Sampling};
use crate::error::{Error, Result};
use crate::text::TokenId;

/// Chooses the tokens of one answer.
///
/// Ids from `vocabulary` on are never chosen: a decoder may have more logits than the tokenizer has entries.
/// The random numbers are `ChaCha8` from the seed, one 64-bit word a token. Probabilities are computed in f64
/// with an exponential of one implementation, so that no platform's library can change a draw.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    bias: Vec<(TokenId, f32)>,
    vocabulary: usize,
    /// Tokens of the history that stand before the answer.
    prompt: usize,
    random: ChaCha8Rng,
    candidates: Vec<Candidate>,
    /// By id, whether the penalty was applied at this step.
    seen: Vec<bool>,
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: TokenId,
    /// Its logit after penalties and bias.
    pub logit: f32,
    /// How likely it is, in parts of the likelihood of the most likely token: `exp((logit - highest) / temperature)`.
    pub weight: f64,
}

impl Sampler {
    /// Begins an answer. `vocabulary` is the number of the tokenizer's entries.
    ///
    /// # Errors
    /// [`Error::Request`] for parameters that [`GenerateParams::validate_for`] refuses.
    pub fn new(params: &GenerateParams, vocabulary: usize) -> Result<Self> {
        params.validate_for(vocabulary)?;
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&params.seed.to_le_bytes());
        Ok(Self {
            sampling: params.sampling,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            bias: params.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            vocabulary,
            prompt: 0,
            random: ChaCha8Rng::from_seed(seed),
            candidates: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// As this sampler, for an answer to a prompt: the first `prompt` tokens of each history are not of the answer, so that
    /// frequency and presence penalty pass over them.
    #[must_use]
    pub fn behind(self, prompt: usize) -> Self {
        Self { prompt, ..self }
    }

    /// Chooses the next token.
    ///
    /// `logits` are those of the last position; penalties and bias are written into them. `history` holds the tokens of
    /// the prompt and of the answer so far, to which the repetition penalty applies; frequency and presence penalty only
    /// to those of the answer, see [`Sampler::behind`].
    ///
    /// # Errors
    /// [`Error::Graph`] when the logits are fewer than the vocabulary, when one of them is not a number or is
    /// infinity, or when all are minus infinity.
    pub fn pick(&mut self, logits: &mut [f32], history: &[TokenId]) -> Result<TokenId> {
        let Sampling::Random { .. } = self.sampling else {
            let logits = self.penalized(logits, history)?;
            return Ok(highest(logits).id);
        };
        // Drawn first, so that each token takes one number whatever the logits are.
        let point = unit(self.random.next_u64());
        let candidates = self.candidates(logits, history)?;
        let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
        let mut left = point * total;
        // Rounding may leave a rest behind the last candidate, which is then taken.
        let mut chosen = None;
        for candidate in candidates {
            chosen = Some(candidate.id);
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        Ok(chosen.expect("the most likely token is always a candidate"))
    }

    /// The tokens that may be chosen, the most likely one first; a greedy sampler has one.
    ///
    /// Arguments and errors are those of [`Sampler::pick`].
    ///
    /// # Errors
    /// Those of [`Sampler::pick`].
    pub fn candidates(&mut self, logits: &mut [f32], history: &[TokenId]) -> Result<&[Candidate]> {
        let logits = self.penalized(logits, history)?;
        let best = highest(logits);
        self.candidates.clear();
        let Sampling::Random { temperature, top_k, top_p, min_p } = self.sampling else {
            self.candidates.push(best);
            return Ok(&self.candidates);
        };
        let weight =
            |logit: f32| libm::exp((f64::from(logit) - f64::from(best.logit)) / f64::from(temperature));
        self.candidates.extend(
            (0..)
                .zip(logits.iter())
                .map(|(id, logit)| Candidate { id, logit: *logit, weight: weight(*logit) })
                .filter(|candidate| candidate.weight > 0.0),
        );
        if let Some(top_k) = top_k {
            keep_highest(&mut self.candidates, top_k);
        }
        keep_head(&mut self.candidates, f64::from(top_p), f64::from(min_p));
        Ok(&self.candidates)
    }

    /// The logits of the vocabulary, all finite or minus infinity, with penalties and bias applied.
    fn penalized<'a>(&mut self, logits: &'a mut [f32], history: &[TokenId]) -> Result<&'a [f32]> {
        let logits = sound(logits, self.vocabulary)?;
        if self.repetition_penalty.to_bits() != 1.0_f32.to_bits() {
            self.penalize(logits, history);
        }
        self.subtract(logits, history.get(self.prompt..).unwrap_or_default());
        for (id, bias) in &self.bias {
            change(logits, *id, *bias);
        }
        if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            return Err(fault(
                "all logits are minus infinity; a stage before it overflowed, try another variant",
            ));
        }
        Ok(logits)
    }

    /// Applies frequency and presence penalty to the tokens of `answer`.
    fn subtract(&mut self, logits: &mut [f32], answer: &[TokenId]) {
        if self.frequency_penalty == 0.0 && self.presence_penalty == 0.0 {
            return;
        }
        self.seen.clear();
        self.seen.resize(logits.len(), false);
        for id in answer {
            let Some(seen) = usize::try_from(*id).ok().and_then(|id| self.seen.get_mut(id)) else { continue };
            let once = if std::mem::replace(seen, true) { 0.0 } else { self.presence_penalty };
            change(logits, *id, -(self.frequency_penalty + once));
        }
    }

    fn penalize(&mut self, logits: &mut [f32], history: &[TokenId]) {
        self.seen.clear();
        self.seen.resize(logits.len(), false);
        for id in history {
            let Ok(id) = usize::try_from(*id) else { continue };
            let (Some(logit), Some(seen)) = (logits.get_mut(id), self.seen.get_mut(id)) else { continue };
            if !std::mem::replace(seen, true) {
                let penalized = if *logit < 0.0 {
                    *logit * self.repetition_penalty
                } else {
                    *logit / self.repetition_penalty
                };
                *logit = penalized.clamp(f32::NEG_INFINITY, f32::MAX);
            }
        }
    }
}

/// The logits of a vocabulary of so many tokens, all finite or minus infinity.
///
/// # Errors
/// [`Error::Graph`] when they are fewer, or when one of them is not a number or is infinity.
pub fn sound(logits: &mut [f32], vocabulary: usize) -> Result<&mut [f32]> {
    let width = logits.len();
    let logits = logits.get_mut(..vocabulary).filter(|logits| !logits.is_empty()).ok_or_else(|| {
        fault(format!("{width} logits serve no vocabulary of {vocabulary} tokens; export the package again"))
    })?;
    match logits.iter().enumerate().find(|(_, logit)| logit.is_nan() || **logit == f32::INFINITY) {
        None => Ok(logits),
        Some((id, logit)) => Err(fault(format!(
            "the logits contain {logit} at token {id}; a stage before it overflowed, try another variant"
        ))),
    }
}

/// Adds `change` to the logit of `id`, which stays a number.
fn change(logits: &mut [f32], id: TokenId, change: f32) {
    if let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) {
        *logit = (*logit + change).clamp(f32::NEG_INFINITY, f32::MAX);
    }
}

/// The candidate with the highest logit, the lowest id of equal ones.
fn highest(logits: &[f32]) -> Candidate {
    let mut best = Candidate { id: 0, logit: f32::NEG_INFINITY, weight: 1.0 };
    for (id, logit) in (0..).zip(logits) {
        if *logit > best.logit {
            best = Candidate { id, logit: *logit, ..best };
        }
    }
    best
}

/// The more likely first, the lower id of equal ones.
fn order(one: &Candidate, other: &Candidate) -> Ordering {
    let logits = other.logit.partial_cmp(&one.logit).expect("logits that are not a number were refused");
    logits.then(one.id.cmp(&other.id))
}

/// Keeps the `count` first, in order.
fn keep_highest(candidates: &mut Vec<Candidate>, count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        candidates.truncate(count);
    }
    // A sum of all must not depend on where the selection happened to leave them.
    candidates.sort_unstable_by(order);
}

/// Keeps the shortest head with at least `top_p` of all likelihood, less what is below `min_p` of the first; in
/// order.
fn keep_head(candidates: &mut Vec<Candidate>, top_p: f64, min_p: f64) {
    let bound = if top_p < 1.0 {
        top_p * candidates.iter().map(|candidate| candidate.weight).sum::<f64>()
    } else {
        f64::INFINITY
    };
    // What min-p drops stands behind all that it keeps, so it may go before the head is measured.
    candidates.retain(|candidate| candidate.weight >= min_p);
    let (mut sorted, mut before) = (0, 0.0);
    while sorted < candidates.len() {
        // Seldom more than a few hundred of 50,000 are in the head: the tail is not sorted.
        let next = (sorted * 8).max(256).min(candidates.len());
        if next < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(next - sorted, order);
        }
        candidates[sorted..next].sort_unstable_by(order);
        for place in sorted..next {
            if before >= bound {
                candidates.truncate(place);
                return;
            }
            before += candidates[place].weight;
        }
        sorted = next;
    }
}

/// The upper 53 bits as a number from 0 and below 1.
#[expect(clippy::cast_precision_loss, reason = "53 bits fit into an f64")]
fn unit(word: u64) -> f64 {
    (word >> 11) as f64 / (1_u64 << 53) as f64
}

fn fault(reason: impl Into<String>) -> Error {
    Error::graph("decoder", reason.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(sampling: Sampling, repetition_penalty: f32, vocabulary: usize) -> Sampler {
        let params = GenerateParams { sampling, repetition_penalty, seed: 5, ..GenerateParams::default() };
        Sampler::new(&params, vocabulary).unwrap()
    }

    fn greedy(mut logits: Vec<f32>, vocabulary: usize) -> Result<TokenId> {
        sampler(Sampling::Greedy, 1.0, vocabulary).pick(&mut logits, &[])
    }

    #[test]
    fn greedy_takes_the_highest_and_of_equals_the_lowest_id() {
        assert_eq!(greedy(vec![-2.0, 1.0, 3.0, 3.0, 9.0], 4).unwrap(), 2);
        assert_eq!(greedy(vec![f32::NEG_INFINITY, f32::MIN, f32::NEG_INFINITY], 3).unwrap(), 1);
        assert_eq!(greedy(vec![-0.0, 0.0], 2).unwrap(), 0);
    }

    #[test]
    fn the_penalty_applies_once_a_token_and_to_both_signs() {
        let mut logits = vec![4.0, -1.0, 3.0, -1.0];
        let mut sampler = sampler(Sampling::Greedy, 2.0, 4);
        assert_eq!(sampler.pick(&mut logits, &[0, 0, 1, 99, TokenId::MAX]).unwrap(), 2);
        assert_eq!(logits.map_to_bits(), [2.0, -2.0, 3.0, -1.0].map_to_bits());
    }

    #[test]
    fn frequency_and_presence_count_the_answer_and_not_the_prompt() {
        let params = GenerateParams {
            frequency_penalty: 0.5,
            presence_penalty: 1.25,
            logit_bias: [(0, -7.0), (3, 0.5)].into(),
            ..GenerateParams::default()
        };
        let mut sampler = Sampler::new(&params, 5).unwrap().behind(2);
        let mut logits = vec![4.0, 1.0, 3.0, -1.0, 1.0];
        // Token 2 twice and token 3 once in the answer; tokens 4 and 2 in the prompt do not count.
        assert_eq!(sampler.pick(&mut logits, &[4, 2, 2, 3, 2, TokenId::MAX]).unwrap(), 1);
        assert_eq!(logits.map_to_bits(), [-3.0, 1.0, 0.75, -2.25, 1.0].map_to_bits());
        // A history that is shorter than the prompt has no answer.
        assert_eq!(sampler.pick(&mut [0.0, 1.0, 2.0, 3.0, 4.0], &[4]).unwrap(), 4);
    }

    #[test]
    fn broken_logits_are_refused() {
        let refusal = |logits, vocabulary| greedy(logits, vocabulary).unwrap_err().to_string();
        assert_eq!(
            refusal(vec![0.0, f32::NAN], 2),
            "graph decoder: the logits contain NaN at token 1; a stage before it overflowed, try another variant"
        );
        assert!(refusal(vec![f32::INFINITY], 1).contains("contain inf at token 0"));
        assert!(refusal(vec![f32::NEG_INFINITY; 3], 3).contains("all logits are minus infinity"));
        assert!(refusal(vec![0.0; 3], 4).contains("3 logits serve no vocabulary of 4 tokens"));
        assert!(refusal(vec![], 0).contains("0 logits serve no vocabulary of 0 tokens"));
    }

    #[test]
    fn a_draw_follows_the_probabilities() {
        let shares = [0.5_f32, 0.3, 0.15, 0.05];
        let logits = shares.map(f32::ln);
        let all = Sampling::Random { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0 };
        let mut sampler = sampler(all, 1.0, 4);
        let mut counts = [0_f64; 4];
        let draws = 20_000_f64;
        for _ in 0..20_000 {
            counts[sampler.pick(&mut logits.clone(), &[]).unwrap() as usize] += 1.0;
        }
        let expected = shares.map(|share| f64::from(share) * draws);
        let chi: f64 = counts.iter().zip(expected).map(|(count, due)| (count - due).powi(2) / due).sum();
        // Three degrees of freedom: a fair draw exceeds 16.3 once in a thousand seeds.
        assert!(chi < 16.3, "{chi} for {counts:?}");
    }

    #[test]
    fn the_first_numbers_of_a_seed_never_change() {
        let mut random = sampler(Sampling::Greedy, 1.0, 1).random;
        let words = [random.next_u64(), random.next_u64(), random.next_u64()];
        // The words of the ChaCha8 that `tests/reference/sampler.py` writes out.
        assert_eq!(words, [0xd5dc_ed51_e7c2_3e80, 0x4f31_f5ab_3e9e_9aaa, 0x37d6_f1b5_25fd_8e6f]);
        assert_eq!(
            [unit(0), unit(1 << 63), unit(u64::MAX)].map(f64::to_bits),
            [0.0, 0.5, 1.0 - f64::EPSILON / 2.0].map(f64::to_bits)
        );
    }

    trait Bits {
        fn map_to_bits(&self) -> Vec<u32>;
    }

    impl<T: AsRef<[f32]>> Bits for T {
        fn map_to_bits(&self) -> Vec<u32> {
            self.as_ref().iter().map(|number| number.to_bits()).collect()
        }
    }
}

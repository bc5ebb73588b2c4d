//! Decides which of several texts is the answer, by how likely the model finds each as a whole.
//!
//! ```text
//! prompt ─ P(" red") ──────────────────> red
//!        └ P(" dark") ─┬ P(" blue") ───> dark blue     what texts share at the beginning is read once,
//!                      └ P(" green") ──> dark green    and what follows the last token of a text is not read
//! ```
//!
//! A text that another one continues counts with its end: `red` beside `red square` is an answer that stops there.

use std::collections::BTreeMap;

use super::{ModelFacts, Request};
use crate::error::{Error, Result};
use crate::generate::logprobs::Distribution;
use crate::generate::params::GenerateParams;
use crate::generate::sampler::{self, Sampler};
use crate::generate::sequence::TokenLogprobs;
use crate::model::CausalModel;
use crate::model::decoder::Logits;
use crate::text::{Prompt, Span, TokenId};

/// The most positions whose logits are held at once: those of one take some 200 KB.
const MOST_AT_ONCE: usize = 16;

/// What was decided.
#[derive(Debug)]
pub(super) struct Decision {
    /// The tokens of the answer.
    pub(super) tokens: Vec<TokenId>,
    /// How likely each of them was, if that was asked for.
    pub(super) logprobs: Vec<TokenLogprobs>,
    /// The texts in the order given, each with its share of the probability of all.
    pub(super) choices: Vec<(String, f64)>,
}

/// One of the texts.
#[derive(Debug)]
struct Text {
    tokens: Vec<TokenId>,
    /// The natural logarithm of the product of its tokens' probabilities.
    logprob: f64,
    told: Vec<TokenLogprobs>,
}

/// Decides among `choices`, with the logits `behind` the prompt of `request`, which takes `positions` of `cache`. The most
/// likely is the answer, or one is drawn, as a token would be: temperature and cuts apply to the choices.
///
/// Each text stands behind the white space that the template puts before an answer, unless the prompt ends in white space:
/// it is ` yes` behind `ASSISTANT:`. With texts of one token nothing is read; `cache` is left as it was.
///
/// # Errors
/// [`Error::TooLong`] when a text does not fit behind the prompt, and those of [`CausalModel::decode`].
pub(super) fn decide<M: CausalModel>(
    model: &mut M,
    facts: &ModelFacts,
    request: &Request,
    (cache, positions): (&mut M::Cache, usize),
    (choices, behind): (&[String], Logits),
) -> Result<Decision> {
    let tokenizer = &facts.tokenizer;
    let before = separator(facts, &request.prompt);
    let texts = choices.iter().map(|choice| {
        let tokens = tokenizer.encode(&format!("{before}{choice}"))?;
        Ok(Text { tokens, logprob: 0.0, told: Vec::new() })
    });
    let texts = texts.collect::<Result<Vec<_>>>()?;
    let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or_default();
    if positions + longest > facts.context {
        return Err(Error::TooLong { needed: positions + longest, capacity: facts.context });
    }
    let most = model.most_at_once().unwrap_or(1).clamp(1, MOST_AT_ONCE);
    let params = &request.params;
    let mut reading = Reading { model, cache, facts, most, logprobs: params.logprobs, texts, ahead: 0 };
    let all: Vec<usize> = (0..choices.len()).collect();
    let result = reading.branch(&all, 0, behind);
    let ahead = reading.ahead;
    let mut texts = reading.texts;
    if ahead > 0 {
        model.forget(ahead, cache)?;
    }
    result?;

    let logprobs: Vec<f64> = texts.iter().map(|text| text.logprob).collect();
    let shares = shares(&logprobs)?;
    let chosen = pick(params, &shares)?;
    let Text { tokens, told, .. } = texts.swap_remove(chosen);
    let choices = choices.iter().cloned().zip(shares).collect();
    Ok(Decision { tokens, logprobs: told, choices })
}

/// The white space that stands between `prompt` and an answer.
fn separator<'a>(facts: &'a ModelFacts, prompt: &Prompt) -> &'a str {
    let last = match prompt.spans().last() {
        Some(Span::Text(ids)) => ids.last().and_then(|id| facts.tokenizer.token_bytes(*id)),
        _ => None,
    };
    let separator = &facts.template.answer_separator;
    let spaced = last.and_then(<[u8]>::last).is_some_and(u8::is_ascii_whitespace);
    if spaced || !separator.trim().is_empty() { "" } else { separator }
}

/// The share of each in the sum of the probabilities whose logarithms are given.
fn shares(logprobs: &[f64]) -> Result<Vec<f64>> {
    let highest = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !highest.is_finite() {
        let reason = "no choice has a probability; a stage before it overflowed, try another variant";
        return Err(Error::graph("decoder", reason));
    }
    let weights: Vec<f64> = logprobs.iter().map(|logprob| libm::exp(logprob - highest)).collect();
    let sum: f64 = weights.iter().sum();
    Ok(weights.into_iter().map(|weight| weight / sum).collect())
}

/// Which one is taken: as of tokens with these probabilities.
fn pick(params: &GenerateParams, shares: &[f64]) -> Result<usize> {
    let params = GenerateParams { sampling: params.sampling, seed: params.seed, ..GenerateParams::default() };
    #[expect(clippy::cast_possible_truncation, reason = "the sampler reads f32, as of any logits")]
    let mut logits: Vec<f32> = shares.iter().map(|share| libm::log(*share) as f32).collect();
    let id = Sampler::new(&params, logits.len())?.pick(&mut logits, &[])?;
    Ok(usize::try_from(id).unwrap_or_default())
}

/// Reads the texts, what they share only once.
struct Reading<'a, M: CausalModel> {
    model: &'a mut M,
    cache: &'a mut M::Cache,
    facts: &'a ModelFacts,
    most: usize,
    logprobs: Option<usize>,
    texts: Vec<Text>,
    /// Positions that were read and not forgotten.
    ahead: usize,
}

impl<M: CausalModel> Reading<'_, M> {
    /// Reads on where `members` part, which share their first `read` tokens; `behind` are the logits behind these.
    fn branch(&mut self, members: &[usize], read: usize, mut behind: Logits) -> Result<()> {
        let vocabulary = self.facts.tokenizer.vocabulary();
        let logits = sampler::sound(behind.values_mut(), vocabulary)?;
        let distribution = Distribution::new(logits);
        let mut groups: BTreeMap<TokenId, Vec<usize>> = BTreeMap::new();
        for &member in members {
            match self.texts[member].tokens.get(read) {
                Some(token) => groups.entry(*token).or_default().push(member),
                // Others go on from here.
                None => self.texts[member].logprob += end(&distribution, &self.facts.eos),
            }
        }
        for (token, group) in &groups {
            self.take(group, *token, &distribution);
        }
        for group in groups.values() {
            self.together(group, read)?;
        }
        Ok(())
    }

    /// Reads what the texts of `group` share from token `read` on, and then each on its own.
    fn together(&mut self, group: &[usize], read: usize) -> Result<()> {
        let shared = self.shared(group);
        let first = self.texts[group[0]].tokens[read..shared].to_vec();
        // What follows the last token of a text is needed only where another text goes on.
        let needed = if group.len() == 1 { first.len().saturating_sub(1) } else { first.len() };
        let mut last = None;
        let mut place = 0;
        while place < needed {
            let run = &first[place..needed.min(place + self.most)];
            for logits in self.read(run)? {
                place += 1;
                last = match first.get(place) {
                    Some(token) => {
                        let mut logits = logits;
                        let vocabulary = self.facts.tokenizer.vocabulary();
                        let sound = sampler::sound(logits.values_mut(), vocabulary)?;
                        self.take(group, *token, &Distribution::new(sound));
                        None
                    }
                    None => Some(logits),
                };
            }
        }
        if let Some(behind) = last {
            self.branch(group, shared, behind)?;
        }
        self.model.forget(needed, self.cache)?;
        self.ahead -= needed;
        Ok(())
    }

    /// The next token of the texts of `group` is `token`.
    fn take(&mut self, group: &[usize], token: TokenId, distribution: &Distribution<'_>) {
        let logprob = distribution.logprob(token);
        let told = self.logprobs.map(|count| distribution.tell(token, count, &self.facts.tokenizer));
        for &member in group {
            self.texts[member].logprob += logprob;
            self.texts[member].told.extend(told.clone());
        }
    }

    /// How many tokens the texts of `group` have in common at the beginning.
    fn shared(&self, group: &[usize]) -> usize {
        let first = &self.texts[group[0]].tokens;
        let common = |other: &usize| {
            let other = &self.texts[*other].tokens;
            first.iter().zip(other).take_while(|(one, other)| one == other).count()
        };
        group.iter().map(common).min().unwrap_or_default()
    }

    /// Reads `run` and gives the logits behind each of its tokens.
    fn read(&mut self, run: &[TokenId]) -> Result<Vec<Logits>> {
        let rows = match run {
            [token] => vec![self.model.decode(*token, self.cache)?],
            _ => self.model.decode_all(run, self.cache)?,
        };
        self.ahead += run.len();
        Ok(rows)
    }
}

/// The logarithm of the probability that the answer ends.
fn end(distribution: &Distribution<'_>, eos: &[TokenId]) -> f64 {
    libm::log(eos.iter().map(|id| libm::exp(distribution.logprob(*id))).sum())
}

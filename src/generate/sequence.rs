//! The state machine of one answer: logits in, text out, until it ends.

use std::sync::Arc;

use serde::Serialize;

use super::constraint::{Around, Constraint, Walk};
use super::logprobs::{Distribution, Extent, Held};
use super::params::GenerateParams;
use super::sampler::{Sampler, sound};
use crate::error::Result;
use crate::text::{Detokenizer, Step, TokenId, Tokenizer};

pub use super::logprobs::{TokenLogprob, TokenLogprobs};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string was complete.
    Stop,
    /// The limit of new tokens or the context's end was reached.
    Length,
    /// The caller gave up.
    Cancelled,
}

/// What an answer grew by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Text that is certain now, in whole characters; often empty, since a character or a stop string may span tokens.
    pub text: String,
    /// How likely the tokens were whose text ends in this delta; nothing unless it was asked for. The last delta of an
    /// answer may have tokens without text: white space around it, which is no part of it.
    pub logprobs: Vec<TokenLogprobs>,
}

impl Delta {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_empty()
    }
}

/// What one step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Advance {
    /// What the answer grew by.
    pub delta: Delta,
    /// What to do next.
    pub next: Next,
}

/// What to do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Let the model read this token.
    Read(TokenId),
    /// The answer is complete.
    Finish(FinishReason),
}

/// One answer while it is made.
#[derive(Debug)]
pub struct Sequence {
    sampler: Sampler,
    detokenizer: Detokenizer,
    eos: Vec<TokenId>,
    limit: usize,
    history: Vec<TokenId>,
    prompt_tokens: usize,
    text: Trimmed,
    /// How many of the likeliest tokens are told in each place.
    logprobs: Option<usize>,
    held: Held,
    told: Vec<TokenLogprobs>,
    walk: Option<Walk>,
    tokenizer: Arc<Tokenizer>,
}

impl Sequence {
    /// An answer of at most `limit` tokens to a prompt whose text tokens are `prompt`; `eos` end it.
    ///
    /// # Errors
    /// When `params` contradict themselves.
    pub fn new(
        tokenizer: &Arc<Tokenizer>,
        params: &GenerateParams,
        prompt: Vec<TokenId>,
        eos: Vec<TokenId>,
        limit: usize,
    ) -> Result<Self> {
        Ok(Self {
            sampler: Sampler::new(params, tokenizer.vocabulary())?.behind(prompt.len()),
            detokenizer: Detokenizer::new(Arc::clone(tokenizer), params.stop.clone()),
            eos,
            limit,
            prompt_tokens: prompt.len(),
            history: prompt,
            text: Trimmed::new(params.constraint.as_ref().map(Constraint::around).unwrap_or_default()),
            walk: params.constraint.as_ref().map(Constraint::begin),
            logprobs: params.logprobs,
            held: Held::default(),
            told: Vec::new(),
            tokenizer: Arc::clone(tokenizer),
        })
    }

    /// Takes the logits of the last position, which are warped in place, and picks the next token.
    ///
    /// # Errors
    /// When no token can be picked because the logits are not numbers.
    pub fn advance(&mut self, logits: &mut [f32]) -> Result<Advance> {
        let raw = self.logprobs.map(|count| (count, logits.to_vec()));
        if let Some(walk) = &mut self.walk {
            // What is no number must not be hidden by what it rules out.
            walk.narrow(sound(logits, self.tokenizer.vocabulary())?, &self.eos)?;
        }
        let token = self.sampler.pick(logits, &self.history)?;
        if self.eos.contains(&token) {
            return self.finish(FinishReason::Stop);
        }
        let told = match raw {
            Some((count, mut raw)) => {
                let logits = sound(&mut raw, self.tokenizer.vocabulary())?;
                Some(Distribution::new(logits).tell(token, count, &self.tokenizer))
            }
            None => None,
        };
        let Step { text, stopped } = self.take(token, told)?;
        if stopped {
            return Ok(self.stopped(text));
        }
        let complete = match &mut self.walk {
            Some(walk) => walk.read(token)?,
            None => false,
        };
        if complete || self.tokens().len() >= self.limit {
            let reason = if complete { FinishReason::Stop } else { FinishReason::Length };
            let Advance { delta, next } = self.finish(reason)?;
            return Ok(Advance { delta: Delta { text: text + &delta.text, ..delta }, next });
        }
        let given = self.detokenizer.given().saturating_sub(self.text.held.len());
        // White space at the beginning has no text: it waits for what follows it.
        let ready = if text.is_empty() { Vec::new() } else { self.held.up_to(given) };
        Ok(Advance { delta: self.tell(text, ready), next: Next::Read(token) })
    }

    /// Takes `tokens` for the answer, as many as the limit allows and up to a stop string; `logprobs` say how likely each
    /// was, or are none.
    ///
    /// # Errors
    /// None.
    pub fn settle(&mut self, tokens: &[TokenId], logprobs: Vec<TokenLogprobs>) -> Result<Advance> {
        let mut logprobs = logprobs.into_iter();
        let mut answer = String::new();
        for token in tokens.iter().take(self.limit) {
            let Step { text, stopped } = self.take(*token, logprobs.next())?;
            answer.push_str(&text);
            if stopped {
                return Ok(self.stopped(answer));
            }
        }
        let reason = if tokens.len() > self.limit { FinishReason::Length } else { FinishReason::Stop };
        let Advance { delta, next } = self.finish(reason)?;
        Ok(Advance { delta: Delta { text: answer + &delta.text, ..delta }, next })
    }

    /// Takes one token of the answer.
    fn take(&mut self, token: TokenId, told: Option<TokenLogprobs>) -> Result<Step> {
        self.history.push(token);
        let start = self.detokenizer.made();
        let step = self.detokenizer.push(token)?;
        if let Some(told) = told {
            let end = self.detokenizer.made() + usize::from(self.detokenizer.is_inside_character());
            self.held.push(Extent { start, end }, told);
        }
        Ok(Step { text: self.text.push(&step.text), stopped: step.stopped })
    }

    /// What is given out last when a stop string is complete.
    fn stopped(&mut self, text: String) -> Advance {
        let cut = self.held.before(self.detokenizer.given());
        Advance { delta: self.tell(text, cut), next: Next::Finish(FinishReason::Stop) }
    }

    /// Ends the answer for `reason`, giving what was held back.
    ///
    /// # Errors
    /// When the held-back tokens have no text.
    pub fn finish(&mut self, reason: FinishReason) -> Result<Advance> {
        let rest = self.detokenizer.finish()?;
        let text = self.text.push(&rest);
        let held = self.held.rest();
        Ok(Advance { delta: self.tell(text, held), next: Next::Finish(reason) })
    }

    fn tell(&mut self, text: String, logprobs: Vec<TokenLogprobs>) -> Delta {
        self.told.extend_from_slice(&logprobs);
        Delta { text, logprobs }
    }

    /// How likely the tokens of the answer were, as far as it was told.
    pub fn logprobs(&self) -> &[TokenLogprobs] {
        &self.told
    }

    /// The tokens of the answer so far, without the one that ended it.
    pub fn tokens(&self) -> &[TokenId] {
        &self.history[self.prompt_tokens..]
    }

    /// The text tokens of the prompt, and those of the answer so far.
    pub fn history(&self) -> &[TokenId] {
        &self.history
    }

    /// The text given out so far.
    pub fn text(&self) -> &str {
        &self.text.given
    }
}

/// Text without what stands around it, which the reference strips from an answer; it comes in pieces.
#[derive(Debug, Default)]
struct Trimmed {
    around: Around,
    given: String,
    held: String,
    begun: bool,
}

impl Trimmed {
    fn new(around: Around) -> Self {
        Self { around, ..Self::default() }
    }

    /// Takes the next piece and gives what of it is certain not to be at the end.
    fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        let space = match self.around {
            Around::Space if self.given.is_empty() => self.held.len() - self.held.trim_start().len(),
            Around::OneBefore if !self.begun => usize::from(self.held.starts_with(' ')),
            _ => 0,
        };
        self.begun |= !self.held.is_empty();
        self.held.drain(..space);
        let end = match self.around {
            Around::Space => self.held.trim_end().len(),
            Around::OneBefore | Around::Nothing => self.held.len(),
        };
        let space = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, space);
        self.given.push_str(&text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_an_answer_is_dropped_and_within_is_kept() {
        for (pieces, wanted) in [
            (&[" red"][..], "red"),
            (&[" ", "\n", " a", " b ", "\n", " c", " \n"], "a b \n c"),
            (&["  ", " "], ""),
            (&["", "x", ""], "x"),
        ] {
            let mut text = Trimmed::default();
            let joined: String = pieces.iter().map(|piece| text.push(piece)).collect();
            assert_eq!(joined, wanted);
            assert_eq!(text.given, wanted);
        }
    }

    fn tokenizer() -> Arc<Tokenizer> {
        let package = crate::package::ModelPackage::embedded().unwrap();
        let file = package.read(&package.manifest().text.tokenizer).unwrap();
        Arc::new(Tokenizer::from_bytes(std::path::Path::new("tokenizer.json"), &file).unwrap())
    }

    /// The deltas of an answer of `tokens`, which `stop` may end sooner: texts, and the tokens told with each.
    fn deltas(tokens: &[TokenId], stop: &[&str]) -> (Vec<(String, Vec<TokenId>)>, Sequence) {
        let tokenizer = tokenizer();
        let stop = stop.iter().map(|&stop| stop.to_owned()).collect();
        let params = GenerateParams { logprobs: Some(2), stop, ..GenerateParams::default() };
        let eos = TokenId::try_from(tokenizer.vocabulary() - 1).unwrap();
        let mut sequence = Sequence::new(&tokenizer, &params, vec![1, 2], vec![eos], 99).unwrap();
        let mut deltas = Vec::new();
        for token in tokens.iter().copied().chain([eos]) {
            let mut logits = vec![0.0; tokenizer.vocabulary()];
            logits[token as usize] = 2.0;
            let Advance { delta, next } = sequence.advance(&mut logits).unwrap();
            for told in &delta.logprobs {
                // One of 2 among zeros.
                let others = f64::from(u32::try_from(tokenizer.vocabulary() - 1).unwrap());
                let wanted = 2.0 - (2.0_f64.exp() + others).ln();
                assert!((f64::from(told.logprob) - wanted).abs() < 1e-6);
                assert_eq!(
                    (told.top[0].id, told.top[0].logprob.to_bits()),
                    (told.id, told.logprob.to_bits())
                );
                assert_eq!((told.top.len(), &told.bytes[..]), (2, tokenizer.token_bytes(told.id).unwrap()));
            }
            if !delta.is_empty() {
                deltas.push((delta.text, delta.logprobs.iter().map(|told| told.id).collect()));
            }
            if let Next::Finish(_) = next {
                break;
            }
        }
        (deltas, sequence)
    }

    #[test]
    fn tokens_are_told_with_their_text() {
        let tokenizer = tokenizer();
        let id = |text: &str| tokenizer.encode(text).unwrap()[0];
        let [space, a, b, c] = [" ", "x", "y", "z"].map(id);
        let snow: Vec<TokenId> = (0..256)
            .filter(|id| tokenizer.token_bytes(*id).is_some_and(|bytes| bytes.len() == 1))
            .filter(|id| "\u{2603}".as_bytes().contains(&tokenizer.token_bytes(*id).unwrap()[0]))
            .collect();
        let of = |byte: u8| {
            *snow
                .iter()
                .find(|id| tokenizer.token_bytes(**id).unwrap() == [byte])
                .expect("every byte is a token")
        };
        let [one, two, three] = [0xe2, 0x98, 0x83].map(of);
        let check = |tokens: &[TokenId], stop: &[&str], wanted: Vec<(&str, Vec<TokenId>)>| {
            let (deltas, sequence) = deltas(tokens, stop);
            let wanted: Vec<_> = wanted.into_iter().map(|(text, ids)| (text.to_owned(), ids)).collect();
            assert_eq!(deltas, wanted, "{tokens:?} {stop:?}");
            let told: Vec<TokenId> = deltas.iter().flat_map(|(_, ids)| ids.clone()).collect();
            assert_eq!(sequence.logprobs().iter().map(|told| told.id).collect::<Vec<_>>(), told);
        };
        check(&[a, b], &[], vec![("x", vec![a]), ("y", vec![b])]);
        // White space waits for what follows; at the end it has no text.
        check(&[space, a, space, b], &[], vec![("x", vec![space, a]), (" y", vec![space, b])]);
        check(&[a, space], &[], vec![("x", vec![a]), ("", vec![space])]);
        check(&[space], &[], vec![("", vec![space])]);
        // A character in three tokens comes with the last of them, or broken at the end.
        check(&[a, one, two, three], &[], vec![("x", vec![a]), ("\u{2603}", vec![one, two, three])]);
        check(&[one, two], &[], vec![("\u{fffd}", vec![one, two])]);
        check(&[one, two, a], &[], vec![("\u{fffd}x", vec![one, two, a])]);
        // What may begin a stop string waits; the tokens of a stop string are cut off.
        check(&[a, b, a], &["yz"], vec![("x", vec![a]), ("yx", vec![b, a])]);
        check(&[a, b, c, a], &["yz"], vec![("x", vec![a])]);
        check(&[a, b, c], &["xyz"], vec![]);
        check(&[a, b], &["yz"], vec![("x", vec![a]), ("y", vec![b])]);
        check(&[a, one, two, three, b], &["\u{2603}"], vec![("x", vec![a])]);
    }
}

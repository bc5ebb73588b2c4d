//! The state machine of one answer: logits in, text out, until it ends.

use std::sync::Arc;

use serde::Serialize;

use super::params::GenerateParams;
use super::sampler::Sampler;
use crate::error::Result;
use crate::text::{Detokenizer, TokenId, Tokenizer};

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

/// What one step gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Text that is certain now; often empty, since a character or a stop string may span tokens.
    pub text: String,
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
            sampler: Sampler::new(params, tokenizer.vocabulary())?,
            detokenizer: Detokenizer::new(Arc::clone(tokenizer), params.stop.clone()),
            eos,
            limit,
            prompt_tokens: prompt.len(),
            history: prompt,
            text: Trimmed::default(),
        })
    }

    /// Takes the logits of the last position, which are warped in place, and picks the next token.
    ///
    /// # Errors
    /// When no token can be picked because the logits are not numbers.
    pub fn advance(&mut self, logits: &mut [f32]) -> Result<Advance> {
        let token = self.sampler.pick(logits, &self.history)?;
        if self.eos.contains(&token) {
            return self.finish(FinishReason::Stop);
        }
        self.history.push(token);
        let step = self.detokenizer.push(token)?;
        let text = self.text.push(&step.text);
        if step.stopped {
            return Ok(Advance { text, next: Next::Finish(FinishReason::Stop) });
        }
        if self.tokens().len() >= self.limit {
            let rest = self.finish(FinishReason::Length)?;
            return Ok(Advance { text: text + &rest.text, ..rest });
        }
        Ok(Advance { text, next: Next::Read(token) })
    }

    /// Ends the answer for `reason`, giving the text that was held back.
    ///
    /// # Errors
    /// When the held-back tokens have no text.
    pub fn finish(&mut self, reason: FinishReason) -> Result<Advance> {
        let rest = self.detokenizer.finish()?;
        Ok(Advance { text: self.text.push(&rest), next: Next::Finish(reason) })
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

/// Text without the white space around it, as the reference strips an answer; it comes in pieces.
#[derive(Debug, Default)]
struct Trimmed {
    given: String,
    held: String,
}

impl Trimmed {
    /// Takes the next piece and gives what of it is certain not to be at the end.
    fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        if self.given.is_empty() {
            self.held.drain(..self.held.len() - self.held.trim_start().len());
        }
        let space = self.held.split_off(self.held.trim_end().len());
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
}

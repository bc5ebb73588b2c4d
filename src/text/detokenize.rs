//! Turns tokens into whole characters as they come and holds back what may begin a stop string.
//!
//! ```text
//! token bytes ─> whole characters ─> text that cannot begin a stop string ─> out
//!             (a cut one waits)    (the rest waits)
//! ```

use std::{str, sync::Arc};

use super::{TokenId, Tokenizer};
use crate::error::Result;

/// What one token gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Whole characters that are new; may be empty.
    pub text: String,
    /// Whether a stop string is complete. The text before it was given out; the stop string never is.
    pub stopped: bool,
}

/// Turns the tokens of one answer into text, a token at a time.
///
/// The steps and [`Detokenizer::finish`] joined equal [`Tokenizer::decode`] of all tokens, up to the stop
/// string that is complete first; where two become complete with one character, the longer one counts. The
/// outcome does not depend on where the borders between tokens lie.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    /// Bytes of a character that is not whole yet: at most three.
    bytes: Vec<u8>,
    /// Text that may begin a stop string: shorter than the longest of them.
    text: String,
    /// Bytes of text that were given out.
    given: usize,
    stopped: bool,
}

impl Detokenizer {
    /// Begins an answer that ends before any of the strings of `stop`; empty ones are passed over.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Self {
        let stop = stop.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { tokenizer, stop, bytes: Vec::new(), text: String::new(), given: 0, stopped: false }
    }

    /// Takes the next token. After a stop string nothing more comes out.
    ///
    /// # Errors
    /// None: special tokens and ids that are no token add nothing.
    pub fn push(&mut self, id: TokenId) -> Result<Step> {
        if !self.stopped {
            self.bytes.extend_from_slice(self.tokenizer.token_bytes(id).unwrap_or_default());
            self.take_characters();
        }
        Ok(self.give_out())
    }

    /// Ends the answer and gives out what was held back: a character that never became whole as U+FFFD, and
    /// text that turned out not to begin a stop string.
    ///
    /// # Errors
    /// None.
    pub fn finish(&mut self) -> Result<String> {
        if !self.stopped && !self.bytes.is_empty() {
            self.bytes.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        let Step { mut text, stopped } = self.give_out();
        if !stopped {
            text.push_str(&self.text);
            self.given += self.text.len();
        }
        self.text.clear();
        self.stopped = true;
        Ok(text)
    }

    /// Bytes of text that were given out so far.
    pub fn given(&self) -> usize {
        self.given
    }

    /// Bytes of text that the tokens made so far, in whole characters: given out or held back.
    pub fn made(&self) -> usize {
        self.given + self.text.len()
    }

    /// Whether the last token ended inside a character.
    pub fn is_inside_character(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Moves all whole characters from the bytes to the text.
    fn take_characters(&mut self) {
        let mut rest = &self.bytes[..];
        loop {
            let error = match str::from_utf8(rest) {
                Ok(whole) => {
                    self.text.push_str(whole);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (whole, broken) = rest.split_at(error.valid_up_to());
            self.text.push_str(str::from_utf8(whole).expect("valid up to here"));
            let Some(length) = error.error_len() else {
                rest = broken;
                break;
            };
            self.text.push(char::REPLACEMENT_CHARACTER);
            rest = &broken[length..];
        }
        let taken = self.bytes.len() - rest.len();
        self.bytes.drain(..taken);
    }

    fn give_out(&mut self) -> Step {
        if self.stopped {
            return Step { text: String::new(), stopped: true };
        }
        let first = self
            .stop
            .iter()
            .filter_map(|stop| self.text.find(stop.as_str()).map(|at| (at + stop.len(), at)))
            .min();
        if let Some((_, at)) = first {
            self.stopped = true;
            let mut text = std::mem::take(&mut self.text);
            text.truncate(at);
            self.given += text.len();
            return Step { text, stopped: true };
        }
        let held = self.stop.iter().map(|stop| overlap(&self.text, stop)).max().unwrap_or_default();
        let text: String = self.text.drain(..self.text.len() - held).collect();
        self.given += text.len();
        Step { text, stopped: false }
    }
}

/// Bytes of the longest end of `text` that begins `stop` and is shorter than it.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().rev().map(|(at, _)| at).find(|at| text.ends_with(&stop[..*at])).unwrap_or_default()
}

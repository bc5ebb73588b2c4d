//! Reads tokens that were only guessed together with one that is certain, and keeps what comes of those that prove right.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::generate::lookup::{Figures, Lookup};
use crate::model::CausalModel;
use crate::model::decoder::Logits;
use crate::text::TokenId;

/// Reads the tokens of one answer, a few of them before they were chosen.
///
/// What was chosen is always what the logits of its own position say; a guess only decides which positions are read in
/// one run.
#[derive(Debug)]
pub(super) struct Ahead {
    lookup: Option<Lookup>,
    /// The most tokens of one run.
    most: usize,
    /// Tokens that were guessed and read and are not chosen yet, each with the logits behind it.
    read: VecDeque<(TokenId, Logits)>,
    /// Of the last guess: its tokens, those that were right so far, and how long it took to read.
    guess: Option<(usize, usize, Duration)>,
}

impl Ahead {
    /// Reads ahead as `lookup` guesses; without one, each token by itself.
    ///
    /// # Errors
    /// [`crate::Error::Request`] when there is a lookup and what serves gives no logits of several positions.
    pub(super) fn new<M: CausalModel>(model: &M, lookup: Option<Lookup>) -> Result<Self> {
        let most = if lookup.is_some() { model.most_at_once()? } else { 1 };
        Ok(Self { lookup, most, read: VecDeque::new(), guess: None })
    }

    /// Reads `token`, the last one of `history`, and gives the logits behind it. At most `room` more tokens may follow.
    ///
    /// # Errors
    /// Those of [`CausalModel::decode`].
    pub(super) fn read<M: CausalModel>(
        &mut self,
        model: &mut M,
        token: TokenId,
        cache: &mut M::Cache,
        (history, room): (&[TokenId], usize),
    ) -> Result<Logits> {
        let Some(lookup) = &mut self.lookup else { return model.decode(token, cache) };
        if let Some((guessed, logits)) = self.read.pop_front() {
            if guessed == token {
                if let Some((_, right, _)) = &mut self.guess {
                    *right += 1;
                }
                return Ok(logits);
            }
            model.forget(self.read.len() + 1, cache)?;
            self.read.clear();
        }
        if let Some((guessed, right, took)) = self.guess.take() {
            lookup.judge(guessed, right, took);
        }
        // The token itself takes one place of a run, and what follows the last one is not needed.
        let room = room.saturating_sub(1).min(self.most.saturating_sub(1));
        let guess = lookup.guess(history, room);
        let begin = Instant::now();
        if guess.is_empty() {
            let logits = model.decode(token, cache)?;
            lookup.read_one(begin.elapsed());
            return Ok(logits);
        }
        let tokens: Vec<TokenId> = std::iter::once(token).chain(guess.iter().copied()).collect();
        let mut rows = model.decode_all(&tokens, cache)?.into_iter();
        self.guess = Some((guess.len(), 0, begin.elapsed()));
        let first = rows.next();
        self.read = guess.into_iter().zip(rows).collect();
        match first {
            Some(logits) => Ok(logits),
            None => model.decode(token, cache),
        }
    }

    /// Takes out of `cache` what was read and not chosen, and tells what guessing came to if there was
    /// any.
    ///
    /// # Errors
    /// Those of [`CausalModel::forget`].
    pub(super) fn end<M: CausalModel>(
        mut self,
        model: &mut M,
        cache: &mut M::Cache,
    ) -> Result<Option<Figures>> {
        if !self.read.is_empty() {
            model.forget(self.read.len(), cache)?;
        }
        let Some(lookup) = &mut self.lookup else { return Ok(None) };
        if let Some((guessed, right, took)) = self.guess.take() {
            lookup.judge(guessed, right, took);
        }
        Ok(Some(lookup.figures()))
    }
}

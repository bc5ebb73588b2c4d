//! Guesses how an answer goes on: as its end went on before, in the prompt or in the answer itself.
//!
//! ```text
//! read and written   next to the blue square . There is a circle next to the
//!                    ^^^^^^^^^^^ here the end stood before       ^^^^^^^^^^^ the end
//! the guess          blue square . There
//! ```
//!
//! A guess costs: several positions are read in one run, of which those behind the first wrong token were for nothing.
//! Whether it pays is measured while it is done, and guessing pauses, ever longer, while it does not.

use std::num::NonZeroUsize;
use std::time::Duration;

use serde::Serialize;

use crate::text::TokenId;

/// The longest end that is looked for; longer ones are tried first.
const LONGEST_END: usize = 4;
/// The shortest: one token alone was followed by too many things.
const SHORTEST_END: usize = 2;
/// Tokens that are read one by one after a guess that did not pay.
const FIRST_PAUSE: usize = 8;
/// The most of them: each further loss doubles the pause up to here.
const LONGEST_PAUSE: usize = 512;

/// Guesses for one answer.
#[derive(Debug)]
pub struct Lookup {
    /// The most tokens of a guess.
    most: usize,
    /// How many the next one may have.
    length: usize,
    /// What reading one token takes, on average.
    single: Option<Duration>,
    /// Tokens to be read one by one before the next guess.
    pause: usize,
    /// The pause after the next loss.
    next_pause: usize,
    /// Guesses made since the last pause that did not pay, in time that was lost.
    lost: Duration,
    figures: Figures,
}

/// What guessing came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Tokens that were guessed and read.
    pub guessed: usize,
    /// Those of them that were right.
    pub right: usize,
}

impl Lookup {
    /// Guesses of at most `most` tokens.
    pub fn new(most: NonZeroUsize) -> Self {
        Self {
            most: most.get(),
            length: 1,
            single: None,
            pause: 0,
            next_pause: FIRST_PAUSE,
            lost: Duration::ZERO,
            figures: Figures::default(),
        }
    }

    /// What may follow `history`, at most `room` tokens; nothing when nothing is known, or while guessing does not pay.
    pub fn guess(&mut self, history: &[TokenId], room: usize) -> Vec<TokenId> {
        // What one token takes must be known before a guess can be judged.
        if self.single.is_none() {
            return Vec::new();
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        continuation(history, self.length.min(room)).to_vec()
    }

    /// One token was read alone.
    pub fn read_one(&mut self, took: Duration) {
        self.single = Some(self.single.map_or(took, |before| (before * 7 + took) / 8));
    }

    /// A guess of `guessed` tokens was read together with the token before it; the first `right` of them were right.
    pub fn judge(&mut self, guessed: usize, right: usize, took: Duration) {
        self.figures.guessed += guessed;
        self.figures.right += right;
        let worth = self.single.unwrap_or(took) * u32::try_from(right + 1).unwrap_or(u32::MAX);
        if worth >= took {
            self.lost = self.lost.saturating_sub(worth.saturating_sub(took));
            self.next_pause = FIRST_PAUSE;
        } else {
            self.lost += took.saturating_sub(worth);
            // One wrong guess may be chance; time that two tokens would have taken is not.
            if right == 0 || self.lost > self.single.unwrap_or_default() * 2 {
                self.pause = self.next_pause;
                self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
                self.lost = Duration::ZERO;
            }
        }
        self.length = if right == guessed { (self.length * 2).min(self.most) } else { right.max(1) };
    }

    /// What guessing came to so far.
    pub fn figures(&self) -> Figures {
        self.figures
    }
}

/// What followed the last place at which `history` had the same end, at most `most` tokens. Longer ends count for more.
fn continuation(history: &[TokenId], most: usize) -> &[TokenId] {
    for end in (SHORTEST_END..=LONGEST_END).rev() {
        let Some(start) = history.len().checked_sub(end) else { continue };
        let wanted = &history[start..];
        // The end itself does not count; it may overlap where it was before.
        if let Some(place) = (0..start).rev().find(|place| history[*place..].starts_with(wanted)) {
            let from = place + end;
            return &history[from..history.len().min(from.saturating_add(most))];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    fn lookup(most: usize) -> Lookup {
        let mut lookup = Lookup::new(NonZeroUsize::new(most).unwrap());
        lookup.read_one(STEP);
        lookup
    }

    #[test]
    fn the_longest_end_decides_and_of_equals_the_last_place() {
        assert_eq!(continuation(&[1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2), [9, 2]);
        assert_eq!(continuation(&[1, 2, 7, 1, 2, 8, 1, 2], 1), [8]);
        assert_eq!(continuation(&[5, 5, 5, 5], 3), [5]);
        assert_eq!(continuation(&[1, 2, 3, 4], 3), [0; 0]);
        assert_eq!(continuation(&[3, 1, 2, 3], 3), [0; 0]);
        assert_eq!(continuation(&[7], 3), [0; 0]);
        assert_eq!(continuation(&[], 3), [0; 0]);
        assert_eq!(continuation(&[1, 2, 3, 1, 2], 0), [0; 0]);
    }

    #[test]
    fn guesses_grow_while_they_are_right_and_shrink_to_what_was() {
        let history = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2];
        let mut lookup = lookup(4);
        for length in [1, 2, 4, 4] {
            assert_eq!(lookup.guess(&history, 9), history[2..2 + length]);
            lookup.judge(length, length, STEP);
        }
        assert_eq!(lookup.guess(&history, 3).len(), 3);
        lookup.judge(3, 2, STEP);
        assert_eq!(lookup.guess(&history, 9).len(), 2);
        assert_eq!(lookup.figures(), Figures { guessed: 14, right: 13 });
    }

    #[test]
    fn nothing_is_guessed_before_a_token_was_timed_nor_without_room() {
        let history = [1, 2, 3, 1, 2];
        let mut untimed = Lookup::new(NonZeroUsize::MIN);
        assert!(untimed.guess(&history, 9).is_empty());
        assert!(lookup(4).guess(&history, 0).is_empty());
        assert_eq!(lookup(4).guess(&history, 1), [3]);
    }

    #[test]
    fn guesses_that_do_not_pay_become_rare() {
        let history = [1, 2, 3, 1, 2];
        let mut lookup = lookup(4);
        let (mut spent, mut tokens) = (Duration::ZERO, 0_u32);
        while tokens < 2000 {
            let guess = lookup.guess(&history, 9);
            tokens += 1;
            if guess.is_empty() {
                lookup.read_one(STEP);
                spent += STEP;
            } else {
                lookup.judge(guess.len(), 0, STEP * 14 / 10);
                spent += STEP * 14 / 10;
            }
        }
        // Ten guesses at most: at 8, 16, ... 512 tokens apart, for 0.4 of a step each.
        assert!(spent <= STEP * tokens + STEP * 4, "{spent:?}");
        assert!(lookup.figures().guessed > 3, "it never gives up for good");
    }

    #[test]
    fn a_guess_that_is_partly_right_goes_on_while_it_pays() {
        let history = [1, 2, 3, 4, 1, 2];
        let mut lookup = lookup(2);
        for _ in 0..20 {
            let guess = lookup.guess(&history, 2);
            assert!(!guess.is_empty());
            lookup.judge(2, 1, STEP * 17 / 10);
        }
        // Slower than two tokens one by one: it stops.
        (0..20).for_each(|_| lookup.judge(2, 1, STEP * 23 / 10));
        assert!(lookup.guess(&history, 2).is_empty());
    }
}

//! Notices an answer that goes round in circles.

use crate::text::TokenId;

/// An answer that repeats so few tokens is looked at.
const LONGEST_PERIOD: usize = 8;

/// So many tokens must repeat before it is.
const SUSPICIOUS: usize = 64;

/// Watches one answer. A loop may be the model's own, or what a broken graph makes of it: the watchdog tells once, and
/// whoever hears it checks the graph.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watchdog {
    told: bool,
}

impl Watchdog {
    /// Whether the end of `tokens` has become a loop; true at most once.
    pub fn barks(&mut self, tokens: &[TokenId]) -> bool {
        let Some(start) = tokens.len().checked_sub(SUSPICIOUS).filter(|_| !self.told) else { return false };
        let end = &tokens[start..];
        self.told = (1..=LONGEST_PERIOD).any(|period| end[period..] == end[..SUSPICIOUS - period]);
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_told_of_once_and_an_answer_is_not_one() {
        let mut watchdog = Watchdog::default();
        let answer: Vec<TokenId> = (0..200).map(|n| n * n % 191).collect();
        assert!((0..answer.len()).all(|end| !watchdog.barks(&answer[..end])));
        assert!(!watchdog.barks(&[0; SUSPICIOUS - 1]));
        assert!(watchdog.barks(&[0; SUSPICIOUS]));
        assert!(!watchdog.barks(&[0; SUSPICIOUS + 1]));
    }

    #[test]
    fn short_periods_are_loops_and_long_ones_are_not() {
        let repeated = |period: u32| -> Vec<TokenId> { (0..200).map(|n| n % period).collect() };
        assert!(Watchdog::default().barks(&repeated(8)));
        assert!(!Watchdog::default().barks(&repeated(9)));
    }
}

//! How an answer is made: its limits and how its tokens are chosen.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use super::constraint::Constraint;
use crate::error::{Error, Result};
use crate::text::TokenId;

/// The most likeliest tokens that are told beside each token of an answer, as in `OpenAI`'s API.
pub const MOST_LOGPROBS: usize = 20;
/// Frequency and presence penalties lie between minus this and this, as in `OpenAI`'s API.
const HIGHEST_PENALTY: f32 = 2.0;
/// A bias lies between minus this and this, as in `OpenAI`'s API.
const HIGHEST_BIAS: f32 = 100.0;

/// How one answer is made.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// Tokens that the answer may have at most, at least 1; `None` is as many as the context holds.
    pub max_new_tokens: Option<usize>,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// Divides the logits above 0 of tokens that the history holds and multiplies those below; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of a token for each time that the answer holds it so far; from -2 to 2, and 0 changes
    /// nothing.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a token that the answer holds so far; from -2 to 2, and 0 changes nothing.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, behind the penalties; from -100, which as good as bans a token, to 100.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// Tell how likely each token of the answer was, and this many of the likeliest in its place, at most
    /// [`MOST_LOGPROBS`]. These are the model's own probabilities: those of its logits before penalties, bias,
    /// temperature, cuts and a constraint, as `OpenAI` and vLLM tell them.
    pub logprobs: Option<usize>,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Where the random numbers begin; one seed gives one answer on every platform.
    pub seed: u64,
    /// Guess at most this many tokens ahead from what was read and written before, and read them in one run; `None`
    /// reads each token by itself. The answer is the same; see [`super::lookup`].
    pub lookup: Option<NonZeroUsize>,
    /// What the answer has to look like; anything otherwise.
    pub constraint: Option<Constraint>,
}

/// How a token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token; of equal ones that with the lowest id.
    Greedy,
    /// A token drawn by its probability. The cuts apply in this order.
    Random {
        /// Divides the logits; above 0, and 1 changes nothing.
        temperature: f32,
        /// Keeps this many of the most likely tokens.
        top_k: Option<usize>,
        /// Keeps the most likely tokens whose probabilities add up to this; 1 keeps all.
        top_p: f32,
        /// Keeps tokens at least this many times as likely as the most likely one; 0 keeps all.
        min_p: f32,
    },
}

impl Default for GenerateParams {
    /// Greedy, until the model ends the answer or the context does.
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            sampling: Sampling::Greedy,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
            stop: Vec::new(),
            seed: 0,
            lookup: None,
            constraint: None,
        }
    }
}

impl GenerateParams {
    /// Refuses values that mean nothing.
    ///
    /// # Errors
    /// [`Error::Request`] that names the option, its value and the way out.
    pub fn validate(&self) -> Result<()> {
        if self.max_new_tokens == Some(0) {
            return refuse("max-new-tokens is 0, which leaves no answer; give at least 1");
        }
        let penalty = self.repetition_penalty;
        if !penalty.is_finite() || penalty <= 0.0 {
            return refuse(format!("repetition-penalty is {penalty}; give a number above 0, 1 is none"));
        }
        for (name, penalty) in
            [("frequency-penalty", self.frequency_penalty), ("presence-penalty", self.presence_penalty)]
        {
            if !(-HIGHEST_PENALTY..=HIGHEST_PENALTY).contains(&penalty) {
                return refuse(format!(
                    "{name} is {penalty}; give a number from -{HIGHEST_PENALTY} to {HIGHEST_PENALTY}, 0 is none"
                ));
            }
        }
        if let Some((id, bias)) =
            self.logit_bias.iter().find(|(_, bias)| !(-HIGHEST_BIAS..=HIGHEST_BIAS).contains(*bias))
        {
            return refuse(format!(
                "logit-bias of token {id} is {bias}; give a number from -{HIGHEST_BIAS} to {HIGHEST_BIAS}"
            ));
        }
        if let Some(count) = self.logprobs.filter(|count| *count > MOST_LOGPROBS) {
            return refuse(format!(
                "logprobs asks for the {count} likeliest tokens of each place; ask for at most {MOST_LOGPROBS}"
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("a stop string is empty and would end every answer at once; leave it out");
        }
        self.fits_choice()?;
        self.sampling.validate()
    }

    /// A choice is made by how likely each text is as a whole, so nothing may change how likely single tokens are.
    fn fits_choice(&self) -> Result<()> {
        if self.constraint.as_ref().and_then(Constraint::choices).is_none() {
            return Ok(());
        }
        let given = [
            ("repetition-penalty", self.repetition_penalty.to_bits() != 1.0_f32.to_bits()),
            ("frequency-penalty", self.frequency_penalty != 0.0),
            ("presence-penalty", self.presence_penalty != 0.0),
            ("logit-bias", !self.logit_bias.is_empty()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => refuse(format!(
                "{name} changes how likely tokens are and a choice is made by how likely its texts are; \
                 leave out one or the other"
            )),
            None => Ok(()),
        }
    }

    /// Refuses values that mean nothing, and what does not fit a tokenizer of `vocabulary` entries.
    ///
    /// # Errors
    /// [`Error::Request`], as [`GenerateParams::validate`], and for a bias of an id that is no token.
    pub fn validate_for(&self, vocabulary: usize) -> Result<()> {
        self.validate()?;
        match self.logit_bias.last_key_value() {
            Some((id, _)) if usize::try_from(*id).is_ok_and(|id| id >= vocabulary) => refuse(format!(
                "logit-bias names token {id} and the model has tokens below {vocabulary}; leave it out"
            )),
            _ => Ok(()),
        }
    }
}

impl Sampling {
    /// Reads options of which each may be missing: none at all is greedy, and a cut without a temperature draws
    /// at temperature 1.
    ///
    /// # Errors
    /// [`Error::Request`] for a temperature of 0 beside a cut, which contradict each other, and for values that
    /// [`GenerateParams::validate`] refuses.
    pub fn from_options(
        temperature: Option<f32>,
        top_p: Option<f32>,
        top_k: Option<usize>,
        min_p: Option<f32>,
    ) -> Result<Self> {
        let cuts: Vec<String> = [
            top_p.map(|value| format!("top-p {value}")),
            top_k.map(|value| format!("top-k {value}")),
            min_p.map(|value| format!("min-p {value}")),
        ]
        .into_iter()
        .flatten()
        .collect();
        let sampling = match temperature {
            None | Some(0.0) if cuts.is_empty() => Self::Greedy,
            Some(0.0) => {
                return refuse(format!(
                    "temperature 0 always takes the most likely token and {} asks for a draw; \
                     leave out one or the other",
                    cuts.join(" with "),
                ));
            }
            _ => Self::Random {
                temperature: temperature.unwrap_or(1.0),
                top_k,
                top_p: top_p.unwrap_or(1.0),
                min_p: min_p.unwrap_or(0.0),
            },
        };
        sampling.validate()?;
        Ok(sampling)
    }

    /// The seed of an answer that is made like this: 0 unless one is given.
    ///
    /// # Errors
    /// [`Error::Request`] when a seed is given and nothing is drawn.
    pub fn seed(&self, seed: Option<u64>) -> Result<u64> {
        match (self, seed) {
            (Self::Greedy, Some(seed)) => refuse(format!(
                "seed {seed} has nothing to draw, the most likely token is always taken; \
                 give a temperature above 0 or leave the seed out"
            )),
            _ => Ok(seed.unwrap_or_default()),
        }
    }

    fn validate(self) -> Result<()> {
        let Self::Random { temperature, top_k, top_p, min_p } = self else { return Ok(()) };
        if !temperature.is_finite() || temperature <= 0.0 {
            return refuse(format!(
                "temperature is {temperature}; give a number above 0, or 0 alone for the most likely token"
            ));
        }
        if top_k == Some(0) {
            return refuse("top-k is 0, which keeps no token; give at least 1, or leave it out to keep all");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse(format!("top-p is {top_p}; give a number above 0 and at most 1, 1 keeps all"));
        }
        if !(0.0..1.0).contains(&min_p) {
            return refuse(format!("min-p is {min_p}; give a number from 0 and below 1, 0 keeps all"));
        }
        Ok(())
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Request(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(temperature: f32, top_k: Option<usize>, top_p: f32, min_p: f32) -> Sampling {
        Sampling::Random { temperature, top_k, top_p, min_p }
    }

    fn check(
        temperature: Option<f32>,
        top_p: Option<f32>,
        top_k: Option<usize>,
        min_p: Option<f32>,
        sampling: Sampling,
    ) {
        assert_eq!(Sampling::from_options(temperature, top_p, top_k, min_p).unwrap(), sampling);
    }

    #[test]
    fn options_say_how_a_token_is_chosen() {
        check(None, None, None, None, Sampling::Greedy);
        check(Some(0.0), None, None, None, Sampling::Greedy);
        check(Some(-0.0), None, None, None, Sampling::Greedy);
        check(Some(0.2), None, None, None, random(0.2, None, 1.0, 0.0));
        check(None, Some(0.9), None, None, random(1.0, None, 0.9, 0.0));
        check(None, None, Some(40), None, random(1.0, Some(40), 1.0, 0.0));
        check(Some(0.7), Some(0.9), Some(40), Some(0.05), random(0.7, Some(40), 0.9, 0.05));
    }

    #[test]
    fn options_that_contradict_each_other_are_refused_by_name() {
        let refusal = Sampling::from_options(Some(0.0), Some(0.9), None, Some(0.1)).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "temperature 0 always takes the most likely token and top-p 0.9 with min-p 0.1 asks for a draw; \
             leave out one or the other"
        );
        let refusal = Sampling::Greedy.seed(Some(7)).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "seed 7 has nothing to draw, the most likely token is always taken; \
             give a temperature above 0 or leave the seed out"
        );
        assert_eq!(Sampling::Greedy.seed(None).unwrap(), 0);
        assert_eq!(random(1.0, None, 1.0, 0.0).seed(Some(7)).unwrap(), 7);
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        let sampling = |sampling| GenerateParams { sampling, ..GenerateParams::default() };
        let penalty = |repetition_penalty| GenerateParams { repetition_penalty, ..GenerateParams::default() };
        for (params, begin) in [
            (sampling(random(-1.0, None, 1.0, 0.0)), "temperature is -1;"),
            (sampling(random(f32::NAN, None, 1.0, 0.0)), "temperature is NaN;"),
            (sampling(random(f32::INFINITY, None, 1.0, 0.0)), "temperature is inf;"),
            (sampling(random(0.0, None, 1.0, 0.0)), "temperature is 0;"),
            (sampling(random(1.0, Some(0), 1.0, 0.0)), "top-k is 0,"),
            (sampling(random(1.0, None, 0.0, 0.0)), "top-p is 0;"),
            (sampling(random(1.0, None, 1.01, 0.0)), "top-p is 1.01;"),
            (sampling(random(1.0, None, f32::NAN, 0.0)), "top-p is NaN;"),
            (sampling(random(1.0, None, 1.0, 1.0)), "min-p is 1;"),
            (sampling(random(1.0, None, 1.0, -0.1)), "min-p is -0.1;"),
            (sampling(random(1.0, None, 1.0, f32::NAN)), "min-p is NaN;"),
            (penalty(0.0), "repetition-penalty is 0;"),
            (penalty(-1.0), "repetition-penalty is -1;"),
            (penalty(f32::NAN), "repetition-penalty is NaN;"),
            (penalty(f32::INFINITY), "repetition-penalty is inf;"),
            (GenerateParams { max_new_tokens: Some(0), ..GenerateParams::default() }, "max-new-tokens is 0,"),
            (
                GenerateParams { stop: vec![String::new()], ..GenerateParams::default() },
                "a stop string is empty",
            ),
        ] {
            let refusal = params.validate().unwrap_err().to_string();
            assert!(refusal.starts_with(begin), "{refusal}");
        }
        GenerateParams::default().validate().unwrap();
    }

    #[test]
    fn options_are_checked_when_they_are_read() {
        assert!(Sampling::from_options(Some(-0.5), None, None, None).is_err());
        assert!(Sampling::from_options(Some(f32::NAN), None, None, None).is_err());
        assert!(Sampling::from_options(None, Some(2.0), None, None).is_err());
    }

    #[test]
    fn penalties_biases_and_counts_out_of_range_are_refused_by_name() {
        let check = |change: fn(&mut GenerateParams), wanted: &str| {
            let mut params = GenerateParams::default();
            change(&mut params);
            assert_eq!(params.validate_for(8).unwrap_err().to_string(), wanted);
        };
        check(
            |params| params.frequency_penalty = 2.5,
            "frequency-penalty is 2.5; give a number from -2 to 2, 0 is none",
        );
        check(
            |params| params.presence_penalty = f32::NAN,
            "presence-penalty is NaN; give a number from -2 to 2, 0 is none",
        );
        check(
            |params| params.logit_bias = [(3, -101.0)].into(),
            "logit-bias of token 3 is -101; give a number from -100 to 100",
        );
        check(
            |params| params.logit_bias = [(3, 1.0), (8, 1.0)].into(),
            "logit-bias names token 8 and the model has tokens below 8; leave it out",
        );
        check(
            |params| params.logprobs = Some(21),
            "logprobs asks for the 21 likeliest tokens of each place; ask for at most 20",
        );
        let sound = GenerateParams {
            frequency_penalty: -2.0,
            presence_penalty: 2.0,
            logit_bias: [(7, 100.0)].into(),
            logprobs: Some(20),
            ..GenerateParams::default()
        };
        assert_eq!(sound.validate_for(8).map_err(|error| error.to_string()), Ok(()));
    }
}

//! How tokens are chosen, from a request's parameters to the engine's.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::{Answer, ApiError};
use super::limits::ServerLimits;
use super::models::Model;
use super::texts::Texts;
use crate::error::Error;
use crate::generate::params::{GenerateParams, Sampling};
use crate::text::TokenId;

/// What a request says of how its tokens are chosen.
///
/// Without a temperature the likeliest token is taken, as everywhere in this program, unless a cut (`top_p`, `top_k`,
/// `min_p`) asks for a draw: then it is 1. At temperature 0 cuts and seed change nothing, since the likeliest token
/// passes every cut.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Choosing {
    /// The most tokens of the answer; otherwise what the context leaves, or 16 of a completion.
    pub(super) max_tokens: Option<usize>,
    /// Sample at this temperature. 0 takes the likeliest token, and so does leaving out this and every cut.
    pub(super) temperature: Option<f32>,
    /// Sample among the likeliest tokens that together have this probability.
    pub(super) top_p: Option<f32>,
    /// Extension: sample among this many of the likeliest tokens.
    pub(super) top_k: Option<usize>,
    /// Extension: sample among tokens that are at least this likely, relative to the likeliest.
    pub(super) min_p: Option<f32>,
    /// Extension: divide the score of tokens that occurred by this; 1 changes nothing.
    pub(super) repetition_penalty: Option<f32>,
    /// Subtract this from the score of a token for each time that it occurred in the answer.
    pub(super) frequency_penalty: Option<f32>,
    /// Subtract this from the score of tokens that occurred in the answer.
    pub(super) presence_penalty: Option<f32>,
    /// Add this to the scores of these tokens, by their numbers.
    pub(super) logit_bias: BTreeMap<String, f32>,
    /// Seed of the draws; the same seed gives the same answer. Answer `i` to a prompt is drawn with `seed + i`.
    pub(super) seed: Option<i64>,
    /// Texts that end the answer and are not part of it.
    pub(super) stop: Option<Texts>,
}

impl Choosing {
    /// The engine's parameters, with the `logprobs` likeliest tokens of each place, checked as far as they can be without
    /// a model.
    ///
    /// # Errors
    /// With the name of the parameter that is at fault.
    pub(super) fn params(self, logprobs: Option<usize>, limits: &ServerLimits) -> Answer<GenerateParams> {
        let sampling = self.sampling()?;
        let stop = self.stop.unwrap_or_default().into_vec();
        if stop.len() > limits.stop_strings {
            let most = limits.stop_strings;
            return Err(ApiError::value("stop", format!("stop has more than {most} strings; give fewer")));
        }
        let logit_bias = self.logit_bias.into_iter().map(|(id, bias)| match id.parse::<TokenId>() {
            Ok(id) => Ok((id, bias)),
            Err(_) => Err(ApiError::value(
                "logit_bias",
                "logit_bias has a key that is no token; keys are the numbers of tokens",
            )),
        });
        let defaults = GenerateParams::default();
        let params = GenerateParams {
            max_new_tokens: self.max_tokens,
            sampling,
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            logit_bias: logit_bias.collect::<Answer<_>>()?,
            logprobs,
            stop,
            // Every number is a seed, those below 0 too.
            seed: self.seed.unwrap_or_default().cast_unsigned(),
            ..defaults
        };
        blame(&params)?;
        Ok(params)
    }

    fn sampling(&self) -> Answer<Sampling> {
        // Cuts that keep everything ask for nothing.
        #[allow(clippy::float_cmp)] // Exactly these values mean that.
        let top_p = self.top_p.filter(|top_p| *top_p != 1.0);
        let min_p = self.min_p.filter(|min_p| *min_p != 0.0);
        let of = Sampling::from_options;
        // Each alone, so that a fault names its parameter.
        named("temperature", of(self.temperature, None, None, None))?;
        named("top_p", of(None, top_p, None, None))?;
        named("top_k", of(None, None, self.top_k, None))?;
        named("min_p", of(None, None, None, min_p))?;
        if self.temperature == Some(0.0) {
            return Ok(Sampling::Greedy);
        }
        named("temperature", of(self.temperature, top_p, self.top_k, min_p))
    }
}

/// Refuses what only `model` can tell to be wrong, as the engine would, with the name that the parameter has here.
///
/// # Errors
/// For a bias of what is no token.
pub(super) fn check(params: &GenerateParams, model: &Model) -> Answer<()> {
    named("logit_bias", params.validate_for(model.engine.facts().tokenizer.vocabulary()))
}

/// Refuses what the engine would, with the name that the parameter has here.
///
/// # Errors
/// For values that mean nothing, or that do not go with `params.constraint`.
pub(super) fn blame(params: &GenerateParams) -> Answer<()> {
    let plain = || GenerateParams { constraint: params.constraint.clone(), ..GenerateParams::default() };
    let alone = [
        ("max_tokens", GenerateParams { max_new_tokens: params.max_new_tokens, ..plain() }),
        ("repetition_penalty", GenerateParams { repetition_penalty: params.repetition_penalty, ..plain() }),
        ("frequency_penalty", GenerateParams { frequency_penalty: params.frequency_penalty, ..plain() }),
        ("presence_penalty", GenerateParams { presence_penalty: params.presence_penalty, ..plain() }),
        ("logit_bias", GenerateParams { logit_bias: params.logit_bias.clone(), ..plain() }),
        ("top_logprobs", GenerateParams { logprobs: params.logprobs, ..plain() }),
        ("stop", GenerateParams { stop: params.stop.clone(), ..plain() }),
    ];
    for (name, params) in alone {
        named(name, params.validate())?;
    }
    Ok(params.validate()?)
}

/// What the engine says of the parameter `name`, which it calls as the command line does.
fn named<T>(name: &str, result: Result<T, Error>) -> Answer<T> {
    let told = |error: Error| match error {
        Error::Request(why) => {
            let own = if name == "max_tokens" { "max-new-tokens".to_owned() } else { name.replace('_', "-") };
            ApiError::value(name, why.replace(&own, name))
        }
        other => ApiError::from(other).about(name),
    };
    result.map_err(told)
}

/// The parameters of each of `count` answers: seeds follow each other.
pub(super) fn each(params: &GenerateParams, count: usize) -> impl Iterator<Item = GenerateParams> + '_ {
    let seeds = (0..count as u64).map(|index| params.seed.wrapping_add(index));
    seeds.map(|seed| GenerateParams { seed, ..params.clone() })
}

/// How many answers are given to each of `prompts`.
///
/// # Errors
/// When there are none, or more in all than `limits` allow.
pub(super) fn count(n: Option<usize>, prompts: usize, limits: &ServerLimits) -> Answer<usize> {
    let (n, most) = (n.unwrap_or(1), limits.answers);
    if n == 0 || n.saturating_mul(prompts) > most {
        let each = if prompts > 1 { format!(" for {prompts} prompts") } else { String::new() };
        return Err(ApiError::value("n", format!("n is {n}{each}; ask for 1 to {most} answers in all")));
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(choosing: Choosing) -> Sampling {
        choosing.params(None, &ServerLimits::default()).unwrap().sampling
    }

    #[test]
    fn nothing_is_drawn_unless_it_is_asked_for() {
        let choosing = Choosing::default;
        let draw = |temperature, top_p| Sampling::Random { temperature, top_k: None, top_p, min_p: 0.0 };
        assert_eq!(sampling(choosing()), Sampling::Greedy);
        assert_eq!(
            sampling(Choosing { temperature: Some(0.0), seed: Some(7), ..choosing() }),
            Sampling::Greedy
        );
        assert_eq!(
            sampling(Choosing { temperature: Some(0.0), top_p: Some(0.9), ..choosing() }),
            Sampling::Greedy
        );
        assert_eq!(sampling(Choosing { top_p: Some(1.0), ..choosing() }), Sampling::Greedy);
        assert_eq!(sampling(Choosing { top_p: Some(0.5), ..choosing() }), draw(1.0, 0.5));
        assert_eq!(
            sampling(Choosing { temperature: Some(0.5), top_p: Some(1.0), ..choosing() }),
            draw(0.5, 1.0)
        );
    }

    #[test]
    fn a_fault_names_the_parameter() {
        let refused = |choosing: Choosing, logprobs: Option<usize>, param: &str| {
            let body = choosing.params(logprobs, &ServerLimits::default()).unwrap_err().body();
            assert_eq!(body["error"]["param"], param, "{body}");
            assert_eq!(body["error"]["code"], "invalid_value", "{body}");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.contains(param.trim_start_matches("top_log")), "{message}");
        };
        let check = |change: fn(&mut Choosing), param: &str| {
            let mut choosing = Choosing::default();
            change(&mut choosing);
            refused(choosing, None, param);
        };
        check(|asked| asked.temperature = Some(-1.0), "temperature");
        check(|asked| asked.temperature = Some(f32::INFINITY), "temperature");
        check(|asked| asked.top_p = Some(2.0), "top_p");
        check(|asked| (asked.temperature, asked.top_p) = (Some(0.0), Some(2.0)), "top_p");
        check(|asked| asked.top_k = Some(0), "top_k");
        check(|asked| asked.min_p = Some(1.0), "min_p");
        check(|asked| asked.max_tokens = Some(0), "max_tokens");
        check(|asked| asked.repetition_penalty = Some(0.0), "repetition_penalty");
        check(|asked| asked.frequency_penalty = Some(2.5), "frequency_penalty");
        check(|asked| asked.presence_penalty = Some(-2.5), "presence_penalty");
        check(|asked| asked.logit_bias = [("5".to_owned(), 101.0)].into(), "logit_bias");
        check(|asked| asked.logit_bias = [("five".to_owned(), 1.0)].into(), "logit_bias");
        refused(Choosing::default(), Some(21), "top_logprobs");
        check(|asked| asked.stop = Some(Texts::One(String::new())), "stop");
        check(|asked| asked.stop = Some(Texts::Several(vec!["a".to_owned(); 17])), "stop");
    }

    #[test]
    fn seeds_follow_each_other() {
        let params = GenerateParams { seed: u64::MAX, ..GenerateParams::default() };
        assert_eq!(each(&params, 3).map(|params| params.seed).collect::<Vec<_>>(), [u64::MAX, 0, 1]);
    }

    #[test]
    fn answers_are_counted_over_all_prompts() {
        let limits = ServerLimits { answers: 4, ..ServerLimits::default() };
        assert_eq!(count(None, 4, &limits).unwrap(), 1);
        assert_eq!(count(Some(2), 2, &limits).unwrap(), 2);
        for (n, prompts) in [(0, 1), (5, 1), (3, 2), (usize::MAX, 2)] {
            assert!(count(Some(n), prompts, &limits).is_err());
        }
    }
}

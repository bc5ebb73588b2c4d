//! Arguments that say how an answer is made.

use std::{collections::BTreeMap, num::NonZeroUsize, sync::Arc};

use super::form::FormArguments;
use crate::chat::conversation::{Message, Part};
use crate::chat::template;
use crate::engine::{Engine, Request};
use crate::error::{Error, Result};
use crate::generate::params::{GenerateParams, Sampling};
use crate::model::vision::ImageInput;
use crate::text::TokenId;

/// How an answer is made.
#[derive(Debug, clap::Args)]
pub(super) struct GenerationArguments {
    /// The system text, instead of the one that the model was trained with
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,

    /// The most tokens of an answer; what the context leaves otherwise
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,

    /// Sample at this temperature; 0 or nothing takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,

    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,

    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Sample among tokens that are at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,

    /// Divide the score of tokens that occurred by this
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,

    /// Subtract this from the score of a token for each time that the answer holds it, from -2 to 2
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,

    /// Subtract this once from the score of a token that the answer holds, from -2 to 2
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,

    /// Add VALUE, from -100 to 100, to the score of token ID; may be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_bias)]
    logit_bias: Vec<(TokenId, f32)>,

    /// Seed of the sampling; the same seed gives the same answer on every platform
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// Guess up to N tokens ahead from what was read and written, and read them in one run: the same answer, sooner
    /// where it repeats; 7 when no number is given
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "7")]
    lookup: Option<NonZeroUsize>,

    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[command(flatten)]
    pub(super) form: FormArguments,
}

impl GenerationArguments {
    /// A single question about `images`, which stand before it, and its parameters.
    pub(super) fn request(
        &self,
        engine: &Engine,
        images: Vec<Arc<ImageInput>>,
        question: &str,
        params: GenerateParams,
    ) -> Result<Request> {
        let parts = (0..images.len()).map(Part::Image).chain([Part::Text(question.to_owned())]);
        let message = Message::user(parts);
        let pieces = template::render(&engine.facts().template, self.system.as_deref(), &[message])?;
        Ok(Request::new(engine.prompt(&pieces)?, images, params))
    }

    /// The parameters, checked against each other, with the `logprobs` likeliest tokens of each place.
    pub(super) fn params(&self, logprobs: Option<usize>) -> Result<GenerateParams> {
        let sampling = Sampling::from_options(self.temperature, self.top_p, self.top_k, self.min_p)?;
        let seed = sampling.seed(self.seed)?;
        let params = GenerateParams {
            max_new_tokens: self.max_new_tokens,
            sampling,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: biases(&self.logit_bias)?,
            logprobs,
            stop: self.stop.clone(),
            seed,
            lookup: self.lookup,
            constraint: None,
        };
        params.validate()?;
        Ok(params)
    }
}

/// A token and what is added to its logit, from the command line.
fn parse_bias(text: &str) -> std::result::Result<(TokenId, f32), String> {
    let pair = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    pair.ok_or_else(|| "a bias is a token's id and a number, such as 262=-1.5".to_owned())
}

fn biases(given: &[(TokenId, f32)]) -> Result<BTreeMap<TokenId, f32>> {
    let mut biases = BTreeMap::new();
    for (id, bias) in given {
        if biases.insert(*id, *bias).is_some() {
            return Err(Error::Request(format!("--logit-bias names token {id} twice; name it once")));
        }
    }
    Ok(biases)
}

/// Refuses a question of nothing but white space.
pub(super) fn check_question(question: &str) -> Result<()> {
    if question.trim().is_empty() {
        return Err(Error::Request("the question is empty; ask something".to_owned()));
    }
    Ok(())
}

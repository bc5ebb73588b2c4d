//! What generation needs from a model.

use std::sync::Arc;

use serde::Serialize;

use super::cancel::Canceler;
use super::chain::ComponentReport;
use super::decoder::Logits;
use super::prefix::PrefixReport;
use super::reading::Prefill;
use super::vision::ImageInput;
use crate::error::Result;
use crate::package::Component;
use crate::runtime::{Refusal, Target};
use crate::text::{Prompt, TokenId};

/// What generation needs from a model: read a prompt, then read one more token at a time.
pub trait CausalModel: Send {
    /// What was read so far.
    type Cache: Send;
    /// A prompt of which a part was read.
    type Reading: Send;

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    fn empty_cache(&mut self) -> Result<Self::Cache>;

    /// How many sequences it has room for.
    fn room(&self) -> Room;

    /// What `cache` holds of a prompt.
    ///
    /// # Errors
    /// [`Error::Request`](crate::error::Error::Request) when the prompt has another number of images than `images`.
    fn shared(&self, prompt: &Prompt, images: &[Arc<ImageInput>], cache: &Self::Cache) -> Result<Shared>;

    /// Begins to read `prompt`, with `images` in its places, into `cache`. What the cache already holds of the beginning
    /// is not read again, nor is what one of `others` holds, or what was kept of earlier prompts; what the cache holds
    /// beyond that is forgotten.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`].
    fn begin(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut Self::Cache,
        others: &[&Self::Cache],
    ) -> Result<Self::Reading>;

    /// Encodes one image of what was begun with `cache`, or reads at most `most` positions; the last piece gives what
    /// came of it.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::error::Error::Graph) when a graph fails,
    /// [`Error::Unsound`](crate::error::Error::Unsound) when it gives what is no number;
    /// [`Error::Cancelled`](crate::error::Error::Cancelled) when [`CausalModel::canceler`] was used. The cache then holds a
    /// prefix of the prompt.
    fn read_on(
        &mut self,
        reading: &mut Self::Reading,
        most: usize,
        cache: &mut Self::Cache,
    ) -> Result<Option<Prefill>>;

    /// Reads a whole prompt.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`].
    fn prefill(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut Self::Cache,
    ) -> Result<Prefill> {
        let mut reading = self.begin(prompt, images, cache, &[])?;
        loop {
            if let Some(prefill) = self.read_on(&mut reading, usize::MAX, cache)? {
                return Ok(prefill);
            }
        }
    }

    /// Reads one more token.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`], and [`Error::TooLong`](crate::error::Error::TooLong) at the context's end.
    fn decode(&mut self, token: TokenId, cache: &mut Self::Cache) -> Result<Logits>;

    /// Reads one more token of each of several sequences, and gives the logits behind each; as [`CausalModel::decode`]
    /// for each of them, in one run where the model has [`Room`] for that.
    ///
    /// # Errors
    /// For each those of [`CausalModel::decode`]; the others are not concerned.
    fn decode_each(&mut self, tokens: &[TokenId], caches: &mut [&mut Self::Cache]) -> Vec<Result<Logits>>;

    /// The most tokens that [`CausalModel::decode_all`] takes.
    ///
    /// # Errors
    /// [`Error::Request`](crate::error::Error::Request) when what serves gives the logits of one position a run.
    fn most_at_once(&self) -> Result<usize>;

    /// Reads `tokens`, at least one, in one run, and gives the logits behind each of them.
    ///
    /// # Errors
    /// As [`CausalModel::decode`] and [`CausalModel::most_at_once`].
    fn decode_all(&mut self, tokens: &[TokenId], cache: &mut Self::Cache) -> Result<Vec<Logits>>;

    /// Forgets the last `count` positions of `cache`.
    ///
    /// # Errors
    /// When what is left cannot be kept; the cache is then of no use.
    fn forget(&mut self, count: usize, cache: &mut Self::Cache) -> Result<()>;

    /// A handle that stops what runs, from another thread.
    fn canceler(&self) -> Canceler;

    /// What serves each component, and what refused to.
    fn reports(&self) -> Vec<ComponentReport>;

    /// What is kept of prompts that were read.
    fn prefixes(&self) -> PrefixReport;

    /// Whether the decoder still computes what it was proved to compute before it served.
    ///
    /// # Errors
    /// As [`CausalModel::prefill`].
    fn recheck(&mut self) -> Result<bool>;

    /// Takes what runs `graph` out of service for `reason`, and puts the next candidate there. Every cache that was
    /// made before is then of no use.
    ///
    /// # Errors
    /// [`Error::Provider`](crate::error::Error::Provider) when there is no other that serves.
    fn demote(&mut self, graph: &str, reason: &str) -> Result<Demotion>;
}

/// Sequences that a model has room for at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Room {
    /// How many sequences; what more than one of them say next is read in one run.
    pub sequences: usize,
    /// Positions that all of them may hold together.
    pub positions: usize,
    /// What decided it, where that is less than was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<String>,
}

/// What a cache holds of a prompt, in positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Positions from the start that are those of the prompt.
    pub common: usize,
    /// All that it holds.
    pub held: usize,
}

/// A variant that was taken out of service, and what serves instead.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Demotion {
    /// The component.
    pub component: Component,
    /// What served, and why it no longer does.
    pub refusal: Refusal,
    /// The variant that serves now.
    pub variant: String,
    /// The provider that runs it.
    pub provider: Target,
}

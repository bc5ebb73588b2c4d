//! A prompt while it is read, a piece at a time.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ndarray::{Array2, s};

use super::decoder::Logits;
use super::embed::Run;
use super::kv_cache::{KvCache, PositionKey};
use super::prefix::{CachedFrom, Found};
use super::projector::ImageEmbeds;
use super::vision::ImageInput;
use super::{LlavaPhi, image_at, position_keys};
use crate::error::{Error, Result};
use crate::text::{Prompt, Span};

/// What reading a prompt gave.
#[derive(Clone, Debug)]
pub struct Prefill {
    /// The logits of the last position.
    pub logits: Logits,
    /// Positions that were not read again.
    pub cached: usize,
    /// Where they came from.
    pub from: CachedFrom,
    /// Images that were encoded; an image whose positions were all cached, or that was encoded before, is not.
    pub images_encoded: usize,
    /// Time for finding what was read before, and copying it.
    pub restore: Duration,
    /// Time for encoding and projecting images.
    pub vision: Duration,
    /// Time for the decoder.
    pub decoder: Duration,
}

/// A prompt of which a part was read. It goes with the cache that it was begun with.
#[derive(Debug)]
pub struct Reading {
    prompt: Prompt,
    images: Vec<Arc<ImageInput>>,
    keys: Vec<PositionKey>,
    /// What was found of it, until what was lacking is kept too.
    found: Option<Found>,
    from: CachedFrom,
    cached: usize,
    /// Positions that the cache holds.
    read: usize,
    /// Images whose rows are still to be had.
    wanted: VecDeque<usize>,
    embedded: HashMap<[u8; 32], Arc<ImageEmbeds>>,
    images_encoded: usize,
    /// The positions from `cached` on, once all images are there.
    embeds: Option<Array2<f32>>,
    restore: Duration,
    vision: Duration,
    decoder: Duration,
}

impl LlavaPhi {
    /// Finds what was read before of a prompt, in `cache`, in `others` and in what is kept, and puts it into `cache`.
    pub(super) fn begin_reading(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut KvCache,
        others: &[&KvCache],
    ) -> Result<Reading> {
        let tokens_per_image = self.visual_tokens.count();
        let keys = position_keys(prompt, images, self.visual_tokens)?;
        let begin = Instant::now();
        let found = self.prefixes.restore(cache, &keys, others, &self.loader.canceler)?;
        // The last position is read again even when it is cached: its logits are what is wanted.
        let cached = cache.len().min(keys.len().saturating_sub(1));
        if cache.len() > cached {
            cache.truncate(cached)?;
        }
        cache.reserve(keys.len())?;
        let from = found.from.at_most(cached);
        let mut wanted = VecDeque::new();
        for (index, start) in image_starts(prompt, tokens_per_image) {
            image_at(images, index)?;
            if start + tokens_per_image > cached {
                wanted.push_back(index);
            }
        }
        Ok(Reading {
            prompt: prompt.clone(),
            images: images.to_vec(),
            keys,
            found: Some(found),
            from,
            cached,
            read: cached,
            wanted,
            embedded: HashMap::new(),
            images_encoded: 0,
            embeds: None,
            restore: begin.elapsed(),
            vision: Duration::ZERO,
            decoder: Duration::ZERO,
        })
    }

    /// Encodes one image, or has the decoder read at most `most` positions; the last piece gives what came of it.
    pub(super) fn read_piece(
        &mut self,
        reading: &mut Reading,
        most: usize,
        cache: &mut KvCache,
    ) -> Result<Option<Prefill>> {
        let begin = Instant::now();
        if let Some(index) = reading.wanted.pop_front() {
            self.read_image(reading, index)?;
            reading.vision += begin.elapsed();
            return Ok(None);
        }
        let embeds = if let Some(embeds) = reading.embeds.take() {
            embeds
        } else {
            self.embedder.splice(&reading.runs_after(self.visual_tokens.count())?)?
        };
        let end = reading.read.saturating_add(most.max(1)).min(reading.keys.len());
        let rows = embeds.slice(s![reading.read - reading.cached..end - reading.cached, ..]);
        let logits = self.decoder()?.forward(&rows, &reading.keys[reading.read..end], cache)?;
        reading.read = end;
        reading.decoder += begin.elapsed();
        if end < reading.keys.len() {
            reading.embeds = Some(embeds);
            return Ok(None);
        }
        if let Some(found) = reading.found.take() {
            self.prefixes.write(cache, &reading.keys, found);
        }
        let Reading { cached, from, images_encoded, restore, vision, decoder, .. } = *reading;
        Ok(Some(Prefill { logits, cached, from, images_encoded, restore, vision, decoder }))
    }

    fn read_image(&mut self, reading: &mut Reading, index: usize) -> Result<()> {
        let image = Arc::clone(image_at(&reading.images, index)?);
        let hash = *image.hash();
        if reading.embedded.contains_key(&hash) {
            return Ok(());
        }
        let embeds = if let Some(embeds) = self.prefixes.image(&hash) {
            embeds
        } else {
            reading.images_encoded += 1;
            let embeds = Arc::new(self.encode(&image)?);
            self.prefixes.keep_image(hash, &embeds);
            embeds
        };
        reading.embedded.insert(hash, embeds);
        Ok(())
    }
}

impl Reading {
    /// The positions that the cache did not hold.
    fn runs_after(&self, tokens_per_image: usize) -> Result<Vec<Run<'_>>> {
        let mut runs = Vec::new();
        let mut at = 0;
        for span in self.prompt.spans() {
            let length = match span {
                Span::Text(ids) => ids.len(),
                Span::Image(_) => tokens_per_image,
            };
            let skip = self.cached.saturating_sub(at).min(length);
            at += length;
            if skip == length {
                continue;
            }
            runs.push(match span {
                Span::Text(ids) => Run::Tokens(&ids[skip..]),
                Span::Image(index) => {
                    let embeds = self
                        .embedded
                        .get(image_at(&self.images, *index)?.hash())
                        .ok_or_else(|| Error::Request(format!("image {} was not encoded", index + 1)))?;
                    Run::Image { embeds, rows: skip..length }
                }
            });
        }
        Ok(runs)
    }
}

/// Each image of `prompt` and the position where it begins.
fn image_starts(prompt: &Prompt, tokens_per_image: usize) -> Vec<(usize, usize)> {
    let mut starts = Vec::new();
    let mut at = 0;
    for span in prompt.spans() {
        match span {
            Span::Text(ids) => at += ids.len(),
            Span::Image(index) => {
                starts.push((*index, at));
                at += tokens_per_image;
            }
        }
    }
    starts
}

//! What an answer cost, as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::engine::event::{Completion, Timings, Usage};

/// What answers cost together, gathered as they end.
#[derive(Debug, Default)]
pub(super) struct Spent {
    prompt: usize,
    cached: usize,
    image: usize,
    completion: usize,
}

impl Spent {
    /// What `completions` cost, of which `each` answer one prompt.
    pub(super) fn of(completions: &[Completion], each: usize) -> Self {
        let mut spent = Self::default();
        for (index, completion) in completions.iter().enumerate() {
            spent.add(index, each, &completion.usage);
        }
        spent
    }

    /// Adds answer `index`, where `each` answers are to one prompt. The prompt counts with its first answer.
    pub(super) fn add(&mut self, index: usize, each: usize, usage: &Usage) {
        self.completion += usage.completion_tokens;
        if index.is_multiple_of(each) {
            self.prompt += usage.prompt_tokens;
            self.cached += usage.cached_tokens;
            self.image += usage.image_tokens;
        }
    }

    /// OpenAI's `usage`. `image_tokens` is an extension: positions of images, which the prompt's hold as well.
    pub(super) fn json(&self) -> Value {
        let Self { prompt, cached, image, completion } = self;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": image},
        })
    }
}

/// How long an answer took: an extension, in milliseconds.
pub(super) fn timings(completion: &Completion) -> Value {
    let Completion { timings, usage, .. } = completion;
    let Timings { queue, restore, vision, prefill, decode, .. } = timings;
    let ms = |duration: &Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    json!({
        "queue_ms": ms(queue),
        "restore_ms": ms(restore),
        "vision_ms": ms(vision),
        "prefill_ms": ms(prefill),
        "decode_ms": ms(decode),
        "first_token_ms": ms(&timings.first_token()),
        "tokens_per_second": timings.tokens_per_second(usage.completion_tokens),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_once_and_each_of_its_answers() {
        let usage = Usage {
            prompt_tokens: 10,
            image_tokens: 4,
            cached_tokens: 3,
            completion_tokens: 2,
            ..Usage::default()
        };
        let mut spent = Spent::default();
        for index in [3, 0, 1, 2] {
            spent.add(index, 2, &usage);
        }
        assert_eq!(
            spent.json(),
            json!({"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28,
                "prompt_tokens_details": {"cached_tokens": 6, "image_tokens": 8}})
        );
    }
}

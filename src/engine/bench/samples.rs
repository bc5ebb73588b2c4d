//! Times of one thing that was done several times, and what they say together.

use std::time::Duration;

use serde::Serialize;

/// What took its time, again and again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// What was measured.
    pub what: What,
    /// Positions that one sample read; `None` where none is read.
    pub positions: Option<usize>,
    /// Positions that were read before and stood in the cache; `None` where none is read.
    pub depth: Option<usize>,
    /// Samples that were taken first and do not count, in milliseconds.
    pub warm_up_ms: Vec<f64>,
    /// The samples in the order in which they were taken, in milliseconds.
    pub samples_ms: Vec<f64>,
    /// What the samples say together.
    #[serde(flatten)]
    pub summary: Summary,
    /// Positions a second, by the median; `None` where none is read, and where a sample does more than read.
    pub per_second: Option<f64>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Finding ONNX Runtime and starting it.
    Runtime,
    /// From the package's directory to a model that proved itself.
    Load,
    /// From an image file's bytes to pixel values with their hash.
    Preprocess,
    /// Pixel values to patch features.
    Encode,
    /// Patch features to image embeddings.
    Project,
    /// Reading a prompt of text into an empty cache, up to the first token.
    Prefill,
    /// Reading one token and choosing the next.
    Decode,
    /// Reading several tokens in one run, with the logits of each.
    Ahead,
    /// One token of each of several sequences in one run; what is read is how many of them.
    Together,
    /// From the pixel values of a picture and a question to the first token, with nothing read before.
    FirstToken,
    /// From a question about a picture that was asked about before to the first token.
    SecondQuestion,
    /// As `prefill`, of all positions but those that `context-decode` takes.
    ContextPrefill,
    /// As `decode`, up to the last position of the context.
    ContextDecode,
}

/// What samples say together, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or what lies between the two in the middle.
    #[serde(rename = "median_ms")]
    pub median: f64,
    /// The shortest.
    #[serde(rename = "min_ms")]
    pub min: f64,
    /// The longest.
    #[serde(rename = "max_ms")]
    pub max: f64,
    /// The median distance from the median: half of all samples are no farther from it.
    #[serde(rename = "mad_ms")]
    pub mad: f64,
}

impl Measurement {
    /// Sums up `samples`, of which each read `positions` behind `depth` others.
    pub(super) fn new(
        what: What,
        positions: Option<usize>,
        depth: Option<usize>,
        warm_up: &[Duration],
        samples: &[Duration],
    ) -> Self {
        let samples_ms: Vec<f64> = samples.iter().copied().map(milliseconds).collect();
        let summary = Summary::of(&samples_ms);
        let reads = !matches!(what, What::FirstToken | What::SecondQuestion);
        let number = positions.and_then(|count| u32::try_from(count).ok());
        let per_second = number
            .filter(|_| reads && summary.median > 0.0)
            .map(|count| f64::from(count) * 1e3 / summary.median);
        let warm_up_ms = warm_up.iter().copied().map(milliseconds).collect();
        Self { what, positions, depth, warm_up_ms, samples_ms, summary, per_second }
    }

    /// One sample of what can be done only once in a process.
    pub fn once(what: What, took: Duration) -> Self {
        Self::new(what, None, None, &[], &[took])
    }
}

impl Summary {
    fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let median = middle(&sorted);
        let mut distances: Vec<f64> = sorted.iter().map(|sample| (sample - median).abs()).collect();
        distances.sort_unstable_by(f64::total_cmp);
        Self {
            median,
            min: sorted.first().copied().unwrap_or_default(),
            max: sorted.last().copied().unwrap_or_default(),
            mad: middle(&distances),
        }
    }
}

/// The middle of sorted numbers; 0 of none.
fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match (sorted.get(half), half.checked_sub(1).and_then(|below| sorted.get(below))) {
        (Some(upper), Some(lower)) if sorted.len().is_multiple_of(2) => f64::midpoint(*lower, *upper),
        (Some(middle), _) => *middle,
        (None, _) => 0.0,
    }
}

/// Rounded to a microsecond: more digits are noise.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn a_summary_is_not_moved_by_one_sample_that_took_long() {
        let Summary { median, min, max, mad } = Summary::of(&[3.0, 1.0, 100.0, 2.0, 4.0]);
        assert!(close(median, 3.0) && close(min, 1.0) && close(max, 100.0) && close(mad, 1.0));
        let Summary { median, mad, .. } = Summary::of(&[1.0, 2.0]);
        assert!(close(median, 1.5) && close(mad, 0.5));
        let Summary { median, min, max, mad } = Summary::of(&[]);
        assert!([median, min, max, mad].iter().all(|number| close(*number, 0.0)));
    }

    #[test]
    fn only_what_reads_has_a_speed() {
        let took = [Duration::from_millis(500)];
        let speed = |what, positions| Measurement::new(what, positions, Some(0), &[], &took).per_second;
        assert_eq!(speed(What::Prefill, Some(100)), Some(200.0));
        assert_eq!(speed(What::Decode, Some(1)), Some(2.0));
        assert_eq!(speed(What::FirstToken, Some(100)), None);
        assert_eq!(speed(What::Encode, None), None);
    }

    #[test]
    fn a_measurement_is_one_flat_object() {
        let measured = Measurement::once(What::ContextDecode, Duration::from_micros(1500));
        assert_eq!(
            serde_json::to_string(&measured).unwrap(),
            r#"{"what":"context-decode","positions":null,"depth":null,"warm_up_ms":[],"samples_ms":[1.5],"median_ms":1.5,"min_ms":1.5,"max_ms":1.5,"mad_ms":0.0,"per_second":null}"#
        );
    }
}

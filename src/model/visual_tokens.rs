//! Which rows of an image's features the decoder reads when it is asked to read fewer.
//!
//! ```text
//! features [of, hidden] ─┬─ most looked at by the class token ── kept as they are ─┐
//!                        └─ the rest: every so many is a target,                   ├─> [kept, hidden]
//!                           the others join the target that they resemble ── mean ─┘   in their old order
//! ```
//!
//! After `VisionZip` (Yang et al. 2024, arXiv:2412.04467); `docs/visual-tokens.md` says where this departs from it and
//! what was measured.

use std::fmt;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::package::ModelPackage;
use crate::package::manifest::{CLS_ATTENTION, MeasuredTokens};

/// One kept row in so many is a mean of what is left; the others are those most looked at.
const MEAN_IN: usize = 6;

/// Told apart in the keys of positions: rows that another rule chose are other rows.
const RULE: &[u8] = b"visual tokens by class attention, rule 1";

/// How many rows of each image the decoder reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisualTokens {
    kept: usize,
    of: usize,
}

/// What is read of each image, and what is known of the answers to that; as text one sentence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VisualTokensReport {
    /// Positions that an image takes.
    pub tokens: usize,
    /// Positions that it would take.
    pub of: usize,
    /// What the package says was measured with so many; empty when nothing was.
    pub measured: Vec<MeasuredTokens>,
}

impl VisualTokens {
    /// `wanted` rows of each image of `package`; all when there is no wish.
    ///
    /// # Errors
    /// [`Error::Request`] for 0, for more rows than an image has, and for fewer when a vision encoder of the package does
    /// not give what they are chosen by.
    pub fn new(package: &ModelPackage, wanted: Option<usize>) -> Result<Self> {
        let manifest = package.manifest();
        let of = manifest.vision.tokens_per_image;
        let kept = wanted.unwrap_or(of);
        if kept == 0 || kept > of {
            return Err(Error::Request(format!(
                "{kept} visual tokens were asked for and an image has {of}; give 1 to {of}, or nothing for all"
            )));
        }
        if let Some(variant) = manifest.reads_whole().filter(|_| kept < of) {
            return Err(Error::Request(format!(
                "visual tokens cannot be chosen with the package {}: its vision encoder {variant} gives no \
                 {CLS_ATTENTION}; export it again, or read all {of}",
                manifest.name
            )));
        }
        Ok(Self { kept, of })
    }

    /// Positions that an image takes.
    pub fn count(self) -> usize {
        self.kept
    }

    /// Positions that an image would take.
    pub fn all(self) -> usize {
        self.of
    }

    /// Whether nothing is left out, so that nothing is chosen.
    pub fn is_all(self) -> bool {
        self.kept == self.of
    }

    /// What identifies the rows of the image with this `hash`: the hash itself when it is read whole.
    pub fn key(self, hash: &[u8; 32]) -> [u8; 32] {
        if self.is_all() {
            return *hash;
        }
        let mut hasher = Sha256::new();
        hasher.update(RULE);
        for number in [self.kept, self.of] {
            hasher.update((number as u64).to_le_bytes());
        }
        hasher.update(hash);
        hasher.finalize().into()
    }

    /// The rows that are read, `[count, hidden]`, of `features` `[of, hidden]`, of which the class token looks at each
    /// as `attention` `[of]` says. All numbers must be finite; of equal ones the earlier counts for more.
    ///
    /// # Errors
    /// [`Error::Graph`] when the shapes are not these.
    pub fn choose(
        self,
        features: &ArrayView2<'_, f32>,
        attention: &ArrayView1<'_, f32>,
    ) -> Result<Array2<f32>> {
        if features.nrows() != self.of || attention.len() != self.of {
            let (rows, looks) = (features.nrows(), attention.len());
            return Err(Error::graph(
                "vision_encoder",
                format!("it gives {rows} rows and {looks} weights of attention for an image of {}", self.of),
            ));
        }
        let groups = groups(features, attention, self.kept, dominant_of(self.kept));
        let mut chosen = Array2::zeros((groups.len(), features.ncols()));
        for (mut row, group) in chosen.rows_mut().into_iter().zip(&groups) {
            if let [only] = group[..] {
                row.assign(&features.row(only));
            } else if let Some(mean) = features.select(Axis(0), group).mean_axis(Axis(0)) {
                row.assign(&mean);
            }
        }
        Ok(chosen)
    }
}

impl VisualTokensReport {
    /// What `package` says of `tokens`; `None` when all are read.
    pub fn new(package: &ModelPackage, tokens: VisualTokens) -> Option<Self> {
        let all = &package.manifest().vision.measured;
        let measured = all.iter().filter(|one| one.tokens == tokens.kept).cloned().collect();
        (!tokens.is_all()).then_some(Self { tokens: tokens.kept, of: tokens.of, measured })
    }
}

impl fmt::Display for VisualTokensReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} visual tokens are read", self.tokens, self.of)?;
        if self.measured.is_empty() {
            return f.write_str("; what this costs was never measured for this package");
        }
        for (place, one) in self.measured.iter().enumerate() {
            write!(f, "{}{one}", if place == 0 { "; measured: " } else { ", " })?;
        }
        Ok(())
    }
}

/// How many of `kept` rows are the most looked at: all but one in [`MEAN_IN`], and but one where there are two.
fn dominant_of(kept: usize) -> usize {
    let means = ((kept + MEAN_IN / 2) / MEAN_IN).max(1);
    kept.saturating_sub(means).max(1)
}

/// The rows that make each of `kept` rows, in the order of the first row of each but for what joined it.
fn groups(
    features: &ArrayView2<'_, f32>,
    attention: &ArrayView1<'_, f32>,
    kept: usize,
    dominant: usize,
) -> Vec<Vec<usize>> {
    let mut by_attention: Vec<usize> = (0..attention.len()).collect();
    by_attention.sort_by(|&a, &b| attention[b].total_cmp(&attention[a]));
    let mut rest = by_attention.split_off(dominant.min(by_attention.len()));
    rest.sort_unstable();
    let targets = spread(&rest, kept - by_attention.len());
    let mut groups: Vec<Vec<usize>> = by_attention.iter().chain(&targets).map(|&row| vec![row]).collect();
    // The targets stand behind the dominant rows, in their own order.
    let first = by_attention.len();
    let units: Vec<_> = targets.iter().map(|&row| unit(&features.row(row))).collect();
    for &row in rest.iter().filter(|row| targets.binary_search(row).is_err()) {
        let similar = units.iter().map(|target| target.dot(&features.row(row)));
        let best = similar.enumerate().fold(None, |best: Option<(usize, f32)>, (place, score)| match best {
            Some((_, highest)) if highest >= score => best,
            _ => Some((place, score)),
        });
        if let Some((place, _)) = best {
            groups[first + place].push(row);
        }
    }
    groups.sort_unstable_by_key(|group| group[0]);
    groups
}

/// `count` of `rows` at equal distances, the first and the last half a distance from the ends.
fn spread(rows: &[usize], count: usize) -> Vec<usize> {
    (0..count).filter_map(|place| rows.get((2 * place + 1) * rows.len() / (2 * count)).copied()).collect()
}

/// `row` of length 1; only zeros stay as they are. What it is compared with need not have length 1: the best target is
/// the same.
fn unit(row: &ArrayView1<'_, f32>) -> ndarray::Array1<f32> {
    let length = row.dot(row).sqrt();
    if length > 0.0 { row / length } else { row.to_owned() }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array};

    use super::*;

    fn of(kept: usize, of: usize) -> VisualTokens {
        VisualTokens { kept, of }
    }

    /// Rows of one number each and the weights.
    fn chosen(kept: usize, features: &[f32], attention: &[f32]) -> Vec<f32> {
        let features = Array2::from_shape_vec((features.len(), 1), features.to_vec()).unwrap();
        let attention = Array1::from(attention.to_vec());
        let rows = of(kept, attention.len()).choose(&features.view(), &attention.view()).unwrap();
        rows.into_raw_vec_and_offset().0
    }

    #[test]
    fn the_most_looked_at_rows_stay_in_their_order_and_the_rest_is_one_mean() {
        // The mean of 1, 3 and 5 stands where the target stood, in their middle.
        assert_eq!(chosen(3, &[1.0, 2.0, 3.0, 4.0, 5.0], &[0.1, 0.4, 0.1, 0.3, 0.1]), [2.0, 3.0, 4.0]);
        // Of equal weights the earlier row counts for more.
        assert_eq!(chosen(3, &[1.0, 2.0, 3.0, 4.0], &[0.25; 4]), [1.0, 2.0, 3.5]);
        assert_eq!(chosen(1, &[1.0, 2.0, 3.0], &[0.1, 0.1, 0.8]), [3.0]);
    }

    #[test]
    fn one_row_in_six_is_a_mean_of_others() {
        let found: Vec<usize> = [1, 2, 3, 4, 6, 8, 16, 32, 64, 144, 288].map(dominant_of).into();
        assert_eq!(found, [1, 1, 2, 3, 5, 7, 13, 27, 53, 120, 240]);
        for kept in 2..600 {
            assert!((1..kept).contains(&dominant_of(kept)), "{kept}");
        }
    }

    #[test]
    fn what_is_left_joins_the_target_that_it_resembles() {
        let features = array![
            [9.0, 9.0], // looked at
            [1.0, 0.0], // target
            [3.0, 0.5], // as the first target
            [0.0, 2.0], // as the second target
            [0.0, 1.0], // target
            [0.5, 9.0], // as the second target
        ];
        let attention = array![0.9, 0.0, 0.0, 0.0, 0.0, 0.1];
        let found = groups(&features.view(), &attention.view(), 3, 1);
        // Of the five that are left, the second and the fourth are targets.
        assert_eq!(found, [vec![0], vec![2, 1], vec![4, 3, 5]]);
        assert_eq!(spread(&[1, 2, 3, 4, 5], 2), [2, 4]);
        assert_eq!(spread(&[1, 2, 3, 4, 5], 5), [1, 2, 3, 4, 5]);
        assert_eq!(spread(&[7], 1), [7]);
        assert!(spread(&[], 0).is_empty());
    }

    #[test]
    fn a_row_of_zeros_joins_a_target_as_any_other() {
        let features = Array2::zeros((12, 3));
        let attention = Array1::from_elem(12, 1.0 / 12.0);
        for kept in 1..=12 {
            let rows = of(kept, 12).choose(&features.view(), &attention.view()).unwrap();
            assert_eq!(rows.dim(), (kept, 3));
            assert!(rows.iter().all(|value| *value == 0.0));
        }
    }

    #[test]
    fn every_row_is_in_one_group_and_as_many_groups_as_asked_for() {
        let number = |value: usize| f32::from(u8::try_from(value).unwrap());
        let features =
            Array2::from_shape_fn((40, 5), |(row, column)| number((row * 7 + column * 13) % 11) - 5.0);
        let attention = Array1::from_shape_fn(40, |row| number((row * 17) % 40));
        for kept in 1..=40 {
            let dominant = dominant_of(kept);
            let found = groups(&features.view(), &attention.view(), kept, dominant);
            assert_eq!(found.len(), kept);
            assert!(found.is_sorted_by_key(|group| group[0]));
            let mut rows: Vec<usize> = found.concat();
            rows.sort_unstable();
            // Without a target there is nothing that the others could join.
            let all = if kept > dominant { (0..40).collect() } else { rows.clone() };
            assert_eq!(rows, all);
        }
    }

    #[test]
    fn a_key_tells_settings_apart_and_all_rows_are_the_image_itself() {
        let hash = [7; 32];
        assert_eq!(of(64, 64).key(&hash), hash);
        let keys =
            [of(16, 64).key(&hash), of(32, 64).key(&hash), of(16, 32).key(&hash), of(16, 64).key(&[8; 32])];
        for (place, key) in keys.iter().enumerate() {
            assert_ne!(*key, hash);
            assert!(!keys[..place].contains(key));
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let features = Array2::zeros((5, 2));
        let error = of(2, 4).choose(&features.view(), &Array1::zeros(4).view()).unwrap_err().to_string();
        assert!(error.contains("5 rows and 4 weights"), "{error}");
    }

    #[test]
    fn a_report_says_what_was_measured_and_that_nothing_was() {
        let report = VisualTokensReport { tokens: 16, of: 64, measured: Vec::new() };
        assert_eq!(
            report.to_string(),
            "16 of 64 visual tokens are read; what this costs was never measured for this package"
        );
        let one = MeasuredTokens {
            tokens: 16,
            benchmark: "easy-VQA test".to_owned(),
            variant: "cpu-int4".to_owned(),
            questions: 9673,
            right: 9650,
            right_with_all: 9652,
        };
        let report = VisualTokensReport { measured: vec![one], ..report };
        assert_eq!(
            report.to_string(),
            "16 of 64 visual tokens are read; measured: 9650 of 9673 right in easy-VQA test with cpu-int4, 9652 with all"
        );
    }
}

//! What is measured of a model, in which order, how often.

use std::time::Duration;

use crate::error::{Error, Result};

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// An image file to pixel values.
    Preprocess,
    /// An image through the encoder and the projector.
    Encode,
    /// Prompts of several lengths.
    Prefill,
    /// Tokens at several depths.
    Decode,
    /// A first question about a picture.
    FirstToken,
    /// A second question about the same picture.
    SecondQuestion,
    /// Several tokens in one run at several depths, as a lookup reads them; only when it is asked for.
    Ahead,
    /// One token of each of several sequences in one run at several depths, as a server reads them; only when it is asked
    /// for.
    Together,
    /// The whole context: how long it is to read, and the speed at its end.
    Context,
}

impl Subject {
    /// Those that are measured unless others are asked for, in the order in which they are measured: what takes most memory comes last.
    pub const USUAL: [Self; 7] = [
        Self::Preprocess,
        Self::Encode,
        Self::FirstToken,
        Self::SecondQuestion,
        Self::Prefill,
        Self::Decode,
        Self::Context,
    ];

    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preprocess => "preprocess",
            Self::Encode => "encode",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::FirstToken => "first-token",
            Self::SecondQuestion => "second-question",
            Self::Ahead => "ahead",
            Self::Together => "together",
            Self::Context => "context",
        }
    }
}

/// What a user asked to have measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// What is measured.
    pub subjects: Vec<Subject>,
    /// Positions of the prompts that are read; `None` is what is usual and fits.
    pub lengths: Option<Vec<usize>>,
    /// Positions behind which tokens are decoded; `None` is what is usual and fits.
    pub depths: Option<Vec<usize>>,
    /// Tokens that are decoded at each depth.
    pub steps: usize,
    /// Text tokens of a question about a picture, the template's own among them.
    pub text: usize,
    /// How often each thing is measured.
    pub repetitions: usize,
    /// How often it is done before that without counting.
    pub warm_up: usize,
    /// No repetition but the first of each thing is begun after this.
    pub budget: Duration,
}

/// One thing to measure with its size, in positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Preprocess,
    Encode,
    FirstToken,
    SecondQuestion,
    Prefill(usize),
    Decode(usize),
    /// So many tokens in one run, behind so many positions.
    Ahead(usize, usize),
    /// A token of each of so many sequences in one run, each behind so many positions.
    Together(usize, usize),
    Context(usize),
}

impl Job {
    /// What it is called while it runs, and where what memory it took is told.
    pub(super) fn name(self) -> String {
        match self {
            Self::Preprocess => Subject::Preprocess.name().to_owned(),
            Self::Encode => Subject::Encode.name().to_owned(),
            Self::FirstToken => Subject::FirstToken.name().to_owned(),
            Self::SecondQuestion => Subject::SecondQuestion.name().to_owned(),
            Self::Prefill(positions) => format!("prefill {positions}"),
            Self::Decode(depth) => format!("decode {depth}"),
            Self::Ahead(tokens, depth) => format!("ahead {tokens} at {depth}"),
            Self::Together(sequences, depth) => format!("together {sequences} at {depth}"),
            Self::Context(_) => Subject::Context.name().to_owned(),
        }
    }
}

/// Tokens of one run that stand for a lookup's.
const AHEAD: [usize; 4] = [1, 2, 4, 8];
/// Sequences that stand for a server's.
pub(super) const TOGETHER: [usize; 4] = [1, 2, 4, 8];
/// The order in which subjects are measured.
const ORDER: [Subject; 9] = [
    Subject::Preprocess,
    Subject::Encode,
    Subject::FirstToken,
    Subject::SecondQuestion,
    Subject::Prefill,
    Subject::Decode,
    Subject::Ahead,
    Subject::Together,
    Subject::Context,
];
/// Lengths of prompts that are measured unless others are asked for: a question alone, and one with a picture.
const LENGTHS: [usize; 2] = [128, 640];
/// Depths that are measured unless others are asked for: the beginning, and behind a question with a picture.
const DEPTHS: [usize; 2] = [0, 700];

impl Wishes {
    /// Sequences for which the model must have room: those that are read together, and the one of everything else, which
    /// keeps the first place.
    pub fn parallel(&self) -> usize {
        let together = self.subjects.contains(&Subject::Together);
        1 + if together { TOGETHER[TOGETHER.len() - 1] } else { 0 }
    }

    /// The jobs in their order, and what is left out because `context` positions do not hold it. A picture takes
    /// `image` positions; the template's own text around it takes `template`.
    ///
    /// # Errors
    /// [`Error::Request`] for a size that was asked for and cannot be, with those that can.
    pub(super) fn jobs(
        &self,
        context: usize,
        image: usize,
        template: usize,
    ) -> Result<(Vec<Job>, Vec<String>)> {
        let refuse = |why: String| Err(Error::Request(why));
        if self.steps == 0 || self.repetitions == 0 {
            return refuse("nothing would be measured; give at least 1 step and 1 repetition".to_owned());
        }
        let mut left_out = Vec::new();
        let mut jobs = Vec::new();
        for subject in ORDER.into_iter().filter(|subject| self.subjects.contains(subject)) {
            match subject {
                Subject::Preprocess => jobs.push(Job::Preprocess),
                Subject::Encode => jobs.push(Job::Encode),
                Subject::Prefill => {
                    let least = usize::from(self.lengths.is_some());
                    let sizes = self.lengths.as_deref().unwrap_or(&LENGTHS);
                    let sizes =
                        fitting("length", sizes, least, context, self.lengths.is_some(), &mut left_out)?;
                    jobs.extend(sizes.into_iter().map(Job::Prefill));
                }
                Subject::Decode => {
                    let Some(most) = context.checked_sub(self.steps) else {
                        return refuse(format!(
                            "{} decode steps do not fit into {context} positions; give fewer --steps",
                            self.steps
                        ));
                    };
                    let sizes = self.depths.as_deref().unwrap_or(&DEPTHS);
                    let sizes = fitting("depth", sizes, 0, most, self.depths.is_some(), &mut left_out)?;
                    jobs.extend(sizes.into_iter().map(Job::Decode));
                }
                Subject::Ahead => {
                    let most = context.saturating_sub(AHEAD[AHEAD.len() - 1]);
                    let sizes = self.depths.as_deref().unwrap_or(&DEPTHS);
                    let sizes = fitting("depth", sizes, 0, most, self.depths.is_some(), &mut left_out)?;
                    // One behind the other, so that what is compared was measured at one time.
                    let all =
                        sizes.into_iter().flat_map(|depth| AHEAD.map(|tokens| Job::Ahead(tokens, depth)));
                    jobs.extend(all);
                }
                Subject::Together => {
                    let most = context.saturating_sub(self.steps.saturating_mul(2));
                    let sizes = self.depths.as_deref().unwrap_or(&DEPTHS);
                    let sizes = fitting("depth", sizes, 0, most, self.depths.is_some(), &mut left_out)?;
                    let all =
                        sizes.into_iter().flat_map(|depth| TOGETHER.map(|count| Job::Together(count, depth)));
                    jobs.extend(all);
                }
                Subject::FirstToken | Subject::SecondQuestion => {
                    // At least one token must differ between two questions.
                    let least = template + 1;
                    let most = context.saturating_sub(image + 1);
                    if self.text < least || self.text > most {
                        return refuse(format!(
                            "{} text tokens do not make a question: the template alone takes {template}, and {most} \
                             are left beside a picture in {context} positions; give --text {least} to {most}",
                            self.text
                        ));
                    }
                    let first = subject == Subject::FirstToken;
                    jobs.push(if first { Job::FirstToken } else { Job::SecondQuestion });
                }
                Subject::Context => match context.checked_sub(self.steps).filter(|left| *left > 0) {
                    Some(left) => jobs.push(Job::Context(left)),
                    None => {
                        return refuse(format!(
                            "{} decode steps leave no prompt in {context} positions; give --steps 1 to {}",
                            self.steps,
                            context.saturating_sub(1)
                        ));
                    }
                },
            }
        }
        Ok((jobs, left_out))
    }
}

/// Those of `sizes` that are `least` to `most`; another is an error when it was `asked` for, and told otherwise.
fn fitting(
    name: &str,
    sizes: &[usize],
    least: usize,
    most: usize,
    asked: bool,
    left_out: &mut Vec<String>,
) -> Result<Vec<usize>> {
    let mut fit = Vec::new();
    for size in sizes {
        if (least..=most).contains(size) {
            fit.push(*size);
        } else if asked {
            return Err(Error::Request(format!(
                "{name} {size} cannot be measured here; give {least} to {most}"
            )));
        } else {
            left_out.push(format!("{name} {size}: at most {most} fit into the context"));
        }
    }
    Ok(fit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(subjects: &[Subject]) -> Wishes {
        Wishes {
            subjects: subjects.to_vec(),
            lengths: None,
            depths: None,
            steps: 16,
            text: 64,
            repetitions: 5,
            warm_up: 1,
            budget: Duration::from_secs(1),
        }
    }

    #[test]
    fn what_is_usual_is_left_out_where_it_does_not_fit_and_told() {
        let (jobs, left_out) = wishes(&Subject::USUAL).jobs(512, 64, 40).unwrap();
        assert_eq!(
            jobs,
            [
                Job::Preprocess,
                Job::Encode,
                Job::FirstToken,
                Job::SecondQuestion,
                Job::Prefill(128),
                Job::Decode(0),
                Job::Context(496)
            ]
        );
        assert_eq!(
            left_out,
            ["length 640: at most 512 fit into the context", "depth 700: at most 496 fit into the context"]
        );
        let (jobs, left_out) = wishes(&[Subject::Decode, Subject::Prefill]).jobs(2048, 64, 40).unwrap();
        assert_eq!(jobs, [Job::Prefill(128), Job::Prefill(640), Job::Decode(0), Job::Decode(700)]);
        assert!(left_out.is_empty());
        let (jobs, left_out) = wishes(&[Subject::Ahead]).jobs(512, 64, 40).unwrap();
        assert_eq!(jobs, AHEAD.map(|tokens| Job::Ahead(tokens, 0)));
        assert_eq!(left_out, ["depth 700: at most 504 fit into the context"]);
        let together = wishes(&[Subject::Together]);
        let (jobs, left_out) = together.jobs(512, 64, 40).unwrap();
        assert_eq!(jobs, TOGETHER.map(|count| Job::Together(count, 0)));
        assert_eq!(left_out, ["depth 700: at most 480 fit into the context"]);
        assert_eq!((together.parallel(), wishes(&[Subject::Ahead]).parallel()), (9, 1));
    }

    #[test]
    fn what_was_asked_for_and_cannot_be_is_refused_with_what_can() {
        let check = |wishes: Wishes, wanted: &str| {
            let error = wishes.jobs(512, 64, 40).unwrap_err().to_string();
            assert!(error.ends_with(wanted), "{error}");
        };
        let lengths =
            |lengths: &[usize]| Wishes { lengths: Some(lengths.to_vec()), ..wishes(&[Subject::Prefill]) };
        check(lengths(&[8, 513]), "length 513 cannot be measured here; give 1 to 512");
        check(lengths(&[0]), "length 0 cannot be measured here; give 1 to 512");
        let depths = Wishes { depths: Some(vec![497]), ..wishes(&[Subject::Decode]) };
        check(depths, "depth 497 cannot be measured here; give 0 to 496");
        for text in [40, 448] {
            check(Wishes { text, ..wishes(&[Subject::FirstToken]) }, "give --text 41 to 447");
        }
        for steps in [512, usize::MAX] {
            check(Wishes { steps, ..wishes(&[Subject::Context]) }, "give --steps 1 to 511");
        }
        check(Wishes { steps: 513, ..wishes(&[Subject::Decode]) }, "give fewer --steps");
        check(Wishes { repetitions: 0, ..wishes(&[]) }, "at least 1 step and 1 repetition");
    }
}

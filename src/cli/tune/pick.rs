//! Which of the measured candidates are to serve.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::decision::Decided;
use crate::model::measure::{DecoderFigures, Figures, Outcome};
use crate::package::Component;
use crate::runtime::Target;

/// What takes up to this many times as long as the fastest counts as equal: runs differ by as much.
const NOISE: f64 = 1.05;

/// One candidate and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) component: Component,
    pub(super) variant: String,
    pub(super) provider: Target,
    /// Threads that the runtime was told to use; its own choice otherwise.
    pub(super) threads: Option<usize>,
    #[serde(flatten)]
    pub(super) outcome: Outcome,
}

impl Row {
    pub(super) fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            Outcome::Measured(figures) => Some(figures),
            Outcome::Refused { .. } => None,
        }
    }

    fn cost_ms(&self) -> f64 {
        self.figures().map_or(f64::INFINITY, Figures::cost_ms)
    }
}

/// The fastest row of each of `components`; where `fits` says why they do not fit into memory together, others for
/// which the least time is given up. Of those as good as equal the one that stands first is taken.
///
/// # Errors
/// [`Error::Provider`] when a component has nothing that passed, or nothing fits; what `fits` returns.
pub(super) fn pick<'a>(
    rows: &'a [Row],
    components: &[Component],
    mut fits: impl FnMut(&[&Row]) -> Result<Option<String>>,
) -> Result<Vec<&'a Row>> {
    let mut choices = Vec::new();
    for component in components {
        let mut passed: Vec<&Row> =
            rows.iter().filter(|row| row.component == *component && row.figures().is_some()).collect();
        prefer(&mut passed);
        if passed.is_empty() {
            return Err(nothing(*component, rows));
        }
        choices.push(passed);
    }
    let mut at = vec![0; choices.len()];
    loop {
        let picks: Vec<&Row> = choices.iter().zip(&at).map(|(list, at)| list[*at]).collect();
        let Some(shortfall) = fits(&picks)? else { return Ok(picks) };
        // What the next choice of each component costs more.
        let loss = |place: usize| {
            let next = choices[place].get(at[place] + 1)?;
            Some((place, next.cost_ms() - picks[place].cost_ms()))
        };
        let least = (0..choices.len()).filter_map(loss).min_by(|a, b| a.1.total_cmp(&b.1));
        let Some((place, _)) = least else {
            let name = picks.first().map_or_else(|| "none".to_owned(), |row| row.provider.to_string());
            let reason = format!("what passed does not fit into memory together: {shortfall}");
            return Err(Error::Provider { name, reason });
        };
        at[place] += 1;
    }
}

/// Puts the fastest first. Where it is not clearly faster, the package's own order decides: `passed` comes in that.
fn prefer(passed: &mut Vec<&Row>) {
    let least = passed.iter().map(|row| row.cost_ms()).fold(f64::INFINITY, f64::min);
    let near = |row: &&&Row| row.cost_ms() <= least * NOISE;
    let favourite = passed.iter().find(near).map(|row| (row.variant.clone(), row.provider));
    passed.sort_by(|a, b| a.cost_ms().total_cmp(&b.cost_ms()));
    // Of one candidate with several numbers of threads the fastest is taken.
    let place = favourite.and_then(|(variant, provider)| {
        passed.iter().position(|row| row.variant == variant && row.provider == provider)
    });
    if let Some(place) = place {
        let favourite = passed.remove(place);
        passed.insert(0, favourite);
    }
}

fn nothing(component: Component, rows: &[Row]) -> Error {
    let of_it = rows.iter().filter(|row| row.component == component);
    let count = of_it.clone().count();
    let name = of_it.map(|row| row.provider.to_string()).next().unwrap_or_else(|| "none".to_owned());
    let reason = match count {
        0 => format!("the package has nothing of the {} for what was asked for", component.name()),
        _ => format!("nothing that was measured serves the {}, so nothing is decided", component.name()),
    };
    Error::Provider { name, reason }
}

/// What is kept of the picks; the head is that of the decoder.
///
/// # Errors
/// [`Error::Request`] when a head's provider is not one, which no measurement tells.
pub(super) fn decided(picks: &[&Row]) -> Result<BTreeMap<String, Decided>> {
    let mut decided = BTreeMap::new();
    for row in picks {
        let Row { component, variant, provider, threads, .. } = row;
        let figures = row.figures().cloned();
        if let Some(Figures { decoder: Some(DecoderFigures { head: Some(head), .. }), .. }) = &figures {
            let head = Decided {
                variant: head.variant.clone(),
                provider: head.provider.parse()?,
                threads: *threads,
                figures: None,
            };
            decided.insert(Component::Head.name().to_owned(), head);
        }
        let one = Decided { variant: variant.clone(), provider: *provider, threads: *threads, figures };
        decided.insert(component.name().to_owned(), one);
    }
    Ok(decided)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::measure::HeadChoice;
    use crate::runtime::Provider;

    const BOTH: [Component; 2] = [Component::VisionEncoder, Component::Decoder];

    fn row(component: Component, variant: &str, cost_ms: f64) -> Row {
        let figures = Figures {
            load_ms: 1.0,
            run_ms: Some(cost_ms),
            decoder: None,
            memory: None,
            agreement: Vec::new(),
        };
        let outcome = Outcome::Measured(figures);
        Row {
            component,
            variant: variant.to_owned(),
            provider: Provider::Cpu.into(),
            threads: Some(2),
            outcome,
        }
    }

    fn refused(component: Component) -> Row {
        let outcome = Outcome::Refused { step: "build".to_owned(), reason: "not there".to_owned() };
        Row { outcome, ..row(component, "gone", 0.0) }
    }

    fn names(picks: &[&Row]) -> Vec<String> {
        picks.iter().map(|row| row.variant.clone()).collect()
    }

    fn rows() -> Vec<Row> {
        let [vision, decoder] = BOTH;
        vec![
            refused(vision),
            row(vision, "slow", 9.0),
            row(vision, "fast", 3.0),
            row(decoder, "big", 50.0),
            row(decoder, "small", 80.0),
            row(decoder, "equal", 49.0),
        ]
    }

    #[test]
    fn the_fastest_that_passed_is_taken_and_of_near_equals_the_first() {
        let rows = rows();
        assert_eq!(names(&pick(&rows, &BOTH, |_| Ok(None)).unwrap()), ["fast", "big"]);
    }

    #[test]
    fn what_does_not_fit_together_gives_up_the_least_time() {
        let rows = rows();
        let no_big = |picks: &[&Row]| Ok(picks.iter().any(|row| row.variant == "big").then(String::new));
        assert_eq!(names(&pick(&rows, &BOTH, no_big).unwrap()), ["fast", "equal"]);
        let slow = |picks: &[&Row]| Ok(picks.iter().any(|row| row.variant == "fast").then(String::new));
        assert_eq!(names(&pick(&rows, &BOTH, slow).unwrap()), ["slow", "equal"]);
        let error = pick(&rows, &BOTH, |_| Ok(Some("too much".to_owned()))).unwrap_err().to_string();
        assert!(error.ends_with("does not fit into memory together: too much"), "{error}");
    }

    #[test]
    fn nothing_is_decided_where_nothing_passed() {
        let rows = [refused(Component::VisionEncoder)];
        let error = pick(&rows, &BOTH, |_| Ok(None)).unwrap_err().to_string();
        assert!(error.contains("nothing that was measured serves the vision_encoder"), "{error}");
        let error = pick(&rows, &BOTH[1..], |_| Ok(None)).unwrap_err().to_string();
        assert!(error.contains("has nothing of the decoder for what was asked for"), "{error}");
    }

    #[test]
    fn the_head_is_decided_with_its_decoder() {
        let mut row = row(Component::Decoder, "delta", 1.0);
        let head = HeadChoice { variant: "head-f16".to_owned(), provider: "cpu".to_owned() };
        let Outcome::Measured(figures) = &mut row.outcome else { panic!() };
        figures.decoder = Some(DecoderFigures {
            positions: 1,
            prefill_ms: 1.0,
            steps: 1,
            decode_ms: 1.0,
            head: Some(head),
        });
        let decided = decided(&[&row]).unwrap();
        assert_eq!(decided["head"].variant, "head-f16");
        assert_eq!((decided["head"].threads, &decided["head"].figures), (Some(2), &None));
        assert_eq!(decided["decoder"].variant, "delta");
    }
}

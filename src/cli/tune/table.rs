//! What `tune` found, for a person.

use std::io::{self, Write};

use super::pick::Row;
use crate::error::size;
use crate::model::decision::Decision;
use crate::model::measure::{ANSWER_STEPS, Figures, Outcome};
use crate::package::Component;

fn header(out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "  {:<14} {:<20} {:<12} {:>7} {:>9} {:>9} {:>9} {:>9} {:>10} {:>10} {:>9}",
        "component",
        "variant",
        "provider",
        "threads",
        "load",
        "run",
        "token",
        "in all",
        "anonymous",
        "mapped",
        "distance"
    )
}

/// Writes every candidate that was measured, those of `picks` marked, then what was refused.
pub(super) fn measured(out: &mut impl Write, rows: &[Row], picks: &[&Row]) -> io::Result<()> {
    header(out)?;
    for row in rows {
        let Some(figures) = row.figures() else { continue };
        let mark = if picks.iter().any(|pick| std::ptr::eq(*pick, row)) { '*' } else { ' ' };
        write!(
            out,
            "{mark} {:<14} {:<20} {:<12}",
            row.component.name(),
            row.variant,
            row.provider.to_string()
        )?;
        writeln!(out, " {}", line(row.threads, figures))?;
    }
    let refused = rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Refused { step, reason } => Some((row, step, reason)),
        Outcome::Measured(_) => None,
    });
    for (place, (row, step, reason)) in refused.enumerate() {
        if place == 0 {
            writeln!(out, "\nrefused")?;
        }
        let Row { component, variant, provider, .. } = row;
        let on = if variant.is_empty() { provider.to_string() } else { format!("{variant} on {provider}") };
        writeln!(out, "  {} {on} at {step}: {reason}", component.name())?;
    }
    writeln!(
        out,
        "\ntimes in milliseconds: load makes the session; run is one image, or for a decoder {}; token is one decode \
         step behind it;\nin all is what candidates are compared by: a run, and for a decoder {ANSWER_STEPS} decode \
         steps more; * is what serves",
        prompt(rows.iter().filter_map(Row::figures))
    )
}

/// Writes a decision that was made before.
pub(super) fn decided(out: &mut impl Write, decision: &Decision) -> io::Result<()> {
    header(out)?;
    for (component, decided) in &decision.components {
        let provider = decided.provider.to_string();
        write!(out, "* {component:<14} {:<20} {provider:<12}", decided.variant)?;
        match &decided.figures {
            Some(figures) => writeln!(out, " {}", line(decided.threads, figures))?,
            None => writeln!(out, " {:>7}", threads(decided.threads))?,
        }
    }
    Ok(())
}

fn line(count: Option<usize>, figures: &Figures) -> String {
    let Figures { load_ms, run_ms, decoder, memory, agreement } = figures;
    let run = run_ms.or_else(|| decoder.as_ref().map(|decoder| decoder.prefill_ms)).unwrap_or_default();
    let token = decoder.as_ref().map_or_else(String::new, |decoder| format!("{:.2}", decoder.decode_ms));
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), size);
    let distance = agreement.iter().map(|one| one.distance).fold(0.0, f64::max);
    format!(
        "{:>7} {load_ms:>9.1} {run:>9.2} {token:>9} {:>9.1} {:>10} {:>10} {distance:>9.1e}",
        threads(count),
        figures.cost_ms(),
        bytes(memory.map(|memory| memory.anonymous)),
        bytes(memory.map(|memory| memory.file_backed)),
    )
}

fn threads(count: Option<usize>) -> String {
    count.map_or_else(|| "auto".to_owned(), |count| count.to_string())
}

fn prompt<'a>(mut figures: impl Iterator<Item = &'a Figures>) -> String {
    match figures.find_map(|figures| figures.decoder.as_ref()) {
        Some(decoder) => format!("a prompt of {} positions", decoder.positions),
        None => "a prompt".to_owned(),
    }
}

/// The components that are measured, in the order of the table; a head is measured with its decoder.
pub(super) const COMPONENTS: [Component; 3] =
    [Component::VisionEncoder, Component::Projector, Component::Decoder];

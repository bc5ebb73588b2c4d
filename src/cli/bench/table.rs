//! What `bench` measured, for a person.

use std::io::{self, Write};

use super::Report;
use crate::engine::bench::{Measurement, MemoryMark, What};
use crate::error::size;

/// Writes what was measured, the memory behind it, and what it was measured with.
pub(super) fn write(out: &mut impl Write, report: &Report<'_>) -> io::Result<()> {
    writeln!(
        out,
        "{:<18} {:>9} {:>7} {:>11} {:>11} {:>11} {:>9} {:>8} {:>10}",
        "what", "positions", "depth", "median ms", "min", "max", "MAD", "samples", "tokens/s"
    )?;
    for measured in &report.figures.measurements {
        writeln!(out, "{}", line(measured))?;
    }
    if !report.figures.memory.is_empty() {
        let titles = ["memory behind", "anonymous", "mapped", "peak", "anonymous", "mapped"];
        writeln!(out)?;
        write!(out, "{:<18}", titles[0])?;
        titles[1..].iter().try_for_each(|title| write!(out, " {title:>10}"))?;
        writeln!(out)?;
    }
    for MemoryMark { after, anonymous, file_backed, peak, peak_anonymous, peak_file_backed } in
        &report.figures.memory
    {
        write!(out, "{after:<18}")?;
        let all = [anonymous, file_backed, peak, peak_anonymous, peak_file_backed];
        all.iter().try_for_each(|bytes| write!(out, " {:>10}", size(**bytes)))?;
        writeln!(out)?;
    }
    writeln!(out)?;
    for (component, served) in &report.providers {
        writeln!(out, "{component}: {}", served.line())?;
    }
    for reason in &report.figures.left_out {
        writeln!(out, "left out: {reason}")?;
    }
    let super::Versions { llava_phi, onnx_runtime, library } = &report.versions;
    writeln!(out, "llava-phi {llava_phi}, ONNX Runtime {onnx_runtime} ({library})")?;
    let processor = &report.machine.processor;
    write!(out, "{}, {} of {} processors", processor.name, processor.usable, processor.logical_cores)?;
    match &report.figures.busy {
        Some(busy) => writeln!(
            out,
            "; of all their time this took {:.0} %, others {:.0} %, the host {:.0} %",
            busy.own * 100.0,
            busy.others * 100.0,
            busy.stolen * 100.0
        ),
        None => writeln!(out, "; how busy others kept them is not known"),
    }
}

fn line(measured: &Measurement) -> String {
    let Measurement { what, positions, depth, samples_ms, summary, per_second, .. } = measured;
    let number = |number: Option<usize>| number.map_or_else(String::new, |number| number.to_string());
    let speed = per_second.map_or_else(String::new, |speed| format!("{speed:.1}"));
    let text = format!(
        "{:<18} {:>9} {:>7} {:>11.2} {:>11.2} {:>11.2} {:>9.2} {:>8} {speed:>10}",
        name(*what),
        number(*positions),
        number(*depth),
        summary.median,
        summary.min,
        summary.max,
        summary.mad,
        samples_ms.len(),
    );
    text.trim_end().to_owned()
}

fn name(what: What) -> &'static str {
    match what {
        What::Runtime => "ONNX Runtime",
        What::Load => "load",
        What::Preprocess => "preprocess",
        What::Encode => "encode",
        What::Project => "project",
        What::Prefill => "prefill",
        What::Decode => "decode",
        What::Ahead => "ahead",
        What::Together => "together",
        What::FirstToken => "first token",
        What::SecondQuestion => "second question",
        What::ContextPrefill => "context, prefill",
        What::ContextDecode => "context, decode",
    }
}

//! `llava-phi compile`: what providers compile, ahead of its first use.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::context::Context;
use super::model::open_package;
use super::session::{SessionArguments, parse_size};
use crate::compiled::{CompiledCache, Listed, Pruned, State};
use crate::error::{Error, Result, size};
use crate::model::ModelOptions;
use crate::model::compile::{CompileReport, compile};
use crate::model::compiled::{CompiledState, PackedWeights};
use crate::model::selection::{ProviderSelection, VariantSelection};

/// What `compile` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The package's directory; the miniature model inside this program otherwise
    #[arg(long, value_name = "DIR", env = "LLAVA_PHI_MODEL")]
    model: Option<PathBuf>,

    /// The providers to compile for, for all components or for each; all that are here and compile otherwise
    #[arg(long, value_name = "LIST", env = "LLAVA_PHI_PROVIDER")]
    provider: Option<ProviderSelection>,

    /// The variants to compile; all that the package has for the providers otherwise
    #[arg(long, value_name = "LIST")]
    variant: Option<VariantSelection>,

    #[command(flatten)]
    session: SessionArguments,

    /// Show what is kept, and compile nothing
    #[arg(long, conflicts_with_all = ["prune", "provider_library", "provider_option", "variant"])]
    list: bool,

    /// Remove what is damaged or was left half built, then what was used longest ago, until it takes no more than SIZE,
    /// or than --limit; compile nothing
    #[arg(long, value_name = "SIZE", value_parser = parse_size, num_args = 0..=1)]
    #[arg(conflicts_with_all = ["provider_library", "provider_option", "variant"])]
    #[expect(clippy::option_option, reason = "not asked for, to the limit, and to a size are three things")]
    prune: Option<Option<u64>>,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was compiled, and where it lies.
#[derive(Debug, Serialize)]
struct Report {
    cache: PathBuf,
    components: Vec<CompileReport>,
}

/// What is kept, and where.
#[derive(Debug, Serialize)]
struct Contents {
    cache: PathBuf,
    bytes: u64,
    limit: u64,
    entries: Vec<Listed>,
}

pub(super) fn run(arguments: &Arguments, given: &Context) -> anyhow::Result<ExitCode> {
    let dir = given.compiled_dir().ok_or_else(|| {
        Error::cache("", "the system names no directory for caches; give one with --cache-dir")
    })?;
    let limit = given.cache_limit();
    let mut out = io::stdout().lock();
    if arguments.list {
        return list(&mut out, &dir, limit, arguments.json);
    }
    if let Some(size) = arguments.prune {
        let pruned = if dir.exists() {
            CompiledCache::open(&dir, limit)?.prune(size.unwrap_or(limit))?
        } else {
            Pruned::default()
        };
        return prune(&mut out, &pruned, arguments.json);
    }
    let package = open_package(arguments.model.as_deref())?;
    let cache = CompiledCache::at(&dir, limit);
    given.start_runtime()?;
    let options = arguments.options(given, cache)?;
    let mut written = Ok(());
    let components = compile(&package, &options, &mut |report| {
        if !arguments.json && written.is_ok() {
            written = person(&mut out, report);
        }
    })?;
    written?;
    let verdict = verdict(&components);
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&Report { cache: dir, components })?)?;
    }
    verdict?;
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    fn options(&self, context: &Context, cache: CompiledCache) -> Result<ModelOptions> {
        let session = self.session.options(context)?;
        let packed_weights = match session.packed_weights {
            PackedWeights::Found => PackedWeights::WORTH_KEEPING,
            asked => asked,
        };
        Ok(ModelOptions {
            variants: self.variant.clone().unwrap_or_default(),
            providers: self.provider.clone().unwrap_or_default(),
            compiled: Some(Arc::new(cache)),
            notices: Some(context.notices()),
            packed_weights,
            ..session
        })
    }
}

/// Fails when something could have been kept and is not, or when nothing serves.
fn verdict(reports: &[CompileReport]) -> Result<()> {
    let compiled = || reports.iter().filter_map(|report| Some((report, report.compiled.as_ref()?)));
    for (report, compiled) in compiled() {
        if let CompiledState::NotCached(reason) = &compiled.state {
            let reason = format!("the {} is not kept: {reason}", report.component.name());
            return Err(Error::Provider { name: report.provider.to_string(), reason });
        }
    }
    match reports.iter().find_map(|report| report.refused.as_ref()) {
        Some(refusal) if compiled().next().is_none() => Err(Error::Provider {
            name: refusal.provider.to_string(),
            reason: format!("nothing was compiled ({refusal})"),
        }),
        _ => Ok(()),
    }
}

fn person(out: &mut impl Write, report: &CompileReport) -> io::Result<()> {
    let CompileReport { component, variant, provider, compiled, refused } = report;
    write!(out, "{:<14} {:<14} {variant:<20} ", component.name(), provider.to_string())?;
    match (compiled, refused) {
        (_, Some(refusal)) => writeln!(out, "refused at {}: {}", refusal.step, refusal.reason),
        (None, None) => writeln!(out, "makes nothing that is worth keeping"),
        (Some(compiled), None) => {
            write!(out, "{}", compiled.state)?;
            if compiled.entry.is_some() {
                write!(out, "  {}", size(compiled.bytes))?;
            }
            if compiled.state != CompiledState::Reused {
                write!(out, "  {:.1} s", compiled.seconds)?;
            }
            match &compiled.replaced {
                Some(why) => writeln!(out, "  (since {why})"),
                None => writeln!(out),
            }
        }
    }
}

fn list(out: &mut impl Write, dir: &Path, limit: u64, json: bool) -> anyhow::Result<ExitCode> {
    let writable = dir.exists().then(|| CompiledCache::open(dir, limit).ok()).flatten();
    let entries = writable.unwrap_or_else(|| CompiledCache::read_only(dir)).list()?;
    let bytes = entries.iter().map(|one| one.bytes).sum();
    if json {
        let contents = Contents { cache: dir.to_owned(), bytes, limit, entries };
        writeln!(out, "{}", serde_json::to_string_pretty(&contents)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for one in &entries {
        line(out, one)?;
    }
    let count = entries.len();
    writeln!(
        out,
        "{count} compiled graphs, {} of at most {}, in {}",
        size(bytes),
        size(limit),
        dir.display()
    )?;
    Ok(ExitCode::SUCCESS)
}

fn prune(out: &mut impl Write, pruned: &Pruned, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(pruned)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for one in &pruned.removed {
        line(out, one)?;
    }
    let count = pruned.removed.len();
    writeln!(out, "{count} removed, {} freed, {} kept", size(pruned.freed), size(pruned.kept))?;
    Ok(ExitCode::SUCCESS)
}

/// One entry: digest, state, size, last use, and what it was compiled from.
fn line(out: &mut impl Write, one: &Listed) -> io::Result<()> {
    let state = match &one.state {
        State::Whole => "whole".to_owned(),
        State::InUse => "in use".to_owned(),
        State::Building => "being built".to_owned(),
        State::Abandoned => "abandoned".to_owned(),
        State::Damaged(why) => format!("damaged: {why}"),
    };
    write!(out, "{}  {state}  {}  used {}", one.digest, size(one.bytes), ago(one.last_used))?;
    if let Some(key) = &one.key {
        let is_graph = |name: &&String| Path::new(name).extension().is_some_and(|kind| kind == "onnx");
        let graph = key.files.keys().find(is_graph).map_or("", String::as_str);
        let device = if key.device.is_empty() { String::new() } else { format!(":{}", key.device) };
        write!(
            out,
            "  {} {graph} for {}{device} by ONNX Runtime {} on machine {}",
            key.component, key.provider, key.runtime, key.machine
        )?;
    }
    writeln!(out)
}

/// How long ago a second since 1970 was, for a person.
pub(super) fn ago(then: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let units = [("day", 86_400), ("hour", 3600), ("minute", 60)];
    let past = now.saturating_sub(then);
    let Some((unit, seconds)) = units.into_iter().find(|(_, seconds)| past >= *seconds) else {
        return "just now".to_owned();
    };
    let count = past / seconds;
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

//! `llava-phi cache`: snapshots of prompts that were read.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;

use super::compile::ago;
use super::context::Context;
use super::model::ModelArguments;
use super::session::parse_size;
use crate::chat::conversation::{Message, Part};
use crate::chat::template;
use crate::engine::ModelFacts;
use crate::error::{Error, Result, size};
use crate::model::LlavaPhi;
use crate::model::prefix::{Content, Listed, Pruned, State};
use crate::package::manifest::SnapshotSpec;
use crate::text::{Span, TokenId};

/// What `cache` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the snapshots, what was used last first
    List {
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Remove what is damaged or was left half written, then what was used longest ago
    Prune {
        /// Until it takes no more than this, such as 500MB; than --snapshot-limit otherwise
        #[arg(value_parser = parse_size)]
        size: Option<u64>,

        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Add to the package at --model what its decoder holds after the head of every prompt, as it is served here
    Ship {
        #[command(flatten)]
        model: Box<ModelArguments>,

        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Remove every snapshot
    Clear {
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
}

/// What is kept, and where.
#[derive(Debug, Serialize)]
struct Contents {
    directory: PathBuf,
    bytes: u64,
    limit: u64,
    snapshots: Vec<Listed>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    if let Command::Ship { model, json } = &arguments.command {
        return ship(model, context, *json);
    }
    let snapshots = context.snapshots().ok_or_else(|| {
        let text =
            "snapshots of prompts are kept only in a directory that was given; name it with --cache-dir";
        Error::Request(text.to_owned())
    })?;
    let mut out = io::stdout().lock();
    match &arguments.command {
        Command::List { json } => {
            let listed = snapshots.list()?;
            let bytes = listed.iter().map(|one| one.bytes).sum();
            let directory = snapshots.dir().to_owned();
            let contents = Contents { directory, bytes, limit: snapshots.limit(), snapshots: listed };
            list(&mut out, &contents, *json)?;
        }
        Command::Prune { size, json } => {
            removed(&mut out, &snapshots.prune(size.unwrap_or(snapshots.limit()))?, *json)?;
        }
        Command::Ship { .. } => {}
        Command::Clear { json } => removed(&mut out, &snapshots.prune(0)?, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn ship(arguments: &ModelArguments, context: &Context, json: bool) -> anyhow::Result<ExitCode> {
    let package = arguments.package()?;
    let facts = ModelFacts::new(&package)?;
    let head = head(&facts)?;
    let runtime = context.start_runtime()?;
    let mut model = LlavaPhi::open(&package, &arguments.model_options(context, runtime, &package)?)?;
    let shipped = model.ship(&head)?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&shipped)?)?;
    } else {
        let bytes = package.directory().and_then(|dir| dir.join(&shipped.file).metadata().ok());
        let bytes = bytes.map_or(0, |meta| meta.len());
        let SnapshotSpec { file, variant, positions } = &shipped;
        writeln!(out, "{file}: {positions} positions, {}, for decoder {variant}", size(bytes))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The tokens with which every prompt begins, whatever is asked about whichever images.
fn head(facts: &ModelFacts) -> Result<Vec<TokenId>> {
    let texts = ["a", "What is it?", "\n1. \u{4e2d}"].map(|text| Part::Text(text.to_owned()));
    let image = [Part::Image(0), Part::Text("a".to_owned())];
    let prompts = texts.into_iter().map(|text| vec![text]).chain([image.into()]).map(|parts| {
        let pieces = template::render(&facts.template, None, &[Message::user(parts)])?;
        let prompt = facts.tokenizer.prompt(&pieces)?;
        Ok(match prompt.spans().first() {
            Some(Span::Text(ids)) => ids.clone(),
            _ => Vec::new(),
        })
    });
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let (first, others) = prompts.split_first().map_or((&[][..], &[][..]), |(a, b)| (&a[..], b));
    let common = |other: &Vec<TokenId>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    Ok(first[..others.iter().map(common).min().unwrap_or(0)].to_vec())
}

fn list(out: &mut impl Write, contents: &Contents, json: bool) -> anyhow::Result<()> {
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(contents)?)?;
        return Ok(());
    }
    for one in &contents.snapshots {
        line(out, one)?;
    }
    let count = contents.snapshots.len();
    let plural = if count == 1 { "" } else { "s" };
    writeln!(
        out,
        "{count} snapshot{plural} of prompts, {} of at most {}, in {}; llava-phi compile --list shows compiled graphs",
        size(contents.bytes),
        size(contents.limit),
        contents.directory.display()
    )?;
    Ok(())
}

fn removed(out: &mut impl Write, pruned: &Pruned, json: bool) -> anyhow::Result<()> {
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(pruned)?)?;
        return Ok(());
    }
    for one in &pruned.removed {
        line(out, one)?;
    }
    let count = pruned.removed.len();
    writeln!(out, "{count} removed, {} freed, {} kept", size(pruned.freed), size(pruned.kept))?;
    Ok(())
}

/// One snapshot: its name, state, size, last use, and what it holds.
fn line(out: &mut impl Write, one: &Listed) -> io::Result<()> {
    let state = match &one.state {
        State::Whole => "whole".to_owned(),
        State::Writing => "being written".to_owned(),
        State::Abandoned => "abandoned".to_owned(),
        State::Damaged(why) => format!("damaged: {why}"),
        State::Unreadable(why) => format!("unreadable: {why}"),
    };
    write!(out, "{}  {state}  {}  used {}", one.file, size(one.bytes), ago(one.last_used))?;
    if let Some(Content { package, variant, provider, positions, images, created }) = &one.content {
        let plural = if *images == 1 { "" } else { "s" };
        write!(out, "  {package}, {positions} positions, {images} image{plural}")?;
        write!(out, ", decoder {variant} on {provider}, written {}", ago(*created))?;
    }
    writeln!(out)
}

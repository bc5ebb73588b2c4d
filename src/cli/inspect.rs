//! `llava-phi inspect`: what a package holds and what it will take.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde::Serialize;

use super::context::Context;
use super::doctor;
use super::model::open_package;
use crate::error::size;
use crate::model::selection::VariantSelection;
use crate::model::{CausalModel as _, ComponentReport, LlavaPhi, ModelOptions};
use crate::package::manifest::{FileInfo, Manifest};
use crate::package::plan::MemoryPlan;
use crate::package::{Component, ModelPackage};

/// What `inspect` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The package's directory; the miniature model inside this program otherwise
    #[arg(env = "LLAVA_PHI_MODEL")]
    model: Option<PathBuf>,

    /// Hash every file, whatever its size
    #[arg(long)]
    verify: bool,

    /// Plan the memory of this variant instead of the best one
    #[arg(long)]
    variant: Option<String>,

    /// Load it too, and show what serves each component and where the nodes of its graph run
    #[arg(long)]
    placement: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What is known of a package.
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    location: String,
    bytes: u64,
    verified: bool,
    manifest: &'a Manifest,
    memory: MemoryPlan,
    #[serde(skip_serializing_if = "Option::is_none")]
    components: Option<Vec<ComponentReport>>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let package = open_package(arguments.model.as_deref())?;
    if arguments.verify {
        package.verify()?;
    }
    let manifest = package.manifest();
    let variants = arguments.variant.as_deref().map_or_else(VariantSelection::default, VariantSelection::of);
    variants.wanted(Component::Decoder, &package)?;
    let components = if arguments.placement {
        context.start_runtime()?;
        let options = ModelOptions { variants, ..ModelOptions::default() };
        Some(LlavaPhi::open(&package, &options)?.reports())
    } else {
        None
    };
    let report = Report {
        name: &manifest.name,
        location: package
            .directory()
            .map_or_else(|| "inside this program".to_owned(), |d| d.display().to_string()),
        bytes: manifest.files.values().map(|file| file.bytes).sum(),
        verified: arguments.verify,
        manifest,
        memory: MemoryPlan::new(&package, arguments.variant.as_deref())?,
        components,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        person(&mut out, &package, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn person(out: &mut impl Write, package: &ModelPackage, report: &Report<'_>) -> io::Result<()> {
    let Manifest { source, image, text, vision, decoder, variants, files, .. } = report.manifest;
    writeln!(out, "{}  {}  {}", report.name, size(report.bytes), report.location)?;
    writeln!(
        out,
        "exported by {} from a {} checkpoint {}",
        source.exporter, source.checkpoint, source.sha256
    )?;
    writeln!(out, "\nsizes")?;
    writeln!(out, "  image       {0} x {0}, {1} positions", image.size, vision.tokens_per_image)?;
    writeln!(
        out,
        "  decoder     {} layers, hidden {}, {} heads of {}",
        decoder.layers, decoder.hidden, decoder.kv_heads, decoder.head_dim
    )?;
    writeln!(out, "  images      {}", report.manifest.image_positions())?;
    for one in &vision.measured {
        writeln!(out, "    {} positions: {one}", one.tokens)?;
    }
    writeln!(out, "  context     {} positions", decoder.context)?;
    writeln!(out, "  vocabulary  {} tokens, {} logits", text.vocabulary, decoder.logits_width)?;
    writeln!(out, "\nvariants")?;
    for name in variants.keys() {
        let serves = Component::ALL.into_iter().filter(|component| {
            component.choices(&report.manifest.serve).iter().any(|choice| &choice.variant == name)
        });
        let has: Vec<String> = serves
            .filter_map(|component| package.graph(component, name).map(|graph| (component, graph)))
            .map(|(component, (_, kv))| match kv {
                Some(kv) => format!("{} (cache {:?} {})", component.name(), kv.form, kv.dtype).to_lowercase(),
                None => component.name().to_owned(),
            })
            .collect();
        writeln!(out, "  {name}: {}", has.join(", "))?;
    }
    writeln!(out, "\nmemory")?;
    let memory = &report.memory;
    for part in &memory.parts {
        let what = [
            (part.component, part.weights, part.variant.as_str()),
            ("  intermediate results", part.activations, ""),
        ];
        for (what, bytes, variant) in what {
            writeln!(out, "  {what:<24} {:>12}  {variant}", size(bytes))?;
        }
    }
    let lines = [
        ("cache of one position", memory.kv_per_position),
        ("cache of a full context", memory.kv_peak),
        ("engine's own buffers", memory.buffers),
        ("mapped files", memory.file_backed),
        ("held against the limit", memory.held()),
    ];
    for (what, bytes) in lines {
        writeln!(out, "  {what:<24} {:>12}", size(bytes))?;
    }
    if let Some(reports) = &report.components {
        writeln!(out, "\nserves")?;
        for report in reports {
            doctor::component(out, report)?;
        }
    }
    writeln!(out, "\nfiles{}", if report.verified { ", every hash checked" } else { "" })?;
    for (name, FileInfo { bytes, sha256 }) in files {
        writeln!(out, "  {name:<36} {:>12}  {}", size(*bytes), &sha256[..sha256.len().min(16)])?;
    }
    Ok(())
}

//! `llava-phi doctor`: what this machine has, what every provider says, and what would serve a package.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use serde::Serialize;

use super::context::Context;
use super::model::ModelArguments;
use crate::error::{ErrorKind, Result, size};
use crate::machine::{Machine, Roots};
use crate::model::stamp::SelfCheck;
use crate::model::visual_tokens::VisualTokensReport;
use crate::model::{CausalModel as _, ComponentReport, LlavaPhi, ModelOptions, memory_host_of};
use crate::package::ModelPackage;
use crate::package::plan::{MemoryPlan, Part};
use crate::runtime::{DeviceInfo, Origin, Provider, ProviderStatus, Runtime};

/// What `doctor` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArguments,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    llava_phi: &'static str,
    machine: Machine,
    /// What of this machine decides speed and results, in short.
    fingerprint: String,
    memory_to_be_had: u64,
    memory_because: String,
    runtime: Answer<RuntimeReport>,
    package: Answer<PackageReport>,
    /// What to install, for a provider that the package prefers to what serves now.
    advice: Vec<String>,
}

/// What there is, or why there is none.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer<T> {
    Found(T),
    Failed { error: String },
}

#[derive(Debug, Serialize)]
struct RuntimeReport {
    version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    origin: Origin,
    providers: Vec<ProviderStatus>,
    devices: Vec<DeviceInfo>,
}

#[derive(Debug, Serialize)]
struct PackageReport {
    name: String,
    sha256: String,
    location: String,
    memory: MemoryPlan,
    /// How few positions an image may take.
    images: String,
    /// What is read of each, when fewer were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    visual_tokens: Option<VisualTokensReport>,
    components: Answer<Vec<ComponentReport>>,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let machine = Machine::probe(&Roots::default());
    let started = context.start_runtime();
    // Opened before the providers are asked: it brings the plugins that were named.
    let package = match &started {
        Ok(runtime) => package(arguments, context, runtime),
        Err(_) => arguments.model.package().and_then(|package| {
            let components = Answer::Failed { error: "ONNX Runtime is missing".to_owned() };
            describe(arguments, &package, components)
        }),
    };
    let package = answer(package)?;
    let report = Report {
        llava_phi: env!("CARGO_PKG_VERSION"),
        fingerprint: machine.fingerprint(),
        memory_to_be_had: machine.memory.budget(),
        memory_because: machine.memory.explain(),
        machine,
        runtime: answer(started.map(runtime))?,
        advice: advice(&package),
        package,
    };
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        person(&mut out, &report)?;
    }
    let serves = matches!(&report.package, Answer::Found(PackageReport { components: Answer::Found(_), .. }));
    Ok(if serves { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// What there is, or why there is none; but a wrong argument is no state of the machine.
fn answer<T>(result: Result<T>) -> Result<Answer<T>> {
    match result {
        Ok(found) => Ok(Answer::Found(found)),
        Err(error) if error.kind() == ErrorKind::Request => Err(error),
        Err(error) => Ok(Answer::Failed { error: super::sentence(&error.into()) }),
    }
}

fn runtime(runtime: &Runtime) -> RuntimeReport {
    RuntimeReport {
        version: runtime.version().to_owned(),
        path: runtime.library().path.clone(),
        origin: runtime.library().origin,
        providers: runtime.providers(),
        devices: runtime.devices(),
    }
}

fn package(arguments: &Arguments, context: &Context, runtime: &Runtime) -> Result<PackageReport> {
    let package = arguments.model.package()?;
    let options = ModelOptions {
        self_check: SelfCheck::Always,
        ..arguments.model.model_options(context, runtime, &package)?
    };
    let opened = LlavaPhi::open(&package, &options);
    describe(arguments, &package, answer(opened.map(|model| model.reports()))?)
}

fn describe(
    arguments: &Arguments,
    package: &ModelPackage,
    components: Answer<Vec<ComponentReport>>,
) -> Result<PackageReport> {
    let memory = match &components {
        Answer::Found(reports) => {
            let parts: Vec<Part<'_>> = reports
                .iter()
                .map(|report| Part {
                    component: report.component,
                    variant: &report.variant,
                    host: memory_host_of(report),
                })
                .collect();
            MemoryPlan::of(package, &parts)?
        }
        Answer::Failed { .. } => MemoryPlan::new(package, None)?,
    };
    Ok(PackageReport {
        name: package.manifest().name.clone(),
        sha256: package.digest().to_owned(),
        location: package
            .directory()
            .map_or_else(|| "inside this program".to_owned(), |d| d.display().to_string()),
        memory,
        images: package.manifest().image_positions(),
        visual_tokens: arguments.model.visual_tokens(package)?,
        components,
    })
}

/// What the providers need that the package prefers to those that serve.
fn advice(package: &Answer<PackageReport>) -> Vec<String> {
    let Answer::Found(PackageReport { components: Answer::Found(reports), .. }) = package else {
        return Vec::new();
    };
    let providers = Runtime::started().map(Runtime::providers).unwrap_or_default();
    let refused: BTreeSet<Provider> =
        reports.iter().flat_map(|report| &report.refused).map(|refusal| refusal.provider.provider).collect();
    let wanted = providers.into_iter().filter(|status| refused.contains(&status.provider));
    wanted.map(|status| format!("{} needs {}", status.provider, status.needs)).collect()
}

fn person(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let Machine { os, os_version, arch, processor, memory, accelerators } = &report.machine;
    writeln!(out, "llava-phi {}", report.llava_phi)?;
    writeln!(out, "\nmachine {}", report.fingerprint)?;
    writeln!(out, "  system      {os} {os_version}, {arch}")?;
    writeln!(
        out,
        "  processor   {}, {} usable of {}; {}",
        processor.name,
        processor.usable,
        processor.logical_cores,
        if processor.instructions.is_empty() { "-".to_owned() } else { processor.instructions.join(" ") }
    )?;
    writeln!(
        out,
        "  memory      {} in all, {} to be had ({})",
        size(memory.total),
        size(report.memory_to_be_had),
        report.memory_because
    )?;
    if let Some(driver) = &accelerators.nvidia_driver {
        writeln!(out, "  NVIDIA      driver {driver}")?;
    }
    for gpu in &accelerators.nvidia_gpus {
        writeln!(out, "  GPU         {} at {}", gpu.name, gpu.bus)?;
    }
    for device in &accelerators.devices {
        let vendor = device.vendor.unwrap_or(&device.vendor_id);
        writeln!(out, "  device      {} {vendor} {}", device.name, device.device_id)?;
    }
    if accelerators.nvidia_gpus.is_empty() && accelerators.devices.is_empty() {
        writeln!(out, "  accelerator none was found")?;
    }
    for library in &accelerators.libraries {
        let path =
            library.path.as_ref().map_or_else(|| "not found".to_owned(), |path| path.display().to_string());
        writeln!(out, "  library     {:<18} {path}", library.name)?;
    }
    match &report.runtime {
        Answer::Failed { error } => writeln!(out, "\nONNX Runtime: {error}")?,
        Answer::Found(runtime) => {
            let path = runtime
                .path
                .as_ref()
                .map_or_else(|| "linked in".to_owned(), |path| path.display().to_string());
            writeln!(out, "\nONNX Runtime {}  {path}", runtime.version)?;
            for status in &runtime.providers {
                let state = match &status.note {
                    None if status.plugin.is_some() => format!("plugin, {} devices", status.devices),
                    None => "ready to be tried".to_owned(),
                    Some(note) => note.clone(),
                };
                writeln!(out, "  {:<13} {state}", status.provider.name())?;
            }
        }
    }
    match &report.package {
        Answer::Failed { error } => writeln!(out, "\npackage: {error}")?,
        Answer::Found(package) => {
            writeln!(out, "\npackage {}  {}  {}", package.name, &package.sha256[..16], package.location)?;
            writeln!(out, "  memory plan  {} held", size(package.memory.held()))?;
            writeln!(out, "  images       {}", package.images)?;
            if let Some(report) = &package.visual_tokens {
                writeln!(out, "               {report}")?;
            }
            match &package.components {
                Answer::Failed { error } => writeln!(out, "  nothing serves: {error}")?,
                Answer::Found(reports) => {
                    for report in reports {
                        component(out, report)?;
                    }
                }
            }
        }
    }
    if !report.advice.is_empty() {
        writeln!(out, "\nthe package prefers providers that are missing here")?;
    }
    for line in &report.advice {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

/// Writes what serves a component, what proves it, and what was refused before.
pub(super) fn component(out: &mut impl Write, report: &ComponentReport) -> io::Result<()> {
    let tuned = report.tuned.as_ref().map_or_else(String::new, |date| format!(", tuned on {date}"));
    writeln!(out, "  {:<15} {} on {}{tuned}", report.component.name(), report.variant, report.provider)?;
    let earlier = report.stamp.as_ref().filter(|stamp| stamp.used);
    let earlier = earlier.map_or_else(String::new, |stamp| format!(" (on {}, not repeated)", stamp.date));
    for agreement in &report.self_check {
        writeln!(out, "    self-check: {agreement}{earlier}")?;
    }
    if let Some(kernels) = &report.kernels {
        writeln!(out, "    kernels: {kernels}")?;
    }
    if let Some(compiled) = &report.compiled {
        writeln!(out, "    {compiled}, {}", size(compiled.bytes))?;
    }
    if let Some(placement) = &report.placement {
        let nodes: Vec<String> =
            placement.nodes.iter().map(|(provider, count)| format!("{count} nodes on {provider}")).collect();
        let pieces = match placement.partitions {
            0 => String::new(),
            pieces => format!(", {pieces} compiled"),
        };
        writeln!(out, "    placement: {}{pieces}", nodes.join(", "))?;
    }
    for refusal in &report.refused {
        writeln!(out, "    not {refusal}")?;
    }
    Ok(())
}

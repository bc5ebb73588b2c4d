//! Sets a session up for the provider that is to serve it, or says at which step the provider refused.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ort::device::Device;
use ort::session::Session;
use ort::session::builder::{AutoDevicePolicy, GraphOptimizationLevel, SessionBuilder};

use crate::error::Error;
use crate::package::manifest::GraphSpec;

use super::built_in::{self, BuiltIn, DEVICE_ID};
use super::compiled::Place;
use super::graph::{GraphSource, OpenError, SessionOptions};
use super::provider::{Provider, Step, Target};
use super::settings::{cuda_behind_tensorrt, settings};
use super::{Runtime, keys, options};

type Settings = BTreeMap<String, String>;

/// What a session is made of before its graph is read, with the provider appended. `place` says where it keeps what
/// the provider compiles, and a `profile` where it is to write one.
///
/// # Errors
/// [`OpenError::Refused`] at [`Step::Build`] or [`Step::Append`] when the provider cannot be had;
/// [`Error::Request`] when it does not take an option; [`Error::Graph`] when ONNX Runtime refuses the rest.
pub(super) fn builder(
    runtime: &Runtime,
    name: &str,
    source: &GraphSource,
    spec: &GraphSpec,
    options: &SessionOptions,
    place: &Place,
    profile: Option<&Path>,
) -> Result<SessionBuilder, OpenError> {
    let target = options.target;
    options::check_all(target.provider, &options.provider_options)?;
    let plugin = runtime.plugin(target.provider);
    let mut told = settings(spec, options, plugin.as_deref(), place.files.as_deref());
    let mut set_up = || -> ort::Result<SessionBuilder> {
        let mut builder = plain(runtime, target.provider, options.threads)?;
        if told.remove(keys::DISABLE_CPU_FALLBACK).is_some_and(|value| value == "1") {
            builder = builder.with_disable_cpu_fallback()?;
        }
        if target.provider == Provider::Cpu && options.parallel_packing {
            builder = builder.with_config_entry("session.prepack.enable_parallel", "1")?;
        }
        // It decides where tensors are made, not what the session is.
        told.remove(keys::CACHE_ON_HOST);
        if let Some(optimizers) = told.remove(keys::DISABLED_OPTIMIZERS) {
            builder = builder.with_disabled_optimizers(optimizers)?;
        }
        if let GraphSource::Memory { data, .. } = source {
            for (name, bytes) in data {
                builder = builder.with_external_initializer_file_in_memory(name, Arc::from(*bytes))?;
            }
        }
        if let Some(prefix) = profile {
            builder = builder.with_profiling(prefix)?;
        }
        place.apply(builder)
    };
    let builder = set_up()
        .map_err(|e| Error::graph(name, "its session could not be set up; report this").because(e))?;
    append(runtime, builder, target, plugin.as_deref(), &told)
}

/// What ONNX Runtime says when the provider is appended to a session that no graph is loaded into.
///
/// # Errors
/// As [`builder`].
pub(super) fn probe(runtime: &Runtime, provider: Provider) -> Result<(), OpenError> {
    let builder = plain(runtime, provider, None)
        .map_err(|e| Error::library("a session could not be set up; report this").because(e))?;
    let plugin = runtime.plugin(provider);
    append(runtime, builder, provider.into(), plugin.as_deref(), &Settings::new()).map(drop)
}

fn plain(runtime: &Runtime, provider: Provider, threads: Option<usize>) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(runtime.environment())?
        // ort's own default policy lets Core ML in on a Mac.
        .with_auto_device(AutoDevicePolicy::PreferCPU)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        // Patterns are planned for shapes that repeat; past and prompt lengths do not.
        .with_memory_pattern(false)?;
    Ok(match (provider, threads) {
        // XNNPACK has threads of its own, which would wait for processors that the session's keep busy.
        (Provider::Xnnpack, _) => builder.with_intra_threads(1)?.with_intra_op_spinning(false)?,
        (_, Some(threads)) => builder.with_intra_threads(threads)?,
        (_, None) => builder,
    })
}

fn append(
    runtime: &Runtime,
    builder: SessionBuilder,
    target: Target,
    plugin: Option<&Path>,
    told: &Settings,
) -> Result<SessionBuilder, OpenError> {
    match (target.provider, plugin) {
        (Provider::Cpu, _) => {
            only_device_0(target)?;
            append_processor(runtime, builder)
        }
        (_, Some(path)) => append_plugin(runtime, builder, target, path, told),
        (_, None) => append_built_in(runtime, builder, target, told),
    }
}

/// Nothing is appended for the processor: ort's own way by its name turns its arena off. But once a plugin has
/// brought a device that counts as a processor, such as QNN's simulator, ONNX Runtime would let it serve; it is then
/// kept out by naming the device.
fn append_processor(runtime: &Runtime, builder: SessionBuilder) -> Result<SessionBuilder, OpenError> {
    let is_processor =
        |device: &Device<'_>| device.ep().is_ok_and(|ep| Provider::of_ep(ep) == Some(Provider::Cpu));
    let (processors, others): (Vec<_>, Vec<_>) = runtime.environment().devices().partition(is_processor);
    if others.is_empty() {
        return Ok(builder);
    }
    let device = processors.into_iter().next();
    builder.with_devices(device, None).map_err(|e| {
        let reason = "it does not take its own processor for a session; report this";
        Error::library(reason).because(ort::Error::<()>::from(e)).into()
    })
}

fn append_plugin(
    runtime: &Runtime,
    builder: SessionBuilder,
    target: Target,
    path: &Path,
    told: &Settings,
) -> Result<SessionBuilder, OpenError> {
    let devices: Vec<_> = runtime
        .environment()
        .devices()
        .filter(|device| device.ep().is_ok_and(|ep| Provider::of_ep(ep) == Some(target.provider)))
        .collect();
    let there = devices.len();
    let Some(device) = devices.into_iter().nth(target.device.unwrap_or(0) as usize) else {
        let (path, provider) = (path.display(), target.provider);
        return Err(refused(
            Step::Append,
            &match there {
                0 => format!("{path} finds no device here that it could run on"),
                1 => format!("there is no {target}; {path} finds one device here, {provider}:0"),
                _ => format!(
                    "there is no {target}; {path} finds {there} devices here, {provider}:0 to {provider}:{}",
                    there - 1
                ),
            },
        ));
    };
    let ep = device.ep().unwrap_or_default();
    let told: Vec<_> = told.iter().map(|(key, value)| (format!("{ep}.{key}"), value.clone())).collect();
    builder.with_devices([device], Some(&told)).map_err(|e| refused(Step::Append, e.message()))
}

fn append_built_in(
    runtime: &Runtime,
    builder: SessionBuilder,
    target: Target,
    told: &Settings,
) -> Result<SessionBuilder, OpenError> {
    let mut told = told.clone();
    match (target.provider, target.device) {
        (Provider::Cuda | Provider::TensorRt | Provider::TensorRtRtx | Provider::DirectMl, Some(device)) => {
            told.insert(DEVICE_ID.to_owned(), device.to_string());
        }
        _ => only_device_0(target)?,
    }
    let builder = append_one(runtime, builder, target.provider, &told)?;
    if target.provider != Provider::TensorRt {
        return Ok(builder);
    }
    // What TensorRT does not take would run on the processor, though the same GPU could.
    let mut cuda = cuda_behind_tensorrt();
    cuda.extend(told.remove_entry(DEVICE_ID));
    append_one(runtime, builder, Provider::Cuda, &cuda)
}

fn append_one(
    runtime: &Runtime,
    builder: SessionBuilder,
    provider: Provider,
    told: &Settings,
) -> Result<SessionBuilder, OpenError> {
    let version = runtime.version();
    let Some(BuiltIn { available, dispatch }) = built_in::find(provider, told) else {
        let os = std::env::consts::OS;
        return Err(refused(Step::Build, &format!("this program has no {provider} on {os}")));
    };
    builder.with_execution_providers([dispatch.error_on_failure()]).map_err(|e| {
        if available {
            return refused(Step::Append, e.message());
        }
        refused(
            Step::Build,
            &format!("ONNX Runtime {version} here comes without {provider}: {}", e.message()),
        )
    })
}

fn only_device_0(target: Target) -> Result<(), OpenError> {
    match target.device {
        None | Some(0) => Ok(()),
        Some(_) => {
            let provider = target.provider;
            Err(refused(
                Step::Append,
                &format!("there is no {target}; {provider} has one device, {provider}:0"),
            ))
        }
    }
}

/// A refusal in the words of ONNX Runtime, on one line.
pub(super) fn refused(step: Step, reason: &str) -> OpenError {
    OpenError::Refused { step, reason: reason.split_whitespace().collect::<Vec<_>>().join(" ") }
}

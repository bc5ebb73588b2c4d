//! Arguments about sessions, whichever command opens them.

use std::{collections::BTreeMap, path::PathBuf};

use clap::ValueEnum;

use super::context::Context;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::ModelOptions;
use crate::model::compiled::PackedWeights;
use crate::runtime::Provider;
use crate::runtime::options::ProviderOption;

/// What bounds a session, and what its provider is told.
#[derive(Debug, clap::Args)]
pub(super) struct SessionArguments {
    /// The library of a provider that ONNX Runtime comes without, such as `qnn=FILE`; may be given several times
    #[arg(long, value_name = "PROVIDER=FILE", value_parser = parse_plugin)]
    provider_library: Vec<(Provider, PathBuf)>,

    /// An option of a provider by its own name, such as `tensorrt.trt_fp16_enable=1`; may be given several times
    #[arg(long, value_name = "PROVIDER.KEY=VALUE")]
    provider_option: Vec<ProviderOption>,

    /// The most pieces into which a graph may fall on a provider that compiles it
    #[arg(long, value_name = "N")]
    max_partitions: Option<usize>,

    /// The most memory that the model may take, such as 4GB; what the machine has left bounds it in any case
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_limit: Option<u64>,

    /// What multiplies few-bit weights and attends to the cache on the processor
    #[arg(long, value_name = "WHOSE", default_value = "own")]
    kernels: KernelChoice,

    /// Whether weights in the layout of ONNX Runtime's kernels are kept in the cache, at twice their size on disk, so that
    /// they load faster and are mapped instead of taking memory
    #[arg(long, value_enum, default_value_t = Packed::Auto)]
    packed_weights: Packed,
}

/// Whether the processor's form of the weights is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Packed {
    /// What `llava-phi compile` kept is used
    Auto,
    /// Kept by this command, if they are not
    Kept,
    /// Never: each session makes it in its own memory
    Private,
}

impl Packed {
    fn option(self) -> PackedWeights {
        match self {
            Self::Auto => PackedWeights::default(),
            Self::Kept => PackedWeights::KeptFrom(0),
            Self::Private => PackedWeights::Private,
        }
    }
}

/// Whose kernels multiply few-bit weights and attend to the cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KernelChoice {
    /// This program's, where it has some for the processor
    Own,
    /// ONNX Runtime's
    Onnxruntime,
}

impl SessionArguments {
    /// The most bytes that models may take.
    #[cfg(feature = "server")]
    pub(super) fn memory_limit(&self) -> Option<u64> {
        self.memory_limit
    }

    /// What they say of how a model is loaded, with the cache of compiled graphs; the rest is as ever.
    pub(super) fn options(&self, context: &Context) -> Result<ModelOptions> {
        let defaults = ModelOptions::default();
        Ok(ModelOptions {
            plugins: self.provider_library.clone(),
            provider_options: by_provider(&self.provider_option)?,
            max_partitions: self.max_partitions.unwrap_or(defaults.max_partitions),
            memory_limit: self.memory_limit,
            compiled: context.compiled_cache(),
            kernels: match self.kernels {
                KernelChoice::Own => Kernels::here(),
                KernelChoice::Onnxruntime => None,
            },
            packed_weights: self.packed_weights.option(),
            ..defaults
        })
    }
}

/// Reads the provider and the file of `qnn=libonnxruntime_providers_qnn.so`.
fn parse_plugin(text: &str) -> Result<(Provider, PathBuf), String> {
    match text.split_once('=') {
        Some((provider, file)) if !file.is_empty() => {
            let provider = provider.parse::<Provider>().map_err(|error| error.to_string())?;
            Ok((provider, PathBuf::from(file)))
        }
        _ => Err("write the provider and its library as qnn=libonnxruntime_providers_qnn.so".to_owned()),
    }
}

/// The options of each provider.
fn by_provider(options: &[ProviderOption]) -> Result<BTreeMap<Provider, BTreeMap<String, String>>> {
    let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for ProviderOption { provider, key, value } in options {
        let before = all.entry(*provider).or_default().insert(key.clone(), value.clone());
        if before.is_some_and(|before| before != *value) {
            return Err(Error::Request(format!("{provider}.{key} has two values; give one of them")));
        }
    }
    Ok(all)
}

/// Reads a size such as 4GB, 512 MB or 1500000000.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => Some(1),
        "KB" => Some(1_000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        _ => None,
    };
    let size = factor.zip(number.parse::<u64>().ok()).and_then(|(factor, number)| number.checked_mul(factor));
    size.ok_or_else(|| "give whole bytes, or a number with kB, MB or GB".to_owned())
}

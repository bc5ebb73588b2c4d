//! The providers that a library of ONNX Runtime may have built in, and how each is handed its settings.

// Where ONNX Runtime is linked in, only phones have one.
#![cfg_attr(not(feature = "load-dynamic"), allow(dead_code, unused_imports, unused_variables))]

use std::collections::BTreeMap;

use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider, ExecutionProviderDispatch};

use super::provider::Provider;

type Settings = BTreeMap<String, String>;

/// The key that chooses among the devices of a built-in provider.
pub(super) const DEVICE_ID: &str = "device_id";

/// Whether the runtime has a provider built in; `false` where this program cannot append it.
pub(super) fn is_there(provider: Provider) -> bool {
    provider == Provider::Cpu || find(provider, &Settings::new()).is_some_and(|found| found.available)
}

/// A provider that this program knows how to append.
pub(super) struct BuiltIn {
    /// Whether ONNX Runtime was built with it, which does not say that it works here.
    pub(super) available: bool,
    pub(super) dispatch: ExecutionProviderDispatch,
}

impl BuiltIn {
    fn new<E: ExecutionProvider + Into<ExecutionProviderDispatch>>(provider: E) -> Self {
        // A runtime that does not answer has none.
        Self { available: E::is_available().unwrap_or(false), dispatch: provider.into() }
    }

    fn configured<E>(told: &Settings) -> Self
    where
        E: Default
            + ExecutionProvider
            + ArbitrarilyConfigurableExecutionProvider
            + Into<ExecutionProviderDispatch>,
    {
        let mut provider = E::default();
        for (key, value) in told {
            provider.options_mut().set(key.as_str(), value.as_str());
        }
        Self::new(provider)
    }
}

/// The provider with what it is told, or `None`: which there are follows the features of `ort` that `Cargo.toml`
/// turns on.
pub(super) fn find(provider: Provider, told: &Settings) -> Option<BuiltIn> {
    match provider {
        #[cfg(any(feature = "load-dynamic", target_os = "ios", target_os = "macos"))]
        Provider::CoreMl => Some(BuiltIn::configured::<ep::CoreML>(told)),
        #[cfg(any(feature = "load-dynamic", target_os = "ios"))]
        Provider::Xnnpack => Some(BuiltIn::configured::<ep::XNNPACK>(told)),
        #[cfg(target_os = "android")]
        Provider::Nnapi => {
            let on = |key: &str| told.get(key).is_some_and(|value| value == "1");
            let nnapi = ep::NNAPI::default().with_fp16(on("use_fp16")).with_nchw(on("use_nchw"));
            Some(BuiltIn::new(nnapi.with_disable_cpu(on("cpu_disabled")).with_cpu_only(on("cpu_only"))))
        }
        #[cfg(feature = "load-dynamic")]
        Provider::Cuda => Some(BuiltIn::configured::<ep::CUDA>(told)),
        #[cfg(feature = "load-dynamic")]
        Provider::TensorRt => Some(BuiltIn::configured::<ep::TensorRT>(told)),
        #[cfg(feature = "load-dynamic")]
        Provider::TensorRtRtx => Some(BuiltIn::configured::<ep::NVRTX>(told)),
        #[cfg(feature = "load-dynamic")]
        Provider::Qnn => Some(BuiltIn::configured::<ep::QNN>(told)),
        #[cfg(feature = "load-dynamic")]
        Provider::OpenVino => Some(BuiltIn::configured::<ep::OpenVINO>(told)),
        #[cfg(feature = "load-dynamic")]
        Provider::WebGpu => Some(BuiltIn::configured::<ep::WebGPU>(told)),
        #[cfg(any(feature = "load-dynamic", windows))]
        Provider::DirectMl => Some(BuiltIn::new(directml(told))),
        _ => None,
    }
}

#[cfg(any(feature = "load-dynamic", windows))]
fn directml(told: &Settings) -> ep::DirectML {
    use ort::ep::directml::{DeviceFilter, PerformancePreference};

    let mut provider = ep::DirectML::default();
    if let Some(device) = told.get(DEVICE_ID).and_then(|device| device.parse().ok()) {
        provider = provider.with_device_id(device);
    }
    provider = match told.get("performance_preference").map(String::as_str) {
        Some("high_performance") => {
            provider.with_performance_preference(PerformancePreference::HighPerformance)
        }
        Some("minimum_power") => provider.with_performance_preference(PerformancePreference::MinimumPower),
        _ => provider,
    };
    match told.get("device_filter").map(String::as_str) {
        Some("any") => provider.with_device_filter(DeviceFilter::Any),
        Some("npu") => provider.with_device_filter(DeviceFilter::Npu),
        _ => provider,
    }
}

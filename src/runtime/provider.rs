//! Which execution provider runs a graph, and which were refused.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize, Serializer};

use crate::error::{Error, Result};

/// What runs a graph's operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// NVIDIA GPUs, by engines that TensorRT compiles.
    TensorRt,
    /// Apple's GPUs and neural engines.
    CoreMl,
    /// Android's neural networks API.
    Nnapi,
    /// Processors, by XNNPACK's kernels.
    Xnnpack,
    /// Qualcomm's neural processors.
    Qnn,
    /// Intel's processors, GPUs and neural processors.
    OpenVino,
    /// Any GPU with Vulkan, Metal or Direct3D 12, by WebGPU.
    WebGpu,
    /// Any GPU under Windows.
    DirectMl,
    /// NVIDIA's RTX GPUs, by the plugin TensorRT for RTX.
    #[serde(rename = "tensorrt-rtx")]
    TensorRtRtx,
}

impl Provider {
    /// Every provider that this version knows.
    pub const ALL: &[Self] = &[
        Self::Cpu,
        Self::Cuda,
        Self::TensorRt,
        Self::CoreMl,
        Self::Nnapi,
        Self::Xnnpack,
        Self::Qnn,
        Self::OpenVino,
        Self::WebGpu,
        Self::DirectMl,
        Self::TensorRtRtx,
    ];

    /// The name in manifests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::CoreMl => "coreml",
            Self::Nnapi => "nnapi",
            Self::Xnnpack => "xnnpack",
            Self::Qnn => "qnn",
            Self::OpenVino => "openvino",
            Self::WebGpu => "webgpu",
            Self::DirectMl => "directml",
            Self::TensorRtRtx => "tensorrt-rtx",
        }
    }

    /// ONNX Runtime's names for it: the built-in provider's, then those that a plugin may have.
    pub(super) fn ep_names(self) -> &'static [&'static str] {
        match self {
            Self::Cpu => &["CPUExecutionProvider"],
            Self::Cuda => &["CUDAExecutionProvider", "CudaPluginExecutionProvider"],
            Self::TensorRt => &["TensorrtExecutionProvider"],
            Self::CoreMl => &["CoreMLExecutionProvider"],
            Self::Nnapi => &["NnapiExecutionProvider"],
            Self::Xnnpack => &["XnnpackExecutionProvider"],
            Self::Qnn => &["QNNExecutionProvider"],
            Self::OpenVino => &["OpenVINOExecutionProvider"],
            Self::WebGpu => &["WebGpuExecutionProvider"],
            Self::DirectMl => &["DmlExecutionProvider"],
            Self::TensorRtRtx => &["NvTensorRTRTXExecutionProvider", "TensorrtRtxExecutionProvider"],
        }
    }

    /// The provider that ONNX Runtime calls `name`.
    pub(super) fn of_ep(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|provider| provider.ep_names().contains(&name))
    }

    /// Whether it compiles subgraphs, so that a node it runs is a piece of the graph, and not an operator.
    pub(super) fn compiles(self) -> bool {
        match self {
            Self::TensorRt | Self::CoreMl | Self::Nnapi | Self::Qnn | Self::OpenVino | Self::TensorRtRtx => {
                true
            }
            Self::Cpu | Self::Cuda | Self::Xnnpack | Self::WebGpu | Self::DirectMl => false,
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Provider {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|provider| provider.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|provider| provider.name()).collect();
            let near =
                nearest(name, &known).map_or_else(String::new, |near| format!("did you mean {near}? "));
            Error::Request(format!(
                "there is no provider {name:?}; {near}this version knows {}",
                known.join(", ")
            ))
        })
    }
}

/// The one of `known` that `word` is most likely a misspelling of, if any is near.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let scored = known.iter().map(|one| (strsim::jaro_winkler(word, one), *one));
    scored.filter(|(score, _)| *score > 0.75).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, one)| one)
}

/// A provider, and which of its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The provider.
    pub provider: Provider,
    /// The device's number; the provider's own first choice otherwise.
    pub device: Option<u32>,
}

impl From<Provider> for Target {
    fn from(provider: Provider) -> Self {
        Self { provider, device: None }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            Some(device) => write!(f, "{}:{device}", self.provider),
            None => self.provider.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((provider, device)) = text.split_once(':') else { return text.parse().map(Provider::into) };
        let provider = provider.parse()?;
        let device = device.parse().map_err(|_| {
            Error::Request(format!("{text:?} names no device; write {provider}:0 for the first one"))
        })?;
        Ok(Self { provider, device: Some(device) })
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A provider that was tried and does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The provider.
    pub provider: Target,
    /// The variant that it was to run.
    pub variant: String,
    /// How far it came.
    pub step: Step,
    /// Why it does not serve, in the words of whoever refused.
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { provider, variant, step, reason } = self;
        if variant.is_empty() {
            return write!(f, "{provider}: {reason}");
        }
        write!(f, "{variant} on {provider} at the step {step}: {reason}")
    }
}

/// The steps that a provider takes before it serves, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The package has a variant for it, and its files are whole.
    Package,
    /// What it will take fits into memory.
    Memory,
    /// This build of ONNX Runtime has it, or a plugin brought it.
    Build,
    /// ONNX Runtime takes it for a session.
    Append,
    /// ONNX Runtime makes the session.
    Commit,
    /// It takes the graph in few enough pieces.
    Placement,
    /// It computes what the goldens say.
    SelfCheck,
    /// It went on computing numbers while it served.
    Serving,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Package => "package",
            Self::Memory => "memory",
            Self::Build => "build",
            Self::Append => "append",
            Self::Commit => "commit",
            Self::Placement => "placement",
            Self::SelfCheck => "self-check",
            Self::Serving => "serving",
        })
    }
}

/// Where ONNX Runtime ran the nodes of a graph, as its profile of one run tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Nodes that each provider ran. A subgraph that a provider compiled counts as one.
    pub nodes: BTreeMap<String, usize>,
    /// Pieces of the graph that the chosen provider compiled; 0 when it runs node by node.
    pub partitions: usize,
    /// Operators that the processor ran beside another provider, with how often each stands in the graph.
    pub left_to_cpu: BTreeMap<String, usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_is_read_by_the_name_that_it_prints() {
        for &provider in Provider::ALL {
            assert_eq!(provider.to_string().parse::<Provider>().unwrap(), provider);
            assert_eq!(serde_json::to_string(&provider).unwrap(), format!("\"{provider}\""));
            let target = Target { provider, device: Some(1) };
            assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
        }
    }

    #[test]
    fn an_unknown_provider_is_refused_with_the_nearest_name() {
        let error = "tensort".parse::<Target>().unwrap_err().to_string();
        assert!(error.starts_with("there is no provider \"tensort\"; did you mean tensorrt? "), "{error}");
        let error = "tpu".parse::<Provider>().unwrap_err().to_string();
        assert!(error.ends_with("this version knows cpu, cuda, tensorrt, coreml, nnapi, xnnpack, qnn, openvino, webgpu, directml, tensorrt-rtx"), "{error}");
        let error = "cuda:first".parse::<Target>().unwrap_err().to_string();
        assert_eq!(error, "\"cuda:first\" names no device; write cuda:0 for the first one");
    }
}

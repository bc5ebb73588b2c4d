//! Which providers this process could use, for those who ask what the machine has.

use std::path::PathBuf;

use serde::Serialize;

use super::graph::OpenError;
use super::provider::Provider;
use super::{Runtime, built_in, session};

/// What there is of a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProviderStatus {
    /// The provider.
    pub provider: Provider,
    /// Whether the library of ONNX Runtime has it. Its drivers may still be missing; `note` says.
    pub built_in: bool,
    /// The plugin that was registered for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugin: Option<PathBuf>,
    /// How many devices [`Runtime::devices`] lists for it; built-in providers but the processor list none.
    pub devices: usize,
    /// What to install or to have for it.
    pub needs: &'static str,
    /// Why it cannot be appended to a session now, in ONNX Runtime's words; `None` when it can be, which does not
    /// say that a graph would run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Runtime {
    /// The state of every provider. Each that is built in is appended to a session for a moment, which loads its
    /// libraries: for CUDA that takes a second.
    pub fn providers(&self) -> Vec<ProviderStatus> {
        let devices = self.devices();
        let status = |provider: Provider| ProviderStatus {
            provider,
            built_in: built_in::is_there(provider),
            plugin: self.plugin(provider),
            devices: devices.iter().filter(|device| device.provider == Some(provider)).count(),
            needs: needs(provider),
            note: session::probe(self, provider).err().map(|e| match e {
                OpenError::Refused { reason, .. } => reason,
                OpenError::Failed(e) => e.to_string(),
            }),
        };
        Provider::ALL.iter().copied().map(status).collect()
    }

    /// Why `provider` cannot be had, where neither this build of ONNX Runtime nor a plugin has it. Nothing is loaded.
    pub fn lacks(&self, provider: Provider) -> Option<OpenError> {
        let here = built_in::is_there(provider) || self.plugin(provider).is_some();
        if here { None } else { session::probe(self, provider).err() }
    }

    /// The providers that are here, built in or by a plugin, and whose compiled graphs can be kept. Whether one works
    /// only a graph tells.
    pub fn compilers(&self) -> Vec<Provider> {
        let keep = Provider::ALL.iter().copied().filter(|provider| provider.keeps_compiled());
        keep.filter(|&one| built_in::is_there(one) || self.plugin(one).is_some()).collect()
    }
}

fn needs(provider: Provider) -> &'static str {
    match provider {
        Provider::Cpu => "nothing, since every build of ONNX Runtime has it",
        Provider::Cuda => {
            "an NVIDIA GPU with a driver for CUDA 13, the libraries of CUDA 13, and `llava-phi runtime install --variant \
             cuda`"
        }
        Provider::TensorRt => {
            "what cuda needs, cuDNN 9, and the libraries of TensorRT 10, which pip has as tensorrt-cu13"
        }
        Provider::CoreMl => "a Mac, an iPhone or an iPad, where the usual build of ONNX Runtime has it",
        Provider::Nnapi => "an Android device, and a build of ONNX Runtime for Android",
        Provider::Xnnpack => "a build of ONNX Runtime with XNNPACK, as those for Android and iOS are",
        Provider::Qnn => {
            "a Qualcomm chip, and the plugin of pip's onnxruntime-qnn, named with --provider-library"
        }
        Provider::OpenVino => {
            "Intel hardware, and the plugin of pip's onnxruntime-ep-openvino, named with --provider-library"
        }
        Provider::WebGpu => {
            "a GPU with Vulkan, Metal or Direct3D 12, and the plugin of pip's onnxruntime-ep-webgpu, named with \
             --provider-library"
        }
        Provider::DirectMl => "Windows, and a build of ONNX Runtime with DirectML",
        Provider::TensorRtRtx => {
            "an NVIDIA RTX GPU, and the plugin of pip's onnxruntime-ep-nv-tensorrt-rtx-cu13, named with \
             --provider-library"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    #[test]
    fn every_provider_has_a_state_and_the_processor_is_always_there() {
        let status = testing::start().providers();
        assert_eq!(status.iter().map(|one| one.provider).collect::<Vec<_>>(), Provider::ALL);
        let cpu = &status[0];
        assert_eq!((cpu.built_in, cpu.devices, &cpu.note, &cpu.plugin), (true, 1, &None, &None));
        for one in &status[1..] {
            assert_eq!(one.note.is_none(), one.built_in, "{one:?}");
            assert!(!one.needs.is_empty());
        }
    }
}

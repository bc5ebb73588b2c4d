//! Providers that come as a library of their own, and the devices that they find.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use ort::memory::DeviceType;
use serde::Serialize;

use crate::error::{Error, Result};

use super::provider::Provider;
use super::{Runtime, identify};

/// A device that a provider can run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// The provider, if this version knows it.
    pub provider: Option<Provider>,
    /// Its number among the provider's devices: `qnn:0` names the first one.
    pub index: u32,
    /// ONNX Runtime's name of the provider.
    pub ep: String,
    /// Who made the provider.
    pub vendor: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Who made the device; empty where the system does not tell.
    pub hardware_vendor: String,
    /// The device's number on its bus, such as PCI's, which names the model rather than the piece.
    pub id: u32,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DeviceKind {
    /// A processor.
    Cpu,
    /// A graphics processor.
    Gpu,
    /// A neural processor.
    Npu,
    /// Something else.
    Other,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Npu => "npu",
            Self::Other => "other",
        })
    }
}

impl Runtime {
    /// Loads the library of a provider that is not built into ONNX Runtime, for the life of the process.
    ///
    /// Graphs that are opened for `provider` afterwards use it, in place of a built-in one too. Registering the same
    /// file again does nothing.
    ///
    /// # Errors
    /// [`Error::Provider`] when `path` is no provider's library for this machine, when ONNX Runtime cannot load it,
    /// when it brings another provider, and when another file was registered for `provider`.
    pub fn register_plugin(&self, provider: Provider, path: &Path) -> Result<()> {
        let refused = |reason: String| Err(Error::Provider { name: provider.to_string(), reason });
        let [name, ..] = provider.ep_names() else { return refused("it has no name".to_owned()) };
        if provider == Provider::Cpu {
            return refused("it is built in; leave its library out".to_owned());
        }
        if let Err(fault) = identify::check_plugin(path) {
            return refused(fault);
        }
        // ONNX Runtime would look for a bare name where the system keeps libraries.
        let path =
            path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned());
        let mut plugins = self.plugins.lock().unwrap_or_else(PoisonError::into_inner);
        // Some plugins take any name, so that a library would serve as what it is not.
        if let Some((other, _)) = plugins.iter().find(|(other, file)| **other != provider && **file == path) {
            return refused(format!("{} is the plugin of {other} already", path.display()));
        }
        match plugins.get(&provider) {
            Some(other) if *other == path => return Ok(()),
            Some(other) => {
                return refused(format!(
                    "this process has it from {} already and cannot change to {}; start another process for it",
                    other.display(),
                    path.display()
                ));
            }
            None => {}
        }
        let before = self.devices();
        if let Err(e) = self.environment().register_ep_library(*name, &path) {
            let told: Vec<&str> = e.message().split_whitespace().collect();
            return refused(format!("{} could not be loaded: {}", path.display(), told.join(" ")));
        }
        plugins.insert(provider, path.clone());
        let other = self.devices().into_iter().find(|device| {
            device.provider != Some(provider) && !before.iter().any(|known| known.ep == device.ep)
        });
        match other {
            None => Ok(()),
            Some(device) => {
                let brings = device.provider.map_or(device.ep, |other| other.to_string());
                refused(format!("{} brings {brings}; name it for that", path.display()))
            }
        }
    }

    /// The library that was registered for a provider.
    pub fn plugin(&self, provider: Provider) -> Option<PathBuf> {
        self.plugins.lock().unwrap_or_else(PoisonError::into_inner).get(&provider).cloned()
    }

    /// The devices that ONNX Runtime and the registered plugins find, those of one provider in the order of their
    /// numbers. Providers that are built in report none, except for the processor.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let mut found: Vec<DeviceInfo> = Vec::new();
        for device in self.environment().devices() {
            let Ok(ep) = device.ep() else { continue };
            let provider = Provider::of_ep(ep);
            let same = |one: &&DeviceInfo| one.ep == ep || (provider.is_some() && one.provider == provider);
            let index = u32::try_from(found.iter().filter(same).count()).unwrap_or(u32::MAX);
            let hardware = device.hardware_device();
            found.push(DeviceInfo {
                provider,
                index,
                ep: ep.to_owned(),
                vendor: device.ep_vendor().unwrap_or_default().to_owned(),
                kind: match hardware.ty() {
                    DeviceType::CPU => DeviceKind::Cpu,
                    DeviceType::GPU => DeviceKind::Gpu,
                    DeviceType::NPU => DeviceKind::Npu,
                    DeviceType::FPGA => DeviceKind::Other,
                },
                hardware_vendor: hardware.vendor().unwrap_or_default().to_owned(),
                id: hardware.id(),
            });
        }
        found
    }
}

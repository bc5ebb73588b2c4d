//! What can compute beside the processor, and which of its drivers and libraries are installed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Roots, names, text};

/// Libraries that providers load by these names, and what each is for.
const LIBRARIES: &[(&str, &str)] = if cfg!(windows) {
    &[
        ("nvcuda.dll", "CUDA driver"),
        ("cudart64_13.dll", "CUDA 13 runtime"),
        ("cudart64_12.dll", "CUDA 12 runtime"),
        ("cudnn64_9.dll", "cuDNN 9"),
        ("nvinfer_10.dll", "TensorRT 10"),
        ("DirectML.dll", "DirectML"),
        ("QnnHtp.dll", "Qualcomm neural processor"),
    ]
} else {
    &[
        ("libcuda.so.1", "CUDA driver"),
        ("libcudart.so.13", "CUDA 13 runtime"),
        ("libcudart.so.12", "CUDA 12 runtime"),
        ("libcublasLt.so.13", "cuBLAS 13"),
        ("libcublasLt.so.12", "cuBLAS 12"),
        ("libcudnn.so.9", "cuDNN 9"),
        ("libnvinfer.so.10", "TensorRT 10"),
        ("libQnnHtp.so", "Qualcomm neural processor"),
        ("libze_loader.so.1", "Intel GPU and neural processor"),
        ("libOpenCL.so.1", "OpenCL"),
        ("libvulkan.so.1", "Vulkan"),
    ]
};

/// Nodes below `/dev` that a driver makes for a device, by the start of their names.
const NODES: &[&str] =
    &["nvidia", "nvhost-gpu", "fastrpc-", "adsprpc", "qaic", "kgsl-3d", "mali", "apusys", "kfd"];

/// Folders below `/dev` whose nodes are devices.
const FOLDERS: &[(&str, &str)] = &[("accel", "accel"), ("dri", "renderD"), ("qaic", "")];

/// Accelerators of this machine, as far as files tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Accelerators {
    /// Version of NVIDIA's kernel driver.
    pub nvidia_driver: Option<String>,
    /// GPUs that NVIDIA's driver serves.
    pub nvidia_gpus: Vec<NvidiaGpu>,
    /// GPUs and neural processors that the kernel lists by vendor.
    pub devices: Vec<Device>,
    /// Nodes below `/dev` through which accelerators are reached, such as `nvidia0` or `dri/renderD128`.
    pub nodes: Vec<String>,
    /// The board or system on a chip, where the system names it.
    pub soc: Option<String>,
    /// Whether this is a system of Apple's, which has Core ML.
    pub core_ml: bool,
    /// Whether Core ML has a neural engine here: Apple's own processors do.
    pub neural_engine: bool,
    /// Libraries that providers need, found or not.
    pub libraries: Vec<Library>,
}

/// A GPU that NVIDIA's driver serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NvidiaGpu {
    /// The model's name.
    pub name: String,
    /// Its place on the bus.
    pub bus: String,
}

/// A GPU or neural processor that the kernel lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in the kernel's list, such as `renderD128`.
    pub name: String,
    /// PCI vendor, hexadecimal, such as `0x8086`.
    pub vendor_id: String,
    /// PCI device, hexadecimal; empty when it is not told.
    pub device_id: String,
    /// The vendor's name, when it is one of those that matter here.
    pub vendor: Option<&'static str>,
    /// The kernel's driver for it.
    pub driver: Option<String>,
}

impl Device {
    /// What it is, without where it is.
    pub(super) fn model(&self) -> String {
        format!("{}:{} {}", self.vendor_id, self.device_id, self.driver.as_deref().unwrap_or_default())
    }
}

/// A library that a provider needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Library {
    /// The name by which it is loaded.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Where it was found; `None` when the loader's standard places lack it.
    pub path: Option<PathBuf>,
    /// The name of the file behind all links, which mostly ends with the full version.
    pub file: Option<String>,
}

impl Accelerators {
    pub(super) fn probe(roots: &Roots) -> Self {
        let driver = roots.proc.join("driver/nvidia");
        Self {
            nvidia_driver: text(&driver.join("version")).as_deref().and_then(driver_version),
            nvidia_gpus: nvidia_gpus(&driver.join("gpus")),
            devices: devices(&roots.sys.join("class")),
            nodes: nodes(&roots.dev),
            soc: soc(roots),
            core_ml: cfg!(target_vendor = "apple"),
            neural_engine: cfg!(all(target_vendor = "apple", target_arch = "aarch64")),
            libraries: libraries(roots),
        }
    }

    /// The library with this name, if it was found.
    pub fn library(&self, name: &str) -> Option<&Library> {
        self.libraries.iter().find(|library| library.name == name && library.path.is_some())
    }
}

/// The first word of the first line that is a version: `535.104.05`.
fn driver_version(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        let mut numbers = word.split('.');
        word.contains('.') && numbers.all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

fn nvidia_gpus(dir: &Path) -> Vec<NvidiaGpu> {
    let information = |bus: String| {
        let text = text(&dir.join(&bus).join("information"))?;
        let name = text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned();
        Some(NvidiaGpu { name, bus })
    };
    names(dir).into_iter().filter_map(information).collect()
}

/// Devices of the kernel's classes `drm` and `accel`, each once: a GPU has a card and a render node.
fn devices(class: &Path) -> Vec<Device> {
    let mut seen = BTreeSet::new();
    let mut devices = Vec::new();
    for (class, prefix) in
        [("drm", "renderD"), ("drm", "card"), ("accel", "accel")].map(|(c, p)| (class.join(c), p))
    {
        for name in names(&class) {
            // `card0-HDMI-A-1` is a connector of `card0`.
            let number = name.strip_prefix(prefix).unwrap_or("-");
            if !number.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            let dir = class.join(&name).join("device");
            let Some(vendor_id) = text(&dir.join("vendor")).map(|id| id.trim().to_owned()) else { continue };
            if !seen.insert(fs::canonicalize(&dir).unwrap_or(dir.clone())) {
                continue;
            }
            let driver = fs::read_link(dir.join("driver")).ok();
            devices.push(Device {
                name,
                vendor: vendor(&vendor_id),
                vendor_id,
                device_id: text(&dir.join("device")).map_or_else(String::new, |id| id.trim().to_owned()),
                driver: driver.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned())),
            });
        }
    }
    devices
}

fn vendor(id: &str) -> Option<&'static str> {
    Some(match id {
        "0x10de" => "NVIDIA",
        "0x8086" => "Intel",
        "0x1002" | "0x1022" => "AMD",
        "0x17cb" | "0x5143" => "Qualcomm",
        "0x13b5" => "Arm",
        _ => return None,
    })
}

fn nodes(dev: &Path) -> Vec<String> {
    let mut nodes: Vec<String> =
        names(dev).into_iter().filter(|name| NODES.iter().any(|start| name.starts_with(start))).collect();
    for (folder, start) in FOLDERS {
        let inside = names(&dev.join(folder)).into_iter().filter(|name| name.starts_with(start));
        nodes.extend(inside.map(|name| format!("{folder}/{name}")));
    }
    nodes
}

/// The name of the board or chip, where a device tree or a chip driver gives one.
fn soc(roots: &Roots) -> Option<String> {
    let places = [roots.sys.join("devices/soc0/machine"), roots.sys.join("firmware/devicetree/base/model")];
    let clean = |name: String| name.trim_matches(|c: char| c.is_whitespace() || c == '\0').to_owned();
    places.iter().filter_map(|place| text(place)).map(clean).find(|name| !name.is_empty())
}

fn libraries(roots: &Roots) -> Vec<Library> {
    let mut directories = roots.libraries.clone();
    directories.extend(configured(&roots.etc));
    let find = |&(name, purpose): &(&'static str, &'static str)| {
        let path = directories.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
        let file = path
            .as_ref()
            .and_then(|path| Some(fs::canonicalize(path).ok()?.file_name()?.to_string_lossy().into_owned()));
        Library { name, purpose, path, file }
    };
    LIBRARIES.iter().map(find).collect()
}

/// The loader's built-in directories on this system.
pub(super) fn standard_directories() -> Vec<PathBuf> {
    let fixed: &[&str] = if cfg!(windows) {
        &["C:\\Windows\\System32"]
    } else if cfg!(target_os = "android") {
        &["/system/lib64", "/system_ext/lib64", "/vendor/lib64", "/odm/lib64", "/vendor/dsp/cdsp"]
    } else if cfg!(target_os = "linux") {
        &["/lib", "/usr/lib", "/lib64", "/usr/lib64"]
    } else {
        &[]
    };
    let mut directories: Vec<PathBuf> = fixed.iter().map(PathBuf::from).collect();
    if cfg!(target_os = "linux") {
        let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
        directories.extend(["/lib", "/usr/lib"].map(|dir| Path::new(dir).join(&triple)));
    }
    directories
}

/// Directories that `ld.so.conf` and the files beside it add. `include` is taken to mean that folder.
fn configured(etc: &Path) -> Vec<PathBuf> {
    let folder = etc.join("ld.so.conf.d");
    let mut files = vec![etc.join("ld.so.conf")];
    files.extend(
        names(&folder)
            .into_iter()
            .filter(|name| Path::new(name).extension().is_some_and(|end| end == "conf"))
            .map(|name| folder.join(name)),
    );
    let lines: Vec<String> = files.iter().filter_map(|file| text(file)).collect();
    let directories =
        lines.iter().flat_map(|text| text.lines()).map(str::trim).filter(|line| line.starts_with('/'));
    directories.map(PathBuf::from).collect()
}

//! The machine that this program runs on: processor, memory and its real limit, accelerators.

mod accelerator;
mod busy;
mod cgroup;
mod memory;
mod processor;
mod resident;
/// What the system itself tells, by calls.
#[cfg(not(target_os = "ios"))]
#[allow(clippy::unnecessary_wraps)] // On iOS it may fail.
fn system(kind: RefreshKind) -> Option<System> {
    Some(System::new_with_specifics(kind))
}

/// What the system itself tells, by calls; the version of `sysinfo` for iOS is another one, whose
/// functions give a `Result` where this one's give an `Option`: `into_iter` takes both.
#[cfg(target_os = "ios")]
fn system(kind: RefreshKind) -> Option<System> {
    System::new_with_specifics(kind).ok()
}

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::{fs, io::Read};

use serde::Serialize;
use sha2::{Digest, Sha256};
use sysinfo::{RefreshKind, System};

pub use accelerator::{Accelerators, Device, Library, NvidiaGpu};
pub use busy::{Busy, BusyWatch};
pub use memory::{Limit, LimitKind, Memory};
pub use processor::Processor;
pub use resident::{Resident, ResidentWatch};

/// Where the facts of a machine are read. Tests give a made-up tree.
#[derive(Clone, Debug)]
pub struct Roots {
    /// The kernel's view of processes and drivers, `/proc`.
    pub proc: PathBuf,
    /// The kernel's view of devices and control groups, `/sys`.
    pub sys: PathBuf,
    /// Device nodes, `/dev`.
    pub dev: PathBuf,
    /// Configuration, `/etc`: where the loader is told of more directories.
    pub etc: PathBuf,
    /// Directories with shared libraries, looked into in this order before those that `etc` names.
    pub libraries: Vec<PathBuf>,
}

impl Default for Roots {
    fn default() -> Self {
        Self { libraries: accelerator::standard_directories(), ..Self::below(Path::new("/")) }
    }
}

impl Roots {
    /// The same places below another directory, such as the root of a mounted system. No libraries are looked for but
    /// where its `etc` says.
    pub fn below(root: &Path) -> Self {
        Self {
            proc: root.join("proc"),
            sys: root.join("sys"),
            dev: root.join("dev"),
            etc: root.join("etc"),
            libraries: Vec::new(),
        }
    }
}

/// Facts of one machine, as this process sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The operating system's family, such as `linux` or `android`.
    pub os: &'static str,
    /// The operating system's name and version, for a person.
    pub os_version: String,
    /// The architecture, such as `x86_64`.
    pub arch: &'static str,
    /// The processor.
    pub processor: Processor,
    /// The memory and what limits this process in it.
    pub memory: Memory,
    /// What can compute beside the processor.
    pub accelerators: Accelerators,
}

impl Machine {
    /// Reads the facts of this machine. What cannot be read is left out; nothing fails.
    pub fn probe(roots: &Roots) -> Self {
        Self {
            os: std::env::consts::OS,
            os_version: os_version(roots),
            arch: std::env::consts::ARCH,
            processor: Processor::probe(roots),
            memory: Memory::probe(roots),
            accelerators: Accelerators::probe(roots),
        }
    }

    /// Sixteen hexadecimal digits that change with what decides speed and correctness: the operating system's family,
    /// the architecture, the processor, the accelerators, their drivers and libraries. Where the drivers are part of
    /// the system (everywhere but Linux), its version counts too. Free memory does not, nor does a kernel update.
    pub fn fingerprint(&self) -> String {
        let version = if self.os == "linux" { "" } else { self.os_version.as_str() };
        let mut facts = vec![self.os, version, self.arch];
        let libraries = self.accelerators.libraries.iter().filter_map(|library| library.file.as_deref());
        let processor = &self.processor;
        let cores =
            format!("{:?} {} {}", processor.physical_cores, processor.logical_cores, processor.usable);
        facts.extend([processor.name.as_str(), cores.as_str()]);
        facts.extend(processor.instructions.iter().copied());
        let accelerators = &self.accelerators;
        facts.extend(accelerators.soc.as_deref());
        facts.extend(accelerators.nvidia_driver.as_deref());
        facts.extend(accelerators.nvidia_gpus.iter().map(|gpu| gpu.name.as_str()));
        let devices: Vec<String> = accelerators.devices.iter().map(Device::model).collect();
        facts.extend(devices.iter().map(String::as_str));
        facts.extend(libraries);
        let mut hash = Sha256::new();
        for fact in facts {
            hash.update(fact.as_bytes());
            hash.update([0]);
        }
        hash.finalize().iter().take(8).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }
}

/// `Debian GNU/Linux 12 (bookworm), kernel 6.1.0` where the files say so, and the system's own words elsewhere.
fn os_version(roots: &Roots) -> String {
    let release = text(&roots.etc.join("os-release")).and_then(|release| {
        let line = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(line.trim().trim_matches('"').to_owned())
    });
    let kernel = text(&roots.proc.join("sys/kernel/osrelease")).map(|kernel| kernel.trim().to_owned());
    match (release.or_else(|| System::long_os_version().into_iter().next()), kernel) {
        (Some(release), Some(kernel)) => format!("{release}, kernel {kernel}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => String::new(),
    }
}

/// The most that is read of one file: none of the kernel's is larger, and one that never ends does no harm.
const LONGEST: u64 = 1 << 20;

/// The text of a small file; `None` when it cannot be read. What is no UTF-8 is replaced.
fn text(path: &Path) -> Option<String> {
    // A pipe or a device would wait for ever.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(LONGEST).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The names in a directory, sorted; none when it cannot be read.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

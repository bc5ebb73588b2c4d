//! The processor: its name, its cores, the instructions that matter for matrices.

use std::collections::BTreeSet;
use std::thread;

use serde::Serialize;
use sysinfo::{CpuRefreshKind, RefreshKind, System};

use super::{Roots, text};

/// What multiplies matrices when nothing else does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Processor {
    /// The maker's name for it; empty when nobody says.
    pub name: String,
    /// Cores, without those that share one; `None` when nobody says.
    pub physical_cores: Option<usize>,
    /// Processors that the system schedules on.
    pub logical_cores: usize,
    /// Processors that this process may use: fewer under an affinity mask or a quota of a control group.
    pub usable: usize,
    /// Instruction sets that change which kernels run, as this processor and system have them.
    pub instructions: Vec<&'static str>,
}

impl Processor {
    /// Reads `cpuinfo`, and asks the system where there is none.
    pub fn probe(roots: &Roots) -> Self {
        let info = text(&roots.proc.join("cpuinfo")).unwrap_or_default();
        let mut processor = Self {
            name: value(&info, &["model name", "Hardware", "cpu model"]).unwrap_or_default(),
            physical_cores: physical(&info),
            logical_cores: values(&info, "processor").filter(|n| n.parse::<usize>().is_ok()).count(),
            usable: thread::available_parallelism().map_or(1, usize::from),
            instructions: instructions(),
        };
        if (processor.name.is_empty() || processor.logical_cores == 0)
            && let Some(system) = super::system(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()))
        {
            if processor.name.is_empty() {
                let brand = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
                processor.name = brand.unwrap_or_default();
            }
            if processor.logical_cores == 0 {
                processor.logical_cores = system.cpus().len().max(processor.usable);
                processor.physical_cores = System::physical_core_count().into_iter().next();
            }
        }
        processor
    }
}

/// Every value of `key` in `key : value` lines.
fn values<'a>(info: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    info.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(move |(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
}

/// The first value of the first key that has one.
fn value(info: &str, keys: &[&str]) -> Option<String> {
    keys.iter().find_map(|key| values(info, key).find(|value| !value.is_empty())).map(str::to_owned)
}

/// Pairs of package and core that differ; `None` when the lines do not tell, as on most Arm systems.
fn physical(info: &str) -> Option<usize> {
    let pairs: BTreeSet<(&str, &str)> = values(info, "physical id").zip(values(info, "core id")).collect();
    Some(pairs.len()).filter(|count| *count > 0)
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> Vec<&'static str> {
    let found = [
        ("avx", is_x86_feature_detected!("avx")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("avx_vnni", is_x86_feature_detected!("avxvnni")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512_vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    found.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

#[cfg(target_arch = "aarch64")]
fn instructions() -> Vec<&'static str> {
    use std::arch::is_aarch64_feature_detected;

    let found = [
        ("neon", is_aarch64_feature_detected!("neon")),
        ("fp16", is_aarch64_feature_detected!("fp16")),
        ("dotprod", is_aarch64_feature_detected!("dotprod")),
        ("i8mm", is_aarch64_feature_detected!("i8mm")),
        ("bf16", is_aarch64_feature_detected!("bf16")),
        ("sve", is_aarch64_feature_detected!("sve")),
    ];
    found.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn instructions() -> Vec<&'static str> {
    Vec::new()
}

//! How much memory this process may still take, and what says so.

use serde::Serialize;
use sysinfo::{MemoryRefreshKind, RefreshKind};

use super::{Roots, cgroup, text};
use crate::error::size;

/// Memory of the machine and the limits on this process, in bytes, at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Memory that the system has.
    pub total: u64,
    /// What could be taken now without swapping. Swap does not count: weights are read whole for every token.
    pub available: u64,
    /// Every limit on this process that was found.
    pub limits: Vec<Limit>,
}

/// One limit on the memory of this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// What sets it.
    pub kind: LimitKind,
    /// Where it is set: the control group's path, empty for a limit of the process.
    pub place: String,
    /// The limit.
    pub bytes: u64,
    /// What is used of it and cannot be taken back: file pages do not count.
    pub used: u64,
}

/// What sets a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitKind {
    /// A control group's `memory.max`; beyond it a process is killed.
    CgroupMax,
    /// A control group's `memory.high`; beyond it a process is slowed until it stands.
    CgroupHigh,
    /// A version 1 control group's `memory.limit_in_bytes`; beyond it a process is killed.
    CgroupV1,
    /// The address space of the process (`RLIMIT_AS`), mapped files included; beyond it an allocation fails.
    AddressSpace,
}

impl Limit {
    /// What is left of it.
    pub fn room(&self) -> u64 {
        self.bytes.saturating_sub(self.used)
    }

    /// What it is called where it is set.
    fn name(&self) -> String {
        match self.kind {
            LimitKind::CgroupMax => format!("memory.max of cgroup {}", self.place),
            LimitKind::CgroupHigh => format!("memory.high of cgroup {}", self.place),
            LimitKind::CgroupV1 => format!("memory.limit_in_bytes of cgroup {}", self.place),
            LimitKind::AddressSpace => "the limit on the address space".to_owned(),
        }
    }
}

impl Memory {
    /// Reads what there is now; without the rest of [`super::Machine::probe`], which looks through directories.
    pub fn probe(roots: &Roots) -> Self {
        let (total, available) = of_system(roots);
        let mut limits = cgroup::limits(roots);
        limits.extend(address_space(roots));
        Self { total, available, limits }
    }

    /// What this process may still take: the least of what is available and what each limit leaves.
    pub fn budget(&self) -> u64 {
        self.limits.iter().map(Limit::room).fold(self.available, u64::min)
    }

    /// What decides the budget, as the end of a sentence: `memory.max of cgroup /a is 8.0 GB, 0.4 GB of it used`.
    pub fn explain(&self) -> String {
        match self.limits.iter().min_by_key(|limit| limit.room()) {
            Some(limit) if limit.room() < self.available => {
                format!("{} is {}, {} of it used", limit.name(), size(limit.bytes), size(limit.used))
            }
            _ => format!("{} of the machine's {} are available", size(self.available), size(self.total)),
        }
    }
}

/// Total and available bytes: from `meminfo`, or by the system's own calls where there is none.
fn of_system(roots: &Roots) -> (u64, u64) {
    let info = text(&roots.proc.join("meminfo")).unwrap_or_default();
    let field = |name| kilobytes(&info, name);
    let total = field("MemTotal");
    let old_kernel = || Some(field("MemFree")?.saturating_add(field("Cached")?));
    let available = field("MemAvailable").or_else(old_kernel);
    if let (Some(total), Some(available)) = (total, available) {
        return (total, available.min(total));
    }
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let known = super::system(memory).map(|system| (system.total_memory(), system.available_memory()));
    // A system that does not tell must not have everything refused.
    known.filter(|(_, available)| *available > 0).unwrap_or((u64::MAX, u64::MAX))
}

/// `RLIMIT_AS` of this process, when it has one.
fn address_space(roots: &Roots) -> Option<Limit> {
    let limits = text(&roots.proc.join("self/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let bytes = line.split_whitespace().next()?.parse().ok()?;
    let status = text(&roots.proc.join("self/status")).unwrap_or_default();
    let used = kilobytes(&status, "VmSize").unwrap_or(0);
    Some(Limit { kind: LimitKind::AddressSpace, place: String::new(), bytes, used })
}

/// The value of a line `name:  123 kB`, in bytes.
pub(super) fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

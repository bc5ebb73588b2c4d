//! The limits that control groups set on the memory of this process.

use std::path::{Component, Path, PathBuf};

use super::memory::{Limit, LimitKind};
use super::{Roots, text};

/// At or above this, a version 1 group means that there is no limit: the kernel writes the largest multiple of a page.
const NO_LIMIT_V1: u64 = 1 << 60;

/// The limits of the process's group and of every group above it, version 1 and 2 alike.
pub(super) fn limits(roots: &Roots) -> Vec<Limit> {
    let own = text(&roots.proc.join("self/cgroup")).unwrap_or_default();
    let base = roots.sys.join("fs/cgroup");
    let mut limits = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if controllers.is_empty() {
            // Beside version 1 the one tree of version 2 is mounted at `unified`.
            for mount in [base.clone(), base.join("unified")] {
                walk(&mount, path, version_2, &mut limits);
            }
        } else if controllers.split(',').any(|controller| controller == "memory") {
            for mount in [base.join("memory"), base.join(controllers)] {
                walk(&mount, path, version_1, &mut limits);
            }
        }
    }
    limits.dedup();
    limits
}

/// Calls `read` for the group `path` below `mount` and for each group above it.
///
/// Inside a container the path may be that of the host and not be there; the container's own group is then the mount
/// itself, which the walk reaches as the last one.
fn walk(mount: &Path, path: &str, read: fn(&Path, &str, &mut Vec<Limit>), limits: &mut Vec<Limit>) {
    let mut names: Vec<&str> = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => names.extend(name.to_str()),
            // `/../other`: the group lies outside of what this process may see.
            Component::ParentDir => return read(mount, "/", limits),
            _ => {}
        }
    }
    loop {
        let dir = names.iter().fold(PathBuf::from(mount), |dir, name| dir.join(name));
        read(&dir, &format!("/{}", names.join("/")), limits);
        if names.pop().is_none() {
            return;
        }
    }
}

fn version_2(dir: &Path, place: &str, limits: &mut Vec<Limit>) {
    for (kind, file) in [(LimitKind::CgroupMax, "memory.max"), (LimitKind::CgroupHigh, "memory.high")] {
        // `max` is no number and no limit.
        let Some(bytes) = number(&dir.join(file)) else { continue };
        let taken = number(&dir.join("memory.current")).unwrap_or(0);
        let used = taken.saturating_sub(reclaimable(dir, ["inactive_file", "active_file"]));
        limits.push(Limit { kind, place: place.to_owned(), bytes, used });
    }
}

fn version_1(dir: &Path, place: &str, limits: &mut Vec<Limit>) {
    let Some(bytes) = number(&dir.join("memory.limit_in_bytes")).filter(|bytes| *bytes < NO_LIMIT_V1) else {
        return;
    };
    let taken = number(&dir.join("memory.usage_in_bytes")).unwrap_or(0);
    let used = taken.saturating_sub(reclaimable(dir, ["total_inactive_file", "total_active_file"]));
    limits.push(Limit { kind: LimitKind::CgroupV1, place: place.to_owned(), bytes, used });
}

/// File pages that the group counts but that the kernel gives up before it kills.
fn reclaimable(dir: &Path, names: [&str; 2]) -> u64 {
    let stat = text(&dir.join("memory.stat")).unwrap_or_default();
    let fields = stat.lines().filter_map(|line| line.split_once(' '));
    let counted =
        fields.filter(|(name, _)| names.contains(name)).filter_map(|(_, value)| value.trim().parse().ok());
    counted.fold(0, u64::saturating_add)
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.trim().parse().ok()
}

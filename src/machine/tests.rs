//! Facts of made-up machines.

use std::fs;
use std::path::Path;

use super::*;

const GB: u64 = 1_000_000_000;
const MEMINFO: &str =
    "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\nCached: 5 kB\n";

/// A tree with these files; the temporary directory goes with the returned guard.
fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Roots) {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let roots = Roots::below(dir.path());
    (dir, roots)
}

/// The budget and its explanation on a machine with 12.3 GB available and these files.
fn budget(files: &[(&str, &str)]) -> (u64, String) {
    let (_dir, roots) = tree(&[&[("proc/meminfo", MEMINFO)], files].concat());
    let memory = Memory::probe(&roots);
    assert_eq!((memory.total, memory.available), (16_384_000_000, 12_288_000_000));
    (memory.budget(), memory.explain())
}

#[test]
fn without_a_limit_the_budget_is_what_is_available() {
    let (bytes, why) = budget(&[]);
    assert_eq!((bytes, why.as_str()), (12_288_000_000, "12.2 GB of the machine's 16.3 GB are available"));
    let (bytes, _) = budget(&[
        ("proc/self/cgroup", "0::/a\n"),
        ("sys/fs/cgroup/a/memory.max", "max\n"),
        ("sys/fs/cgroup/a/memory.high", "max\n"),
        ("sys/fs/cgroup/a/memory.current", "5000000000\n"),
        (
            "proc/self/limits",
            "Limit  Soft Limit  Hard Limit  Units\nMax address space   unlimited  unlimited  bytes\n",
        ),
    ]);
    assert_eq!(bytes, 12_288_000_000);
}

#[test]
fn the_group_with_the_least_room_decides_even_when_it_is_a_parent() {
    let files = [
        ("proc/self/cgroup", "0::/pod/app\n"),
        ("sys/fs/cgroup/pod/app/memory.max", "8000000000\n"),
        ("sys/fs/cgroup/pod/app/memory.current", "1000000000\n"),
        ("sys/fs/cgroup/pod/memory.max", "4000000000\n"),
        ("sys/fs/cgroup/pod/memory.current", "3000000000\n"),
        (
            "sys/fs/cgroup/pod/memory.stat",
            "anon 1500000000\ninactive_file 1000000000\nactive_file 500000000\n",
        ),
    ];
    let (bytes, why) = budget(&files);
    assert_eq!(bytes, 4 * GB - (3 * GB - 1_500_000_000), "file pages can be taken back");
    assert_eq!(why, "memory.max of cgroup /pod is 4.0 GB, 1.5 GB of it used");
    let high = [files.as_slice(), &[("sys/fs/cgroup/pod/app/memory.high", "2000000000\n")]].concat();
    let (bytes, why) = budget(&high);
    assert_eq!((bytes, why.as_str()), (GB, "memory.high of cgroup /pod/app is 2.0 GB, 1.0 GB of it used"));
}

#[test]
fn a_version_1_limit_counts_and_its_giant_does_not() {
    let own = ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/box/one\n1:cpu:/\n0::/\n");
    let (bytes, why) = budget(&[
        own,
        ("sys/fs/cgroup/memory/box/one/memory.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "3000000000\n"),
        ("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "2000000000\n"),
        ("sys/fs/cgroup/memory/box/memory.stat", "total_inactive_file 600000000\ninactive_file 7\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
    ]);
    assert_eq!(bytes, 1_600_000_000);
    assert_eq!(why, "memory.limit_in_bytes of cgroup /box is 3.0 GB, 1.4 GB of it used");
    // In a container the group's own path is not there, and its limit stands at the mount.
    let (bytes, _) = budget(&[own, ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000\n")]);
    assert_eq!(bytes, 2 * GB);
    let (bytes, _) = budget(&[
        ("proc/self/cgroup", "4:cpu,memory:/a\n0::/\n"),
        ("sys/fs/cgroup/cpu,memory/a/memory.limit_in_bytes", "1000000000\n"),
    ]);
    assert_eq!(bytes, GB);
}

#[test]
fn a_limit_on_the_address_space_counts_what_is_mapped() {
    let (bytes, why) = budget(&[
        (
            "proc/self/limits",
            "Max address space         6000000000           unlimited            bytes     \n",
        ),
        ("proc/self/status", "Name:\tx\nVmSize:\t 1000000 kB\n"),
    ]);
    assert_eq!(bytes, 6 * GB - 1_024_000_000);
    assert_eq!(why, "the limit on the address space is 6.0 GB, 1.0 GB of it used");
}

#[test]
fn garbage_sets_no_limit_and_a_full_group_leaves_nothing() {
    let (bytes, _) = budget(&[
        ("proc/self/cgroup", "\n::\nx\n0::/../../other\n0::/a/../b\n4:memory:\n\u{fffd}\n0:/only-two\n"),
        ("sys/fs/cgroup/memory.max", "-1\n"),
        ("sys/fs/cgroup/b/memory.max", "five"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "99999999999999999999999999"),
        ("proc/self/limits", "Max address space\nMax address space  ???"),
    ]);
    assert_eq!(bytes, 12_288_000_000);
    let (bytes, _) = budget(&[
        ("proc/self/cgroup", "0::/a\n"),
        ("sys/fs/cgroup/a/memory.max", "5"),
        ("sys/fs/cgroup/a/memory.current", "18446744073709551615"),
        ("sys/fs/cgroup/a/memory.stat", "inactive_file 18446744073709551615\nactive_file 9\nx\n"),
    ]);
    assert_eq!(bytes, 5);
    let (bytes, _) = budget(&[
        ("proc/self/cgroup", "0::/a\n"),
        ("sys/fs/cgroup/a/memory.max", "5"),
        ("sys/fs/cgroup/a/memory.current", "7"),
    ]);
    assert_eq!(bytes, 0);
}

#[test]
fn without_meminfo_the_system_is_asked() {
    for files in [[("etc/x", "")], [("proc/meminfo", "MemTotal: many kB\n\0\0")]] {
        let (_dir, roots) = tree(&files);
        let memory = Memory::probe(&roots);
        assert!(memory.total > 0 && memory.available <= memory.total, "{memory:?}");
    }
}

#[test]
fn an_old_kernel_says_free_and_cached() {
    let (_dir, roots) = tree(&[("proc/meminfo", "MemTotal: 100 kB\nMemFree: 10 kB\nCached: 20 kB\n")]);
    assert_eq!(Memory::probe(&roots).available, 30 * 1024);
}

const CPUINFO: &str = "processor\t: 0\nmodel name\t: A Processor\nphysical id\t: 0\ncore id\t: 0\n\n\
    processor\t: 1\nmodel name\t: A Processor\nphysical id\t: 0\ncore id\t: 0\n\n\
    processor\t: 2\nmodel name\t: A Processor\nphysical id\t: 0\ncore id\t: 1\n\n\
    processor\t: 3\nmodel name\t: A Processor\nphysical id\t: 0\ncore id\t: 1\n";

#[test]
fn cores_that_two_processors_share_count_once() {
    let (_dir, roots) = tree(&[("proc/cpuinfo", CPUINFO)]);
    let processor = Processor::probe(&roots);
    assert_eq!(processor.name, "A Processor");
    assert_eq!((processor.physical_cores, processor.logical_cores), (Some(2), 4));
    assert!(processor.usable > 0);
    let (_dir, roots) = tree(&[("proc/cpuinfo", ":::\nprocessor: x\n")]);
    assert!(Processor::probe(&roots).logical_cores > 0, "the system is asked");
}

const INFORMATION: &str = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 44\nGPU UUID: \t GPU-0\n";
const NVRM: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build  (builder)\nGCC version: gcc 13.2.0\n";

fn accelerated() -> (tempfile::TempDir, Roots) {
    let (dir, roots) = tree(&[
        ("proc/cpuinfo", CPUINFO),
        ("proc/meminfo", MEMINFO),
        ("proc/driver/nvidia/version", NVRM),
        ("proc/driver/nvidia/gpus/0000:01:00.0/information", INFORMATION),
        ("proc/driver/nvidia/gpus/0000:02:00.0/information", "no model"),
        ("sys/class/drm/version", "drm"),
        ("sys/class/drm/card0-HDMI-A-1/device/vendor", "0x9999"),
        ("sys/devices/pci/gpu/vendor", "0x8086\n"),
        ("sys/devices/pci/gpu/device", "0x56a0\n"),
        ("sys/class/accel/accel0/device/vendor", "0x8086\n"),
        ("sys/devices/soc0/machine", "SM8650\n\0"),
        ("dev/nvidia0", ""),
        ("dev/nvidiactl", ""),
        ("dev/null", ""),
        ("dev/dri/renderD128", ""),
        ("dev/dri/card0", ""),
        ("dev/accel/accel0", ""),
        ("dev/fastrpc-cdsp", ""),
        ("libs/libcudart.so.13.2.1", "library"),
        ("etc/os-release", "NAME=x\nPRETTY_NAME=\"A System 12\"\n"),
        ("proc/sys/kernel/osrelease", "6.1.0\n"),
    ]);
    fs::write(
        dir.path().join("etc/ld.so.conf"),
        format!("# more\ninclude x\n{}\n", dir.path().join("libs").display()),
    )
    .unwrap();
    (dir, roots)
}

#[cfg(unix)]
fn link(target: &str, path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(target, path).unwrap();
}

#[cfg(unix)]
#[test]
fn accelerators_are_read_with_their_drivers_and_libraries() {
    let (dir, roots) = accelerated();
    link("../../../devices/pci/gpu", &dir.path().join("sys/class/drm/card0/device"));
    link("../../../devices/pci/gpu", &dir.path().join("sys/class/drm/renderD128/device"));
    link("../../bus/drivers/xe", &dir.path().join("sys/devices/pci/gpu/driver"));
    link("libcudart.so.13.2.1", &dir.path().join("libs/libcudart.so.13"));
    let found = Accelerators::probe(&roots);
    assert_eq!(found.nvidia_driver.as_deref(), Some("560.35.03"));
    let gpu = NvidiaGpu { name: "NVIDIA H100 80GB HBM3".to_owned(), bus: "0000:01:00.0".to_owned() };
    assert_eq!(found.nvidia_gpus, [gpu]);
    let devices: Vec<String> = found.devices.iter().map(|d| format!("{} {}", d.name, d.model())).collect();
    assert_eq!(devices, ["renderD128 0x8086:0x56a0 xe", "accel0 0x8086: "], "card0 is the same GPU");
    assert_eq!(found.devices[0].vendor, Some("Intel"));
    assert_eq!(found.nodes, ["fastrpc-cdsp", "nvidia0", "nvidiactl", "accel/accel0", "dri/renderD128"]);
    assert_eq!(found.soc.as_deref(), Some("SM8650"));
    let runtime = found.library("libcudart.so.13").unwrap();
    assert_eq!(runtime.file.as_deref(), Some("libcudart.so.13.2.1"));
    assert_eq!(found.library("libcuda.so.1"), None);
}

#[test]
fn a_fingerprint_follows_drivers_and_processors_but_neither_memory_nor_kernel() {
    let (dir, roots) = accelerated();
    let of = || Machine::probe(&roots).fingerprint();
    let first = of();
    assert_eq!(first.len(), 16);
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("proc/meminfo", "MemTotal: 7 kB\nMemAvailable: 7 kB\n");
    if cfg!(target_os = "linux") {
        write("proc/sys/kernel/osrelease", "6.2.0\n");
    }
    assert_eq!(of(), first);
    write("proc/driver/nvidia/version", &NVRM.replace("560.35.03", "570.1.2"));
    let other_driver = of();
    assert_ne!(other_driver, first);
    write("proc/cpuinfo", &CPUINFO.replace("A Processor", "Another"));
    assert_ne!(of(), other_driver);
}

#[test]
fn a_tree_without_anything_gives_a_machine_without_accelerators() {
    let (_dir, roots) = tree(&[]);
    let machine = Machine::probe(&roots);
    let nothing = &machine.accelerators;
    assert!(nothing.nvidia_driver.is_none() && nothing.devices.is_empty() && nothing.nodes.is_empty());
    assert!(nothing.libraries.iter().all(|library| library.path.is_none()));
    assert!(serde_json::to_string(&machine).unwrap().contains("\"processor\""));
}

#[test]
fn this_machine_can_be_read() {
    let machine = Machine::probe(&Roots::default());
    assert!(machine.memory.budget() > 0 && machine.memory.budget() <= machine.memory.total);
    assert_eq!(machine.fingerprint(), Machine::probe(&Roots::default()).fingerprint());
    println!("{}\n{}", serde_json::to_string_pretty(&machine).unwrap(), machine.memory.explain());
}

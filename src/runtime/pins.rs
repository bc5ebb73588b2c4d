//! Which wheels ONNX Runtime is taken from: versions, sizes and hashes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which build of ONNX Runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LibraryVariant {
    /// For processors alone.
    #[default]
    Cpu,
    /// For NVIDIA GPUs too.
    Cuda,
}

impl LibraryVariant {
    /// Every variant.
    pub const ALL: &[Self] = &[Self::Cpu, Self::Cuda];

    /// The name on the command line and in the cache.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl fmt::Display for LibraryVariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LibraryVariant {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|variant| variant.name() == name).ok_or_else(|| {
            Error::Request(format!("there is no build {name} of ONNX Runtime; there are cpu and cuda"))
        })
    }
}

/// One wheel of the Python package index, for one kind of machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wheel {
    pub(super) variant: LibraryVariant,
    /// The project's name on the index.
    pub(super) project: &'static str,
    pub(super) version: &'static str,
    /// As [`std::env::consts::OS`].
    os: &'static str,
    /// As [`std::env::consts::ARCH`].
    arch: &'static str,
    /// The platform tag that pip is asked for.
    pub(super) platform: &'static str,
    pub(super) bytes: u64,
    /// What is taken out of it, in bytes.
    pub(super) unpacked: u64,
    pub(super) sha256: &'static str,
}

/// The interpreter whose wheels are pinned, whatever Python the user has: the library in them is the same.
pub(super) const PYTHON_VERSION: &str = "3.12";
pub(super) const PYTHON_ABI: &str = "cp312";

const CPU: &str = "1.32.0";
const CUDA: &str = "1.31.1";

/// The index has no `onnxruntime` for Intel Macs since 1.24 and none for musl, and no `onnxruntime-gpu` for ARM.
pub(super) const WHEELS: &[Wheel] = &[
    Wheel {
        variant: LibraryVariant::Cpu,
        project: "onnxruntime",
        version: CPU,
        os: "linux",
        arch: "x86_64",
        platform: "manylinux_2_28_x86_64",
        bytes: 27_780_211,
        unpacked: 35_175_180,
        sha256: "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
    },
    Wheel {
        variant: LibraryVariant::Cpu,
        project: "onnxruntime",
        version: CPU,
        os: "linux",
        arch: "aarch64",
        platform: "manylinux_2_28_aarch64",
        bytes: 23_196_724,
        unpacked: 27_700_596,
        sha256: "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
    },
    Wheel {
        variant: LibraryVariant::Cpu,
        project: "onnxruntime",
        version: CPU,
        os: "macos",
        arch: "aarch64",
        platform: "macosx_14_0_arm64",
        bytes: 22_519_308,
        unpacked: 35_608_212,
        sha256: "d52510bbbcc880c13b826f7d75cdf33ac5cf0bb864d960000fc29ce73f0cb83e",
    },
    Wheel {
        variant: LibraryVariant::Cpu,
        project: "onnxruntime",
        version: CPU,
        os: "windows",
        arch: "x86_64",
        platform: "win_amd64",
        bytes: 16_698_767,
        unpacked: 23_032_670,
        sha256: "efe7456952c243a05a53d5b8732953625144642c2f3989094277f6217f0c0c40",
    },
    Wheel {
        variant: LibraryVariant::Cpu,
        project: "onnxruntime",
        version: CPU,
        os: "windows",
        arch: "aarch64",
        platform: "win_arm64",
        bytes: 16_030_610,
        unpacked: 21_162_294,
        sha256: "64d394c69d561af3efd4d4f49dcac8f11d0ce135a20701c16d53b74056cd4cf8",
    },
    Wheel {
        variant: LibraryVariant::Cuda,
        project: "onnxruntime-gpu",
        version: CUDA,
        os: "linux",
        arch: "x86_64",
        platform: "manylinux_2_28_x86_64",
        bytes: 255_569_273,
        unpacked: 314_785_345,
        sha256: "05d548956197b9d01f59b625de740e0d6be3593f874e241a12dc0362650ecdf7",
    },
    Wheel {
        variant: LibraryVariant::Cuda,
        project: "onnxruntime-gpu",
        version: CUDA,
        os: "windows",
        arch: "x86_64",
        platform: "win_amd64",
        bytes: 168_098_228,
        unpacked: 214_559_965,
        sha256: "2bb1e9373baba88f6415257f5b6a589d23e23c16004f7d89adf4344eada5749e",
    },
];

/// The wheels for this machine.
pub(super) fn wheels_here() -> impl Iterator<Item = &'static Wheel> {
    let musl = cfg!(target_env = "musl");
    WHEELS.iter().filter(move |wheel| {
        !musl && wheel.os == std::env::consts::OS && wheel.arch == std::env::consts::ARCH
    })
}

/// The wheel of one variant for this machine.
pub(super) fn wheel(variant: LibraryVariant) -> Result<&'static Wheel> {
    wheels_here().find(|wheel| wheel.variant == variant).ok_or_else(|| {
        Error::library(format!(
            "the Python package index has no {variant} build for {}; get a library for this machine elsewhere and \
             install it with `llava-phi runtime install --from FILE`",
            this_machine()
        ))
    })
}

/// The directory of a wheel's library in the cache.
pub(super) fn slot(wheel: &Wheel) -> String {
    format!("{}-{}", wheel.version, wheel.variant)
}

/// `linux on x86_64`.
pub(super) fn this_machine() -> String {
    let musl = if cfg!(target_env = "musl") { " with musl" } else { "" };
    format!("{} on {}{musl}", std::env::consts::OS, std::env::consts::ARCH)
}

/// Bytes as people say them: `27.8 MB`.
pub(super) fn megabytes(bytes: u64) -> String {
    let tenths = bytes.div_ceil(100_000);
    format!("{}.{} MB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_is_a_whole_hash_of_a_wheel_that_shrinks_what_it_holds() {
        for wheel in WHEELS {
            assert_eq!(wheel.sha256.len(), 64, "{wheel:?}");
            assert!(
                wheel.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)),
                "{wheel:?}"
            );
            assert!(wheel.unpacked > wheel.bytes, "{wheel:?}");
        }
    }

    #[test]
    fn a_machine_has_one_wheel_of_a_variant_at_most() {
        for (n, one) in WHEELS.iter().enumerate() {
            for other in &WHEELS[n + 1..] {
                assert_ne!((one.variant, one.os, one.arch), (other.variant, other.os, other.arch));
            }
        }
    }

    #[test]
    fn sizes_are_said_in_megabytes_rounded_up() {
        assert_eq!(megabytes(27_780_211), "27.8 MB");
        assert_eq!(megabytes(1), "0.1 MB");
        assert_eq!(megabytes(0), "0.0 MB");
    }
}

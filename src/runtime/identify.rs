//! What a file is that is said to be ONNX Runtime or a provider's plugin, before it is loaded: loading runs its code.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

#[cfg(feature = "load-dynamic")]
use crate::error::{Error, Result};

/// Reads the head of a file and refuses what is no whole shared library for this machine, with a sentence: the path,
/// what is there, and what to do.
pub(super) fn check_file(path: &Path) -> std::result::Result<(), String> {
    match examine(path) {
        Ok(()) => Ok(()),
        Err(Fault::Zip) => Err(format!(
            "{path} is a zip archive; if it is a wheel of ONNX Runtime, install it with `llava-phi runtime install \
             --from {path}`",
            path = path.display()
        )),
        Err(Fault::What(what)) => {
            Err(format!("{} {what}; name a library of ONNX Runtime {ADVICE}", path.display()))
        }
    }
}

const ADVICE: &str = "1.24 or newer, or let `llava-phi runtime install` fetch one";

/// The same for a library that is said to bring a provider.
pub(super) fn check_plugin(path: &Path) -> std::result::Result<(), String> {
    let what = match examine(path) {
        Ok(()) if mentions(path, b"CreateEpFactories") => return Ok(()),
        Ok(()) => "is a library but not a provider's plugin (it has no CreateEpFactories)".to_owned(),
        Err(Fault::Zip) => "is a zip archive, which must be unpacked first".to_owned(),
        Err(Fault::What(what)) => what,
    };
    Err(format!("{} {what}; name the plugin's own library", path.display()))
}

/// Why a file is no library that could be loaded.
enum Fault {
    Zip,
    /// The end of a sentence that begins with the path.
    What(String),
}

fn examine(path: &Path) -> std::result::Result<(), Fault> {
    let refused = |what: &dyn fmt::Display| Err(Fault::What(what.to_string()));
    let meta = match path.metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return refused(&"does not exist"),
        Err(e) => return refused(&format_args!("cannot be read ({e})")),
    };
    if meta.is_dir() {
        return refused(&"is a directory");
    }
    if !meta.is_file() {
        return refused(&"is not a regular file");
    }
    let head = match head(path) {
        Ok(head) => head,
        Err(e) => return refused(&format_args!("cannot be read ({e})")),
    };
    match Kind::of(&head, meta.len()) {
        Kind::Library { os, arch, .. } if os != std::env::consts::OS || arch != std::env::consts::ARCH => {
            let here = format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH);
            refused(&format_args!("is a library for {os} on {arch}, and this is {here}"))
        }
        Kind::Library { ends, .. } if ends > meta.len() => {
            refused(&format_args!("is cut off: it has {} bytes of at least {ends}", meta.len()))
        }
        Kind::Library { .. } => Ok(()),
        Kind::Wheel => Err(Fault::Zip),
        Kind::Other(what) => refused(&what),
    }
}

/// Whether a file is a zip archive, as wheels are.
pub(super) fn is_zip(path: &Path) -> std::io::Result<bool> {
    Ok(head(path)?.starts_with(b"PK\x03\x04"))
}

/// The lowest version that this program can use: `1.24`.
#[cfg(feature = "load-dynamic")]
pub(super) fn lowest() -> String {
    format!("1.{}", ort::MINOR_VERSION)
}

/// The version that a library tells, `1.32`; loads it for a moment.
///
/// # Errors
/// [`Error::Library`] when it is no library for this machine, not ONNX Runtime, or too old.
#[cfg(feature = "load-dynamic")]
pub(super) fn version(path: &Path) -> Result<String> {
    check_file(path).map_err(Error::library)?;
    match ort::util::probe(path) {
        Some(minor) if minor >= ort::MINOR_VERSION => Ok(full_version(path, minor)),
        Some(minor) => Err(too_old(path, &format!("1.{minor}"))),
        None if mentions(path, b"OrtGetApiBase") => Err(not_loaded(path)),
        None => Err(not_onnxruntime(path)),
    }
}

/// Loads a library for the life of the process and returns its version.
///
/// # Errors
/// As [`version`]; nothing stays loaded then.
#[cfg(feature = "load-dynamic")]
pub(super) fn load(path: &Path) -> Result<(ort::environment::EnvironmentBuilder, String)> {
    use ort::LoadDynamicError as E;

    check_file(path).map_err(Error::library)?;
    let builder = ort::init_from(path).map_err(|e| match &e {
        E::MissingApi { .. } | E::InvalidVersionString => not_onnxruntime(path),
        E::BadVersion { version_str, .. } => too_old(path, version_str),
        E::Dlopen { error, .. } => {
            let told =
                std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
            not_loaded(path).because(told)
        }
    })?;
    match ort::util::probe(path) {
        Some(minor) => Ok((builder, full_version(path, minor))),
        None => Err(Error::library(format!(
            "{} is not ONNX Runtime 1; name a library of ONNX Runtime {ADVICE}",
            path.display()
        ))),
    }
}

#[cfg(feature = "load-dynamic")]
fn not_onnxruntime(path: &Path) -> Error {
    Error::library(format!(
        "{} is a library but not ONNX Runtime (it has no OrtGetApiBase); name a library of ONNX Runtime {ADVICE}",
        path.display()
    ))
}

#[cfg(feature = "load-dynamic")]
fn too_old(path: &Path, version: &str) -> Error {
    Error::library(format!(
        "{} is version {version}, and this program needs {} or newer; let `llava-phi runtime install` fetch one",
        path.display(),
        lowest()
    ))
}

#[cfg(feature = "load-dynamic")]
fn not_loaded(path: &Path) -> Error {
    Error::library(format!(
        "the system could not load {}; a library that it needs may be missing or too old, so let \
         `llava-phi runtime install` fetch one that is built for many systems",
        path.display()
    ))
}

/// The file's name often tells the whole version: `libonnxruntime.so.1.32.0`. The library's own word is `1.32`.
#[cfg(feature = "load-dynamic")]
fn full_version(path: &Path, minor: u32) -> String {
    let told = format!("1.{minor}");
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let in_name: String = name
        .split_once("onnxruntime.")
        .map(|(_, rest)| rest.trim_start_matches("so.").trim_end_matches(".dylib"))
        .filter(|rest| rest.starts_with(&format!("{told}.")))
        .unwrap_or_default()
        .to_owned();
    let whole = !in_name.is_empty() && in_name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if whole { in_name } else { told }
}

/// Whether the bytes `needle` stand anywhere in the file.
fn mentions(path: &Path, needle: &[u8]) -> bool {
    std::fs::read(path).is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
}

/// Enough of the beginning for the headers that say what a file is and how long it should be.
fn head(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(64 * 1024).read_to_end(&mut head)?;
    Ok(head)
}

/// What a file is, by its first bytes.
#[derive(Debug, PartialEq)]
enum Kind {
    /// A shared library; the file must reach to `ends`.
    Library { os: &'static str, arch: &'static str, ends: u64 },
    /// A zip archive.
    Wheel,
    /// Anything else, as the end of a sentence.
    Other(&'static str),
}

impl Kind {
    fn of(head: &[u8], bytes: u64) -> Self {
        if bytes == 0 {
            return Self::Other("is empty");
        }
        let text =
            head.iter().take(512).all(|&b| b == b'\t' || b == b'\n' || b == b'\r' || (32..127).contains(&b));
        match head {
            [0x7f, b'E', b'L', b'F', ..] => elf(head).unwrap_or(Self::Other("is a damaged library")),
            [0xcf, 0xfa, 0xed, 0xfe, ..] => mach(head).unwrap_or(Self::Other("is a damaged library")),
            [0xca, 0xfe, 0xba, 0xbe, ..] => fat(head).unwrap_or(Self::Other("is a damaged library")),
            [b'M', b'Z', ..] => pe(head).unwrap_or(Self::Other("is a damaged library")),
            [b'P', b'K', 3, 4, ..] => Self::Wheel,
            _ if text => Self::Other("is a text file"),
            _ => Self::Other("is not a shared library"),
        }
    }
}

fn u16_at(head: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(head: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(head: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?))
}

/// Linux and Android. The table of sections is the last thing in the file, so its end is the file's.
fn elf(head: &[u8]) -> Option<Kind> {
    let arch = match u16_at(head, 18)? {
        62 => "x86_64",
        183 => "aarch64",
        3 => "x86",
        40 => "arm",
        _ => "another machine",
    };
    // Only 64-bit little-endian files are read further; the rest is for another machine anyway.
    if head.get(4..6)? != [2, 1] {
        return Some(Kind::Library { os: "linux", arch, ends: 0 });
    }
    let sections =
        u64_at(head, 40)?.checked_add(u64::from(u16_at(head, 58)?) * u64::from(u16_at(head, 60)?))?;
    let first = usize::try_from(u64_at(head, 32)?).ok()?;
    let size = usize::from(u16_at(head, 54)?);
    let mut ends = sections;
    for place in 0..usize::from(u16_at(head, 56)?) {
        let at = first.checked_add(place * size)?;
        ends = ends.max(u64_at(head, at.checked_add(8)?)?.checked_add(u64_at(head, at.checked_add(32)?)?)?);
    }
    let os = if cfg!(target_os = "android") { "android" } else { "linux" };
    Some(Kind::Library { os, arch, ends })
}

/// macOS, one architecture.
fn mach(head: &[u8]) -> Option<Kind> {
    let arch = mach_arch(u32_at(head, 4)?);
    let mut ends = 0;
    let mut at = 32_usize;
    for _ in 0..u32_at(head, 16)? {
        const SEGMENT_64: u32 = 0x19;
        if u32_at(head, at)? == SEGMENT_64 {
            ends = ends.max(u64_at(head, at + 40)?.checked_add(u64_at(head, at + 48)?)?);
        }
        at = at.checked_add(usize::try_from(u32_at(head, at + 4)?).ok()?.max(8))?;
    }
    Some(Kind::Library { os: apple(), arch, ends })
}

/// macOS, several architectures in one file; its numbers are big endian.
fn fat(head: &[u8]) -> Option<Kind> {
    let number = |at: usize| Some(u32_at(head, at)?.swap_bytes());
    let mut found = Kind::Other("is a library for other machines");
    for place in 0..usize::try_from(number(4)?).ok()?.min(16) {
        let at = 8 + place * 20;
        let ends = u64::from(number(at + 8)?) + u64::from(number(at + 12)?);
        let arch = mach_arch(number(at)?);
        if arch == std::env::consts::ARCH || place == 0 {
            found = Kind::Library { os: apple(), arch, ends };
        }
    }
    Some(found)
}

fn mach_arch(cpu: u32) -> &'static str {
    match cpu {
        0x0100_0007 => "x86_64",
        0x0100_000c => "aarch64",
        _ => "another machine",
    }
}

fn apple() -> &'static str {
    if cfg!(target_os = "ios") { "ios" } else { "macos" }
}

/// Windows.
fn pe(head: &[u8]) -> Option<Kind> {
    let start = usize::try_from(u32_at(head, 60)?).ok()?;
    if head.get(start..start.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    let arch = match u16_at(head, start + 4)? {
        0x8664 => "x86_64",
        0xaa64 => "aarch64",
        0x014c => "x86",
        _ => "another machine",
    };
    let table = start + 24 + usize::from(u16_at(head, start + 20)?);
    let mut ends = 0;
    for place in 0..usize::from(u16_at(head, start + 6)?) {
        let at = table + place * 40;
        ends = ends.max(u64::from(u32_at(head, at + 16)?) + u64::from(u32_at(head, at + 20)?));
    }
    Some(Kind::Library { os: "windows", arch, ends })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of `sections` at the end of `bytes`, for the machine `machine`.
    fn elf_file(machine: u8, bytes: u64) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        head[18] = machine;
        head[40..48].copy_from_slice(&(bytes - 64).to_le_bytes());
        head[58] = 64;
        head[60] = 1;
        head
    }

    #[test]
    fn a_file_is_known_by_its_first_bytes() {
        assert_eq!(Kind::of(b"", 0), Kind::Other("is empty"));
        assert_eq!(Kind::of(b"hello\n", 6), Kind::Other("is a text file"));
        assert_eq!(Kind::of(&[0, 1, 2, 200], 4), Kind::Other("is not a shared library"));
        assert_eq!(Kind::of(b"PK\x03\x04rest", 8), Kind::Wheel);
        assert_eq!(
            Kind::of(&elf_file(183, 128), 128),
            Kind::Library { os: "linux", arch: "aarch64", ends: 128 }
        );
        assert_eq!(Kind::of(&[0xcf, 0xfa, 0xed, 0xfe], 4), Kind::Other("is a damaged library"));
    }

    #[test]
    fn no_head_of_any_length_makes_it_panic() {
        let mut mach = vec![0xcf, 0xfa, 0xed, 0xfe];
        mach.extend([0xff; 60]);
        let mut fat = vec![0xca, 0xfe, 0xba, 0xbe];
        fat.extend([0xff; 60]);
        let mut pe = vec![b'M', b'Z'];
        pe.extend([0xff; 80]);
        let mut wild = elf_file(62, 128);
        wild[6..].fill(0xff);
        for file in [elf_file(62, 128), mach, fat, pe, wild] {
            for end in 0..=file.len() {
                Kind::of(&file[..end], end as u64);
            }
        }
    }

    #[test]
    fn a_file_is_refused_with_its_path_what_it_is_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, bytes: &[u8], expected: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let text = check_file(&path).unwrap_err();
            assert!(text.starts_with(&format!("{} {expected}", path.display())), "{text}");
            assert!(text.contains("llava-phi runtime install"), "{text}");
        };
        check("empty", b"", "is empty; name a library of ONNX Runtime 1.24 or newer");
        check("text", b"hello", "is a text file; ");
        check("wheel", b"PK\x03\x04", "is a zip archive; ");
        check("arm", &elf_file(40, 128), "is a library for linux on arm, and this is ");
        check("dos", b"MZ", "is a damaged library; ");
        let error = check_file(&dir.path().join("none")).unwrap_err();
        assert!(error.contains("none does not exist; name a library"), "{error}");
        assert!(check_file(dir.path()).unwrap_err().contains("is a directory"));
    }

    #[test]
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn a_library_that_is_cut_off_is_not_loaded() {
        let machine = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cut.so");
        std::fs::write(&path, elf_file(machine, 4096)).unwrap();
        let error = check_file(&path).unwrap_err();
        assert!(error.contains("cut.so is cut off: it has 64 bytes of at least 4096"), "{error}");
    }
}

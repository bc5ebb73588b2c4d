//! The floors of the crate, as a test: a module may name only modules on floors below its own.

use std::{collections::BTreeMap, fs, path::Path};

/// Lowest first. Modules on one line stand side by side and may not name each other.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["disk"],
    &["package", "machine", "compiled", "kernels"],
    &["image", "text"],
    &["runtime"],
    &["model"],
    &["generate"],
    &["engine"],
    &["chat"],
    &["server"],
    &["cli"],
];

/// Crates that one module owns; nobody else may name them.
const OWNED: &[(&str, &str)] = &[
    ("ort::", "runtime"),
    ("tokenizers::", "text"),
    ("fast_image_resize::", "image"),
    ("llguidance::", "generate"),
    ("axum::", "server"),
    ("reqwest::", "server"),
    ("tokio::", "server"),
    ("clap::", "cli"),
    ("rustyline::", "cli"),
    ("indicatif::", "cli"),
];

#[test]
fn modules_depend_downwards() {
    let floor: BTreeMap<&str, usize> =
        FLOORS.iter().enumerate().flat_map(|(n, names)| names.iter().map(move |name| (*name, n))).collect();
    let mut faults = Vec::new();
    visit(Path::new("src"), &mut |path, text| {
        let Some(module) = module_of(path).filter(|m| floor.contains_key(m.as_str())) else { return };
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for used in code.split("crate::").skip(1).map(first_word) {
                let fault = match floor.get(used) {
                    None if used.is_empty() => {
                        "one module per `use crate::`, so that grep finds it".to_owned()
                    }
                    Some(&n) if used != module && n >= floor[module.as_str()] => {
                        format!("{module} names {used}")
                    }
                    _ => continue,
                };
                faults.push(format!("{}:{}: {fault}", path.display(), number + 1));
            }
            for (name, owner) in OWNED {
                if module != *owner && code.split(is_not_path).any(|word| word.starts_with(name)) {
                    faults.push(format!("{}:{}: {name} belongs to {owner}", path.display(), number + 1));
                }
            }
        }
    });
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn every_module_has_a_floor() {
    let placed: Vec<&str> = FLOORS.iter().flat_map(|names| names.iter().copied()).collect();
    let unplaced: Vec<String> = fs::read_dir("src")
        .expect("src is readable")
        .map(|entry| entry.expect("entry is readable").file_name().into_string().expect("names are UTF-8"))
        .map(|name| name.trim_end_matches(".rs").to_owned())
        .filter(|name| name != "lib" && name != "main" && !placed.contains(&name.as_str()))
        .collect();
    assert!(unplaced.is_empty(), "give these modules a floor: {unplaced:?}");
}

/// `src/model/vision.rs` and `src/model.rs` both belong to `model`.
fn module_of(path: &Path) -> Option<String> {
    let first = path.strip_prefix("src").ok()?.iter().next()?.to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

fn first_word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// Splits code into paths such as `ort::session::Session`, so that `support::x` does not count as `ort::`.
fn is_not_path(c: char) -> bool {
    !c.is_alphanumeric() && c != '_' && c != ':'
}

fn visit(dir: &Path, see: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(dir).expect("src is readable") {
        let path = entry.expect("entry is readable").path();
        if path.is_dir() {
            visit(&path, see);
        } else if path.extension().is_some_and(|e| e == "rs") {
            see(&path, &fs::read_to_string(&path).expect("source is UTF-8"));
        }
    }
}

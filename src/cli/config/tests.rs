//! What wins over what, and what is refused.

use std::{ffi::OsString, fs};

use clap::CommandFactory as _;
use tempfile::TempDir;

use super::*;
use crate::cli::Arguments;

/// The settings of `serve` with this file, these variables and these words.
fn printed(text: &str, variables: &[(&str, &str)], words: &[&str]) -> Result<(String, PathBuf)> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, text).unwrap();
    let file = path.to_str().unwrap();
    let words: Vec<OsString> =
        ["llava-phi", "--config", file, "serve"].iter().chain(words).map(OsString::from).collect();
    let variable = |name: &str| {
        variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
    };
    let layers = Layers::new(Arguments::command(), &words, &variable)?;
    let matches = layers.program.clone().try_get_matches_from(&words).unwrap();
    Ok((layers.print(&matches)?, path))
}

/// The setting `key` as it is printed: what it came from, and its value.
fn setting(printed: &str, key: &str) -> (String, String) {
    let lines: Vec<&str> = printed.lines().collect();
    let start = format!("{key} = ");
    let at = lines.iter().position(|line| line.starts_with(&start)).unwrap();
    (lines[at - 1].trim_start_matches("# ").to_owned(), lines[at][start.len()..].to_owned())
}

#[test]
fn each_layer_wins_over_the_next() {
    let file = "parallel = 2\n[serve]\nparallel = 3\n";
    let variables = [("LLAVA_PHI_SERVE_PARALLEL", "4")];
    let check = |file: &str, variables: &[(&str, &str)], words: &[&str], origin: &str, value: &str| {
        let (text, path) = printed(file, variables, words).unwrap();
        let (from, is) = setting(&text, "parallel");
        assert_eq!((from.replace(path.to_str().unwrap(), "FILE").as_str(), is.as_str()), (origin, value));
    };
    check("", &[], &[], "default", "8");
    check("parallel = 2\n", &[], &[], "FILE:1", "2");
    check(file, &[], &[], "FILE:3", "3");
    check(file, &variables, &[], "environment variable LLAVA_PHI_SERVE_PARALLEL", "4");
    check(file, &variables, &["--parallel", "5"], "--parallel", "5");
    check(file, &[("LLAVA_PHI_SERVE_PARALLEL", "")], &[], "FILE:3", "3");
}

#[test]
fn lists_and_switches_have_every_layer_too() {
    let origins = "[serve]\nallow-origin = [\"https://a.example\"]\nlow-memory = true\noffline = true\n";
    let (text, _) = printed(origins, &[], &[]).unwrap();
    assert_eq!(setting(&text, "allow-origin").1, "[\"https://a.example\"]");
    assert_eq!(setting(&text, "low-memory").1, "true");
    assert_eq!(setting(&text, "offline").1, "true");
    let variables = [
        ("LLAVA_PHI_SERVE_ALLOW_ORIGIN", "https://b.example, https://c.example"),
        ("LLAVA_PHI_SERVE_LOW_MEMORY", "false"),
    ];
    let (text, _) = printed(origins, &variables, &[]).unwrap();
    assert_eq!(setting(&text, "allow-origin").1, "[\"https://b.example\", \"https://c.example\"]");
    assert_eq!(setting(&text, "low-memory").1, "false");
    let (text, _) = printed(origins, &variables, &["--allow-origin", "https://d.example"]).unwrap();
    assert_eq!(setting(&text, "allow-origin").1, "[\"https://d.example\"]");
}

#[test]
fn every_option_of_serve_has_a_key_and_a_variable() {
    let program = with_variables(Arguments::command());
    let serve = program.find_subcommand(SERVE).unwrap();
    let args: Vec<&Arg> = serve.get_arguments().filter(|arg| arg.get_long().is_some()).collect();
    assert!(args.len() > 30);
    for arg in args.into_iter().filter(|arg| !NO_KEYS.contains(&arg.get_long().unwrap())) {
        let name = arg.get_env().unwrap().to_str().unwrap();
        assert!(name.starts_with("LLAVA_PHI_"), "{name}");
    }
}

#[test]
fn what_is_printed_gives_the_same_settings() {
    let words = ["--port", "0", "--model-name", "a \"b\" \\ c", "--memory-limit", "4GB", "--low-memory"];
    let (first, _) =
        printed("[serve]\nprovider-option = [\"cuda.enable_cudnn=1\"]\nqueue = 0x10\n", &[], &words).unwrap();
    let (second, path) = printed(&first, &[], &[]).unwrap();
    let set = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        // In no order: what has a value comes before what has none.
        lines.map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(set(&first), set(&second));
    assert_eq!(setting(&second, "queue").1, "16");
    assert!(setting(&second, "port").0.starts_with(path.to_str().unwrap()));
    toml::from_str::<toml::Table>(&first).unwrap();
}

#[test]
fn what_cannot_be_is_refused_with_its_line() {
    let check = |text: &str, words: &[&str]| {
        let error = printed(text, &[], &[]).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    };
    check("\n\nporte = 1", &["config.toml:3: ", "no option porte", "did you mean port?"]);
    check("[serve]\n\nmax-imagse = 1", &["config.toml:3: ", "of serve", "did you mean max-images?"]);
    check("[serve]\nquestion = 1", &["config.toml:2: ", "no option question of serve"]);
    check("[serve]\nport = \"many\"", &["config.toml:2: ", "many", "--port"]);
    check("[serve]\nport = 70000", &["config.toml:2: ", "70000"]);
    check("[serve]\nport = true", &["config.toml:2: ", "port is true"]);
    check("[serve]\nmodel = 5", &["config.toml:2: ", "model is 5", "quotes"]);
    check("[serve]\nlow-memory = \"true\"", &["config.toml:2: ", "true or false"]);
    check("[serve]\nport = [1, 2]", &["config.toml:2: ", "give no list"]);
    check("[serve]\nport = 2026-01-01", &["config.toml:2: ", "port is neither"]);
    check("[serve]\nport = ", &["config.toml:2: "]);
    check("[serve]\nconfig = \"other\"", &["config.toml:2: ", "no option config"]);
    let error = printed("", &[("LLAVA_PHI_SERVE_PORT", "many")], &[]).unwrap_err().to_string();
    assert!(error.contains("environment variable LLAVA_PHI_SERVE_PORT") && error.contains("many"), "{error}");
    let error = printed("", &[("LLAVA_PHI_SERVE_LOW_MEMORY", "maybe")], &[]).unwrap_err().to_string();
    assert!(error.contains("LLAVA_PHI_SERVE_LOW_MEMORY"), "{error}");
}

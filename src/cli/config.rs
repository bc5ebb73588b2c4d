//! A file of arguments that need not be given each time.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, Command};
use toml::{Table, Value};

use crate::error::{Error, Result};

/// The variable that names the file.
pub(super) const VARIABLE: &str = "LLAVA_PHI_CONFIG";

/// The option that names the file.
const OPTION: &str = "--config";

/// The program's words with those of the configuration file among them.
///
/// The file is what `--config` names, else the variable, else `config.toml` in the user's configuration directory if
/// there is one. Its keys are the long names of options; a command takes from it those that it knows. What is given on
/// the command line or in the environment counts for more.
///
/// # Errors
/// [`Error::Request`] for a file that cannot be read, that is no TOML, or that has a key which no command takes.
pub(super) fn with_file(program: &Command, words: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some((path, chosen)) = file(&words) else { return Ok(words) };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !chosen => return Ok(words),
        Err(e) => return Err(refused(&path, &format!("the file cannot be read ({e})"))),
    };
    let table: Table = toml::from_str(&text)
        .map_err(|e| refused(&path, &e.to_string().split_whitespace().collect::<Vec<_>>().join(" ")))?;
    let known = options(program);
    let mut nested = Vec::new();
    for (key, value) in &table {
        if !known.contains(&key.as_str()) {
            let near = known.iter().map(|name| (strsim::jaro_winkler(key, name), name));
            let near = near.filter(|(score, _)| *score > 0.75).max_by(|a, b| a.0.total_cmp(&b.0));
            let hint = near.map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"));
            return Err(refused(&path, &format!("there is no option {key}{hint}")));
        }
        nested.push((key.as_str(), values(&path, key, value)?));
    }
    let is_command =
        |word: &OsString| program.get_subcommands().find(|one| one.get_name() == word.as_os_str());
    let place = words.iter().skip(1).position(|word| is_command(word).is_some());
    let Some((place, command)) = place.and_then(|at| Some((at + 2, is_command(&words[at + 1])?))) else {
        return Ok(words);
    };
    let mut all = words;
    let rest = all.split_off(place);
    for (key, values) in nested {
        let argument =
            command.get_arguments().chain(program.get_arguments().filter(|one| one.is_global_set()));
        let argument = argument.into_iter().find(|argument| argument.get_long() == Some(key));
        if let Some(argument) = argument.filter(|argument| !overridden(argument, &rest)) {
            all.extend(written(argument, key, values));
        }
    }
    all.extend(rest);
    Ok(all)
}

/// Whether the command line or the environment says something else. What may be given several times adds up.
fn overridden(argument: &Arg, rest: &[OsString]) -> bool {
    if argument.get_env().and_then(env::var_os).is_some_and(|value| !value.is_empty()) {
        return true;
    }
    let Some(long) = argument.get_long().filter(|_| !matches!(argument.get_action(), ArgAction::Append))
    else {
        return false;
    };
    let flag = format!("--{long}");
    rest.iter()
        .filter_map(|word| word.to_str())
        .any(|word| word.strip_prefix(&flag).is_some_and(|after| after.is_empty() || after.starts_with('=')))
}

fn written(argument: &Arg, key: &str, values: Vec<String>) -> Vec<OsString> {
    let one = |value: String| match argument.get_action() {
        ArgAction::SetTrue => (value == "true").then(|| format!("--{key}")),
        _ => Some(format!("--{key}={value}")),
    };
    values.into_iter().filter_map(one).map(OsString::from).collect()
}

/// The long names that a file may use.
fn options(program: &Command) -> Vec<&str> {
    let commands = std::iter::once(program).chain(program.get_subcommands());
    let mut names: Vec<&str> = commands.flat_map(Command::get_arguments).filter_map(Arg::get_long).collect();
    names.retain(|name| !matches!(*name, "help" | "version" | "config"));
    names.sort_unstable();
    names.dedup();
    names
}

/// A value as words of a command line; a list gives one for each item, a table one `name=value` for each entry.
fn values(path: &Path, key: &str, value: &Value) -> Result<Vec<String>> {
    let plain = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(flag) => Ok(flag.to_string()),
        _ => Err(refused(path, &format!("{key} is neither text, a number, a flag, nor a list of them"))),
    };
    match value {
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::Table(entries) => {
            entries.iter().map(|(name, value)| plain(value).map(|value| format!("{name}={value}"))).collect()
        }
        value => plain(value).map(|value| vec![value]),
    }
}

/// The file, and whether the user named it.
fn file(words: &[OsString]) -> Option<(PathBuf, bool)> {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == OPTION {
            return words.next().map(|path| (path.into(), true));
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            return Some((path.into(), true));
        }
    }
    if let Some(path) = env::var_os(VARIABLE).filter(|path| path != OsStr::new("")) {
        return Some((path.into(), true));
    }
    let directories = directories::ProjectDirs::from("", "", "llava-phi")?;
    Some((directories.config_dir().join("config.toml"), false))
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Request(format!("configuration {}: {reason}", path.display()))
}

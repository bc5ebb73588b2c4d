//! The settings of `serve` as a file that gives them again, with what each came from.

use std::{any::TypeId, fmt::Write as _, num::NonZeroUsize};

use clap::{Arg, ArgMatches, Command};

use super::{Layers, NO_KEYS, Origin, SERVE, is_flag, is_list};
use crate::error::{Error, Result};

impl Layers {
    /// Every setting of `serve` in TOML, what is not set as a comment.
    ///
    /// # Errors
    /// [`Error::Request`] for a value that TOML cannot hold, since it is not UTF-8.
    pub(in crate::cli) fn print(&self, matches: &ArgMatches) -> Result<String> {
        let Some((command, matches)) =
            self.program.find_subcommand(SERVE).zip(matches.subcommand_matches(SERVE))
        else {
            return Ok(String::new());
        };
        let mut text =
            format!("# What llava-phi {SERVE} takes, and from where; --config takes this file again.\n");
        let global = self.program.get_arguments().filter(|arg| arg.is_global_set());
        self.section(&mut text, global, matches)?;
        let _ = write!(text, "\n[{SERVE}]\n");
        self.section(&mut text, own(command), matches)?;
        Ok(text)
    }

    fn section<'a>(
        &self,
        text: &mut String,
        args: impl Iterator<Item = &'a Arg>,
        matches: &ArgMatches,
    ) -> Result<()> {
        for (arg, key) in args.filter_map(|arg| Some((arg, arg.get_long()?))) {
            if NO_KEYS.contains(&key) {
                continue;
            }
            // A `String` takes everything.
            let _ = match (self.origin(arg, matches), value(arg, key, matches)?) {
                (Origin::Unset, _) | (_, None) => write!(text, "\n# not set\n# {key} =\n"),
                (origin, Some(value)) => write!(text, "\n# {}\n{key} = {value}\n", origin.told(key)),
            };
        }
        Ok(())
    }
}

impl Origin {
    fn told(&self, key: &str) -> String {
        let told = match self {
            Self::Unset => "not set".to_owned(),
            Self::Default => "default".to_owned(),
            Self::File(path, line) => format!("{}:{line}", path.display()),
            Self::Environment(name) => format!("environment variable {name}"),
            Self::Flag => format!("--{key}"),
        };
        // A path may hold anything, and a comment ends with its line.
        told.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    }
}

/// The settings that only `command` has.
fn own(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_global_set())
}

/// The value of `arg` as TOML has it.
fn value(arg: &Arg, key: &str, matches: &ArgMatches) -> Result<Option<String>> {
    let id = arg.get_id().as_str();
    if is_flag(arg) {
        return Ok(Some(matches.get_flag(id).to_string()));
    }
    let Some(values) = matches.get_raw(id) else { return Ok(None) };
    let mut shown = Vec::new();
    for value in values {
        let text = value.to_str().ok_or_else(|| {
            Error::Request(format!("{key} is not UTF-8, which a file of settings has to be; give another"))
        })?;
        shown.push(literal(arg, text));
    }
    Ok(if is_list(arg) { Some(format!("[{}]", shown.join(", "))) } else { shown.pop() })
}

/// Numbers stand bare where the option takes numbers, everything else in quotes.
fn literal(arg: &Arg, text: &str) -> String {
    let typed = arg.get_value_parser().type_id();
    let is_number = [
        TypeId::of::<u16>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<usize>(),
        TypeId::of::<NonZeroUsize>(),
    ]
    .into_iter()
    .any(|number| typed == number);
    match text.parse::<i64>() {
        // As it was written: `+5` or `007` are no numbers of TOML.
        Ok(number) if is_number && number.to_string() == text => text.to_owned(),
        _ => quoted(text),
    }
}

/// A basic string of TOML, whose escapes are those of JSON but for one character.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007F")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_its_quotes() {
        for text in ["", "a b", "\"", "\\", "\n\t\u{7f}\u{1}", "grün"] {
            let table: toml::Table = toml::from_str(&format!("a = {}", quoted(text))).unwrap();
            assert_eq!(table["a"].as_str(), Some(text));
        }
    }
}

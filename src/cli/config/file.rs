//! A file of settings, with the line of each.

use std::{
    any::TypeId,
    fmt,
    path::{Path, PathBuf},
};

use clap::{Arg, Command};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::{NO_KEYS, is_flag, is_list};
use crate::error::{Error, Result};

/// What a file says.
#[derive(Debug)]
pub(super) struct File {
    /// Where it lies.
    pub(super) path: PathBuf,
    entries: Vec<Entry>,
}

/// One setting.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The table that it stands in: the name of a command, where it is one.
    table: Option<String>,
    /// The option's long name.
    pub(super) key: String,
    /// Its line, from 1.
    pub(super) line: usize,
    value: Value,
}

/// What a setting is set to.
#[derive(Clone, Debug)]
enum Value {
    One(Scalar),
    Several(Vec<Scalar>),
    Named(Vec<(String, Scalar)>),
    /// What no option can have.
    Other,
}

#[derive(Clone, Debug)]
enum Scalar {
    Text(String),
    Number(String),
    Flag(bool),
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Number(text) => f.write_str(text),
            Self::Flag(flag) => flag.fmt(f),
        }
    }
}

impl Scalar {
    fn read(value: &DeValue<'_>) -> Option<Self> {
        Some(match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Integer(number) => {
                Self::Number(i128::from_str_radix(number.as_str(), number.radix()).ok()?.to_string())
            }
            DeValue::Float(number) => Self::Number(number.as_str().to_owned()),
            DeValue::Boolean(flag) => Self::Flag(*flag),
            _ => return None,
        })
    }
}

impl Value {
    fn read(value: &DeValue<'_>) -> Self {
        let value = match value {
            DeValue::Array(items) => items
                .iter()
                .map(|item| Scalar::read(item.get_ref()))
                .collect::<Option<_>>()
                .map(Self::Several),
            DeValue::Table(table) => {
                let named = table
                    .iter()
                    .map(|(name, value)| Some((name.get_ref().to_string(), Scalar::read(value.get_ref())?)));
                named.collect::<Option<_>>().map(Self::Named)
            }
            value => Scalar::read(value).map(Self::One),
        };
        value.unwrap_or(Self::Other)
    }
}

impl Entry {
    /// Its value as words of a command line; a list gives one for each item, a table one `name=value` for each entry.
    pub(super) fn values(&self, arg: &Arg) -> Result<Vec<String>, String> {
        let key = &self.key;
        match &self.value {
            Value::One(scalar) => one(arg, key, scalar).map(|value| vec![value]),
            Value::Other => Err(format!("{key} is neither text, a number, a flag, nor a list of them")),
            Value::Several(_) | Value::Named(_) if !is_list(arg) => {
                Err(format!("{key} has one value; give no list"))
            }
            Value::Several(items) => items.iter().map(|item| one(arg, key, item)).collect(),
            Value::Named(items) => Ok(items.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        }
    }
}

/// A value as a word, if it has the type of `arg`.
fn one(arg: &Arg, key: &str, scalar: &Scalar) -> Result<String, String> {
    let typed = arg.get_value_parser().type_id();
    let is_text = typed == TypeId::of::<PathBuf>() || typed == TypeId::of::<String>();
    match scalar {
        Scalar::Flag(_) if is_flag(arg) => {}
        _ if is_flag(arg) => return Err(format!("{key} is {scalar}; give true or false, without quotes")),
        Scalar::Flag(flag) => return Err(format!("{key} is {flag}, and is no switch; give its value")),
        Scalar::Number(number) if is_text => {
            return Err(format!("{key} is {number}, and takes text; put it into quotes"));
        }
        Scalar::Number(_) | Scalar::Text(_) => {}
    }
    Ok(scalar.to_string())
}

impl File {
    /// # Errors
    /// [`Error::Request`] where `text` is no TOML.
    pub(super) fn parse(path: PathBuf, text: &str) -> Result<Self> {
        let line = |at: usize| text.get(..at).unwrap_or(text).matches('\n').count() + 1;
        let table = DeTable::parse(text).map_err(|error| {
            let reason = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
            refused(&path, error.span().map_or(1, |span| line(span.start)), &reason)
        })?;
        let mut entries = Vec::new();
        for (key, value) in table.get_ref() {
            let entry =
                |table: Option<&str>, key: &Spanned<DeString<'_>>, value: &Spanned<DeValue<'_>>| Entry {
                    table: table.map(str::to_owned),
                    key: key.get_ref().to_string(),
                    line: line(key.span().start),
                    value: Value::read(value.get_ref()),
                };
            // Whether it is a command is known once there are some.
            if let DeValue::Table(inner) = value.get_ref() {
                entries.extend(inner.iter().map(|(name, value)| entry(Some(key.get_ref()), name, value)));
            }
            entries.push(entry(None, key, value));
        }
        Ok(Self { path, entries })
    }

    /// Refuses keys that no command of `program` takes, or not the one whose table they stand in.
    pub(super) fn check(&self, program: &Command) -> Result<()> {
        let all: Vec<&str> =
            program.get_subcommands().flat_map(|command| names(program, Some(command))).collect();
        for entry in &self.entries {
            let (known, whose) = match &entry.table {
                None if program.find_subcommand(&entry.key).is_some() && self.is_table(&entry.key) => {
                    continue;
                }
                None => (all.clone(), String::new()),
                Some(table) => {
                    // What stands in a table of another name is part of that setting's value.
                    let Some(command) = program.find_subcommand(table) else { continue };
                    (names(program, Some(command)), format!(" of {table}"))
                }
            };
            if known.contains(&entry.key.as_str()) {
                continue;
            }
            let near = known.iter().map(|name| (strsim::jaro_winkler(&entry.key, name), name));
            let near = near.filter(|(score, _)| *score > 0.75).max_by(|a, b| a.0.total_cmp(&b.0));
            let hint = near.map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"));
            return Err(self.refused(entry.line, &format!("there is no option {}{whose}{hint}", entry.key)));
        }
        Ok(())
    }

    /// Whether `key` is a table.
    fn is_table(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| {
            entry.key == key && entry.table.is_none() && matches!(entry.value, Value::Named(_) | Value::Other)
        })
    }

    /// What is said to the command `asked`, that which is only for it last.
    pub(super) fn entries_for<'a>(&'a self, asked: Option<&'a str>) -> impl Iterator<Item = &'a Entry> {
        let general = self.entries.iter().filter(|entry| entry.table.is_none());
        let own = self.entries.iter().filter(move |entry| asked.is_some() && entry.table.as_deref() == asked);
        general.chain(own)
    }

    pub(super) fn refused(&self, line: usize, reason: &str) -> Error {
        refused(&self.path, line, reason)
    }
}

fn refused(path: &Path, line: usize, reason: &str) -> Error {
    Error::Request(format!("configuration {}:{line}: {reason}", path.display()))
}

/// The settings of a command.
fn names<'a>(program: &'a Command, command: Option<&'a Command>) -> Vec<&'a str> {
    let own = command.into_iter().flat_map(Command::get_arguments);
    let global = program.get_arguments().filter(|arg| arg.is_global_set());
    let names = own.chain(global).filter_map(Arg::get_long);
    names.filter(|name| !NO_KEYS.contains(name)).collect()
}

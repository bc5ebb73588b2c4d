//! Where the value of an option comes from: the command line, the environment, a file, or the program.
//!
//! The keys of the file are the long names of options, as clap's own definition of the commands has them: an option that
//! is added has its key by that, and one of `serve` its environment variable too. What a file or a list in the
//! environment says becomes the option's default, so that clap lets the command line win.

mod file;
mod printed;

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs, io,
    path::PathBuf,
};

use clap::builder::{BoolishValueParser, Resettable};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::error::{Error, Result};
use file::File;

/// The variable that names the file.
pub(super) const VARIABLE: &str = "LLAVA_PHI_CONFIG";

/// The option that names the file.
const OPTION: &str = "--config";

/// The command of which every option has a variable.
const SERVE: &str = "serve";

/// Options that are no settings.
const NO_KEYS: [&str; 4] = ["help", "version", "config", "print-config"];

/// The program with what the file and the environment say as defaults.
#[derive(Debug)]
pub(super) struct Layers {
    /// What parses the command line.
    pub(super) program: Command,
    /// What took the place of a default, by the option's long name.
    origins: BTreeMap<String, Origin>,
}

/// What gave an option its value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// Nothing.
    Unset,
    /// The program.
    Default,
    /// A file, on this line.
    File(PathBuf, usize),
    /// This variable.
    Environment(String),
    /// The command line.
    Flag,
}

impl Layers {
    /// Lays the file and the environment, which `variable` gives, under the options of `program` as `words` call it.
    ///
    /// The file is what `--config` names, else the variable, else `config.toml` in the user's configuration directory if
    /// there is one. Its keys are the long names of options; a command takes from it those that it knows. A table with
    /// the name of a command holds what is only for that, and counts for more.
    ///
    /// # Errors
    /// [`Error::Request`] for a file that cannot be read, that is no TOML, that has a key which no command takes, or a
    /// value that its option cannot have; and for a list in the environment that its option cannot have.
    pub(super) fn new(
        program: Command,
        words: &[OsString],
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let file = chosen(words, variable)?;
        let program = without_empty(with_variables(program), variable);
        let asked = program.clone().ignore_errors(true).try_get_matches_from(words).ok();
        let asked = asked.as_ref().and_then(ArgMatches::subcommand_name).map(str::to_owned);
        let mut layers = Self { program, origins: BTreeMap::new() };
        if let Some(file) = file {
            file.check(&layers.program)?;
            layers.lay_file(&file, asked.as_deref())?;
        }
        layers.lay_environment(asked.as_deref(), variable)?;
        Ok(layers)
    }

    /// Makes defaults of what `file` says to the command `asked`.
    fn lay_file(&mut self, file: &File, asked: Option<&str>) -> Result<()> {
        for entry in file.entries_for(asked) {
            let Some(arg) = option(&self.program, asked, &entry.key) else { continue };
            let values = entry.values(arg).map_err(|reason| file.refused(entry.line, &reason))?;
            check(arg, &values).map_err(|reason| file.refused(entry.line, &reason))?;
            self.set_default(asked, &entry.key, values, Origin::File(file.path.clone(), entry.line));
        }
        Ok(())
    }

    /// Makes defaults of what variables say, so that a fault in one names it.
    fn lay_environment(
        &mut self,
        asked: Option<&str>,
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<()> {
        let command = asked.and_then(|name| self.program.find_subcommand(name));
        let args = command.into_iter().flat_map(Command::get_arguments).chain(self.program.get_arguments());
        let named: Vec<Arg> = args.filter(|arg| arg.get_env().is_some()).cloned().collect();
        for arg in named {
            let name = arg.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let Some(key) = arg.get_long().filter(|key| !NO_KEYS.contains(key)) else { continue };
            let Some(value) = variable(&name) else { continue };
            // A path need not be UTF-8; clap takes it as it is.
            let Some(text) = value.to_str() else { continue };
            self.change(asked, arg.get_id().as_str(), |arg| arg.env(Resettable::Reset));
            let values: Vec<String> = match text {
                list if is_list(&arg) => list.split(',').map(|item| item.trim().to_owned()).collect(),
                text => vec![text.to_owned()],
            };
            check(&arg, &values)
                .map_err(|reason| Error::Request(format!("environment variable {name}: {reason}")))?;
            self.set_default(asked, key, values, Origin::Environment(name.clone()));
        }
        Ok(())
    }

    fn set_default(&mut self, asked: Option<&str>, key: &str, values: Vec<String>, origin: Origin) {
        let Some(id) = option(&self.program, asked, key).map(|arg| arg.get_id().to_string()) else {
            return;
        };
        self.change(asked, &id, |arg| arg.required(false).default_values(values));
        self.origins.insert(key.to_owned(), origin);
    }

    /// Changes an option of the command `asked`, or one that all commands have.
    fn change(&mut self, asked: Option<&str>, id: &str, change: impl FnOnce(Arg) -> Arg) {
        let program = std::mem::take(&mut self.program);
        let has = |command: &Command| command.get_arguments().any(|arg| arg.get_id() == id);
        self.program = match asked {
            _ if has(&program) => program.mut_arg(id, change),
            Some(name) if program.find_subcommand(name).is_some_and(has) => {
                program.mut_subcommand(name, |command| command.mut_arg(id, change))
            }
            _ => program,
        };
    }

    /// What gave `arg` the value that it has in `matches`.
    fn origin(&self, arg: &Arg, matches: &ArgMatches) -> Origin {
        let laid = || arg.get_long().and_then(|key| self.origins.get(key)).cloned();
        match matches.value_source(arg.get_id().as_str()) {
            None => Origin::Unset,
            Some(ValueSource::CommandLine) => Origin::Flag,
            Some(ValueSource::EnvVariable) => {
                Origin::Environment(arg.get_env().unwrap_or_default().to_string_lossy().into_owned())
            }
            Some(_) => laid().unwrap_or(Origin::Default),
        }
    }
}

/// What the environment of this process says.
pub(super) fn environment(name: &str) -> Option<OsString> {
    env::var_os(name)
}

/// Gives every setting of `serve` that has no variable one.
fn with_variables(program: Command) -> Command {
    let named = |prefix: &str, arg: Arg| {
        let key = arg.get_long().filter(|key| arg.get_env().is_none() && !NO_KEYS.contains(key));
        let Some(key) = key else { return arg };
        let name = format!("{prefix}{}", key.replace('-', "_").to_uppercase());
        let is_flag = is_flag(&arg);
        let arg = arg.env(name);
        if is_flag { arg.value_parser(BoolishValueParser::new()) } else { arg }
    };
    let program = program.mut_args(|arg| if arg.is_global_set() { named("LLAVA_PHI_", arg) } else { arg });
    if program.find_subcommand(SERVE).is_none() {
        return program;
    }
    program.mut_subcommand(SERVE, |command| command.mut_args(|arg| named("LLAVA_PHI_SERVE_", arg)))
}

/// The program, to which a variable that is empty is as if it were not there.
fn without_empty(program: Command, variable: &dyn Fn(&str) -> Option<OsString>) -> Command {
    let is_empty = |name: &OsStr| name.to_str().and_then(variable).is_some_and(|value| value.is_empty());
    let program = program
        .mut_args(|arg| if arg.get_env().is_some_and(is_empty) { arg.env(Resettable::Reset) } else { arg });
    program.mut_subcommands(|command| without_empty(command, variable))
}

/// The setting `key` of the command `asked`, or of all.
fn option<'a>(program: &'a Command, asked: Option<&str>, key: &str) -> Option<&'a Arg> {
    let command = asked.and_then(|name| program.find_subcommand(name));
    let own = command.into_iter().flat_map(Command::get_arguments);
    let global = program.get_arguments().filter(|arg| arg.is_global_set());
    own.chain(global).find(|arg| arg.get_long() == Some(key) && !NO_KEYS.contains(&key))
}

fn is_flag(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// Refuses values that the option cannot have, as it would on the command line.
fn check(arg: &Arg, values: &[String]) -> Result<(), String> {
    let key = arg.get_long().unwrap_or_default().to_owned();
    // An argument of its own: the rules between options are for what is typed.
    let mut alone = Arg::new(key.clone()).long(key.clone()).value_parser(arg.get_value_parser().clone());
    if let Some(names) = arg.get_value_names() {
        alone = alone.value_names(names.iter().cloned());
    }
    let trial = Command::new("").no_binary_name(true).disable_help_flag(true).arg(alone);
    for value in values {
        if let Err(error) = trial.clone().try_get_matches_from([format!("--{key}={value}")]) {
            return Err(super::fault(&error));
        }
    }
    Ok(())
}

/// The file that the user named, or that lies where one is looked for.
fn chosen(words: &[OsString], variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<File>> {
    let Some((path, named)) = place(words, variable) else { return Ok(None) };
    match fs::read_to_string(&path) {
        Ok(text) => File::parse(path, &text).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound && !named => Ok(None),
        Err(e) => Err(Error::Request(format!(
            "configuration {}: the file cannot be read ({e}); check the path",
            path.display()
        ))),
    }
}

/// The file, and whether the user named it.
fn place(words: &[OsString], variable: &dyn Fn(&str) -> Option<OsString>) -> Option<(PathBuf, bool)> {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == OPTION {
            return words.next().map(|path| (path.into(), true));
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            return Some((path.into(), true));
        }
    }
    if let Some(path) = variable(VARIABLE).filter(|path| path != OsStr::new("")) {
        return Some((path.into(), true));
    }
    let directories = directories::ProjectDirs::from("", "", "llava-phi")?;
    Some((directories.config_dir().join("config.toml"), false))
}

#[cfg(test)]
mod tests;

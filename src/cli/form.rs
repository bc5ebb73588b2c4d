//! What an answer has to look like, from the command line.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::engine::Engine;
use crate::error::{Error, Result, size};
use crate::generate::constraint::{Constraint, ConstraintSpec};
use crate::generate::params::GenerateParams;

/// Bytes of a file; more than any form may have.
const LONGEST: u64 = 1 << 20;

/// Options of which one says what an answer has to look like.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub(super) struct FormArguments {
    /// Answer with JSON that the JSON schema in FILE describes
    #[arg(long, value_name = "FILE")]
    schema: Option<PathBuf>,

    /// Answer with a JSON object
    #[arg(long)]
    json_object: bool,

    /// Answer with text that this regular expression matches as a whole
    #[arg(long, value_name = "R")]
    regex: Option<String>,

    /// Answer with one of these texts, and tell how likely each is; a comma parts them, and it may be given several times
    #[arg(long, value_name = "A,B,...", value_delimiter = ',')]
    choice: Vec<String>,

    /// Answer with text that the grammar in FILE produces, in the form of Lark that llguidance reads
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl FormArguments {
    /// What was asked for; files are read.
    pub(super) fn spec(&self) -> Result<Option<ConstraintSpec>> {
        Ok(if let Some(path) = &self.schema {
            let schema = serde_json::from_str(&read(path)?).map_err(|e| {
                Error::Request(format!("{} is no JSON ({e}); give a JSON schema", path.display()))
            })?;
            Some(ConstraintSpec::JsonSchema(schema))
        } else if let Some(path) = &self.grammar {
            Some(ConstraintSpec::Grammar(read(path)?))
        } else if let Some(regex) = &self.regex {
            Some(ConstraintSpec::Regex(regex.clone()))
        } else if self.choice.is_empty() {
            self.json_object.then_some(ConstraintSpec::JsonObject)
        } else {
            Some(ConstraintSpec::Choice(self.choice.clone()))
        })
    }
}

fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    match read {
        Ok(bytes) if bytes as u64 > LONGEST => Err(Error::Request(format!(
            "{} is longer than {}; say what is needed in less",
            path.display(),
            size(LONGEST)
        ))),
        Ok(_) => Ok(text),
        Err(e) => Err(Error::Request(format!("{} cannot be read ({e}); check the path", path.display()))),
    }
}

/// `params` for answers of `engine` that look as `spec` says.
pub(super) fn constrained(
    params: GenerateParams,
    spec: Option<&ConstraintSpec>,
    engine: &Engine,
) -> Result<GenerateParams> {
    let constraint = spec.map(|spec| Constraint::new(&engine.facts().tokenizer, spec)).transpose()?;
    let params = GenerateParams { constraint, ..params };
    params.validate()?;
    Ok(params)
}

//! Checks a tokenizer's file before the library reads it, which panics on some damaged files and passes over
//! some contradictions.

use std::{collections::HashMap, path::Path, str};

use serde::Deserialize;

use super::TokenId;
use crate::error::{Error, Result};

/// The parts of a `tokenizer.json` that are checked.
#[derive(Debug, Deserialize)]
pub(super) struct File {
    #[serde(default)]
    pub(super) added_tokens: Vec<Added>,
    model: Model,
    // Read whole: the library panics on a value that is not JSON in here.
    #[serde(default)]
    decoder: serde_json::Value,
}

/// A token that was added to the vocabulary of the model.
#[derive(Debug, Deserialize)]
pub(super) struct Added {
    pub(super) id: TokenId,
    pub(super) content: String,
}

#[derive(Debug, Deserialize)]
struct Model {
    r#type: Option<String>,
    vocab: HashMap<String, TokenId>,
    merges: Vec<Merge>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// A merge as files write it: two strings, or in older files one with a space between.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl File {
    /// Reads and checks `bytes`; `path` is only named in errors.
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let fault = "is not a byte-level BPE tokenizer in the Hugging Face form; export the package again";
        let text = str::from_utf8(bytes).map_err(|cause| Error::package(path, fault).because(cause))?;
        let file: Self =
            serde_json::from_str(text).map_err(|cause| Error::package(path, fault).because(cause))?;
        match file.contradiction() {
            None => Ok(file),
            Some(reason) => Err(Error::package(path, reason)),
        }
    }

    fn contradiction(&self) -> Option<String> {
        let model = &self.model;
        if let Some(kind) = model.r#type.as_deref().filter(|kind| *kind != "BPE") {
            return Some(format!(
                "has a model of kind {kind}; this version reads byte-level BPE tokenizers only"
            ));
        }
        if self.decoder.get("type").and_then(serde_json::Value::as_str) != Some("ByteLevel") {
            return Some(
                "has a decoder other than ByteLevel; this version reads byte-level BPE tokenizers only"
                    .to_owned(),
            );
        }
        if let Some(dropout) = model.dropout.filter(|dropout| *dropout != 0.0) {
            return Some(format!(
                "leaves out merges at random, dropout {dropout}, as in training; set it to null"
            ));
        }
        let marks = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if let Some(mark) = marks.into_iter().flatten().find(|mark| !mark.is_empty()) {
            return Some(format!("marks parts of words with {mark:?}, which byte-level BPE has no use for"));
        }
        let broken = (1..).zip(&model.merges).find(|(_, merge)| !self.is_whole(merge))?;
        Some(format!("has merge {} that joins no two entries to a third: {:?}", broken.0, broken.1))
    }

    fn is_whole(&self, merge: &Merge) -> bool {
        let pair = match merge {
            Merge::Pair(one, other) => Some((one.as_str(), other.as_str())),
            Merge::Line(line) => line.split_once(' '),
        };
        let known = |entry: &str| self.model.vocab.contains_key(entry);
        pair.is_some_and(|(one, other)| known(one) && known(other) && known(&[one, other].concat()))
    }
}

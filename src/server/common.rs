//! What a request for a chat and one for a completion both say.

use serde::Deserialize;

use super::choosing;
use super::error::Answer;
use super::limits::ServerLimits;
use super::response_format::{Form, ResponseFormat};
use super::sse::{self, StreamOptions};
use crate::engine::Priority;
use crate::generate::constraint::ConstraintSpec;

/// Parameters of both, but for those of [`Choosing`](choosing::Choosing).
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Common {
    /// The model's name, as `/v1/models` lists it; may be left out where one is served and not a directory of them.
    pub(super) model: Option<String>,
    /// Send the answer as server-sent events while it is made.
    stream: bool,
    /// How it is sent.
    stream_options: Option<StreamOptions>,
    /// Answers to give to each prompt; 1 otherwise. At temperature 0 they are alike.
    n: Option<usize>,
    /// Extension: the answer is one of these texts, and how likely each is is told.
    choice: Option<Vec<String>>,
    /// Extension: this regular expression matches the whole answer.
    regex: Option<String>,
    /// Extension: this grammar, in the form of Lark, produces the answer.
    grammar: Option<String>,
    /// Extension: `low`, `normal` or `high`: who goes first where several wait.
    pub(super) priority: Priority,
    /// Who asks. It changes nothing, and is neither kept nor logged.
    #[allow(dead_code)] // Only read to refuse what is no text.
    user: Option<String>,
}

impl Common {
    /// Whether the answer is sent while it is made, and if so whether what it cost is sent too.
    ///
    /// # Errors
    /// As [`sse::asked`].
    pub(super) fn stream(&self) -> Answer<Option<bool>> {
        sse::asked(self.stream, self.stream_options.as_ref())
    }

    /// How many answers are given to each of `prompts`.
    ///
    /// # Errors
    /// As [`choosing::count`].
    pub(super) fn count(&self, prompts: usize, limits: &ServerLimits) -> Answer<usize> {
        choosing::count(self.n, prompts, limits)
    }

    /// What the answer has to look like, and the name of the parameter that asks for it.
    ///
    /// # Errors
    /// As [`Form::spec`].
    pub(super) fn form(
        self,
        response_format: Option<ResponseFormat>,
    ) -> Answer<Option<(&'static str, ConstraintSpec)>> {
        let Self { choice, regex, grammar, .. } = self;
        Form { response_format, choice, regex, grammar }.spec()
    }
}

//! What an answer has to look like, from a request's parameters to the engine's.

use serde::Deserialize;
use serde_json::Value;

use super::error::{Answer, ApiError};
use super::models::Model;
use crate::generate::constraint::{Constraint, ConstraintSpec};

/// What an answer has to look like, in OpenAI's form.
// Braces, since serde ignores what stands beside the tag of a variant without them.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum ResponseFormat {
    /// Any text.
    Text {},
    /// Any JSON object.
    JsonObject {},
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema.
        json_schema: JsonSchema,
    },
}

/// A schema with a name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JsonSchema {
    /// What the client calls it. It changes nothing: the model is not shown it.
    name: String,
    /// What the client says of it. It changes nothing: the model is not shown it.
    #[serde(default)]
    #[allow(dead_code)] // Only read to refuse what is no text.
    description: Option<String>,
    /// The schema; without one any JSON object will do.
    #[serde(default)]
    schema: Option<Value>,
    /// Whether the schema is followed to the letter. It always is.
    #[serde(default)]
    #[allow(dead_code)] // Only read to refuse what is neither true nor false.
    strict: Option<bool>,
}

/// What a request says of what its answer has to look like. At most one of these may be given.
#[derive(Clone, Debug, Default)]
pub(super) struct Form {
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) choice: Option<Vec<String>>,
    pub(super) regex: Option<String>,
    pub(super) grammar: Option<String>,
}

impl Form {
    /// What the engine is asked for, and the name of the parameter that asks.
    ///
    /// # Errors
    /// When two of them ask for something.
    pub(super) fn spec(self) -> Answer<Option<(&'static str, ConstraintSpec)>> {
        let format = match self.response_format {
            None | Some(ResponseFormat::Text {}) => None,
            Some(ResponseFormat::JsonObject {}) => Some(ConstraintSpec::JsonObject),
            Some(ResponseFormat::JsonSchema { json_schema }) => Some(json_schema.spec()?),
        };
        let mut asked = [
            ("response_format", format),
            ("choice", self.choice.map(ConstraintSpec::Choice)),
            ("regex", self.regex.map(ConstraintSpec::Regex)),
            ("grammar", self.grammar.map(ConstraintSpec::Grammar)),
        ]
        .into_iter()
        .filter_map(|(name, spec)| Some((name, spec?)));
        let first = asked.next();
        match (&first, asked.next()) {
            (Some((one, _)), Some((other, _))) => Err(ApiError::value(
                other,
                format!("{one} and {other} both say what the answer is; give one"),
            )),
            _ => Ok(first),
        }
    }
}

/// Compiles for `model` what an answer has to look like; a fault names the parameter that asks for it.
pub(super) fn compiled(
    model: &Model,
    form: Option<(&'static str, ConstraintSpec)>,
) -> Answer<Option<Constraint>> {
    let compile = |(name, spec): (&str, ConstraintSpec)| {
        let compiled = Constraint::new(&model.engine.facts().tokenizer, &spec);
        compiled.map_err(|error| ApiError::from(error).about(name))
    };
    form.map(compile).transpose()
}

impl JsonSchema {
    fn spec(self) -> Answer<ConstraintSpec> {
        if self.name.is_empty() {
            return Err(ApiError::value("response_format", "the schema's name is empty; give it one"));
        }
        Ok(self.schema.map_or(ConstraintSpec::JsonObject, ConstraintSpec::JsonSchema))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(format: Value) -> Answer<Option<(&'static str, ConstraintSpec)>> {
        let response_format = Some(serde_json::from_value(format).unwrap());
        Form { response_format, ..Form::default() }.spec()
    }

    #[test]
    fn each_form_is_what_it_says() {
        assert_eq!(spec(json!({"type": "text"})).unwrap(), None);
        let object = Some(("response_format", ConstraintSpec::JsonObject));
        assert_eq!(spec(json!({"type": "json_object"})).unwrap(), object);
        let schema = json!({"type": "object", "properties": {"a": {"enum": [null, 1]}}});
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": schema}});
        assert_eq!(spec(format).unwrap(), Some(("response_format", ConstraintSpec::JsonSchema(schema))));
        let form = Form { choice: Some(vec!["yes".to_owned()]), ..Form::default() };
        assert_eq!(form.spec().unwrap(), Some(("choice", ConstraintSpec::Choice(vec!["yes".to_owned()]))));
    }

    #[test]
    fn two_forms_contradict_each_other() {
        let form = Form { regex: Some("a".to_owned()), grammar: Some("b".to_owned()), ..Form::default() };
        let body = form.spec().unwrap_err().body();
        assert_eq!(body["error"]["param"], "grammar");
        assert_eq!(body["error"]["message"], "regex and grammar both say what the answer is; give one");
    }

    #[test]
    fn what_is_no_form_is_refused() {
        for wrong in [
            json!({}),
            json!({"type": "xml"}),
            json!({"type": "text", "x": 1}),
            json!({"type": "json_schema"}),
        ] {
            assert!(serde_json::from_value::<ResponseFormat>(wrong.clone()).is_err(), "{wrong}");
        }
    }
}

//! `GET /openapi.json`: the API as a document that tools read.
//!
//! The document is written by hand: what requests hold is read by code that names every fault, which no derived schema
//! would know of. Tests hold it to the routes and to the fields that are read.

use std::sync::LazyLock;

use axum::Json;
use serde_json::Value;

/// The document, without the version.
const WRITTEN: &str = include_str!("openapi.json");

/// Gives the document.
pub(super) async fn openapi() -> Json<&'static Value> {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(document);
    Json(&DOCUMENT)
}

fn document() -> Value {
    // A test reads it; what cannot be read is not shipped.
    let mut document: Value = serde_json::from_str(WRITTEN).unwrap_or_default();
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    document
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::json::Members;
    use super::super::{chat_completions, completions, responses};
    use super::*;

    /// The routes as the router names them, with their methods.
    fn routes() -> BTreeSet<(String, String)> {
        let source = include_str!("../router.rs");
        let routes = source.split(".route(\"").skip(1).map(|rest| {
            let (path, rest) = rest.split_once("\", ").unwrap();
            let (method, _) = rest.split_once('(').unwrap();
            (path.to_owned(), method.to_owned())
        });
        routes.collect()
    }

    fn operations(document: &Value) -> BTreeMap<(String, String), &Value> {
        let paths = document["paths"].as_object().unwrap();
        let of = |(path, methods): (&String, &'_ Value)| -> Vec<_> {
            let path = path.clone();
            methods.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())).collect()
        };
        let names: Vec<_> = paths.iter().flat_map(of).collect();
        names
            .into_iter()
            .map(|(path, method)| {
                let operation = &document["paths"][&path][&method];
                ((path, method), operation)
            })
            .collect()
    }

    fn visit(value: &Value, see: &mut impl FnMut(&Value)) {
        see(value);
        match value {
            Value::Object(members) => members.values().for_each(|member| visit(member, see)),
            Value::Array(items) => items.iter().for_each(|item| visit(item, see)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_in_the_document_and_nothing_else() {
        let document = document();
        assert!(routes().len() > 7, "{:?}", routes());
        assert_eq!(operations(&document).into_keys().collect::<BTreeSet<_>>(), routes());
    }

    #[test]
    fn a_request_has_the_fields_that_are_read_and_no_other() {
        fn check<T: Members>(document: &Value, name: &str) {
            let schema = &document["components"]["schemas"][name];
            let written: BTreeSet<&str> =
                schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(written, T::names().into_iter().collect(), "{name}");
            assert_eq!(schema["additionalProperties"], false, "{name}");
        }
        let document = document();
        check::<chat_completions::Asked>(&document, "ChatCompletionRequest");
        check::<completions::Asked>(&document, "CompletionRequest");
        check::<responses::Asked>(&document, "ResponseRequest");
    }

    #[test]
    fn every_operation_says_what_it_takes_and_answers() {
        let document = document();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let operations = operations(&document);
        for ((path, method), operation) in &operations {
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{path}");
            assert_eq!(method == "post", operation["requestBody"]["required"] == true, "{path}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                assert!(
                    status.parse::<u16>().is_ok_and(|status| (200..600).contains(&status)),
                    "{path} {status}"
                );
                let told = response.get("$ref").or_else(|| response.get("description"));
                assert!(told.is_some_and(Value::is_string), "{path} {status}");
            }
            let named = operation.get("parameters").map_or(0, |all| all.as_array().unwrap().len());
            assert_eq!(named, path.matches('{').count(), "{path}");
        }
        let names: BTreeSet<_> =
            operations.values().map(|operation| operation["operationId"].as_str().unwrap()).collect();
        assert_eq!(names.len(), operations.len(), "names are each other's");
    }

    #[test]
    fn references_lead_somewhere_and_what_is_required_is_there() {
        let document = document();
        let mut references = 0;
        visit(&document, &mut |value| {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                let place = reference.strip_prefix('#').unwrap();
                assert!(document.pointer(place).is_some(), "{reference} leads nowhere");
                references += 1;
            }
            let (Some(required), Some(properties)) = (value.get("required"), value.get("properties")) else {
                return;
            };
            for name in required.as_array().unwrap() {
                assert!(properties.get(name.as_str().unwrap()).is_some(), "{name} is required and unknown");
            }
        });
        assert!(references > 20);
    }

    #[test]
    fn what_asks_for_a_key_says_so() {
        for ((path, _), operation) in operations(&document()) {
            let open = operation.get("security").is_some_and(|all| all.as_array().unwrap().is_empty());
            assert_eq!(open, ["/", "/health", "/ready"].contains(&path.as_str()), "{path}");
            assert_eq!(open, operation["responses"].get("401").is_none(), "{path}");
        }
    }
}

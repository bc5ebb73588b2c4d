//! Answers that have to look like something.

use serde_json::{Value, json};

use super::{MODEL, asking, shared, with};

fn text(more: Value) -> String {
    let response = shared().chat(&asking(more));
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[test]
fn one_of_several_texts_is_taken_and_how_likely_each_was_is_told() {
    let choices = ["a blue square", "a red triangle", "nothing"];
    let response = shared().chat(&asking(json!({"choice": choices}))).json();
    let choice = &response["choices"][0];
    assert_eq!(choice["message"]["content"], "a red triangle");
    let told = choice["choice_probabilities"].as_array().unwrap();
    assert_eq!(told.iter().map(|one| one["choice"].as_str().unwrap()).collect::<Vec<_>>(), choices);
    let likely: Vec<f64> = told.iter().map(|one| one["probability"].as_f64().unwrap()).collect();
    assert!((likely.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{likely:?}");
    assert!(likely[1] > likely[0] && likely[1] > likely[2], "{likely:?}");
    let chunks = shared().chat(&asking(json!({"choice": choices, "stream": true}))).chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["choice_probabilities"], choice["choice_probabilities"]);
}

#[test]
fn a_pattern_matches_the_whole_answer() {
    assert_eq!(text(json!({"regex": "the (blue|red) (square|triangle)"})), "the red triangle");
    assert_eq!(text(json!({"grammar": "start: COLOR\nCOLOR: \"blue\" | \"red\""})), "red");
    let body = json!({"model": MODEL, "prompt": "USER: hello ASSISTANT:", "regex": "[0-9]{3}"});
    let number = shared().post("/v1/completions", &body).json();
    let number = number["choices"][0]["text"].as_str().unwrap();
    assert!(number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()), "{number}");
}

#[test]
fn an_answer_is_json_that_its_schema_describes() {
    let schema = json!({
        "type": "object",
        "properties": {"color": {"enum": ["blue", "red"]}, "shape": {"enum": ["square", "triangle"]}},
        "required": ["color", "shape"],
        "additionalProperties": false,
    });
    let format = |strict: Value| {
        json!({"response_format": {"type": "json_schema",
        "json_schema": {"name": "seen", "strict": strict, "schema": schema}}})
    };
    for strict in [json!(true), json!(false), Value::Null] {
        let seen: Value = serde_json::from_str(&text(format(strict))).unwrap();
        assert_eq!(seen, json!({"color": "red", "shape": "triangle"}));
    }
    let whole = text(format(json!(true)));
    let chunks = shared().chat(&asking(with(format(json!(true)), json!({"stream": true})))).chunks();
    let joined = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(joined.collect::<String>(), whole);
}

#[test]
fn a_form_that_cannot_be_followed_is_refused_by_name() {
    for (name, value) in [
        ("regex", json!("(")),
        ("grammar", json!("start: nothing")),
        ("choice", json!([])),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}}),
        ),
        ("response_format", json!({"type": "json_schema", "json_schema": {"name": "", "schema": {}}})),
        ("response_format", json!({"type": "json_schema"})),
    ] {
        shared().chat(&asking(json!({name: value}))).refused(400, "invalid_value", Some(name));
    }
    let two = asking(json!({"regex": "a", "choice": ["b"]}));
    shared().chat(&two).refused(400, "invalid_value", Some("regex"));
}

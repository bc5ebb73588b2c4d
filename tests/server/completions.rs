//! Text that the model goes on with.

use serde_json::{Value, json};

use super::{EOS, MODEL, shared, with};

const PATH: &str = "/v1/completions";

fn texted(more: Value) -> Value {
    with(json!({"model": MODEL, "prompt": "USER: what can you do? ASSISTANT:"}), more)
}

fn texts(more: Value) -> Vec<String> {
    let response = shared().post(PATH, &texted(more));
    assert_eq!(response.status, 200, "{response:?}");
    let choices = response.json()["choices"].as_array().unwrap().clone();
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn text_goes_on() {
    let response = shared().post(PATH, &texted(json!({"logit_bias": {(EOS): -100}}))).json();
    assert_eq!(response["object"], "text_completion");
    assert!(response["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(response["usage"]["completion_tokens"], 16);
    let choice = &response["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("length"), &Value::Null));
    assert!(!choice["text"].as_str().unwrap().is_empty());
}

#[test]
fn each_prompt_is_answered_as_if_it_were_alone() {
    let prompts = ["USER: hello ASSISTANT:", "USER: what shape is it? ASSISTANT:"];
    let draw = json!({"temperature": 1.2, "seed": 3, "n": 2, "max_tokens": 8});
    let both = texts(with(draw.clone(), json!({"prompt": prompts})));
    let alone = prompts.map(|prompt| texts(with(draw.clone(), json!({"prompt": prompt})))).concat();
    assert_eq!(both, alone);
    let usage =
        |prompt: Value| shared().post(PATH, &texted(json!({"prompt": prompt}))).json()["usage"].take();
    let count = |usage: &Value| usage["prompt_tokens"].as_u64().unwrap();
    let sum: u64 = prompts.iter().map(|prompt| count(&usage(json!(prompt)))).sum();
    assert_eq!(count(&usage(json!(prompts))), sum);
}

#[test]
fn a_stream_joins_to_the_whole() {
    let asked = json!({"max_tokens": 12, "logprobs": 2});
    let whole = shared().post(PATH, &texted(asked.clone())).json();
    let more = with(asked, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = shared().post(PATH, &texted(more)).chunks();
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    let choices = || chunks.iter().map(|chunk| &chunk["choices"][0]);
    let text: String = choices().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["text"]);
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let joined = choices().filter_map(|choice| choice["logprobs"][list].as_array()).flatten();
        let joined: Vec<&Value> = joined.collect();
        let told = whole["choices"][0]["logprobs"][list].as_array().unwrap();
        assert_eq!(joined, told.iter().collect::<Vec<_>>(), "{list}");
        assert_eq!(told.len() as u64, whole["usage"]["completion_tokens"].as_u64().unwrap());
    }
}

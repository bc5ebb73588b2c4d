//! Questions with images, answered at once or as they are made.

use serde_json::{Value, json};

use super::{MODEL, asking, long, picture, shared, with};
use crate::server::client::Response;

fn content(response: &Response) -> String {
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// The texts of a stream's deltas, joined.
fn joined(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let choices = choices.filter(|choice| choice["index"] == index);
    choices.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[test]
fn where_one_model_is_served_none_need_be_named() {
    let mut unnamed = asking(json!({}));
    unnamed.as_object_mut().unwrap().remove("model");
    for body in [unnamed, asking(json!({"model": null}))] {
        let response = shared().chat(&body).json();
        assert_eq!(response["choices"][0]["message"]["content"], "a red triangle", "{response}");
        assert_eq!(response["model"], MODEL);
    }
    let prompt = json!({"prompt": "a", "max_tokens": 1});
    for (path, body) in [("/v1/completions", prompt), ("/v1/responses", json!({"input": "a"}))] {
        let response = shared().post(path, &body);
        assert_eq!((response.status, &response.json()["model"]), (200, &json!(MODEL)), "{path}");
    }
}

#[test]
fn the_picture_is_seen_and_what_it_cost_is_told() {
    let response = shared().chat(&asking(json!({})));
    assert_eq!(content(&response), "a red triangle");
    let body = response.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"), "{body}");
    assert_eq!((body["object"].as_str(), body["model"].as_str()), (Some("chat.completion"), Some(MODEL)));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &body["choices"][0];
    assert_eq!((choice["index"].as_u64(), choice["finish_reason"].as_str()), (Some(0), Some("stop")));
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["refusal"].is_null() && choice["logprobs"].is_null());
    assert!(choice["timings"]["first_token_ms"].as_f64().unwrap() > 0.0, "{choice}");
    let usage = &body["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"));
    assert!(count("completion_tokens") > 0);
    assert_eq!(usage["prompt_tokens_details"]["image_tokens"], 64);
    let again = shared().chat(&asking(json!({}))).json();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0, "{again}");
    assert_ne!(again["id"], body["id"]);
}

#[test]
fn a_stream_begins_with_the_role_and_ends_with_done() {
    let response = shared().chat(&asking(json!({"stream": true})));
    assert_eq!(response.header("cache-control"), Some("no-store"));
    let chunks = response.chunks();
    let id = &chunks[0]["id"];
    for chunk in &chunks {
        assert_eq!((&chunk["id"], chunk["object"].as_str()), (id, Some("chat.completion.chunk")));
        assert_eq!((chunk["model"].as_str(), chunk["choices"].as_array().unwrap().len()), (Some(MODEL), 1));
        assert!(chunk.get("usage").is_none(), "{chunk}");
    }
    let first = &chunks[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": "", "refusal": null}));
    assert!(first["finish_reason"].is_null());
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(
        (&last["choices"][0]["delta"], &last["choices"][0]["finish_reason"]),
        (&json!({}), &json!("stop"))
    );
    assert!(before.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert_eq!(joined(&chunks, 0), "a red triangle");
}

#[test]
fn a_stream_tells_what_it_cost_where_that_is_asked_for() {
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = shared().chat(&asking(options)).chunks();
    let (last, before) = chunks.split_last().unwrap();
    assert!(before.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(last["choices"], json!([]));
    let whole = shared().chat(&asking(json!({}))).json();
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][count], whole["usage"][count]);
    }
}

#[test]
fn pieces_join_to_the_whole_answer() {
    let stream = shared().chat(&long(60, json!({"stream": true}))).chunks();
    let whole = shared().chat(&long(60, json!({})));
    assert_eq!(joined(&stream, 0), content(&whole));
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(whole.json()["usage"]["completion_tokens"], 60);
    assert_eq!(stream.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn several_answers_are_drawn_with_seeds_that_follow_each_other() {
    let question = |more| long(24, with(json!({"temperature": 1.5, "seed": 5}), more));
    let several = shared().chat(&question(json!({"n": 3}))).json();
    let texts: Vec<&str> = several["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["message"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 3);
    for (seed, text) in (5..).zip(&texts) {
        assert_eq!(&content(&shared().chat(&question(json!({"seed": seed})))), text);
    }
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "{texts:?}");
    assert_eq!(several["usage"]["completion_tokens"], 72);
    let one = shared().chat(&question(json!({}))).json();
    assert_eq!(several["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
    let chunks = shared().chat(&question(json!({"n": 3, "stream": true}))).chunks();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(&joined(&chunks, index), text);
    }
}

#[test]
fn nothing_is_drawn_without_a_temperature() {
    let plain = content(&shared().chat(&asking(json!({}))));
    for more in [
        json!({"temperature": 0}),
        json!({"temperature": 0, "top_p": 0.5, "seed": 9}),
        json!({"top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}),
        json!({"user": "somebody", "metadata": {"a": "b"}, "store": false, "safety_identifier": "x"}),
        json!({"stop": null, "tools": null, "response_format": {"type": "text"}, "modalities": ["text"]}),
        json!({"stream": false, "max_completion_tokens": 100, "priority": "high"}),
    ] {
        assert_eq!(content(&shared().chat(&asking(more))), plain);
    }
}

#[test]
fn an_answer_ends_at_a_stop_string_or_the_limit() {
    let stopped = shared().chat(&asking(json!({"stop": [" triangle", "never"]})));
    assert_eq!(content(&stopped), "a red");
    assert_eq!(stopped.json()["choices"][0]["finish_reason"], "stop");
    assert_eq!(content(&shared().chat(&asking(json!({"stop": " red"})))), "a");
    let cut = shared().chat(&asking(json!({"max_tokens": 1}))).json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert_eq!(cut["usage"]["completion_tokens"], 1);
}

#[test]
fn a_chat_holds_what_was_said_before() {
    let say = |messages: Value| shared().chat(&json!({"model": MODEL, "messages": messages}));
    let first =
        json!({"role": "user", "content": [picture(), {"type": "text", "text": "What is in the image?"}]});
    let follow = |answer: Value| {
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Really."}]},
            first,
            answer,
            {"role": "user", "content": "what color is the shape?"},
        ]);
        let response = say(messages);
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    };
    let plain = follow(json!({"role": "assistant", "content": "a red triangle"}));
    // As the Python package sends an answer back that it got.
    let sent = follow(
        json!({"role": "assistant", "content": "a red triangle", "refusal": null, "tool_calls": null}),
    );
    assert_eq!(plain["usage"]["prompt_tokens"], sent["usage"]["prompt_tokens"]);
    assert_eq!(plain["choices"][0]["message"]["content"], sent["choices"][0]["message"]["content"]);

    // Two in a row are one with a line between them.
    let rows =
        say(json!([{"role": "user", "content": "hello"}, {"role": "user", "content": "who are you?"}]));
    let one = say(json!([{"role": "user", "content": "hello\nwho are you?"}]));
    assert_eq!(rows.json()["usage"]["prompt_tokens"], one.json()["usage"]["prompt_tokens"]);
    assert_eq!(content(&rows), content(&one));
}

#[test]
fn an_answer_that_was_begun_goes_on() {
    let begun = asking(json!({}));
    let mut messages = begun["messages"].as_array().unwrap().clone();
    messages.push(json!({"role": "assistant", "content": "a red"}));
    assert_eq!(content(&shared().chat(&with(begun, json!({"messages": messages})))), "triangle");
}

#[test]
fn several_images_have_their_places() {
    let content = json!([picture(), picture(), {"type": "text", "text": "describe the images."}]);
    let response =
        shared().chat(&json!({"model": MODEL, "messages": [{"role": "user", "content": content}]}));
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.json()["usage"]["prompt_tokens_details"]["image_tokens"], 128);
    for detail in ["auto", "low", "high"] {
        let mut picture = picture();
        picture["image_url"]["detail"] = detail.into();
        let content = json!([{"type": "text", "text": "What is in the image?"}, picture]);
        let messages = json!([{"role": "user", "content": content}]);
        assert_eq!(shared().chat(&json!({"model": MODEL, "messages": messages})).status, 200);
    }
}

#[test]
fn each_token_tells_how_likely_it_was() {
    let asked = json!({"logprobs": true, "top_logprobs": 3});
    let response = shared().chat(&asking(asked.clone()));
    let choice = &response.json()["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, response.json()["usage"]["completion_tokens"].as_u64().unwrap());
    let bytes = tokens.iter().flat_map(|token| token["bytes"].as_array().unwrap());
    let bytes: Vec<u8> = bytes.map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap().trim(), "a red triangle");
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: what was taken is the likeliest.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
    }
    let chunks = shared().chat(&asking(with(asked, json!({"stream": true})))).chunks();
    let told = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(&told.flatten().cloned().collect::<Vec<_>>(), tokens);
    let none = shared().chat(&asking(json!({"logprobs": true}))).json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

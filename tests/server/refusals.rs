//! What is refused, and by which name.

use serde_json::{Value, json};

use super::{MODEL, asking, shared, with};
use crate::server::client::send;

fn said(messages: impl Into<Value>) -> Value {
    json!({"model": MODEL, "messages": messages.into()})
}

#[test]
fn a_parameter_that_is_not_supported_is_refused_by_name() {
    for name in [
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "parallel_tool_calls",
        "audio",
        "prediction",
        "reasoning_effort",
        "service_tier",
        "verbosity",
        "web_search_options",
        "best_of",
        "echo",
        "prompt",
        "temprature",
    ] {
        let message =
            shared().chat(&asking(json!({name: "x"}))).refused(400, "unsupported_parameter", Some(name));
        assert_eq!(message, format!("{name} is not supported; leave it out"));
    }
    for name in ["messages", "suffix", "best_of", "response_format", "tools"] {
        let body = json!({"model": MODEL, "prompt": "a", name: "x"});
        shared().post("/v1/completions", &body).refused(400, "unsupported_parameter", Some(name));
    }
    let echo = json!({"model": MODEL, "prompt": "a", "echo": true});
    shared().post("/v1/completions", &echo).refused(400, "unsupported_parameter", Some("echo"));
}

#[test]
fn a_value_that_means_nothing_is_refused_by_name() {
    for (name, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(0)),
        ("top_k", json!(-1)),
        ("min_p", json!(1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("max_completion_tokens", json!("many")),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(3)),
        ("presence_penalty", json!(-3)),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!([1])),
        ("logprobs", json!(2)),
        ("top_logprobs", json!(2)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("seed", json!(1.5)),
        ("stop", json!("")),
        ("stop", json!([1])),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("stream_options", json!({"other": true})),
        ("response_format", json!({"type": "xml"})),
        ("response_format", json!("json")),
        ("choice", json!("yes")),
        ("regex", json!(["a"])),
        ("priority", json!("highest")),
        ("modalities", json!(["audio"])),
        ("modalities", json!([])),
        ("store", json!(true)),
        ("metadata", json!({"a": 1})),
        ("user", json!(1)),
        ("messages", json!("hello")),
        ("model", json!(1)),
    ] {
        let body = asking(json!({name: value}));
        shared().chat(&body).refused(400, "invalid_value", Some(name));
    }
    let both = asking(json!({"max_tokens": 1, "max_completion_tokens": 2}));
    shared().chat(&both).refused(400, "invalid_value", Some("max_tokens"));
    let too_many = asking(json!({"logprobs": true, "top_logprobs": 21}));
    shared().chat(&too_many).refused(400, "invalid_value", Some("top_logprobs"));
    shared().chat(&asking(json!({"logit_bias": {"580": 1}}))).refused(
        400,
        "invalid_value",
        Some("logit_bias"),
    );
    for prompt in [json!([]), json!([1, 2]), json!([[1]]), json!({})] {
        let body = json!({"model": MODEL, "prompt": prompt});
        shared().post("/v1/completions", &body).refused(400, "invalid_value", Some("prompt"));
    }
}

#[test]
fn messages_that_no_model_can_read_are_refused() {
    let user = |content: Value| json!({"role": "user", "content": content});
    let url = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
    for (messages, words) in [
        (json!([]), "begin with the user"),
        (json!([{"role": "system", "content": "a"}]), "begin with the user"),
        (json!([{"role": "assistant", "content": "a"}]), "begin with the user"),
        (json!([user(json!(""))]), "message 0 is empty"),
        (json!([user(json!([]))]), "message 0 is empty"),
        (json!([user(json!("a")), {"role": "system", "content": "b"}]), "message 1 is of the system"),
        (json!([user(json!("a")), {"role": "tool", "content": "b"}]), "message 1: unknown variant `tool`"),
        (json!([{"role": "user"}]), "message 0: missing field `content`"),
        (json!([{"content": "a"}]), "message 0: missing field `role`"),
        (json!([user(json!(1))]), "expected text or a list of parts"),
        (json!([user(json!([{"type": "input_audio", "input_audio": {}}]))]), "unknown variant `input_audio`"),
        (json!([user(json!([{"type": "text", "text": "a", "x": 1}]))]), "unknown field `x`"),
        (json!([{"role": "user", "content": "a", "name": "b"}]), "unknown field `name`"),
        (
            json!([user(json!("a")), {"role": "assistant", "content": [url("data:,")]}]),
            "only the user can show",
        ),
        (json!([{"role": "system", "content": [url("data:,")]}]), "only the user can show"),
    ] {
        let message = shared().chat(&said(messages)).refused(400, "invalid_value", Some("messages"));
        assert!(message.contains(words), "{message:?} has no {words:?}");
    }
    for wrong in ["file:///etc/passwd", "data:image/png,x", "data:;base64,*"] {
        shared().chat(&said(json!([user(json!([url(wrong)]))]))).refused(
            400,
            "invalid_image_url",
            Some("messages"),
        );
    }
    let detail = json!([{"type": "image_url", "image_url": {"url": "data:,", "detail": "fine"}}]);
    shared().chat(&said(json!([user(detail)]))).refused(400, "invalid_value", Some("messages"));
    let broken = shared().chat(&said(json!([user(json!([url("data:image/png;base64,AAAA")]))])));
    let message = broken.refused(400, "invalid_image", Some("messages"));
    assert!(message.starts_with("image 1: "), "{message}");
    let pictures = vec![url("data:,"); 17];
    shared().chat(&said(json!([user(json!(pictures))]))).refused(400, "too_many_images", Some("messages"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let text = "word ".repeat(2000);
    let body = said(json!([{"role": "user", "content": text}]));
    shared().chat(&body).refused(400, "context_length_exceeded", Some("messages"));
    let completion = |more: Value| shared().post("/v1/completions", &with(json!({"model": MODEL}), more));
    let response = |more: Value| shared().post("/v1/responses", &with(json!({"model": MODEL}), more));
    completion(json!({"prompt": text})).refused(400, "context_length_exceeded", Some("prompt"));
    completion(json!({"prompt": ["short", text]})).refused(400, "context_length_exceeded", Some("prompt"));
    completion(json!({"prompt": ""})).refused(400, "invalid_value", Some("prompt"));
    response(json!({"input": text})).refused(400, "context_length_exceeded", Some("input"));
    let text = "x".repeat(200_001);
    let body = said(json!([{"role": "user", "content": text}]));
    shared().chat(&body).refused(400, "prompt_too_long", Some("messages"));
    let body = json!({"model": MODEL, "prompt": text});
    shared().post("/v1/completions", &body).refused(400, "prompt_too_long", Some("prompt"));
    for (name, none) in [("max_tokens", 0), ("max_completion_tokens", 0), ("max_tokens", 10_000)] {
        shared().chat(&asking(json!({name: none}))).refused(400, "invalid_value", Some(name));
    }
    let length = "max_completion_tokens";
    shared().chat(&asking(json!({length: 10_000}))).refused(400, "invalid_value", Some(length));
    let length = json!({"prompt": "a", "max_tokens": 10_000});
    completion(length).refused(400, "invalid_value", Some("max_tokens"));
    let length = json!({"input": "a", "max_output_tokens": 10_000});
    response(length).refused(400, "invalid_value", Some("max_output_tokens"));
    let biased = json!({"prompt": "a", "logit_bias": {"580": 1}});
    completion(biased).refused(400, "invalid_value", Some("logit_bias"));
}

#[test]
fn paths_methods_and_bodies_are_checked() {
    let server = shared();
    server.get("/v1/nothing").refused(404, "unknown_url", None);
    let wrong = server.get("/v1/chat/completions");
    wrong.refused(405, "method_not_allowed", None);
    assert_eq!(wrong.header("allow"), Some("POST"));
    let wrong = server.post("/health", &json!({}));
    wrong.refused(405, "method_not_allowed", None);
    assert_eq!(wrong.header("allow"), Some("GET,HEAD"));
    let path = "/v1/chat/completions";
    let json = ["Content-Type: application/json"];
    for body in ["", "{", "[]", "null", "{\"model\": \"tiny\"} more", "\u{0}"] {
        send(server.address, "POST", path, &json, body).refused(400, "malformed_json", None);
    }
    for headers in
        [&[][..], &["Content-Type: text/plain"], &["Content-Type: application/x-www-form-urlencoded"]]
    {
        send(server.address, "POST", path, headers, "{}").refused(415, "unsupported_media_type", None);
    }
    let packed = ["Content-Type: application/json", "Content-Encoding: gzip"];
    send(server.address, "POST", path, &packed, "{}").refused(415, "unsupported_content_encoding", None);
    let typed = ["Content-Type: Application/JSON; charset=utf-8", "Content-Encoding: Identity"];
    let body = asking(json!({})).to_string();
    assert_eq!(send(server.address, "POST", path, &typed, &body).status, 200);
    let unknown = server.chat(&with(asking(json!({})), json!({"model": "gpt-4o"})));
    unknown.refused(404, "model_not_found", Some("model"));
    server.chat(&with(asking(json!({})), json!({"model": ""}))).refused(
        404,
        "model_not_found",
        Some("model"),
    );
}

#[test]
fn the_models_are_listed() {
    let server = shared();
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&model["id"], &model["object"], &model["created"]),
        (&json!(MODEL), &json!("model"), &json!(1_700_000_000))
    );
    assert_eq!(&server.get("/v1/models/tiny").json(), model);
    server.get("/v1/models/other").refused(404, "model_not_found", Some("model"));
    server.get("/v1/models/%FF").refused(400, "invalid_path", None);
}

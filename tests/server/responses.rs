//! `/v1/responses`: the same questions in the newer form.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::client::Response;
use super::{MODEL, PICTURE, Server, engine, shared, with};

fn image() -> Value {
    json!({"type": "input_image", "image_url": format!("data:image/png;base64,{}", STANDARD.encode(PICTURE))})
}

/// A question about the picture, with more parameters.
fn asking(more: Value) -> Value {
    let content = json!([{"type": "input_text", "text": "What is in the image?"}, image()]);
    with(json!({"model": MODEL, "input": [{"role": "user", "content": content}]}), more)
}

fn ask(body: &Value) -> Response {
    shared().post("/v1/responses", body)
}

/// The events of a stream, each with its name.
fn events(response: &Response) -> Vec<Value> {
    assert_eq!(response.header("content-type"), Some("text/event-stream"), "{response:?}");
    let blocks = response.body.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap();
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), event["type"].as_str(), "{block}");
        event
    };
    blocks.map(event).collect()
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

#[test]
fn the_picture_is_seen_in_the_newer_form_too() {
    let response = ask(&asking(json!({"metadata": {"a": "b"}, "user": "me", "store": false}))).json();
    assert_eq!(text(&response), "a red triangle", "{response}");
    assert_eq!(
        (response["object"].as_str(), response["status"].as_str()),
        (Some("response"), Some("completed"))
    );
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!((&response["metadata"], &response["store"]), (&json!({"a": "b"}), &json!(false)));
    let item = &response["output"][0];
    assert_eq!((item["type"].as_str(), item["role"].as_str()), (Some("message"), Some("assistant")));
    assert_eq!(
        (item["status"].as_str(), &item["content"][0]["annotations"]),
        (Some("completed"), &json!([]))
    );
    let usage = &response["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("input_tokens") + count("output_tokens"), count("total_tokens"));
    let details = &usage["input_tokens_details"];
    assert_eq!(details["image_tokens"], 64);
    let read = details["cached_tokens"].as_u64().unwrap() + details["cache_write_tokens"].as_u64().unwrap();
    assert_eq!(read, count("input_tokens"));
    assert!(response["error"].is_null() && response["incomplete_details"].is_null());
}

#[test]
fn an_earlier_answer_is_sent_back_as_it_came() {
    let first = ask(&asking(json!({}))).json();
    let mut input = asking(json!({}))["input"].clone();
    input.as_array_mut().unwrap().push(first["output"][0].clone());
    input.as_array_mut().unwrap().push(json!({"role": "user", "content": "what color is it?"}));
    let body = json!({"model": MODEL, "input": input});
    let chat = json!({"model": MODEL, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is in the image?"}, super::picture()]},
        {"role": "assistant", "content": "a red triangle"},
        {"role": "user", "content": "what color is it?"},
    ]});
    let chat = shared().chat(&chat).json();
    assert_eq!(text(&ask(&body).json()), chat["choices"][0]["message"]["content"]);
}

#[test]
fn instructions_are_the_systems_text() {
    let input = |more: Value| with(json!({"model": MODEL, "input": "describe the image."}), more);
    let said = ask(&input(json!({"instructions": "Be brief.", "max_output_tokens": 4}))).json();
    let items = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "describe the image."}]);
    let item = ask(&json!({"model": MODEL, "input": items, "max_output_tokens": 4})).json();
    assert_eq!(said["usage"]["input_tokens"], item["usage"]["input_tokens"]);
    assert_eq!(text(&said), text(&item));
    let both =
        ask(&json!({"model": MODEL, "input": items, "instructions": "And kind.", "max_output_tokens": 4}))
            .json();
    assert!(both["usage"]["input_tokens"].as_u64() > item["usage"]["input_tokens"].as_u64(), "{both}");
}

#[test]
fn an_answer_that_a_limit_ended_is_incomplete() {
    let response = ask(&asking(json!({"max_output_tokens": 1}))).json();
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["usage"]["output_tokens"], 1);
    let events = events(&ask(&asking(json!({"max_output_tokens": 1, "stream": true}))));
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
}

#[test]
fn a_stream_tells_all_events_in_order() {
    let response = ask(&asking(json!({"stream": true, "stream_options": {"include_obfuscation": false}})));
    let events = events(&response);
    assert!(!response.body.contains("[DONE]"));
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
    }
    let mut names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    let of = |name: &str| events.iter().find(|event| event["type"] == name).unwrap();
    assert_eq!(deltas, "a red triangle");
    assert_eq!(of("response.output_text.done")["text"], "a red triangle");
    assert_eq!(of("response.content_part.done")["part"]["text"], "a red triangle");
    assert_eq!(text(&of("response.completed")["response"]), "a red triangle");
    assert_eq!(of("response.output_item.added")["item"]["content"], json!([]));
    let item = &of("response.output_item.added")["item"]["id"];
    for event in events.iter().filter(|event| event.get("item_id").is_some()) {
        assert_eq!(
            (&event["item_id"], &event["output_index"], &event["content_index"]),
            (item, &json!(0), &json!(0))
        );
    }
    let id = &of("response.created")["response"]["id"];
    assert_eq!(&of("response.completed")["response"]["id"], id);
    assert_eq!(of("response.created")["response"]["status"], "in_progress");
}

#[test]
fn an_answer_has_the_form_that_is_asked_for() {
    let schema = json!({"type": "object", "properties": {"shape": {"enum": ["circle", "triangle"]}},
        "required": ["shape"], "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "name": "seen", "strict": true, "schema": schema, "description": null});
    let response = ask(&asking(json!({"text": {"format": format}}))).json();
    let answer: Value = serde_json::from_str(text(&response)).unwrap_or_else(|e| panic!("{e}: {response}"));
    assert!(["circle", "triangle"].contains(&answer["shape"].as_str().unwrap()), "{answer}");
    assert_eq!(response["text"]["format"]["name"], "seen");
    let response = ask(&asking(json!({"text": {"format": {"type": "text"}}}))).json();
    assert_eq!(text(&response), "a red triangle");
}

#[test]
fn how_likely_tokens_were_is_told_where_it_is_asked_for() {
    let more = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let whole = ask(&asking(more.clone())).json();
    let tokens = whole["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, whole["usage"]["output_tokens"].as_u64().unwrap());
    assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2), "{whole}");
    let events = events(&ask(&asking(with(more, json!({"stream": true})))));
    let told = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let told: Vec<&Value> = told.flat_map(|event| event["logprobs"].as_array().unwrap()).collect();
    assert_eq!(told.len(), tokens.len());
    assert_eq!(told[0]["token"], tokens[0]["token"]);
    assert_eq!(ask(&asking(json!({}))).json()["output"][0]["content"][0]["logprobs"], json!([]));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for name in [
        "previous_response_id",
        "tools",
        "tool_choice",
        "reasoning",
        "background",
        "conversation",
        "prompt",
        "max_tool_calls",
        "parallel_tool_calls",
        "service_tier",
        "messages",
        "max_tokens",
        "n",
        "seed",
        "verbosity",
    ] {
        ask(&asking(json!({name: "x"}))).refused(400, "unsupported_parameter", Some(name));
    }
    for (more, param) in [
        (json!({"store": true}), "store"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"include": ["reasoning.encrypted_content"]}), "include"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"include": ["message.output_text.logprobs"], "top_logprobs": 21}), "top_logprobs"),
        (json!({"stream_options": {"include_obfuscation": false}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_obfuscation": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"text": {"format": {"type": "xml"}}}), "text"),
        (json!({"text": {"format": {"type": "text", "x": 1}}}), "text"),
        (json!({"text": {"verbosity": "low"}}), "text"),
        (json!({"text": {"format": {"type": "json_schema", "name": "", "schema": {}}}}), "text.format"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 7}}}}),
            "text.format",
        ),
        (json!({"input": []}), "input"),
        (json!({"input": " "}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": [{"role": "user", "content": []}]}), "input"),
        (json!({"input": [{"role": "assistant", "content": [image()]}]}), "input"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input"),
    ] {
        ask(&asking(more)).refused(400, "invalid_value", Some(param));
    }
    let url = |url: &str| json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]});
    ask(&asking(url("https://example.org/a.png"))).refused(400, "invalid_image", Some("input"));
    ask(&asking(url("file:///etc/passwd"))).refused(400, "invalid_image_url", Some("input"));
    ask(&asking(url("data:image/png;base64,AAEC"))).refused(400, "invalid_image", Some("input"));
    ask(&json!({"model": "another", "input": "a"})).refused(404, "model_not_found", Some("model"));
}

#[test]
fn a_stream_that_takes_too_long_ends_as_failed() {
    let server = Server::start(&engine(1), |options| {
        options.limits.request_time = std::time::Duration::from_millis(1500);
    });
    let body = json!({"model": MODEL, "input": "describe the image.", "stream": true});
    let response = server.post("/v1/responses", &body);
    // Whether it is quick enough is the machine's to say; one of the two ends every stream.
    let last = events(&response).pop().unwrap();
    let kind = last["type"].as_str().unwrap();
    assert!(["response.completed", "response.incomplete", "response.failed"].contains(&kind), "{last}");
    assert_eq!(last["response"]["status"], kind.strip_prefix("response.").unwrap());
}

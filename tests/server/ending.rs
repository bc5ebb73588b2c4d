//! Clients that leave, models that load, and a server that is told to end.

use std::{sync::mpsc, thread, time::Duration};

use llava_phi::Error;
use llava_phi::server::{Model, Models, Notice};
use serde_json::json;

use super::{MODEL, Server, asking, engine, long, until};
use crate::server::client::{Connection, PATIENCE, request};

const PATH: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json";

fn say(server: &Server, body: &serde_json::Value) -> Connection {
    let mut connection = Connection::open(server.address);
    connection.say(request("POST", PATH, &[JSON], &body.to_string()).as_bytes()).unwrap();
    connection
}

#[test]
fn a_client_that_leaves_ends_its_answers() {
    let engine = engine(1);
    let server = Server::start(&engine, |_| {});
    let rest = || engine.load().active + engine.load().waiting == 0;
    for stream in [true, false] {
        let before = engine.load().step_tokens;
        let many = long(400, json!({"stream": stream, "n": 16, "temperature": 1}));
        let mut connection = say(&server, &many);
        if stream {
            assert_eq!(connection.head().0, 200);
            assert!(connection.chunk().is_some());
        }
        until("the first token", || engine.load().step_tokens > before);
        drop(connection);
        until("the engine's rest", rest);
        // Sixteen answers of 400 tokens would have been all of them.
        let written = engine.load().step_tokens - before;
        assert!(written < 16 * 399, "{written} tokens for a client that left");
    }
    assert_eq!(server.chat(&asking(json!({}))).status, 200);
}

#[test]
fn requests_that_wait_are_dropped_when_their_client_leaves() {
    let engine = engine(1);
    let server = Server::start(&engine, |_| {});
    let mut first = say(&server, &long(400, json!({"stream": true, "n": 8, "temperature": 1})));
    assert_eq!(first.head().0, 200);
    until("the first eight", || engine.load().waiting == 7);
    let second = say(&server, &long(400, json!({})));
    until("the ninth", || engine.load().waiting == 8);
    drop(second);
    until("its end", || engine.load().completed > 0 && engine.load().waiting < 8);
    drop(first);
    until("the engine's rest", || engine.load().active + engine.load().waiting == 0);
}

#[test]
fn probes_are_answered_while_the_model_loads() {
    let (go, wait) = mpsc::channel::<()>();
    let engine = engine(1);
    let open = move || {
        wait.recv_timeout(PATIENCE).unwrap();
        Ok(Models::one(Model { name: MODEL.to_owned(), engine, fit: None, created: 0 }))
    };
    let listening = Notice::Listening { address: ([0, 0, 0, 0], 0).into(), tls: false };
    let server = Server::opening(Box::new(open), listening, |_| {});
    for path in ["/health", "/ready"] {
        let response = server.get(path);
        assert_eq!((response.status, response.json()["status"].as_str()), (503, Some("unavailable")));
        assert!(response.json()["reason"].as_str().unwrap().contains("loaded"), "{response:?}");
    }
    let early = server.chat(&asking(json!({})));
    early.refused(503, "service_unavailable", None);
    assert!(early.header("retry-after").is_some());
    go.send(()).unwrap();
    until("the model", || server.get("/health").status == 200);
    assert_eq!((server.get("/ready").status, server.chat(&asking(json!({}))).status), (200, 200));
}

#[test]
fn a_model_that_cannot_be_opened_ends_the_server() {
    let open = || Err(Error::Request("no such model".to_owned()));
    let listening = Notice::Listening { address: ([0, 0, 0, 0], 0).into(), tls: false };
    let server = Server::opening(Box::new(open), listening, |_| {});
    assert_eq!(server.end().unwrap_err().to_string(), "no such model");
}

#[test]
fn what_was_begun_is_finished_before_the_end_and_nothing_else_is_taken() {
    let engine = engine(1);
    let server = Server::start(&engine, |options| options.shutdown_grace = PATIENCE);
    let mut running = say(&server, &long(200, json!({"stream": true, "n": 4, "temperature": 1})));
    assert_eq!(running.head().0, 200);
    let mut kept = Connection::open(server.address);
    server.shutdown.ask();
    until("the end's begin", || server.get("/ready").status == 503);
    assert_eq!(server.get("/health").status, 200);
    let late = server.chat(&asking(json!({})));
    late.refused(503, "service_unavailable", None);
    assert!(late.header("retry-after").is_some());
    kept.say(request("POST", PATH, &[JSON], &asking(json!({})).to_string()).as_bytes()).unwrap();
    kept.response().refused(503, "service_unavailable", None);
    let mut text = String::new();
    while let Some(chunk) = running.chunk() {
        text.push_str(&String::from_utf8(chunk).unwrap());
    }
    assert_eq!(text.matches("\"finish_reason\":\"length\"").count(), 4);
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(server.end().is_ok());
}

#[test]
fn what_outlasts_the_grace_is_told_so() {
    let engine = engine(1);
    let server = Server::start(&engine, |options| options.shutdown_grace = Duration::from_millis(50));
    let many = |stream: bool| long(400, json!({"stream": stream, "n": 16, "temperature": 1}));
    let mut stream = say(&server, &many(true));
    let mut whole = say(&server, &many(false));
    until("both", || engine.load().waiting + engine.load().active > 20);
    server.shutdown.ask();
    whole.response().refused(503, "service_unavailable", None);
    let response = stream.response();
    let last: serde_json::Value = serde_json::from_str(response.data().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "service_unavailable");
    assert!(server.end().is_ok());
}

#[test]
fn being_told_twice_ends_at_once() {
    let engine = engine(1);
    let server = Server::start(&engine, |options| options.shutdown_grace = Duration::from_hours(1));
    let mut running = say(&server, &long(400, json!({"n": 16, "temperature": 1})));
    until("its begin", || engine.load().active > 0);
    server.shutdown.ask();
    thread::sleep(Duration::from_millis(20));
    server.shutdown.ask();
    running.response().refused(503, "service_unavailable", None);
    assert!(server.end().is_ok());
}

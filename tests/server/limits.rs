//! Keys, sizes, and clients that are slow or many.

use std::{io::Write as _, time::Duration};

use llava_phi::engine::{Engine, EngineOptions};
use llava_phi::server::{Keys, ServerLimits, ServerOptions};
use serde_json::json;
use tempfile::NamedTempFile;

use super::{MODEL, Server, asking, engine, long, shared, with};
use crate::server::client::{Connection, request, send};
use crate::support::{library, options, package};

const PATH: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json";

/// A server with other limits than usual.
fn limited(change: impl FnOnce(&mut ServerLimits)) -> Server {
    Server::start(&engine(1), |options| change(&mut options.limits))
}

#[test]
fn nothing_but_probes_is_open_where_keys_are_set() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(b"# of the test\nsk-first\nsk-second\n").unwrap();
    let keys = Keys::open(file.path()).unwrap();
    let server = Server::start(&engine(1), |options| options.keys = keys);
    let get = |path: &str, header: &str| send(server.address, "GET", path, &[header], "");
    for path in
        ["/v1/models", "/v1/models/tiny", PATH, "/v1/completions", "/metrics", "/v1/nothing", "/nothing"]
    {
        for header in [
            "X-Nothing: 1",
            "Authorization: Bearer sk-firs",
            "Authorization: Bearer ",
            "Authorization: sk-first",
        ] {
            let response = get(path, header);
            response.refused(401, "invalid_api_key", None);
            assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        }
    }
    for key in ["sk-first", "sk-second"] {
        assert_eq!(get("/v1/models", &format!("Authorization: Bearer {key}")).status, 200);
    }
    assert_eq!((get("/health", "X-Nothing: 1").status, get("/ready", "X-Nothing: 1").status), (200, 200));
    let headers = [JSON, "Authorization: Bearer sk-second"];
    assert_eq!(send(server.address, "POST", PATH, &headers, &asking(json!({})).to_string()).status, 200);
    // With a key the name by which a client knows this machine is its own affair.
    assert_eq!(named(&server, "service.example", "Authorization: Bearer sk-first"), 200);
}

fn named(server: &Server, host: &str, header: &str) -> u16 {
    let mut connection = Connection::open(server.address);
    let request = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\n{header}\r\n\r\n");
    connection.say(request.as_bytes()).unwrap();
    connection.response().status
}

#[test]
fn a_name_that_was_made_to_mean_this_machine_is_not_answered() {
    for (host, status) in [
        ("127.0.0.1", 200),
        ("localhost:1", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        ("localhost.example", 421),
    ] {
        assert_eq!(named(shared(), host, "X-Nothing: 1"), status, "{host}");
    }
}

#[test]
fn a_public_address_needs_a_key_or_insistence() {
    let mut options = ServerOptions::at(([0, 0, 0, 0], 0).into());
    let refusal = options.validate().unwrap_err().to_string();
    assert!(refusal.contains("--api-key-file") && refusal.contains("--insecure-no-key"), "{refusal}");
    options.open_to_everybody = true;
    assert!(options.validate().is_ok());
    assert!(ServerOptions::at(([127, 0, 0, 1], 0).into()).validate().is_ok());
}

#[test]
fn a_body_that_is_too_large_is_refused_whether_it_says_so_or_not() {
    let server = limited(|limits| limits.body_bytes = 500);
    let body = asking(json!({})).to_string();
    assert!(body.len() > 500);
    send(server.address, "POST", PATH, &[JSON], &body).refused(413, "body_too_large", None);
    // Announced only: nothing of it is waited for.
    let mut connection = Connection::open(server.address);
    let head =
        format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: 99999999999\r\n\r\n");
    connection.say(head.as_bytes()).unwrap();
    connection.response().refused(413, "body_too_large", None);
    // In pieces, of which nobody knows how many will come.
    let mut connection = Connection::open(server.address);
    let head =
        format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection.say(head.as_bytes()).unwrap();
    connection.say(format!("3e9\r\n{}\r\n", " ".repeat(1001)).as_bytes()).unwrap();
    connection.response().refused(413, "body_too_large", None);
}

#[test]
fn bodies_that_are_being_read_share_one_room() {
    let server = limited(|limits| limits.buffered_bytes = 8192);
    let body = with(asking(json!({})), json!({"user": "x".repeat(9000)})).to_string();
    let whole = request("POST", PATH, &[JSON], &body);
    // Two pages are taken, and the rest does not come.
    let (begin, _) = whole.as_bytes().split_at(whole.find("\r\n\r\n").unwrap() + 4 + 8000);
    super::until("the refusal", || {
        let mut first = Connection::open(server.address);
        first.say(begin).unwrap();
        // Whichever comes first takes the room, which is meant to be that one.
        std::thread::sleep(Duration::from_millis(10));
        let second = server.chat(&asking(json!({})));
        second.status == 429 && second.header("retry-after").is_some()
    });
    super::until("the room", || server.chat(&asking(json!({}))).status == 200);
}

#[test]
fn requests_beyond_the_limit_are_told_to_come_again() {
    let server = limited(|limits| limits.requests = 1);
    let mut first = Connection::open(server.address);
    let body = long(400, json!({"stream": true, "n": 16, "temperature": 1})).to_string();
    first.say(request("POST", PATH, &[JSON], &body).as_bytes()).unwrap();
    assert_eq!(first.head().0, 200);
    let second = server.chat(&asking(json!({})));
    second.refused(429, "rate_limit_exceeded", None);
    assert_eq!(second.header("retry-after"), Some("1"));
    // Whoever asks for no answer is not concerned.
    assert_eq!((server.get("/health").status, server.get("/v1/models").status), (200, 200));
    drop(first);
    super::until("room", || server.chat(&asking(json!({}))).status == 200);
}

#[test]
fn more_answers_than_ever_fit_are_refused_for_good() {
    let model = options("cpu-int4", 1);
    let options = EngineOptions { library: library(), model, queue: Some(1), ..EngineOptions::default() };
    let server = Server::start(&Engine::open(package(), &options).unwrap(), |_| {});
    for path in [PATH, "/v1/completions"] {
        let body = match path {
            PATH => asking(json!({"n": 3})),
            _ => json!({"model": MODEL, "prompt": ["a", "b", "c"]}),
        };
        let told = server.post(path, &body).refused(400, "invalid_value", Some("n"));
        assert!(told.starts_with("3 answers are asked for and the server takes 2 at once"), "{told}");
    }
    assert_eq!(server.chat(&asking(json!({"n": 2}))).status, 200);
}

#[test]
fn connections_that_say_nothing_or_stop_halfway_are_closed() {
    let short = Duration::from_millis(200);
    let server = limited(|limits| (limits.header_time, limits.stall_time) = (short, short));
    for begin in [
        "",
        "P",
        "POST / HTTP/1.1\r\n",
        "POST / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "PRI * HTTP/2.0\r\n",
    ] {
        let mut connection = Connection::open(server.address);
        connection.say(begin.as_bytes()).unwrap();
        connection.rest();
    }
    // One that is kept for the next request, which does not come.
    let mut connection = Connection::open(server.address);
    connection.say(request("GET", "/health", &[], "").as_bytes()).unwrap();
    assert_eq!(connection.response().status, 200);
    assert!(connection.rest().is_empty());
    // A body of which a part never comes.
    let mut connection = Connection::open(server.address);
    let body = asking(json!({})).to_string();
    let whole = request("POST", PATH, &[JSON], &body);
    connection.say(&whole.as_bytes()[..whole.len() - 1]).unwrap();
    connection.response().refused(408, "request_timeout", None);
    assert_eq!(server.chat(&asking(json!({}))).status, 200);
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let server = limited(|limits| limits.connections = 2);
    let held = [Connection::open(server.address), Connection::open(server.address)];
    let mut third = Connection::open(server.address);
    assert!(third.rest().is_empty());
    drop(held);
    super::until("room", || {
        let mut connection = Connection::open(server.address);
        connection.say(request("GET", "/health", &["Connection: close"], "").as_bytes()).is_ok()
            && connection.rest().starts_with(b"HTTP/1.1 200")
    });
}

#[test]
fn an_answer_that_takes_too_long_is_given_up_on() {
    let engine = engine(1);
    let server = Server::start(&engine, |options| options.limits.request_time = Duration::from_millis(300));
    let question = |more| long(400, with(json!({"n": 16, "temperature": 1}), more));
    server.chat(&question(json!({}))).refused(504, "deadline_exceeded", None);
    let stream = server.chat(&question(json!({"stream": true})));
    let last: serde_json::Value = serde_json::from_str(stream.data().last().unwrap()).unwrap();
    assert_eq!((stream.status, last["error"]["code"].as_str()), (200, Some("deadline_exceeded")));
    super::until("the engine's rest", || engine.load().active + engine.load().waiting == 0);
}

#[test]
fn a_client_that_reads_nothing_holds_nobody_up() {
    let engine = engine(1);
    let server = Server::start(&engine, |_| {});
    let mut slow = Connection::open(server.address);
    let body = long(400, json!({"stream": true, "n": 4, "logprobs": true, "top_logprobs": 20})).to_string();
    slow.say(request("POST", PATH, &[JSON], &body).as_bytes()).unwrap();
    super::until("its begin", || engine.load().active + engine.load().waiting > 0);
    assert_eq!(server.chat(&asking(json!({}))).status, 200);
    super::until("the engine's rest", || engine.load().active + engine.load().waiting == 0);
    assert_eq!(slow.response().chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
}

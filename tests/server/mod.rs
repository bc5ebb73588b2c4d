//! `llava-phi serve` as its clients see it.

mod chat;
mod client;
mod completions;
mod directory;
mod ending;
mod forms;
mod limits;
mod program;
mod refusals;
mod responses;
mod watched;

use std::{
    net::SocketAddr,
    sync::{OnceLock, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use llava_phi::Result;
use llava_phi::engine::{Engine, EngineOptions};
use llava_phi::model::ModelOptions;
use llava_phi::server::{self, Model, Models, Notice, Open, ServerOptions, Shutdown};
use serde_json::{Value, json};

use crate::support::{library, options, package};
use client::{PATIENCE, Response, send};

/// What requests call the model.
const MODEL: &str = "tiny";

/// A picture of which the miniature knows what it is.
const PICTURE: &[u8] = include_bytes!("../../models/tiny/images/red-triangle.png");

/// A server on a thread of its own.
struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Server {
    /// A server over `engine` with other options than usual.
    fn start(engine: &Engine, change: impl FnOnce(&mut ServerOptions)) -> Self {
        let engine = engine.clone();
        Self::opening(
            Box::new(move || {
                Ok(Models::one(Model { name: MODEL.to_owned(), engine, fit: None, created: 1_700_000_000 }))
            }),
            Notice::Ready,
            change,
        )
    }

    /// A server that opens its models with `open`, once it has told `until` or where it listens.
    fn opening(open: Open, until: Notice, change: impl FnOnce(&mut ServerOptions)) -> Self {
        let mut options = ServerOptions::at(([127, 0, 0, 1], 0).into());
        change(&mut options);
        let shutdown = Shutdown::new();
        let asked = shutdown.clone();
        let (sender, notices) = mpsc::channel();
        let thread = thread::spawn(move || {
            server::run(options, open, &asked, &mut |notice| {
                let _ = sender.send(notice);
            })
        });
        let Ok(Notice::Listening { address, .. }) = notices.recv_timeout(PATIENCE) else {
            panic!("{:?}", thread.join());
        };
        if until == Notice::Ready {
            assert_eq!(notices.recv_timeout(PATIENCE), Ok(Notice::Ready));
        }
        Self { address, shutdown, thread: Some(thread) }
    }

    fn get(&self, path: &str) -> Response {
        send(self.address, "GET", path, &[], "")
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        send(self.address, "POST", path, &["Content-Type: application/json"], &body.to_string())
    }

    fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    /// Waits for the end, which comes by itself once it was asked for.
    fn end(mut self) -> Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shutdown.ask();
            self.shutdown.ask();
            let ended = thread.join();
            assert!(thread::panicking() || ended.is_ok_and(|ended| ended.is_ok()));
        }
    }
}

/// An engine of a test's own.
fn engine(parallel: usize) -> Engine {
    let model = ModelOptions { parallel, ..options("cpu-int4", 1) };
    Engine::open(package(), &EngineOptions { library: library(), model, ..EngineOptions::default() }).unwrap()
}

/// A server that tests share as long as they change nothing of it.
fn shared() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&engine(4), |_| {}))
}

/// The picture as a message shows it.
fn picture() -> Value {
    let url = format!("data:image/png;base64,{}", STANDARD.encode(PICTURE));
    json!({"type": "image_url", "image_url": {"url": url}})
}

/// A question about the picture, with more parameters.
fn asking(more: Value) -> Value {
    let content = json!([{"type": "text", "text": "What is in the image?"}, picture()]);
    with(json!({"model": MODEL, "messages": [{"role": "user", "content": content}]}), more)
}

/// A question to which the answer has exactly so many tokens.
fn long(tokens: usize, more: Value) -> Value {
    let bias = json!({(EOS): -100});
    let question = json!({"model": MODEL, "messages": [{"role": "user", "content": "describe the image."}],
        "max_tokens": tokens, "logit_bias": bias});
    with(question, more)
}

/// The token that ends answers of the miniature.
const EOS: &str = "575";

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}") };
    body.as_object_mut().unwrap().extend(more);
    body
}

/// Waits until `condition` holds, which it must.
fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what} does not come");
        thread::sleep(Duration::from_millis(5));
    }
}

//! The program: what it says, what it refuses, and how it ends.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    process::{Child, ChildStderr, Command, Stdio},
};

use serde_json::json;
use tempfile::TempDir;

use super::asking;
use crate::cli;
use crate::server::client::send;
use crate::support;

/// The program while it serves; killed where a test fails.
struct Serving {
    child: Child,
    said: BufReader<ChildStderr>,
    address: SocketAddr,
}

impl Serving {
    fn start(arguments: &[&str]) -> Self {
        let mut command = support::program();
        command.args(["serve", "--port", "0"]).args(arguments);
        command.env("LLAVA_PHI_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-cache"));
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
        let mut serving = Self { child, said, address };
        assert_eq!(serving.line(), "ready");
        serving
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Everything that it said after it was ready, once it has ended with `code`.
    fn end(mut self, signal: &str, code: i32) -> String {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        let mut out = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(code), "{rest}");
        assert!(out.is_empty(), "{out}");
        rest
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(unix)]
#[test]
fn a_signal_ends_it_in_order_and_the_log_holds_nothing_of_what_was_said() {
    let directory = TempDir::new().unwrap();
    let keys = directory.path().join("keys");
    fs::write(&keys, "sk-secret\n").unwrap();
    for signal in ["-TERM", "-INT"] {
        let serving = Serving::start(&["--model-name", "tiny", "--api-key-file", keys.to_str().unwrap()]);
        let headers = ["Content-Type: application/json", "Authorization: Bearer sk-secret"];
        let body = asking(json!({"user": "somebody"})).to_string();
        let response = send(serving.address, "POST", "/v1/chat/completions?key=hidden", &headers, &body);
        assert_eq!(response.json()["choices"][0]["message"]["content"], "a red triangle");
        let wrong = ["Authorization: Bearer sk-wrong"];
        assert_eq!(send(serving.address, "GET", "/private/path", &wrong, "").status, 401);
        let log = serving.end(signal, 0);
        for secret in
            ["sk-secret", "sk-wrong", "hidden", "private", "What is in", "triangle", "base64", "somebody"]
        {
            assert!(!log.contains(secret), "{secret} in {log}");
        }
        for told in ["/v1/chat/completions", "status=200", "status=401", "completion_tokens=", "POST", "ms="]
        {
            assert!(log.contains(told), "{told} not in {log}");
        }
    }
}

#[test]
fn arguments_that_let_strangers_in_or_say_nothing_are_refused() {
    let directory = TempDir::new().unwrap();
    let empty = directory.path().join("empty");
    fs::write(&empty, "# nobody\n").unwrap();
    let empty = empty.to_str().unwrap();
    let check = |arguments: &[&str], code: i32, words: &[&str]| {
        let run = cli::end(cli::program().arg("serve").args(arguments));
        assert_eq!(run.code, Some(code), "{arguments:?}: {run:?}");
        assert!(run.out.is_empty() && run.err.lines().count() == 1, "{run:?}");
        for word in words {
            assert!(run.err.contains(word), "{word:?} is not in {:?}", run.err);
        }
    };
    check(&["--host", "0.0.0.0"], 2, &["--api-key-file", "--insecure-no-key"]);
    check(&["--host", "::"], 2, &["--api-key-file", "--insecure-no-key"]);
    check(&["--host", "0.0.0.0", "--api-key-file", empty], 2, &["holds no key"]);
    check(&["--api-key-file", "/nowhere/keys"], 2, &["/nowhere/keys", "cannot be read", "check the path"]);
    check(&["--host", "example.com"], 2, &["127.0.0.1"]);
    check(&["--port", "99999"], 2, &["--port"]);
    check(&["--parallel", "0"], 2, &["--parallel"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    check(&["--port", &port], 2, &["cannot be listened on", "another address or port"]);
    check(&["--model-name", ""], 2, &["--model-name"]);
    check(&["--max-models", "2"], 2, &["--models-dir"]);
}

#[test]
fn a_package_that_is_none_ends_it() {
    let directory = TempDir::new().unwrap();
    let run = cli::end(cli::program().args(["serve", "--port", "0", "--model"]).arg(directory.path()));
    assert_eq!(run.code, Some(3), "{run:?}");
    assert!(
        run.err.contains("listening on http://127.0.0.1:") && run.err.contains("error: package"),
        "{run:?}"
    );
}

#[test]
fn settings_are_shown_with_their_origins_and_can_be_given_again() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("llava_phi.toml");
    fs::write(&file, "[serve]\nqueue = 5\nmax-images = 3\nparallel = 2\nmodel = \"/nowhere\"\n").unwrap();
    let show = |file: &str, words: &[&str], variables: &[(&str, &str)]| {
        let mut command = cli::program();
        command.args(["serve", "--print-config", "--config", file]).args(words);
        let run = cli::end(command.envs(variables.iter().copied()));
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(run.err.is_empty(), "{run:?}");
        run.out
    };
    let path = file.to_str().unwrap();
    let variables = [("LLAVA_PHI_SERVE_MAX_IMAGES", "4"), ("LLAVA_PHI_SERVE_PARALLEL", "6")];
    let shown = show(path, &["--parallel", "7"], &variables);
    for told in [
        format!("# {path}:2\nqueue = 5\n"),
        "# environment variable LLAVA_PHI_SERVE_MAX_IMAGES\nmax-images = 4\n".to_owned(),
        "# --parallel\nparallel = 7\n".to_owned(),
        "# default\nport = 8080\n".to_owned(),
        "# not set\n# model-name =\n".to_owned(),
    ] {
        assert!(shown.contains(&told), "{told:?} is not in {shown}");
    }
    let again = directory.path().join("again.toml");
    fs::write(&again, &shown).unwrap();
    let values = |text: &str| {
        let set = text.lines().filter(|line| !line.starts_with('#'));
        set.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    assert_eq!(values(&show(again.to_str().unwrap(), &[], &[])), values(&shown));
}

#[test]
fn a_variable_that_is_empty_is_as_if_it_were_not_there() {
    let help = cli::end(cli::program().args(["serve", "--help"])).out;
    let names: BTreeSet<&str> = help
        .split("[env: ")
        .skip(1)
        .filter_map(|rest| rest.split(['=', ']']).next())
        .chain(["LLAVA_PHI_LOG", "LLAVA_PHI_CACHE", "LLAVA_PHI_OFFLINE", "LLAVA_PHI_RUNTIME_LIBRARY"])
        .collect();
    assert!(names.contains("LLAVA_PHI_SERVE_PORT") && names.contains("LLAVA_PHI_CONFIG"), "{names:?}");
    for command in [&["serve", "--print-config"][..], &["inspect"], &["completions", "bash"]] {
        let run = |value: Option<&str>| {
            let mut program = cli::program();
            for name in &names {
                match value {
                    Some(value) => program.env(name, value),
                    None => program.env_remove(name),
                };
            }
            cli::end(program.args(command))
        };
        let (without, empty) = (run(None), run(Some("")));
        assert_eq!((empty.code, &empty.err), (Some(0), &without.err), "{command:?}");
        assert_eq!(empty.out, without.out, "{command:?}");
    }
}

#[cfg(unix)]
#[test]
fn each_line_of_the_log_is_an_object_where_that_is_asked_for() {
    let mut command = support::program();
    command.args(["serve", "--port", "0", "--log-format", "json"]);
    command.env("LLAVA_PHI_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-cache"));
    // As if it were not there: requests are logged.
    command.env("LLAVA_PHI_LOG", "");
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        serde_json::from_str::<serde_json::Value>(&line).unwrap_or_else(|_| panic!("{line:?}"))
    };
    let first = line();
    let address = first["message"].as_str().unwrap().strip_prefix("listening on http://").unwrap();
    let address: SocketAddr = address.parse().unwrap();
    assert_eq!(line()["message"], "ready");
    let headers = ["Content-Type: application/json"];
    let body = asking(json!({"model": "llava-phi-tiny"})).to_string();
    assert_eq!(send(address, "POST", "/v1/chat/completions", &headers, &body).status, 200);
    let request = line();
    let _ = (child.kill(), child.wait());
    assert_eq!((request["status"].as_u64(), request["method"].as_str()), (Some(200), Some("POST")));
    assert!(request["completion_tokens"].as_u64().unwrap() > 0, "{request}");
    for secret in ["What is in", "triangle", "base64"] {
        assert!(!request.to_string().contains(secret), "{request}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_told_of_once_and_every_line_is_an_object() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let cache = directory.path().join("file/cache");
    let mut command = support::program();
    command.args(["serve", "--port", "0", "--visual-tokens", "16", "--log-format", "json", "--cache-dir"]);
    let mut child = command.arg(&cache).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut lines: Vec<serde_json::Value> = Vec::new();
    let message = |line: &serde_json::Value| line["message"].as_str().unwrap_or_default().to_owned();
    while lines.last().is_none_or(|line| message(line) != "request") {
        let mut line = String::new();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended: {lines:?}");
        lines.push(serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}")));
        if message(&lines[lines.len() - 1]) == "ready" {
            let address = message(&lines[0]);
            let address = address.strip_prefix("listening on http://").unwrap().parse().unwrap();
            let body = asking(json!({"model": null})).to_string();
            let headers = ["Content-Type: application/json"];
            assert_eq!(send(address, "POST", "/v1/chat/completions", &headers, &body).status, 200);
        }
    }
    let _ = (child.kill(), child.wait());
    let cache = cache.to_str().unwrap();
    let told: Vec<_> = lines.iter().filter(|line| line.to_string().contains(cache)).collect();
    assert_eq!(told.len(), 1, "{lines:?}");
    for word in ["nothing is kept for later runs", "use another directory", "--cache-dir"] {
        assert!(message(told[0]).contains(word), "{word:?} is not in {told:?}");
    }
    assert!(lines.iter().any(|line| message(line).starts_with("notice: ") && line != told[0]), "{lines:?}");
}

#[test]
fn what_ends_it_is_an_object_too_where_that_is_asked_for() {
    let directory = TempDir::new().unwrap();
    let words = ["serve", "--port", "0", "--log-format", "json", "--model"];
    let run = cli::end(cli::program().args(words).arg(directory.path()));
    assert_eq!(run.code, Some(3), "{run:?}");
    let lines: Vec<serde_json::Value> = run
        .err
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line:?}")))
        .collect();
    let last = lines.last().unwrap();
    assert_eq!(last["level"], "ERROR");
    assert!(last["message"].as_str().unwrap().starts_with("package "), "{last}");
}

//! Several models from one directory: opened on demand, closed for each other.

use std::{fs, path::Path, sync::Arc, thread, time::Duration};

use llava_phi::engine::{Engine, EngineOptions};
use llava_phi::package::ModelPackage;
use llava_phi::package::plan::MemoryPlan;
use llava_phi::server::{Models, ModelsDirectory, Notice};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::Response;
use super::{Server, asking, long, until, with};
use crate::support::{library, options};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/package");

/// A directory of packages `one` and `two`, one that is broken, and one that is none.
fn directory() -> TempDir {
    let directory = TempDir::new().unwrap();
    for name in ["one", "two", "broken"] {
        copy(Path::new(TINY), &directory.path().join(name));
    }
    fs::remove_file(directory.path().join("broken/manifest.json")).unwrap();
    fs::write(directory.path().join("broken/manifest.json"), "{}").unwrap();
    fs::create_dir(directory.path().join("none")).unwrap();
    directory
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

fn start(directory: &TempDir, change: impl FnOnce(&mut ModelsDirectory)) -> Server {
    let open = |package: &ModelPackage| {
        let model = options("cpu-int4", 1);
        Engine::open(package, &EngineOptions { library: library(), model, ..EngineOptions::default() })
    };
    let mut models =
        ModelsDirectory { retry: Duration::ZERO, ..ModelsDirectory::at(directory.path(), Arc::new(open)) };
    change(&mut models);
    Server::opening(Box::new(move || Models::in_directory(models)), Notice::Ready, |_| {})
}

fn ask(server: &Server, model: &str) -> Response {
    server.chat(&asking(json!({"model": model})))
}

fn ask_unnamed(server: &Server) -> Response {
    server.chat(&asking(json!({"model": null})))
}

fn answered(response: &Response) {
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.json()["choices"][0]["message"]["content"], "a red triangle");
}

/// The state of each model, in the order of their names.
fn states(server: &Server) -> Vec<String> {
    let status = server.get("/v1/status").json();
    let models = status["models"].as_array().unwrap();
    models.iter().map(|model| format!("{}={}", text(&model["id"]), text(&model["state"]))).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn models_are_listed_unopened_and_opened_when_they_are_asked_for() {
    let directory = directory();
    let server = start(&directory, |models| models.most = 2);
    let list = server.get("/v1/models").json();
    let names: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| text(&model["id"])).collect();
    assert_eq!(names, ["broken", "one", "two"]);
    assert!(list["data"][1]["context_length"].as_u64().unwrap() > 0, "{list}");
    assert_eq!(list["data"][0]["context_length"], Value::Null);
    assert_eq!(states(&server), ["broken=unloaded", "one=unloaded", "two=unloaded"]);
    assert_eq!((server.get("/health").status, server.get("/ready").status), (200, 200));

    thread::scope(|scope| {
        let asked: Vec<_> = ["one", "two", "one", "two"]
            .into_iter()
            .map(|model| {
                let server = &server;
                scope.spawn(move || ask(server, model))
            })
            .collect();
        for response in asked {
            answered(&response.join().unwrap());
        }
    });
    assert_eq!(states(&server), ["broken=unloaded", "one=ready", "two=ready"]);
    assert_eq!(server.get("/v1/models/two").json()["id"], "two");
    assert_eq!(server.get("/v1/models/none").status, 404);
    assert_eq!(ask(&server, "none").status, 404);
    let unnamed = ask_unnamed(&server).refused(404, "model_not_found", Some("model"));
    assert!(unnamed.contains("broken, one, two"), "{unnamed}");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("model=\"one\"") && metrics.contains("model=\"two\""), "{metrics}");
}

#[test]
fn the_model_used_longest_ago_leaves_for_another() {
    let directory = directory();
    copy(Path::new(TINY), &directory.path().join("three"));
    let server = start(&directory, |models| {
        models.most = 2;
        models.preload = vec!["two".to_owned()];
    });
    assert_eq!(states(&server)[3], "two=ready");
    for model in ["one", "two", "three"] {
        answered(&ask(&server, model));
    }
    assert_eq!(states(&server), ["broken=unloaded", "one=unloaded", "three=ready", "two=ready"]);
}

#[test]
fn one_that_answers_stays_and_the_other_is_told_to_come_again() {
    let directory = directory();
    let server = start(&directory, |models| models.most = 1);
    thread::scope(|scope| {
        let busy = scope.spawn(|| server.chat(&with(long(400, json!({})), json!({"model": "one"}))));
        until("the answer's begin", || {
            let status = server.get("/v1/status").json();
            status["models"][1]["load"]["active"].as_u64().is_some_and(|active| active > 0)
        });
        let refused = ask(&server, "two");
        if !busy.is_finished() {
            assert_eq!(refused.status, 503, "{refused:?}");
            assert!(refused.header("retry-after").is_some(), "{refused:?}");
            assert_eq!(refused.json()["error"]["code"], "model_busy");
        }
        assert_eq!(busy.join().unwrap().status, 200);
    });
    until("room", || ask(&server, "two").status == 200);
    assert_eq!(states(&server), ["broken=unloaded", "one=unloaded", "two=ready"]);
}

#[test]
fn memory_bounds_how_many_are_open() {
    let directory = directory();
    let held = MemoryPlan::new(&ModelPackage::open(TINY).unwrap(), None).unwrap().held();
    let server = start(&directory, |models| (models.most, models.memory) = (9, Some(held + held / 2)));
    answered(&ask(&server, "one"));
    until("room", || ask(&server, "two").status == 200);
    assert_eq!(states(&server), ["broken=unloaded", "one=unloaded", "two=ready"]);
}

#[cfg(unix)]
#[test]
fn where_a_package_lies_that_is_a_link_is_not_told() {
    let (directory, elsewhere) = (TempDir::new().unwrap(), directory());
    let place = elsewhere.path().join("broken");
    std::os::unix::fs::symlink(&place, directory.path().join("linked")).unwrap();
    let server = start(&directory, |_| {});
    let body = ask(&server, "linked").json();
    assert!(text(&body["error"]["message"]).contains("linked/manifest.json"), "{body}");
    assert!(!body.to_string().contains(elsewhere.path().to_str().unwrap()), "{body}");
}

#[test]
fn a_broken_package_tells_why_and_is_tried_again() {
    let directory = directory();
    let server = start(&directory, |_| {});
    let refused = ask(&server, "broken");
    assert_eq!(refused.status, 503, "{refused:?}");
    let body = refused.json();
    assert_eq!(body["error"]["code"], "model_failed");
    assert!(text(&body["error"]["message"]).contains("broken/manifest.json"), "{body}");
    assert!(!body.to_string().contains(directory.path().to_str().unwrap()), "{body}");
    let status = server.get("/v1/status").json();
    assert_eq!(status["models"][0]["state"], "failed");
    assert!(text(&status["models"][0]["reason"]).contains("manifest.json"), "{status}");
    answered(&ask(&server, "one"));
    fs::copy(Path::new(TINY).join("manifest.json"), directory.path().join("broken/manifest.json")).unwrap();
    until("the mended model", || ask(&server, "broken").status == 200);
    let metrics = server.get("/metrics").body;
    for line in [
        "llava_phi_models_loaded{} 1\n",
        "llava_phi_model_loads_total{model=\"broken\",result=\"failed\"} 1\n",
        "llava_phi_model_loads_total{model=\"broken\",result=\"loaded\"} 1\n",
        "llava_phi_model_loads_total{model=\"one\",result=\"loaded\"} 1\n",
        "llava_phi_model_loads_total{model=\"two\",result=\"loaded\"} 0\n",
        "llava_phi_model_unloads_total{model=\"one\"} 1\n",
    ] {
        assert!(metrics.contains(line), "{line:?} is not in {metrics}");
    }
}

#[test]
fn a_directory_that_cannot_serve_is_refused() {
    let open = |_: &ModelPackage| -> llava_phi::Result<Engine> { unreachable!() };
    let empty = TempDir::new().unwrap();
    let refused = |path: &Path, preload: &[&str]| {
        let preload = preload.iter().map(ToString::to_string).collect();
        let models = ModelsDirectory { preload, ..ModelsDirectory::at(path, Arc::new(open)) };
        Models::in_directory(models).unwrap_err().to_string()
    };
    assert!(refused(empty.path(), &[]).contains("holds no package"));
    assert!(refused(Path::new("/nowhere"), &[]).contains("cannot be read"));
    assert!(refused(directory().path(), &["three"]).contains("--preload three"));
}

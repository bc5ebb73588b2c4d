//! What the program says and does where a provider cannot serve, can serve, or is asked for in a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::cli::{Run, end, program};

const PHOTO: &str = "models/tiny/images/red-triangle.png";
const QUESTION: &str = "What is in the image?";
const ANSWER: &str = "a red triangle";

/// The directory that `variable` names; without it the test says what it lacks and passes.
fn named(variable: &str, maker: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: {variable} is not set; {maker} makes what it names");
    }
    found
}

/// A package with every variant of the miniature.
fn variants() -> Option<PathBuf> {
    named("LLAVA_PHI_TEST_PACKAGE", "scripts/test.py")
}

fn ask(package: &Path, more: &[&str], environment: &[(&str, String)]) -> Run {
    let mut command = program();
    command.args(["ask", "--json", "--model"]).arg(package).args(more).args([PHOTO, QUESTION]);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    end(&mut command)
}

fn answered(run: &Run) -> Value {
    assert_eq!(run.code, Some(0), "{run:?}");
    // QNN's simulator has a line of its own to say when the process ends.
    let answer: Value = serde_json::from_str(run.out.lines().next().unwrap()).unwrap();
    assert_eq!(answer["text"], ANSWER);
    answer
}

fn library_of(directory: &Path) -> String {
    let mut files = directory.join("onnxruntime").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("libonnxruntime.so");
    files.find(is_it).unwrap().display().to_string()
}

/// The build for NVIDIA GPUs starts where there is none, says at which step CUDA failed, and the processor answers.
#[test]
fn cuda_that_cannot_serve_is_told_of_and_the_processor_answers() {
    let Some(package) = variants() else { return };
    let Some(cuda) = named("LLAVA_PHI_TEST_CUDA", "scripts/fetch-providers.py --cuda") else { return };
    let path = |places: &[&str]| {
        let places: Vec<_> = places.iter().map(|place| cuda.join(place).display().to_string()).collect();
        ("LD_LIBRARY_PATH", places.join(":"))
    };
    let library = library_of(&cuda);
    for (libraries, step, words) in [
        (path(&[]), "append", ".so.13"),
        (path(&["libs"]), "append", "libcuda.so.1"),
        (path(&["driver", "libs"]), "commit", "CUDA failure 35"),
    ] {
        let environment = [libraries, ("ORT_DYLIB_PATH", library.clone())];
        let answer = answered(&ask(&package, &["--provider", "cuda"], &environment));
        for component in ["vision", "projector", "decoder"] {
            let served = &answer["providers"][component];
            assert_eq!(served["provider"], "cpu", "{served}");
            let refused = &served["refused"][0];
            assert_eq!((refused["provider"].as_str(), refused["step"].as_str()), (Some("cuda"), Some(step)));
            assert!(refused["reason"].as_str().unwrap().contains(words), "{refused}");
        }
        let only = ask(&package, &["--provider", "only:cuda"], &environment);
        assert_eq!(only.code, Some(3), "{only:?}");
        assert!(only.out.is_empty() && only.err.lines().count() == 1, "{only:?}");
        for word in ["nothing serves the vision_encoder", step, words] {
            assert!(only.err.contains(word), "{word:?} is not in {}", only.err);
        }
        let far = ask(&package, &["--provider", "cuda:7"], &environment);
        assert_eq!(answered(&far)["providers"]["decoder"]["refused"][0]["provider"], "cuda:7");
    }
}

/// Encoder, projector and decoder run on the neural processor's simulator alone, and the answer is the same.
#[test]
fn qnn_answers_from_its_simulator_with_nothing_left_to_the_processor() {
    let Some(package) = variants() else { return };
    let Some(qnn) = named("LLAVA_PHI_TEST_QNN", "scripts/fetch-providers.py --qnn") else { return };
    let places = ["onnxruntime_qnn", "onnxruntime_qnn.libs"].map(|name| qnn.join(name).display().to_string());
    let environment = [("LD_LIBRARY_PATH", places.join(":"))];
    let plugin = format!("qnn={}/libonnxruntime_providers_qnn.so", places[0]);
    let options = [
        "--variant",
        "qnn-fp16",
        "--provider",
        "only:qnn",
        "--provider-library",
        &plugin,
        "--provider-option",
        "qnn.disable_cpu_fallback=1",
    ];
    let answer = answered(&ask(&package, &options, &environment));
    for component in ["vision", "projector", "decoder"] {
        let served = &answer["providers"][component];
        assert_eq!(
            (served["provider"].as_str(), served["variant"].as_str()),
            (Some("qnn"), Some("qnn-fp16"))
        );
        assert_eq!(served["placement"]["partitions"], 1, "{served}");
        assert_eq!(served["placement"]["left_to_cpu"], serde_json::json!({}));
        let check = &served["self_check"][0];
        assert!(check["distance"].as_f64().unwrap() <= check["tolerance"].as_f64().unwrap());
    }
    let cpu = answered(&ask(&package, &["--variant", "portable-f32", "--provider", "cpu"], &[]));
    assert_eq!(answer["token_ids"], cpu["token_ids"]);
}

#[test]
fn the_doctor_tells_what_serves_and_ends_with_3_where_nothing_does() {
    let run = end(program().args(["doctor", "--json"]));
    assert_eq!(run.code, Some(0), "{run:?}");
    let report: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(report["package"]["name"], "llava-phi-tiny");
    let components = report["package"]["components"].as_array().unwrap();
    let names: Vec<&str> = components.iter().map(|one| one["component"].as_str().unwrap()).collect();
    assert_eq!(names, ["vision_encoder", "projector", "decoder"]);
    for one in components {
        assert_eq!((one["variant"].as_str(), one["provider"].as_str()), (Some("cpu-int4"), Some("cpu")));
        let check = &one["self_check"][0];
        assert!(check["distance"].as_f64().unwrap() <= check["tolerance"].as_f64().unwrap());
        assert!(one["placement"]["nodes"]["cpu"].as_u64().unwrap() > 1, "{one}");
    }
    let providers = report["runtime"]["providers"].as_array().unwrap();
    assert_eq!(providers.len(), 11);
    assert!(providers.iter().all(|one| one["provider"] == "cpu" || one["note"].is_string()));
    assert!(report["memory_to_be_had"].as_u64().unwrap() > 0);
    assert_eq!(report["fingerprint"].as_str().unwrap().len(), 16);

    let person = end(program().arg("doctor"));
    for words in
        ["machine ", "ONNX Runtime 1.", "decoder         cpu-int4 on cpu", "self-check: logits differ"]
    {
        assert!(person.out.contains(words), "{words:?} is not in {}", person.out);
    }

    let none = end(program().args(["doctor", "--provider", "only:cuda", "--variant", "cpu-int4"]));
    assert_eq!(none.code, Some(3), "{none:?}");
    assert!(
        none.out.contains("nothing serves") && none.out.contains("not enabled in this build"),
        "{none:?}"
    );
    let fresh = end(crate::cli::bare().args(["doctor", "--json"]).env("XDG_CACHE_HOME", "/nonexistent"));
    assert_eq!(fresh.code, Some(3), "{fresh:?}");
    let report: Value = serde_json::from_str(&fresh.out).unwrap();
    assert!(report["runtime"]["error"].as_str().unwrap().contains("ONNX Runtime"), "{report}");
}

#[test]
fn a_file_of_options_counts_less_than_the_environment_and_the_command_line() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("config.toml");
    let config = file.display().to_string();
    let variant = |more: &[&str], environment: &[(&str, &str)]| {
        let mut command = program();
        command.args(["--config", &config, "ask", "--json"]).args(more).args([PHOTO, QUESTION]);
        command.envs(environment.iter().copied());
        let answer = answered(&end(&mut command));
        let decoder = &answer["providers"]["decoder"];
        (decoder["variant"].as_str().unwrap().to_owned(), decoder["refused"].as_array().unwrap().len())
    };
    fs::write(&file, "variant = \"portable-f32\"\nprovider = \"cuda,cpu\"\nthreads = 1\nlow-memory = true\n")
        .unwrap();
    assert_eq!(variant(&[], &[]), ("portable-f32".to_owned(), 1));
    assert_eq!(variant(&["--variant", "cpu-int4"], &[]), ("cpu-int4".to_owned(), 1));
    assert_eq!(
        variant(&["--variant=cpu-int4"], &[("LLAVA_PHI_PROVIDER", "cpu")]),
        ("cpu-int4".to_owned(), 0)
    );

    let refused = |text: &str, words: &[&str]| {
        fs::write(&file, text).unwrap();
        let run = end(program().args(["--config", &config, "ask", "Hi"]));
        assert_eq!(run.code, Some(2), "{run:?}");
        assert_eq!(run.err.lines().count(), 1, "{run:?}");
        for word in words {
            assert!(run.err.contains(word), "{word:?} is not in {}", run.err);
        }
    };
    refused("varient = \"x\"", &["config.toml", "no option varient", "did you mean variant?"]);
    refused("variant = ", &["config.toml", "expected"]);
    refused("provider = \"cdua\"", &["cdua", "did you mean cuda?"]);
    refused("threads = { a = { b = 1 } }", &["config.toml", "threads is neither"]);
    fs::remove_file(&file).unwrap();
    let run = end(program().args(["--config", &config, "ask", "Hi"]));
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.err.contains("cannot be read"), "{run:?}");
}

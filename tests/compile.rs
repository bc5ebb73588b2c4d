//! `llava-phi compile`, and the use of what it built.
//!
//! What compiles here is QNN's simulator: `LLAVA_PHI_TEST_QNN` is where `scripts/fetch-providers.py --qnn` put it, and
//! `LLAVA_PHI_TEST_PACKAGE` a package with the variant `qnn-fp16`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use llava_phi::compiled::{CompiledCache, Key};
use llava_phi::model::stamp::Stamp;
use llava_phi::model::{CausalModel as _, LlavaPhi, ModelOptions};
use llava_phi::runtime::Runtime;
use serde_json::Value;
use tempfile::TempDir;

use crate::support;

const PHOTO: &str = "tests/images/photo.jpg";

/// The program with its own cache, and nothing of the user's around it.
fn program(cache: &Path) -> Command {
    let mut command = support::program();
    command.env("LLAVA_PHI_CACHE", cache);
    command
}

fn compile(cache: &Path, args: &[&str]) -> Output {
    program(cache).arg("compile").args(args).output().unwrap()
}

/// The JSON object of a run that went well. QNN's simulator itself prints a line to standard output now and then.
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let text = &text[text.find('{').unwrap_or_else(|| panic!("{output:?}"))..];
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    values.next().unwrap().unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Checks that a run was refused with `code`, in one line that holds every one of `words`.
fn refused(output: &Output, code: i32, words: &[&str]) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{told}");
    let errors: Vec<&str> = told.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("{told}") };
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

/// An entry of `bytes` bytes for the decoder of a made-up driver.
fn made_up(cache: &CompiledCache, driver: &str, bytes: usize) -> String {
    let key = Key {
        component: "decoder".to_owned(),
        files: [("tensorrt-fp16/decoder.onnx".to_owned(), "00".to_owned())].into(),
        provider: "tensorrt".to_owned(),
        runtime: "1.32.0".to_owned(),
        machine: driver.to_owned(),
        ..Key::default()
    };
    let work = |dir: &Path| {
        fs::write(dir.join("engine"), vec![7; bytes]).unwrap();
        Ok(())
    };
    cache.build(&key, &mut || {}, work).unwrap();
    key.digest()
}

#[test]
fn providers_that_compile_nothing_are_told_so_and_nothing_is_written() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("cache");
    let refusal = compile(&cache, &["--provider", "webgpu"]);
    refused(
        &refusal,
        3,
        &["provider webgpu: it compiles nothing that could be kept", "tensorrt, coreml, qnn"],
    );
    let refusal = compile(&cache, &["--provider", "cpu"]);
    refused(&refusal, 3, &["provider cpu: what it makes of this package is not worth keeping"]);
    refused(&compile(&cache, &["--provider", "qqn"]), 2, &["did you mean qnn?"]);
    assert!(!cache.exists());
    let ask = program(&cache).args(["ask", "Hi", "--json", "--max-new-tokens", "1"]).output().unwrap();
    assert_eq!(json(&ask)["providers"]["decoder"].get("compiled"), None);
    assert_eq!(json(&compile(&cache, &["--list", "--json"]))["entries"], Value::Array(Vec::new()));
    assert_eq!(json(&compile(&cache, &["--prune", "--json"]))["freed"], 0);
    refused(&compile(&cache, &["--provider", "qnn"]), 3, &["the package has nothing for it to compile"]);
}

#[test]
fn a_provider_that_is_not_here_is_refused_and_leaves_no_entry() {
    let dir = TempDir::new().unwrap();
    // No build of ONNX Runtime that tests run with has both a plugin's provider and its plugin.
    let args = ["--provider", "qnn", "--variant", "portable-f32"];
    refused(
        &compile(dir.path(), &args),
        3,
        &["nothing was compiled", "portable-f32 on qnn at the step build"],
    );
    assert!(CompiledCache::at(&dir.path().join("compiled"), 0).list().unwrap().is_empty());
    fs::write(dir.path().join("file"), "").unwrap();
    let refusal = compile(&dir.path().join("file"), &args);
    refused(&refusal, 3, &["cache ", "file/compiled: it cannot be written"]);
}

#[test]
fn what_is_kept_is_listed_and_removed_as_asked() {
    let dir = TempDir::new().unwrap();
    let cache = CompiledCache::at(&dir.path().join("compiled"), u64::MAX);
    let (small, large) = (made_up(&cache, "one", 10), made_up(&cache, "two", 5000));
    let partial = cache.dir().join(".partial-00112233445566778899aabbccddeeff");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("engine"), "half").unwrap();

    let listed = json(&compile(dir.path(), &["--list", "--json", "--limit", "1MB"]));
    assert_eq!(listed["limit"], 1_000_000);
    let states: BTreeMap<&str, &str> = listed["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["digest"].as_str().unwrap(), one["state"].as_str().unwrap()))
        .collect();
    assert_eq!(states.len(), 3);
    assert_eq!((states[small.as_str()], states[large.as_str()]), ("whole", "whole"));
    assert_eq!(states["00112233445566778899aabbccddeeff"], "abandoned");
    let text = compile(dir.path(), &["--list"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("decoder tensorrt-fp16/decoder.onnx for tensorrt by ONNX Runtime 1.32.0"),
        "{text}"
    );
    assert!(text.contains("3 compiled graphs") && text.contains("of at most 20.0 GB"), "{text}");

    let pruned = json(&compile(dir.path(), &["--prune", "--json"]));
    assert_eq!(pruned["removed"].as_array().unwrap().len(), 1, "{pruned}");
    assert!(!partial.exists());
    let pruned = compile(dir.path(), &["--prune", "0"]);
    let text = String::from_utf8(pruned.stdout).unwrap();
    assert!(text.contains(&small) && text.contains(&large) && text.contains("2 removed"), "{text}");
    assert!(cache.list().unwrap().is_empty());
    refused(&compile(dir.path(), &["--prune", "much"]), 2, &["--prune"]);
    refused(&compile(dir.path(), &["--prune", "--list"]), 2, &["--list"]);
}

/// Where the plugin and the package are, or `None` with the reason on stderr.
fn fetched() -> Option<(PathBuf, PathBuf)> {
    let place = |name: &str| {
        let value = std::env::var_os(name).map(PathBuf::from);
        if value.is_none() {
            eprintln!("skipped: {name} is not set; see the top of tests/compile.rs");
        }
        value
    };
    place("LLAVA_PHI_TEST_QNN").zip(place("LLAVA_PHI_TEST_PACKAGE"))
}

/// A command on the simulator.
fn qnn(cache: &Path, (plugin, package): &(PathBuf, PathBuf), command: &str, args: &[&str]) -> Command {
    let places = ["onnxruntime_qnn", "onnxruntime_qnn.libs"].map(|name| plugin.join(name));
    let library = places[0].join("libonnxruntime_providers_qnn.so");
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::env::join_paths(places.iter().cloned().chain(std::env::split_paths(&before))).unwrap();
    let mut program = program(cache);
    program.env("LD_LIBRARY_PATH", paths).arg(command).arg("--json").arg("--model").arg(package);
    program.args(["--provider", "only:qnn", "--variant", "qnn-fp16", "--provider-library"]);
    program.arg(format!("qnn={}", library.display())).args(args);
    program.stdout(Stdio::piped()).stderr(Stdio::piped());
    program
}

/// The states of the components, in the order of their reports.
fn states(report: &Value) -> Vec<String> {
    let one = |one: &Value| one["compiled"]["state"].as_str().unwrap().to_owned();
    report["components"].as_array().unwrap().iter().map(one).collect()
}

#[test]
fn the_simulator_compiles_once_and_what_it_compiled_answers_the_same() {
    let Some(places) = fetched() else { return };
    let dir = TempDir::new().unwrap();
    let ask = |cache: &Path| {
        let args = ["--max-new-tokens", "3", PHOTO, "Describe the image."];
        let output = qnn(cache, &places, "ask", &args).output().unwrap();
        let answer = json(&output);
        eprintln!("loaded in {} ms", answer["timings_ms"]["load"]);
        let state = |name: &str| answer["providers"][name]["compiled"].clone();
        let states = ["vision", "projector", "decoder"].map(state);
        (answer["token_ids"].clone(), states, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // Nothing can be kept below a file: the simulator compiles for this session alone, and the report says so.
    fs::write(dir.path().join("file"), "").unwrap();
    let (ids, alone, _) = ask(&dir.path().join("file"));
    for state in &alone {
        let text = state["state"].as_str().unwrap();
        assert!(text.starts_with("not cached: cache ") && text.contains("it cannot be written"), "{state}");
    }

    // Two at once: each entry is built by one of them.
    let both = [(); 2].map(|()| qnn(dir.path(), &places, "compile", &[]).spawn().unwrap());
    let both = both.map(|child| states(&json(&child.wait_with_output().unwrap())));
    for (one, other) in both[0].iter().zip(&both[1]) {
        let mut pair = [one.as_str(), other.as_str()];
        pair.sort_unstable();
        assert_eq!(pair, ["built", "reused"], "{both:?}");
    }
    assert_eq!(both[0].len(), 3);
    assert_eq!(states(&json(&qnn(dir.path(), &places, "compile", &[]).output().unwrap())), ["reused"; 3]);

    let (again, reused, told) = ask(dir.path());
    assert_eq!(again, ids);
    assert!(reused.iter().all(|state| state["state"] == "reused" && state["seconds"] == 0.0), "{reused:?}");
    assert!(!told.contains("compiling"), "{told}");

    let entry = |state: &Value| dir.path().join("compiled").join(state["entry"].as_str().unwrap());
    let decoder = entry(&reused[2]).join("graph_qnn.bin");
    let mut bytes = fs::read(&decoder).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&decoder, bytes).unwrap();
    let (mended, rebuilt, told) = ask(dir.path());
    assert_eq!(mended, ids);
    assert_eq!(rebuilt[0]["state"], "reused");
    assert_eq!(rebuilt[2]["state"], "built");
    assert!(rebuilt[2]["replaced"].as_str().unwrap().contains("was changed"), "{rebuilt:?}");
    assert!(told.contains("compiling decoder for qnn, once"), "{told}");

    let cache = CompiledCache::at(&dir.path().join("compiled"), u64::MAX);
    let record: Value =
        serde_json::from_slice(&fs::read(entry(&reused[1]).join("entry.json")).unwrap()).unwrap();
    let key: Key = serde_json::from_value(record["key"].clone()).unwrap();
    let replace = |graph: &[u8]| {
        assert!(cache.discard(&key.digest()).unwrap());
        let work = |dir: &Path| {
            fs::write(dir.join("graph.onnx"), graph).unwrap();
            Ok(())
        };
        drop(cache.build(&key, &mut || {}, work).unwrap());
    };
    // An entry that is whole but loads no more, as after an update of something that the key does not know.
    replace(b"no graph");
    let (mended, rebuilt, _) = ask(dir.path());
    assert_eq!(mended, ids);
    assert_eq!(rebuilt[1]["state"], "built");
    assert!(rebuilt[1]["replaced"].as_str().unwrap().contains("could not be loaded"), "{rebuilt:?}");

    // One that loads and computes something else: weights lie in the middle of the file, here large ones.
    let mut graph = fs::read(places.1.join(key.files.keys().next().unwrap())).unwrap();
    let middle = graph.len() / 2;
    graph[middle..middle + 64].fill(0x7b);
    replace(&graph);
    let refusal = qnn(dir.path(), &places, "ask", &["Hi"]).output().unwrap();
    refused(&refusal, 3, &["nothing serves the projector", "self-check"]);
    assert!(!cache.dir().join(key.digest()).exists(), "it is not used again");
}

/// A copy of the miniature package on disk, where its files can be mapped.
fn on_disk(dir: &Path) -> PathBuf {
    let package = dir.join("package");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package"), &package);
    package
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(|_| ()).unwrap() }
    }
}

/// What the processor answers from the package in `dir`, and what the report says of its decoder.
fn asked(dir: &Path, args: &[&str]) -> (Value, Value) {
    let mut command = program(&dir.join("cache"));
    command.args(["ask", "--json", "--max-new-tokens", "4", "--provider", "only:cpu"]).args(args);
    let answer =
        json(&command.arg("--model").arg(dir.join("package")).args([PHOTO, "What is it?"]).output().unwrap());
    (answer["token_ids"].clone(), answer["providers"]["decoder"].clone())
}

#[test]
fn weights_that_are_asked_for_packed_and_cannot_be_kept_are_told() {
    let dir = TempDir::new().unwrap();
    let mut command = program(&dir.path().join("cache"));
    command.args(["ask", "--packed-weights", "kept", "--kernels", "onnxruntime", PHOTO, "What is it?"]);
    let told = String::from_utf8(command.output().unwrap().stderr).unwrap();
    let decoder: Vec<_> = told.lines().filter(|line| line.contains("of the decoder")).collect();
    assert_eq!(
        decoder,
        [
            "the packed weights of the decoder are not kept: the package is inside this program, where nothing can be \
             mapped"
        ]
    );
}

#[test]
fn packed_weights_are_kept_and_a_self_check_is_passed_once() {
    let dir = TempDir::new().unwrap();
    let package = on_disk(dir.path());
    // This program's own kernels read weights as the package has them.
    let theirs = ["--kernels", "onnxruntime"];
    let kept = ["--packed-weights", "kept", theirs[0], theirs[1]];
    let (ids, first) = asked(dir.path(), &kept);
    assert_eq!((&first["compiled"]["state"], &first["compiled"]["packed"]), (&"built".into(), &true.into()));
    assert_eq!(first["stamp"]["used"], false);
    let (again, second) = asked(dir.path(), &kept);
    assert_eq!((again, &second["compiled"]["state"]), (ids.clone(), &"reused".into()));
    assert_eq!(
        (&second["stamp"]["used"], &second["stamp"]["entry"]),
        (&true.into(), &first["stamp"]["entry"])
    );
    assert_eq!((&second["self_check"], &second["placement"]), (&first["self_check"], &first["placement"]));
    assert!(second["placement"]["nodes"]["cpu"].as_u64().unwrap() > 1, "{second}");
    let (_, always) = asked(dir.path(), &[&kept[..], &["--self-check", "always"]].concat());
    assert_eq!(always["stamp"]["used"], false);

    let private = ["--packed-weights", "private", theirs[0], theirs[1]];
    // Other weights than those that were proved, though they are the same numbers.
    let (again, alone) = asked(dir.path(), &private);
    assert_eq!((again, alone.get("compiled"), &alone["stamp"]["used"]), (ids.clone(), None, &false.into()));
    let (_, alone) = asked(dir.path(), &private);
    assert_eq!(alone["stamp"]["used"], true);
    // What is kept is used unasked.
    let (_, auto) = asked(dir.path(), &theirs);
    assert_eq!(auto["compiled"]["state"], "reused");
    assert_eq!(auto["stamp"]["used"], false, "other weights again");
    let (_, other) = asked(dir.path(), &["--threads", "1"]);
    assert_eq!(other.get("compiled").is_some(), other.get("kernels").is_none());
    assert_eq!(other["stamp"]["used"], false, "another setting");

    let (_, whole) = asked(dir.path(), &kept);
    let compiled = dir.path().join("cache/compiled");
    let entry = compiled.join(whole["compiled"]["entry"].as_str().unwrap());
    let weights = entry.join("graph.onnx.data");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let (again, mended) = asked(dir.path(), &kept);
    assert_eq!((again, &mended["compiled"]["state"]), (ids.clone(), &"built".into()));
    assert!(mended["compiled"]["replaced"].as_str().unwrap().contains("was changed"), "{mended}");
    assert_eq!(mended["stamp"]["used"], false, "what was packed anew is proved anew");

    let stamp =
        compiled.join("proved").join(mended["stamp"]["entry"].as_str().unwrap()).join("self-check.json");
    fs::write(&stamp, "{}").unwrap();
    assert_eq!(asked(dir.path(), &kept).1["stamp"]["used"], false, "a damaged stamp stands for nothing");
    assert_eq!(asked(dir.path(), &kept).1["stamp"]["used"], true);
    let file = package.join("cpu-int4/decoder.onnx");
    fs::write(&file, fs::read(&file).unwrap()).unwrap();
    let (again, touched) = asked(dir.path(), &kept);
    assert_eq!((again, &touched["stamp"]["used"]), (ids, &false.into()), "a file was written since");
    assert_eq!(touched["compiled"]["state"], "reused", "its hash is the same");

    let model = package.to_str().unwrap();
    let built = json(&compile(
        &dir.path().join("cache"),
        &[&["--model", model, "--provider", "cpu", "--json"], &kept[..]].concat(),
    ));
    assert_eq!(states(&built), ["reused"; 3]);
    let listed = json(&compile(&dir.path().join("cache"), &["--list", "--json"]));
    assert_eq!(listed["entries"].as_array().unwrap().len(), 3);
}

#[test]
fn what_is_taken_out_of_service_loses_its_stamp() {
    let dir = TempDir::new().unwrap();
    let package = llava_phi::package::ModelPackage::open(on_disk(dir.path())).unwrap();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let cache = CompiledCache::at(&dir.path().join("compiled"), u64::MAX);
    let options = ModelOptions { compiled: Some(cache.clone().into()), ..ModelOptions::default() };
    let stamp = |model: &LlavaPhi| model.reports()[2].stamp.clone().unwrap();
    let proved = || {
        let listed = cache.below("proved", u64::MAX).list().unwrap();
        listed.into_iter().map(|one| one.digest).collect::<Vec<_>>()
    };
    let first = stamp(&LlavaPhi::open(&package, &options).unwrap());
    let mut model = LlavaPhi::open(&package, &options).unwrap();
    assert_eq!(stamp(&model), Stamp { used: true, ..first.clone() });
    assert!(proved().contains(&first.entry));
    model.demote("decoder", "a test wants it so").unwrap();
    assert!(!proved().contains(&first.entry), "{:?}", proved());
    assert_ne!(stamp(&model).entry, first.entry);
    assert_eq!(stamp(&LlavaPhi::open(&package, &options).unwrap()), first, "it is proved again");
    let without = LlavaPhi::open(&package, &ModelOptions::default()).unwrap();
    assert!(without.reports().iter().all(|report| report.stamp.is_none()));
}

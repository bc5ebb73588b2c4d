//! What was read before is not read again, and the answers stay the same: in turn, in another process, from a bad disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use llava_phi::{
    engine::Request,
    model::{
        CausalModel as _, LlavaPhi, ModelOptions, Prefill,
        kv_cache::KvCache,
        prefix::{CachedFrom, PrefixDirectory, PrefixOptions},
    },
    package::{Component, ModelPackage},
    runtime::Runtime,
    text::TokenId,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{self, Drawing, VARIANTS, engine, highest, question};

const TOKENS: usize = 12;
const PLENTY: u64 = 64 << 20;

/// The embedded package, and the one with all variants where there is one.
fn every_variant() -> Vec<(ModelPackage, String)> {
    let mut all: Vec<_> =
        VARIANTS.iter().map(|name| (support::package().clone(), (*name).to_owned())).collect();
    match std::env::var_os("LLAVA_PHI_TEST_PACKAGE").map(PathBuf::from) {
        Some(path) => {
            let package = ModelPackage::open(path).unwrap();
            let decoders = package.manifest().variants.keys();
            let decoders = decoders.filter(|name| package.graph(Component::Decoder, name).is_some());
            all.extend(decoders.map(|name| (package.clone(), name.clone())));
        }
        None => eprintln!("LLAVA_PHI_TEST_PACKAGE names no package with all variants: two are tested"),
    }
    all
}

fn model(package: &ModelPackage, variant: &str, prefixes: PrefixOptions) -> LlavaPhi {
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    LlavaPhi::open(package, &ModelOptions { prefixes, ..support::options(variant, 1) }).unwrap()
}

fn in_memory(bytes: u64) -> PrefixOptions {
    PrefixOptions { memory: Some(bytes), directory: None }
}

fn on_disk(dir: &TempDir) -> PrefixOptions {
    let directory = PrefixDirectory::at(dir.path(), PLENTY);
    PrefixOptions { memory: Some(0), directory: Some(Arc::new(directory)) }
}

/// Reads the prompt into `cache`, and decodes greedily.
fn answer(model: &mut LlavaPhi, request: &Request, cache: &mut KvCache) -> (Vec<TokenId>, Prefill) {
    let first = model.prefill(&request.prompt, &request.images, cache).unwrap();
    let mut ids = vec![highest(first.logits.values())];
    while ids.len() < TOKENS {
        let logits = model.decode(*ids.last().unwrap(), cache).unwrap();
        ids.push(highest(logits.values()));
    }
    (ids, first)
}

/// The questions of two people in turn, whose images are swapped, repeated, and left out.
fn conversations() -> Vec<Request> {
    let engine = engine("cpu-int4");
    let [a, b] = [&Drawing::red_circle(), &Drawing::blue_square()];
    let color = "what color is the shape?";
    let ask = |images: &[&Drawing], text: &str| question(engine, images, text);
    vec![
        ask(&[a], color),
        ask(&[b], color),
        ask(&[a], "what shape is in the image?"),
        ask(&[b], "what shape is in the image?"),
        ask(&[a, b], color),
        ask(&[b, a], color),
        ask(&[a, b], "is there a circle in the image?"),
        ask(&[a, a], color),
        ask(&[], color),
        ask(&[b, b], color),
        ask(&[a], color),
    ]
}

#[test]
fn every_way_to_what_was_read_before_answers_as_reading_it_does() {
    let questions = conversations();
    for (package, variant) in every_variant() {
        let mut plain = model(&package, &variant, in_memory(0));
        let wanted: Vec<_> = questions
            .iter()
            .map(|question| {
                let mut cache = plain.empty_cache().unwrap();
                answer(&mut plain, question, &mut cache).0
            })
            .collect();
        drop(plain);
        let dir = TempDir::new().unwrap();
        let image = package.manifest().vision.tokens_per_image;
        let mut seen = CachedFrom::default();
        // A memory for all of it, one for a part, the disk as it fills, and the disk in the next process.
        for (name, options) in [
            ("memory", in_memory(PLENTY)),
            ("little memory", in_memory(200_000)),
            ("disk", on_disk(&dir)),
            ("disk again", on_disk(&dir)),
        ] {
            let mut used = model(&package, &variant, options);
            let mut cache = used.empty_cache().unwrap();
            let mut encoded = 0;
            for (number, (question, wanted)) in questions.iter().zip(&wanted).enumerate() {
                // A cache that is new now and then, as after a failure.
                if number % 4 == 3 {
                    cache = used.empty_cache().unwrap();
                }
                let (ids, prefill) = answer(&mut used, question, &mut cache);
                assert_eq!(ids, *wanted, "{variant}, {name}, question {number}: {:?}", prefill.from);
                assert_eq!(prefill.from.total(), prefill.cached);
                let report = used.prefixes();
                assert!(report.memory_used <= report.memory_limit, "{report:?}");
                seen.memory += prefill.from.memory;
                seen.disk += prefill.from.disk;
                encoded += prefill.images_encoded;
            }
            match name {
                "memory" => assert_eq!(encoded, 2, "{variant}: each image is encoded once"),
                "disk again" => assert_eq!(encoded, 0, "{variant}: another process encoded them"),
                _ => {}
            }
        }
        assert!(seen.memory > image && seen.disk > image, "{variant}: {seen:?}");
    }
}

#[test]
fn a_prompt_that_was_given_up_leaves_a_cache_of_what_was_read() {
    for variant in VARIANTS {
        let request = &conversations()[4];
        let mut plain = model(support::package(), variant, in_memory(0));
        let mut fresh = plain.empty_cache().unwrap();
        let (wanted, _) = answer(&mut plain, request, &mut fresh);
        let dir = TempDir::new().unwrap();
        let options = PrefixOptions { memory: Some(PLENTY), ..on_disk(&dir) };
        let mut used = model(support::package(), variant, options);
        let mut cache = used.empty_cache().unwrap();
        answer(&mut used, &conversations()[1], &mut cache);
        used.canceler().cancel();
        assert!(used.prefill(&request.prompt, &request.images, &mut cache).is_err());
        used.canceler().reset();
        let (ids, _) = answer(&mut used, request, &mut cache);
        assert_eq!(ids, wanted, "{variant}");
        let (ids, prefill) = answer(&mut used, request, &mut cache);
        assert_eq!((ids, prefill.images_encoded), (wanted, 0), "{variant}");
    }
}

#[test]
fn the_engine_chooses_a_limit_and_says_what_decided_it() {
    let open = |options: ModelOptions| {
        Runtime::start(&support::library(), &mut |_| {}).unwrap();
        LlavaPhi::open(support::package(), &options).unwrap().prefixes()
    };
    let chosen = open(support::options("cpu-int4", 1));
    assert!(chosen.memory_limit > 0 && !chosen.decided_by.is_empty(), "{chosen:?}");
    let low = open(ModelOptions { low_memory: true, ..support::options("cpu-int4", 1) });
    assert_eq!((low.memory_limit, &low.decided_by[..]), (0, "low memory was asked for"));
}

/// The program with a cache of its own, and nothing of the user's around it.
fn program(cache: &Path) -> Command {
    let mut command = support::program();
    command.arg("--cache-dir").arg(cache);
    command
}

fn ask(cache: &Path, image: &Path, text: &str, more: &[&str]) -> Command {
    let mut command = program(cache);
    command.args(["ask", "--json", "--max-new-tokens", "8", "--threads", "1"]).args(more);
    command.arg(image).arg(text);
    command
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn disk(answer: &Value) -> u64 {
    answer["usage"]["cached_from"]["disk"].as_u64().unwrap()
}

fn drawn(dir: &TempDir, name: &str, drawing: &Drawing) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, drawing.file()).unwrap();
    path
}

const COLOR: &str = "what color is the shape?";

#[test]
fn another_process_finds_an_image_by_its_pixels_and_not_by_its_name() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("cache");
    let [red, same] = ["a.ppm", "b.ppm"].map(|name| drawn(&dir, name, &Drawing::red_circle()));
    let run =
        |image: &Path, text: &str, more: &[&str]| json(&ask(&cache, image, text, more).output().unwrap());
    let first = run(&red, COLOR, &[]);
    assert_eq!(disk(&first), 0);
    let image = first["usage"]["image_tokens"].as_u64().unwrap();
    let second = run(&same, COLOR, &[]);
    assert!(disk(&second) >= image, "{second}");
    assert_eq!(second["usage"]["cached_tokens"], second["usage"]["cached_from"]["disk"]);
    assert_eq!(second["token_ids"], first["token_ids"]);
    // Another question, and the answer of a process that has no snapshots.
    let other = run(&red, "what shape is in the image?", &[]);
    let plain = run(&red, "what shape is in the image?", &["--snapshot-limit", "0"]);
    assert!(disk(&other) >= image && disk(&plain) == 0);
    assert_eq!(plain["prefixes"]["directory"], Value::Null);
    assert_eq!(other["token_ids"], plain["token_ids"]);
    // The same name with other pixels, and the same pixels for another variant.
    drawn(&dir, "a.ppm", &Drawing::blue_square());
    let blue = run(&red, COLOR, &[]);
    assert_eq!((disk(&blue), &blue["text"]), (0, &Value::from("blue")));
    assert_eq!(disk(&run(&same, COLOR, &["--variant", "portable-f32"])), 0);

    let list = json(&program(&cache).args(["cache", "list", "--json"]).output().unwrap());
    let snapshots = list["snapshots"].as_array().unwrap();
    assert_eq!(snapshots.len(), 3, "{list}");
    assert!(snapshots.iter().all(|one| one["state"] == "whole" && one["images"] == 1), "{list}");
    let text = program(&cache).args(["cache", "list"]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.lines().count() == 4 && text.contains("1 image, decoder cpu-int4 on cpu"), "{text}");
    let most = snapshots[0]["bytes"].to_string();
    let pruned = json(&program(&cache).args(["cache", "prune", "--json", &most]).output().unwrap());
    assert!(!pruned["removed"].as_array().unwrap().is_empty(), "{pruned}");
    let cleared = json(&program(&cache).args(["cache", "clear", "--json"]).output().unwrap());
    assert_eq!(cleared["kept"], 0, "{cleared}");
    assert_eq!(disk(&run(&same, COLOR, &[])), 0);
}

#[test]
fn processes_that_ask_at_once_get_one_answer_and_leave_one_snapshot() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("cache");
    let image = drawn(&dir, "a.ppm", &Drawing::red_circle());
    let running: Vec<_> = (0..4)
        .map(|_| {
            let mut command = ask(&cache, &image, COLOR, &[]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let answers: Vec<_> = running.into_iter().map(|child| json(&child.wait_with_output().unwrap())).collect();
    assert!(answers.iter().all(|answer| answer["text"] == "red"));
    let read = answers.iter().filter(|answer| disk(answer) == 0).count();
    assert_eq!(read, 1, "one read the image, the others waited for it");
    let list = json(&program(&cache).args(["cache", "list", "--json"]).output().unwrap());
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 1, "{list}");
}

#[test]
fn a_damaged_snapshot_is_told_of_and_the_answer_is_the_same() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("cache");
    let image = drawn(&dir, "a.ppm", &Drawing::red_circle());
    let run = || ask(&cache, &image, COLOR, &[]).output().unwrap();
    let first = json(&run());
    let file = || {
        let mut files = fs::read_dir(cache.join("prefixes")).unwrap().map(|entry| entry.unwrap().path());
        files.find(|path| path.is_file()).unwrap()
    };
    let mut bytes = fs::read(file()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file(), bytes).unwrap();
    let output = run();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(told.matches("is not used: its hash is another one").count(), 1, "{told}");
    let answer = json(&output);
    assert_eq!((disk(&answer), &answer["token_ids"]), (0, &first["token_ids"]));
    assert!(disk(&json(&run())) > 0, "it was written anew");
}

#[test]
fn snapshots_are_kept_only_where_a_directory_was_named() {
    let dir = TempDir::new().unwrap();
    let mut command = program(dir.path());
    command.args(["cache", "list"]);
    let args: Vec<_> = command.get_args().skip(2).map(ToOwned::to_owned).collect();
    let mut bare = Command::new(env!("CARGO_BIN_EXE_llava-phi"));
    let output =
        bare.args(args).env_remove("LLAVA_PHI_CACHE").env_remove("LLAVA_PHI_CONFIG").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("name it with --cache-dir"), "{output:?}");
    // A file in the directory's place is told of, and the answer comes.
    fs::write(dir.path().join("prefixes"), "a file").unwrap();
    let image = drawn(&dir, "a.ppm", &Drawing::red_circle());
    let output = ask(dir.path(), &image, COLOR, &[]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no snapshots are written"), "{output:?}");
    let answer = json(&output);
    assert_eq!(answer["text"], "red");
    assert!(answer["prefixes"]["refused"].as_str().unwrap().contains("no snapshots are written"));
}

#[test]
fn the_head_of_every_prompt_comes_with_the_package() {
    let dir = TempDir::new().unwrap();
    let package = dir.path().join("package");
    support::copy_directory(Path::new("models/tiny/package"), &package);
    let image = drawn(&dir, "a.ppm", &Drawing::red_circle());
    let model = package.to_str().unwrap();
    let run = |more: &[&str]| {
        let more: Vec<&str> =
            ["--snapshot-limit", "0", "--model", model].into_iter().chain(more.iter().copied()).collect();
        ask(dir.path(), &image, COLOR, &more).output().unwrap()
    };
    let plain = json(&run(&[]));
    let ship =
        || json(&program(dir.path()).args(["cache", "ship", "--json", "--model", model]).output().unwrap());
    let shipped = ship();
    let positions = shipped["positions"].as_u64().unwrap();
    assert!(positions > 8, "{shipped}");
    // The same again is the same file; the package stays whole.
    assert_eq!(ship()["file"], shipped["file"]);
    ModelPackage::open(&package).unwrap().verify().unwrap();
    let with = json(&run(&[]));
    assert_eq!(with["usage"]["cached_from"]["package"], positions, "{with}");
    assert_eq!(with["token_ids"], plain["token_ids"]);
    // It is of one variant.
    let other = json(&run(&["--variant", "portable-f32"]));
    assert_eq!(other["usage"]["cached_from"]["package"], 0);
    // A damaged one is told of, and the package serves.
    let file = package.join(shipped["file"].as_str().unwrap());
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let output = run(&[]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("of the package is not used"), "{output:?}");
    let damaged = json(&output);
    assert_eq!((&damaged["token_ids"], &damaged["usage"]["cached_tokens"]), (&plain["token_ids"], &0.into()));
    let inside = program(dir.path()).args(["cache", "ship"]).output().unwrap();
    assert_eq!(inside.status.code(), Some(2), "{inside:?}");
}

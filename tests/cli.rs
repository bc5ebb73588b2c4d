//! The program as a user runs it: what it prints, where, and how it ends.

use std::{collections::BTreeSet, fs, path::Path};

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;

use crate::support;

const PHOTO: &str = "tests/images/photo.jpg";
const NOT_SQUARE: &str = "tests/images/rgb.bmp";
const DESCRIBE: &str = "Describe the image.";

/// How one run ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The program without anything of the user's own around it.
pub(crate) fn bare() -> Command {
    Command::from_std(support::bare())
}

pub(crate) fn program() -> Command {
    let mut command = Command::from_std(support::program());
    // What a developer tuned would change what serves.
    command.env("LLAVA_PHI_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/no-cache"));
    command
}

pub(crate) fn end(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn run(args: &[&str]) -> Run {
    end(program().args(args))
}

fn good(args: &[&str]) -> String {
    let run = run(args);
    assert_eq!(run.code, Some(0), "{args:?}: {}", run.err);
    run.out
}

fn chat(args: &[&str], lines: &[&str]) -> Run {
    end(program().arg("chat").args(args).write_stdin(lines.join("\n") + "\n"))
}

/// Asks, and gives the answer's JSON object.
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&good(&[&["ask", "--json"], args].concat())).unwrap()
}

/// Checks that `run` was refused with `code`, in one line on standard error that holds every one of `words`.
fn refused(run: &Run, code: i32, words: &[&str]) {
    assert_eq!(run.code, Some(code), "{words:?}: {run:?}");
    assert!(run.out.is_empty(), "{run:?}");
    assert!(run.err.starts_with("error: ") && run.err.ends_with('\n'), "{run:?}");
    assert_eq!(run.err.lines().count(), 1, "{run:?}");
    assert!(!run.err.contains("panicked"), "{run:?}");
    for word in words {
        assert!(run.err.contains(word), "{word:?} is not in {:?}", run.err);
    }
}

fn check(args: &[&str], words: &[&str]) {
    refused(&run(args), 2, words);
}

#[test]
fn the_answer_goes_to_stdout_and_its_figures_to_stderr() {
    let run = run(&["ask", PHOTO, DESCRIBE]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let answer = json(&[PHOTO, DESCRIBE]);
    assert_eq!(run.out, format!("{}\n", answer["text"].as_str().unwrap()));
    for figure in ["first token", "load", "tokens/s", "vision cpu", "projector cpu", "decoder cpu"] {
        assert!(run.err.contains(figure), "{}", run.err);
    }
    assert_eq!(run.err.lines().count(), 1);
}

#[test]
fn json_is_one_object_with_the_keys_that_are_promised() {
    let answer = json(&[PHOTO, DESCRIBE]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let check = |value: &Value, expected: &str| {
        assert_eq!(keys(value), expected.split(' ').map(str::to_owned).collect());
    };
    check(&answer, "text token_ids finish_reason usage timings_ms providers model prefixes");
    check(&answer["usage"], "prompt_tokens image_tokens cached_tokens cached_from completion_tokens");
    check(&answer["timings_ms"], "load preprocess restore vision prefill decode total");
    check(&answer["providers"], "vision projector decoder");
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["model"], "llava-phi-tiny");
    let count = |key: &str| answer["usage"][key].as_u64().unwrap();
    assert_eq!(count("image_tokens"), 64);
    assert!(count("prompt_tokens") > 64);
    assert_eq!(count("completion_tokens"), answer["token_ids"].as_array().unwrap().len() as u64);
    let steps = answer["timings_ms"].as_object().unwrap();
    let sum: f64 =
        steps.iter().filter(|(name, _)| *name != "total").map(|(_, ms)| ms.as_f64().unwrap()).sum();
    // Each is rounded to a microsecond.
    assert!((sum - steps["total"].as_f64().unwrap()).abs() < 0.01, "{steps:?}");
}

#[test]
fn images_come_from_files_and_from_stdin_in_any_number() {
    let tokens = |answer: &Value| answer["usage"]["image_tokens"].as_u64().unwrap();
    let one = json(&[PHOTO, DESCRIBE]);
    let piped = end(program().args(["ask", "--json", "-", DESCRIBE]).write_stdin(fs::read(PHOTO).unwrap()));
    assert_eq!(piped.code, Some(0), "{piped:?}");
    let piped: Value = serde_json::from_str(&piped.out).unwrap();
    assert_eq!(piped["token_ids"], one["token_ids"]);
    assert_eq!(tokens(&json(&[PHOTO, NOT_SQUARE, DESCRIBE])), 128);
    assert_eq!(tokens(&json(&["Which colour has the sky?"])), 0);
}

#[test]
fn options_shape_the_answer() {
    let whole = json(&[PHOTO, DESCRIBE]);
    let text = whole["text"].as_str().unwrap();
    assert_eq!(json(&[PHOTO, DESCRIBE])["token_ids"], whole["token_ids"], "greedy is the default");

    let short = json(&[PHOTO, DESCRIBE, "--max-new-tokens", "2"]);
    assert_eq!(
        (&short["finish_reason"], &short["usage"]["completion_tokens"]),
        (&"length".into(), &2.into())
    );

    let stop = text.split(' ').nth(2).expect("the description has three words");
    let stopped = json(&[PHOTO, DESCRIBE, "--stop", "never to be seen", "--stop", stop]);
    assert_eq!(stopped["text"].as_str().unwrap(), text.split(stop).next().unwrap().trim_end());
    assert_eq!(stopped["finish_reason"], "stop");

    let terse = json(&[PHOTO, DESCRIBE, "--system", "Be terse."]);
    assert!(terse["usage"]["prompt_tokens"].as_u64() < whole["usage"]["prompt_tokens"].as_u64());

    let chunked = json(&[PHOTO, DESCRIBE, "--prefill-chunk", "7", "--threads", "1"]);
    assert_eq!(chunked["text"], whole["text"]);
    let portable = json(&[PHOTO, DESCRIBE, "--variant", "portable-f32"]);
    assert_eq!(portable["providers"]["decoder"]["variant"], "portable-f32");
    json(&[PHOTO, DESCRIBE, "--model", "models/tiny/package", "--image-mode", "pad"]);
}

#[test]
fn a_seed_reproduces_a_sample() {
    let sample = |seed: &str| {
        let options = ["--temperature", "3", "--top-k", "200", "--top-p", "0.99", "--min-p", "0.0001"];
        let more = ["--repetition-penalty", "1.1", "--max-new-tokens", "40", "--seed", seed];
        json(&[&[PHOTO, DESCRIBE][..], &options, &more].concat())["token_ids"].clone()
    };
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

#[test]
fn images_that_cannot_be_used_are_refused() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let photo = fs::read(PHOTO).unwrap();
    let mut bomb = fs::read(NOT_SQUARE).unwrap();
    // Width and height of a BMP.
    bomb[18..22].copy_from_slice(&30_000_u32.to_le_bytes());
    bomb[22..26].copy_from_slice(&30_000_u32.to_le_bytes());
    let table = [
        (file("text.png", b"This is no image at all."), "it is no image"),
        (file("half.jpg", &photo[..photo.len() / 2]), "truncated"),
        (file("empty.png", b""), "there are no bytes"),
        (file("bomb.bmp", &bomb), "30000 x 30000"),
        (dir.path().join("none.png").to_str().unwrap().to_owned(), "there is no such file"),
        (dir.path().to_str().unwrap().to_owned(), "this is a directory"),
    ];
    for (path, why) in &table {
        check(&["ask", path, "What?"], &[path, why]);
    }
    check(&["ask", PHOTO, &table[4].0, "What?"], &[&table[4].0]);
    check(&["trace", &table[0].0, "What?"], &[&table[0].0, "it is no image"]);
    check(&["chat", &table[0].0], &[&table[0].0, "it is no image"]);
    check(&["ask", "--max-image-pixels", "100", PHOTO, "What?"], &[PHOTO, "25600 pixels", "limit is 100"]);
    check(&["ask", "--max-image-bytes", "10", PHOTO, "What?"], &[PHOTO, "10 bytes"]);
    check(&["ask", "-", "-", "What?"], &["standard input", "only once"]);
    let nothing = end(program().args(["ask", "-", "What?"]).write_stdin(""));
    refused(&nothing, 2, &["image stdin", "there are no bytes"]);
}

#[test]
fn questions_and_options_that_cannot_be_used_are_refused() {
    let long = "word ".repeat(600);
    for (args, words) in [
        (&[""][..], &["question is empty"][..]),
        (&[PHOTO, "  "], &["question is empty"]),
        (&[PHOTO], &[PHOTO, "no question"]),
        (&["-"], &["no question"]),
        (&[&long], &["positions", "context holds 512", "shorten"]),
        (&["Hi", "--max-new-tokens", "512"], &["512 new tokens", "ask for at most"]),
        (&["Hi", "--max-new-tokens", "0"], &["max-new-tokens is 0", "at least 1"]),
        (&["Hi", "--temperature", "0", "--top-p", "0.9"], &["temperature 0", "top-p 0.9", "leave out"]),
        (&["Hi", "--seed", "1"], &["seed 1", "temperature"]),
        (&["Hi", "--temperature", "-1"], &["temperature is -1"]),
        (&["Hi", "--temperature", "NaN"], &["temperature is NaN"]),
        (&["Hi", "--top-k", "0"], &["top-k is 0"]),
        (&["Hi", "--top-p", "1.5"], &["top-p is 1.5"]),
        (&["Hi", "--min-p", "2"], &["min-p is 2"]),
        (&["Hi", "--repetition-penalty", "0"], &["repetition-penalty is 0"]),
        (&["Hi", "--stop", ""], &["stop string is empty"]),
        (&["Hi", "--threads", "0"], &["--threads", "0"]),
        (&["Hi", "--threads", "9999"], &["9999", "--threads", "four for each processor"]),
        (&["Hi", "--image-mode", "stretch"], &["stretch", "auto, crop, pad"]),
        (&["Hi", "--variant", "gpu"], &["variant \"gpu\"", "cpu-int4, portable-f32"]),
        (&["Hi", "--provider", "cdua"], &["cdua", "did you mean cuda?", "--provider"]),
        (&["Hi", "--provider", "eyes=cpu"], &["eyes", "vision", "--provider"]),
        (&["Hi", "--variant", "a,b"], &["a,b", "two variants", "--variant"]),
        (&["Hi", "--jsn"], &["--jsn", "--json", "--help"]),
        (&["Hi", "--seed", "abc"], &["abc", "--seed"]),
        (&[], &["QUESTION", "--help"]),
    ] {
        check(&[&["ask"], args].concat(), words);
    }
    check(&["answer"], &["answer", "--help"]);
    check(&["completions", "tcsh"], &["tcsh", "bash"]);
    check(&["trace", PHOTO, ""], &["question is empty"]);
    check(&["inspect", "--variant", "gpu"], &["variant \"gpu\"", "cpu-int4, portable-f32"]);
    check(&["batch", "none.jsonl", "--output", "out.jsonl"], &["none.jsonl", "cannot be read"]);
    assert!(!Path::new("out.jsonl").exists());
}

#[test]
fn a_package_or_a_library_that_cannot_be_used_ends_with_3() {
    let dir = TempDir::new().unwrap();
    let empty = dir.path().to_str().unwrap();
    for command in
        [&["ask", "Hi", "--model", empty][..], &["inspect", empty], &["trace", PHOTO, "Hi", "--model", empty]]
    {
        refused(&run(command), 3, &[empty, "manifest.json", "llava-phi-export"]);
    }
    refused(&run(&["ask", "Hi", "--model", "no/such/package"]), 3, &["no/such/package", "no such directory"]);
    let text = run(&["ask", "Hi", "--runtime-library", "Cargo.toml"]);
    refused(&text, 3, &["Cargo.toml", "text file", "llava-phi runtime install"]);

    let mut alone = bare();
    alone.env("HOME", empty).env("XDG_CACHE_HOME", empty).env("LOCALAPPDATA", empty);
    if cfg!(target_os = "linux") {
        refused(&end(alone.args(["ask", "Hi"])), 3, &["offline", "llava-phi runtime install"]);
        assert_eq!(fs::read_dir(empty).unwrap().count(), 0, "nothing is left behind");
    }
}

#[test]
fn a_follow_up_does_not_read_the_image_again() {
    let run = chat(
        &[PHOTO],
        &["What colour is the shape?", "", "Which shape is it?", "/stats", "/help", "/quit", "Hi"],
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    let stats = run.out.lines().find(|line| line.starts_with("context: ")).unwrap();
    let numbers: Vec<usize> =
        stats.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let [taken, context, kept, prompt] = numbers[..] else { panic!("{stats}") };
    assert_eq!(context, 512);
    assert!(kept > 64 && kept < prompt && prompt <= taken, "{stats}");
    for command in ["/image", "/system", "/reset", "/forget", "/save", "/load", "/stats", "/help", "/quit"] {
        assert!(run.out.contains(command), "{command} is not in the help");
    }
    assert_eq!(run.err, "");
}

#[test]
fn a_conversation_is_saved_and_taken_up() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("saved.json");
    let (save, load) = (format!("/save {}", file.display()), format!("/load {}", file.display()));
    let image = format!("/image {PHOTO}");
    let first = chat(&[], &[&image, "What colour is the shape?", &save, DESCRIBE]);
    assert_eq!(first.code, Some(0), "{first:?}");
    let second = chat(&[], &[&load, DESCRIBE]);
    assert_eq!(second.code, Some(0), "{second:?}");
    assert_eq!(second.out.lines().last(), first.out.lines().last());

    fs::write(&file, "{}").unwrap();
    let path = file.to_str().unwrap();
    refused(&chat(&[], &[&load]), 2, &[path, "not a saved conversation", "/save"]);
    let nowhere = format!("/save {path}/x");
    refused(&chat(&[], &[&nowhere]), 2, &[path, "cannot be saved"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file is left");
}

#[test]
fn a_conversation_can_be_begun_anew() {
    let run = chat(
        &[PHOTO],
        &["What colour is the shape?", "/reset", "/stats", "/system Be terse.", DESCRIBE, "/stats"],
    );
    assert_eq!(run.code, Some(0), "{run:?}");
    let stats: Vec<&str> = run.out.lines().filter(|line| line.starts_with("context: ")).collect();
    assert!(stats[0].contains("512 positions; how many"), "{stats:?}");
    let begin = json(&["--system", "Be terse.", DESCRIBE]);
    let prompt = &begin["usage"]["prompt_tokens"];
    assert!(stats[1].contains(&format!("of the last prompt's {prompt} were")), "{stats:?} {prompt}");

    let lines = ["What colour is the shape?", "Which shape is it?", "/forget", "/forget"];
    let run = chat(&[PHOTO], &[&lines[..], &["/forget"]].concat());
    assert_eq!(run.code, Some(2), "{run:?}");
    assert_eq!(run.err, "error: nothing was said yet that could be forgotten\n");
}

#[test]
fn a_chat_names_what_it_cannot_do() {
    refused(&chat(&[], &["/dance"]), 2, &["/dance", "/help"]);
    refused(&chat(&[], &["/image"]), 2, &["/image needs a value", "/help"]);
    refused(&chat(&[], &["/image none.png"]), 2, &["none.png", "no such file"]);
    refused(&chat(&[], &["/forget"]), 2, &["nothing was said"]);
    let long = "word ".repeat(600);
    refused(&chat(&[], &[&long]), 2, &["context holds 512", "/forget", "/reset"]);
    assert_eq!(chat(&[], &[]).code, Some(0));
}

#[test]
fn a_package_is_shown_to_a_person_and_to_a_program() {
    let person = good(&["inspect", "models/tiny/package", "--verify"]);
    for word in [
        "llava-phi-tiny",
        "64 x 64",
        "512 positions",
        "cpu-int4",
        "cache shared i8",
        "embeddings.bin",
        "every hash checked",
    ] {
        assert!(person.contains(word), "{word:?} is not in {person}");
    }
    assert!(!good(&["inspect"]).contains("every hash checked"));
    let placed = good(&["inspect", "--placement", "--variant", "portable-f32"]);
    for word in ["decoder         portable-f32 on cpu", "nodes on cpu", "self-check: logits"] {
        assert!(placed.contains(word), "{word:?} is not in {placed}");
    }
    let report: Value = serde_json::from_str(&good(&["inspect", "--json"])).unwrap();
    assert_eq!(report["verified"], false);
    assert_eq!(report["manifest"]["format"], 3);
    // Four layers of two caches of two heads of 80 bytes.
    assert_eq!(report["memory"]["kv_per_position"], 4 * 2 * 2 * 80);
    assert_eq!(report["memory"]["kv_full"], 4 * 2 * 2 * 80 * 512);
}

#[test]
fn a_trace_shows_every_stage_and_keeps_it() {
    let dir = TempDir::new().unwrap();
    let dump = |mode: &str| {
        let path = dir.path().join(mode);
        let out = good(&[
            "trace",
            NOT_SQUARE,
            "What colour?",
            "--image-mode",
            mode,
            "--dump",
            path.to_str().unwrap(),
        ]);
        (out, path)
    };
    let (out, path) = dump("auto");
    for (number, (stage, shape)) in [
        ("rgb", "(30, 40, 3)"),
        ("resized", "(64, 64, 3)"),
        ("pixel_values", "(1, 3, 64, 64)"),
        ("patch_features", "(1, 64, 128)"),
        ("image_embeds", "(64, 160)"),
        ("token_ids", ""),
        ("inputs_embeds", ", 160)"),
        ("logits", "(640,)"),
        ("answer_ids", ""),
    ]
    .into_iter()
    .enumerate()
    {
        assert!(out.lines().any(|line| line.starts_with(stage)), "{stage} is not in {out}");
        let bytes = fs::read(path.join(format!("{number:02}-{stage}.npy"))).unwrap();
        let head = String::from_utf8_lossy(&bytes[..bytes.len().min(128)]).into_owned();
        assert!(head.contains("NUMPY") && head.contains(shape), "{stage}: {head}");
    }
    let answer = json(&[NOT_SQUARE, "What colour?"]);
    assert_eq!(out.lines().last(), answer["text"].as_str());

    let pixels = |path: &Path| fs::read(path.join("02-pixel_values.npy")).unwrap();
    assert_eq!(pixels(&dump("crop").1), pixels(&path), "the model was trained on the middle");
    assert_ne!(pixels(&dump("pad").1), pixels(&path));
    check(&["trace", PHOTO, "What?", "--dump", "Cargo.toml"], &["Cargo.toml", "directory", "--dump"]);
}

#[test]
fn fewer_visual_tokens_are_asked_for_and_told() {
    let run = run(&["ask", "--json", "--visual-tokens", "16", PHOTO, DESCRIBE]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.err.starts_with("notice: 16 of 64 visual tokens are read; "), "{}", run.err);
    let answer: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(answer["usage"]["image_tokens"], 16);
    assert_eq!(
        (&answer["visual_tokens"]["tokens"], &answer["visual_tokens"]["of"]),
        (&16.into(), &64.into())
    );
    assert!(answer["visual_tokens"]["measured"].is_array());
    // All of them are what is read without a wish, and nothing is said.
    let all = json(&["--visual-tokens", "64", PHOTO, DESCRIBE]);
    assert!(all.get("visual_tokens").is_none());
    assert_eq!(all["token_ids"], json(&[PHOTO, DESCRIBE])["token_ids"]);

    let traced = good(&["trace", PHOTO, DESCRIBE, "--visual-tokens", "16"]);
    for stage in [
        "patch_features  [1, 64, 128]",
        "cls_attention   [64]",
        "visual_tokens   [1, 16, 128]",
        "image_embeds    [16, 160]",
    ] {
        assert!(traced.contains(stage), "{stage} is not in {traced}");
    }
    assert_eq!(traced.lines().last(), answer["text"].as_str());
    assert!(good(&["inspect"]).contains("images      take 64 positions, or fewer"));
    assert!(good(&["doctor", "--visual-tokens", "16"]).contains("16 of 64 visual tokens are read"));

    check(&["ask", "--visual-tokens", "0", PHOTO, DESCRIBE], &["0 visual tokens", "give 1 to 64"]);
    check(&["trace", "--visual-tokens", "65", PHOTO, DESCRIBE], &["65 visual tokens", "give 1 to 64"]);
}

#[test]
fn the_program_tells_about_itself() {
    let version = good(&["--version"]);
    assert!(
        version.starts_with(concat!("llava-phi ", env!("CARGO_PKG_VERSION"), "\nONNX Runtime 1.")),
        "{version}"
    );
    assert!(good(&["--help"]).contains("Exit codes:"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(good(&["completions", shell]).contains("inspect"), "{shell}");
    }
    let options = good(&["runtime", "options", "tensorrt"]);
    assert!(options.lines().all(|line| line.starts_with("tensorrt.")) && options.contains("trt_fp16_enable"));
    check(&["runtime", "options", "tensort"], &["tensort", "did you mean tensorrt?"]);
    let status: Value = serde_json::from_str(&good(&["runtime", "status", "--json"])).unwrap();
    assert!(status["library"]["version"].as_str().unwrap().starts_with("1."), "{status}");
}

#[test]
fn a_batch_goes_on_where_it_stopped_and_tells_what_failed() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (questions, answers) = (at("questions.jsonl"), at("answers.jsonl"));
    let ask = |id: &str, image: &str| {
        format!(r#"{{"id":{id},"question":"{DESCRIBE}","images":["{image}"]}}"#) + "\n"
    };
    let batch = || run(&["batch", &questions, "--output", &answers]);
    let lines = || -> Vec<Value> {
        fs::read_to_string(&answers)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    fs::write(&questions, ask("1", PHOTO) + &ask("\"b\"", NOT_SQUARE) + "\n" + &ask("3", "none.png"))
        .unwrap();
    refused(&batch(), 2, &["1 of 3", &answers]);
    let first = lines();
    assert_eq!(
        first.iter().map(|line| line["id"].clone()).collect::<Vec<_>>(),
        [serde_json::json!(1), serde_json::json!("b"), serde_json::json!(3)]
    );
    assert_eq!(first[0]["token_ids"], json(&[PHOTO, DESCRIBE])["token_ids"]);
    assert!(first[2]["error"].as_str().unwrap().contains("none.png"));

    fs::write(&questions, ask("1", PHOTO) + &ask("\"b\"", PHOTO) + &ask("3", PHOTO)).unwrap();
    let second = batch();
    assert_eq!((second.code, second.out.as_str(), second.err.as_str()), (Some(0), "", ""));
    let all = lines();
    assert_eq!((all.len(), &all[3]["id"], &all[3]["token_ids"]), (4, &3.into(), &first[0]["token_ids"]));

    fs::write(&questions, "{\"id\":1}\n").unwrap();
    refused(&batch(), 2, &[&questions, "line 1", "question"]);
    let other = run(&["batch", &questions, "--output", dir.path().to_str().unwrap()]);
    assert_eq!(other.code, Some(2), "{other:?}");
}

#[cfg(unix)]
mod signals {
    use std::{
        io::{BufRead as _, BufReader, Read as _},
        process::{Child, Command, Stdio},
    };

    use super::{DESCRIBE, PHOTO, Value};
    use crate::support::library_path;

    /// An answer that takes a while, even of a miniature.
    fn start(more: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llava-phi"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("LLAVA_PHI_OFFLINE", "1");
        command.env("LLAVA_PHI_LOG", "llava_phi=debug");
        if let Some(library) = library_path() {
            command.env("ORT_DYLIB_PATH", library);
        }
        command.args(["ask", PHOTO, DESCRIBE, "--variant", "portable-f32", "--threads", "1"]);
        command.args(["--temperature", "5", "--seed", "11", "--max-new-tokens", "400"]).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn interrupt(child: &Child) {
        // The program may have ended already.
        let _ = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .stderr(Stdio::null())
            .status()
            .unwrap();
    }

    #[test]
    fn an_interrupt_ends_an_answer_with_130() {
        // A busy machine may let the answer end first.
        let stopped = (0..20).any(|_| {
            let mut child = start(&[]);
            let mut first = [0];
            child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
            interrupt(&child);
            let output = child.wait_with_output().unwrap();
            let code = output.status.code();
            assert!(matches!(code, Some(0 | 130)), "{output:?}");
            code == Some(130) && String::from_utf8_lossy(&output.stderr).contains("first token")
        });
        assert!(stopped);
    }

    #[test]
    fn an_interrupted_answer_has_its_json() {
        // A busy machine may let the answer end first.
        let cancelled = (0..20).any(|_| {
            let mut child = start(&["--json"]);
            let log = BufReader::new(child.stderr.take().unwrap()).lines();
            assert!(log.map_while(Result::ok).any(|line| line.contains("prompt read")));
            interrupt(&child);
            let output = child.wait_with_output().unwrap();
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            let cancelled = output.status.code() == Some(130);
            // One that comes after the answer ends the program too, but not the answer.
            let stopped = answer["finish_reason"] == "cancelled";
            assert!(cancelled || !stopped, "{answer}");
            stopped
        });
        assert!(cancelled);
    }

    #[test]
    fn a_reader_that_goes_away_is_no_failure() {
        let mut child = start(&[]);
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    }
}

#[test]
fn an_option_that_no_provider_takes_is_refused_whether_or_not_the_provider_is_tried() {
    let ask = |words: &[&str], expected: &[&str]| check(&[&["ask", "Hi"], words].concat(), expected);
    ask(
        &["--provider-option", "trt_fp16_enable=1"],
        &["is no provider option", "tensorrt.trt_fp16_enable=1"],
    );
    ask(&["--provider-option", "tensort.trt_fp16_enable=1"], &["did you mean tensorrt?"]);
    ask(&["--provider-option", "tensorrt.trt_fp16=1"], &["takes no option", "did you mean trt_fp16_enable?"]);
    ask(&["--provider-option", "cuda.device_id=1"], &["name the device in the provider, as cuda:0"]);
    let twice = ["--provider-option", "cuda.use_tf32=1", "--provider-option", "cuda.use_tf32=0"];
    ask(&twice, &["cuda.use_tf32 has two values"]);
    let same = ["ask", "Hi", "--provider-option", "cuda.use_tf32=1", "--provider-option", "cuda.use_tf32=1"];
    good(&same);
}

#[test]
fn a_library_that_is_no_plugin_is_refused_before_the_model_is_loaded() {
    let ask = |plugin: &str| run(&["ask", "Hi", "--provider-library", plugin]);
    refused(&ask("qnn"), 2, &["write the provider and its library as qnn=", "--provider-library"]);
    refused(&ask("qnn="), 2, &["write the provider and its library as qnn="]);
    refused(&ask("tensort=plugin.so"), 2, &["there is no provider \"tensort\"", "did you mean tensorrt?"]);
    refused(&ask("qnn=none/plugin.so"), 3, &["provider qnn: none/plugin.so does not exist"]);
    refused(&ask(&format!("qnn={PHOTO}")), 3, &["provider qnn: ", PHOTO]);
    refused(&ask("cpu=plugin.so"), 3, &["provider cpu: it is built in; leave its library out"]);
}

#[test]
fn an_answer_looks_as_it_was_asked_to() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let schema = write(
        "schema.json",
        r#"{"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"],
            "additionalProperties": false}"#,
    );
    let grammar = write("grammar.lark", "start: \"red \" /[0-9]{3}/");
    let value: Value =
        serde_json::from_str(good(&["ask", PHOTO, DESCRIBE, "--schema", &schema]).trim()).unwrap();
    assert!(value["red"].is_boolean(), "{value}");
    let text = good(&["ask", PHOTO, DESCRIBE, "--grammar", &grammar]);
    assert!(text.trim_end().len() == 7 && text.starts_with("red "), "{text}");
    assert_eq!(
        good(&["ask", PHOTO, DESCRIBE, "--regex", "x{3}y?", "--logit-bias", "0=-2"]).trim_end().find("xxx"),
        Some(0)
    );

    let asked = run(&["ask", PHOTO, "What colour is it?", "--choice", "red,blue", "--choice", "green"]);
    assert_eq!(asked.code, Some(0), "{}", asked.err);
    assert!(["red\n", "blue\n", "green\n"].contains(&&asked.out[..]), "{}", asked.out);
    assert!(asked.err.contains("; choices red 0."), "{}", asked.err);

    let answer = json(&[PHOTO, "What colour is it?", "--choice", "red,blue", "--logprobs", "2"]);
    assert_eq!(answer["choices"][1]["text"], "blue");
    let shares = [0, 1].map(|n| answer["choices"][n]["probability"].as_f64().unwrap());
    assert!((shares[0] + shares[1] - 1.0).abs() < 1e-9);
    assert_eq!(answer["logprobs"][0]["top"].as_array().unwrap().len(), 2);
    assert_eq!(answer["logprobs"][0]["id"], answer["token_ids"][0]);
    let plain = json(&[PHOTO, DESCRIBE]);
    assert!(plain.get("choices").is_none() && plain.get("logprobs").is_none());
}

#[test]
fn what_an_answer_cannot_look_like_is_refused_by_name() {
    let ask = |args: &[&str]| run(&[&["ask", PHOTO, DESCRIBE], args].concat());
    refused(&ask(&["--regex", "("]), 2, &["the regex is refused", "change it or leave it out"]);
    refused(&ask(&["--schema", "no/such/file"]), 2, &["no/such/file cannot be read"]);
    refused(&ask(&["--schema", PHOTO]), 2, &["photo.jpg cannot be read"]);
    refused(&ask(&["--choice", "red,red"]), 2, &["choice \"red\" is given twice"]);
    refused(&ask(&["--frequency-penalty", "3"]), 2, &["frequency-penalty is 3", "from -2 to 2"]);
    refused(&ask(&["--logit-bias", "99999999=1"]), 2, &["logit-bias names token 99999999"]);
    refused(&ask(&["--logit-bias", "1=1", "--logit-bias", "1=2"]), 2, &["--logit-bias names token 1 twice"]);
    refused(&ask(&["--choice", "a,b", "--presence-penalty", "1"]), 2, &["presence-penalty", "choice"]);
    for args in [&["--regex", "a", "--choice", "b"][..], &["--logprobs", "2"], &["--logit-bias", "x"]] {
        assert_eq!(ask(args).code, Some(2), "{args:?}");
    }
}

//! `llava-phi tune`: what it measures, what it keeps, and who uses it later.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::cli::{Run, end, program};
use crate::support;

const PACKAGE: &str = "models/tiny/package";

/// The program with a cache of the test's own.
fn run(cache: &Path, args: &[&str]) -> Run {
    end(program().env("LLAVA_PHI_CACHE", cache).args(args))
}

fn tune(cache: &Path, more: &[&str]) -> Value {
    let args = ["tune", "--json", "--decoder-steps", "2", "--threads", "1"];
    let run = run(cache, &[&args[..], more].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    serde_json::from_str(&run.out).unwrap()
}

/// The answer's object, and what was said on standard error.
fn ask(cache: &Path, more: &[&str]) -> (Value, String) {
    let run = run(cache, &[&["ask", "--json", "Which colour?", "--max-new-tokens", "1"][..], more].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    (serde_json::from_str(&run.out).unwrap(), run.err)
}

/// The files that hold decisions.
fn kept(cache: &Path) -> Vec<PathBuf> {
    fs::read_dir(cache.join("tuned")).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn rows<'a>(report: &'a Value, component: &'a str) -> impl Iterator<Item = &'a Value> {
    report["candidates"].as_array().unwrap().iter().filter(move |row| row["component"] == component)
}

#[test]
fn what_is_fastest_is_kept_and_serves_from_then_on() {
    let dir = TempDir::new().unwrap();
    assert_eq!(ask(dir.path(), &[]).0["providers"]["decoder"]["tuned"], Value::Null);
    let report = tune(dir.path(), &[]);
    let [file] = &kept(dir.path())[..] else { panic!("{:?}", kept(dir.path())) };
    assert_eq!(report["stored"].as_str().unwrap(), file.to_str().unwrap());
    let decision: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(decision, report["decision"]);
    for key in ["machine", "runtime", "package", "engine"] {
        assert!(!decision["key"][key].as_str().unwrap().is_empty());
    }

    // The fastest of those that passed, by the figure that is promised.
    let cost = |row: &Value| {
        let decoder = &row["decoder"];
        let answer =
            || decoder["prefill_ms"].as_f64().unwrap() + 64.0 * decoder["decode_ms"].as_f64().unwrap();
        row["run_ms"].as_f64().unwrap_or_else(answer)
    };
    for component in ["vision_encoder", "projector", "decoder"] {
        let passed: Vec<&Value> =
            rows(&report, component).filter(|row| row["status"] == "measured").collect();
        let best = passed.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap();
        let decided = &decision["components"][component];
        // As good as equal counts as equal.
        assert!(cost(&decided["figures"]) <= 1.05 * cost(best), "{component}: {decided}, {best}");
        let keys = ["variant", "provider", "threads"];
        assert!(passed.iter().any(|row| keys.iter().all(|key| row[key] == decided[key])), "{decided}");
        assert!(passed.iter().all(|row| row["load_ms"].as_f64().unwrap() > 0.0 && cost(row) > 0.0));
        for row in passed {
            let agreement = &row["agreement"][0];
            assert!(agreement["distance"].as_f64() <= agreement["tolerance"].as_f64(), "{row}");
            let memory = &row["memory"];
            assert_eq!(memory.is_object(), cfg!(target_os = "linux"));
            assert!(memory.is_null() || memory["peak"].as_u64() >= memory["anonymous"].as_u64());
        }
    }
    let refused: Vec<&Value> = rows(&report, "decoder").filter(|row| row["status"] == "refused").collect();
    assert!(refused.iter().all(|row| !row["step"].as_str().unwrap().is_empty()));
    assert!(refused.iter().all(|row| !row["reason"].as_str().unwrap().is_empty()));

    let decided = &decision["components"]["decoder"];
    let (answer, notice) = ask(dir.path(), &[]);
    assert_eq!(notice, "");
    for component in ["vision", "projector", "decoder"] {
        assert_eq!(answer["providers"][component]["tuned"], decision["date"]);
        assert_eq!(answer["providers"][component]["threads"], 1);
    }
    assert_eq!(answer["providers"]["decoder"]["variant"], decided["variant"]);
    let figures = run(dir.path(), &["ask", "Which colour?"]).err;
    let said = format!("(tuned on {}, threads 1)", decision["date"].as_str().unwrap());
    assert_eq!(figures.matches(&said).count(), 3, "{figures}");

    let again = run(dir.path(), &["tune"]);
    assert!(again.out.contains("--force measures again"), "{again:?}");
    assert!(tune(dir.path(), &[])["candidates"].as_array().unwrap().is_empty());
    assert!(
        !tune(dir.path(), &["--force", "--provider", "cpu"])["candidates"].as_array().unwrap().is_empty()
    );
    assert_eq!(kept(dir.path()).len(), 1);
}

#[test]
fn whoever_asks_for_something_else_gets_it() {
    let dir = TempDir::new().unwrap();
    tune(dir.path(), &["--provider", "cpu", "--variant", "decoder=portable-f32"]);
    let (tuned, _) = ask(dir.path(), &[]);
    assert_eq!(tuned["providers"]["decoder"]["variant"], "portable-f32");
    let decoder = |more: &[&str]| ask(dir.path(), more).0["providers"]["decoder"].clone();
    let (plain, asked, other, threads) = (
        decoder(&["--no-tuned"]),
        decoder(&["--provider", "decoder=cpu"]),
        decoder(&["--variant", "cpu-int4"]),
        decoder(&["--threads", "2"]),
    );
    for untuned in [&plain, &asked, &other] {
        assert_eq!((&untuned["tuned"], &untuned["threads"]), (&Value::Null, &Value::Null), "{untuned}");
        assert_eq!(untuned["variant"], "cpu-int4");
    }
    assert_eq!((&threads["variant"], &threads["threads"]), (&"portable-f32".into(), &2.into()));
    assert!(threads["tuned"].is_string());
    let vision = &ask(dir.path(), &["--provider", "decoder=cpu"]).0["providers"]["vision"];
    assert!(vision["tuned"].is_string(), "nothing was asked for it: {vision}");
}

#[test]
fn a_decision_that_no_longer_holds_is_ignored_in_the_open() {
    let dir = TempDir::new().unwrap();
    tune(dir.path(), &["--provider", "cpu"]);
    let [file] = &kept(dir.path())[..] else { panic!() };
    let whole = fs::read_to_string(file).unwrap();
    let decision: Value = serde_json::from_str(&whole).unwrap();
    let runtime = decision["key"]["runtime"].as_str().unwrap();
    let ignored = |expected: &str| {
        let (answer, notice) = ask(dir.path(), &[]);
        assert_eq!(answer["providers"]["decoder"]["tuned"], Value::Null);
        assert!(notice.starts_with("notice: ") && notice.contains(expected), "{expected}: {notice}");
        assert_eq!(notice.lines().count(), 1);
        assert_eq!(ask(dir.path(), &["--no-tuned"]).1, "");
    };

    let old = whole.replace(&format!("\"runtime\": \"{runtime}\""), "\"runtime\": \"1.20.0\"");
    fs::write(file, &old).unwrap();
    ignored("it was decided with ONNX Runtime 1.20.0");
    let elsewhere = file.with_file_name("other.json");
    fs::rename(file, &elsewhere).unwrap();
    ignored("what was tuned on");
    fs::rename(&elsewhere, file).unwrap();
    fs::write(file, &whole[..whole.len() / 2]).unwrap();
    ignored("it is no decision");

    // The next one takes its place.
    tune(dir.path(), &["--provider", "cpu"]);
    assert!(ask(dir.path(), &[]).0["providers"]["decoder"]["tuned"].is_string());

    // What was decided and is gone is refused like anything else that was tried first.
    let gone = fs::read_to_string(file).unwrap().replace("\"provider\": \"cpu\"", "\"provider\": \"nnapi\"");
    fs::write(file, gone).unwrap();
    let decoder = &ask(dir.path(), &[]).0["providers"]["decoder"];
    assert_eq!((&decoder["provider"], &decoder["tuned"]), (&"cpu".into(), &Value::Null));
    assert_eq!(decoder["refused"][0]["provider"], "nnapi");
}

#[test]
fn a_candidate_that_is_damaged_is_refused_and_the_others_are_measured() {
    let dir = TempDir::new().unwrap();
    let package = dir.path().join("package");
    support::copy_directory(Path::new(PACKAGE), &package);
    let manifest: Value = serde_json::from_slice(&fs::read(package.join("manifest.json")).unwrap()).unwrap();
    let graph = manifest["variants"]["cpu-int4"]["decoder"]["graph"]["path"].as_str().unwrap();
    fs::write(package.join(graph), b"no graph").unwrap();
    let report = tune(dir.path(), &["--model", package.to_str().unwrap(), "--provider", "cpu"]);
    let damaged = rows(&report, "decoder").find(|row| row["variant"] == "cpu-int4").unwrap();
    assert_eq!((&damaged["status"], &damaged["step"]), (&"refused".into(), &"package".into()));
    assert!(damaged["reason"].as_str().unwrap().contains(graph), "{damaged}");
    assert_eq!(report["decision"]["components"]["decoder"]["variant"], "portable-f32");
}

#[test]
fn what_cannot_be_done_is_said_in_a_sentence() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"in the way").unwrap();
    let measured = run(&file, &["tune", "--provider", "cpu", "--threads", "1", "--decoder-steps", "1"]);
    assert_eq!(measured.code, Some(3), "{measured:?}");
    assert!(measured.out.contains("* decoder"), "what was measured is shown: {measured:?}");
    assert_eq!(measured.err.lines().count(), 1);
    assert!(measured.err.contains("choose another place with --cache-dir"), "{measured:?}");

    let nothing = run(dir.path(), &["tune", "--provider", "nnapi"]);
    assert_eq!(nothing.code, Some(3), "{nothing:?}");
    assert!(nothing.err.contains("error: provider nnapi: "), "{nothing:?}");
    let small = run(dir.path(), &["tune", "--provider", "cpu", "--memory-limit", "1MB"]);
    assert_eq!(small.code, Some(3));
    assert!(small.out.contains("at memory: the plan takes"), "{small:?}");
    for (args, code, word) in [
        (["--decoder-steps", "100000"], 2, "do not leave room for a prompt"),
        (["--variant", "none"], 2, "has no variant \"none\""),
        (["--threads", "0"], 2, "give 1 to"),
        (["--provider", "cdua"], 2, "did you mean cuda?"),
        (["--model", "/nowhere"], 3, "there is no such directory"),
    ] {
        let run = run(dir.path(), &[&["tune"], &args[..]].concat());
        assert_eq!(run.code, Some(code), "{run:?}");
        assert!(run.err.contains(word) && run.err.lines().count() == 1, "{run:?}");
    }
    assert!(kept(dir.path()).is_empty());
}

#[cfg(target_os = "linux")]
mod signals {
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// Processes that were started with `word` among their arguments.
    fn running(word: &str) -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let named = processes.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
        named
            .filter(|entry| {
                let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&words).contains(word)
            })
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    fn until(what: impl Fn() -> bool) {
        let begin = Instant::now();
        while !what() {
            assert!(begin.elapsed() < Duration::from_mins(1), "it did not happen in a minute");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts to tune for long, sends `signal` while a candidate is measured, and gives the exit code.
    fn stopped(cache: &Path, signal: &str) -> Option<i32> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llava-phi"));
        for (name, value) in program().get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.args(["tune", "--decoder-steps", "400", "--provider", "cpu", "--cache-dir"]).arg(cache);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until(|| running(cache.to_str().unwrap()).len() > 1);
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        child.wait().unwrap().code()
    }

    #[test]
    fn an_interrupt_ends_what_measures_and_leaves_nothing() {
        for (signal, code) in [("-INT", Some(130)), ("-KILL", None)] {
            let dir = TempDir::new().unwrap();
            assert_eq!(stopped(dir.path(), signal), code);
            until(|| running(dir.path().to_str().unwrap()).is_empty());
            assert!(kept(dir.path()).is_empty());
        }
    }
}

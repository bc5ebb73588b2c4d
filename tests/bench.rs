//! `llava-phi bench`: what it measures, what it leaves out, what it refuses.

use serde_json::Value;

use crate::cli::{Run, end, program};

fn run(args: &[&str]) -> Run {
    end(program().args([&["bench"], args].concat()))
}

fn report(args: &[&str]) -> Value {
    let run = run(&[&["--json", "--threads", "1", "--provider", "only:cpu"], args].concat());
    assert_eq!(run.code, Some(0), "{run:?}");
    serde_json::from_str(&run.out).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn an_image_counts_as_the_positions_that_it_takes() {
    let report =
        report(&["--only", "first-token", "--repetitions", "1", "--text", "70", "--visual-tokens", "16"]);
    let rows = report["measurements"].as_array().unwrap();
    assert_eq!(rows.last().unwrap()["positions"], 70 + 16);
    assert_eq!(report["package"]["tokens_per_image"], 16);
    assert_eq!(report["settings"]["model"]["visual_tokens"], 16);
}

#[test]
fn another_provider_than_the_wanted_one_and_a_file_that_is_no_image_are_told_of() {
    let run = run(&["--provider", "cuda", "--only", "load"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.out.contains("decoder: cpu") && run.out.contains("(not cuda: "), "{run:?}");
    let run = super::bench::run(&["--image", "Cargo.toml"]);
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.err.contains("image Cargo.toml: "), "{run:?}");
}

#[test]
fn everything_is_measured_and_what_does_not_fit_is_told() {
    let report = report(&["--repetitions", "2", "--steps", "3", "--lengths", "16,128", "--text", "70"]);
    let rows: Vec<(&str, Option<u64>, Option<u64>, usize)> = report["measurements"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let [positions, depth] = ["positions", "depth"].map(|key| row[key].as_u64());
            (row["what"].as_str().unwrap(), positions, depth, numbers(&row["samples_ms"]).len())
        })
        .collect();
    let image = report["package"]["tokens_per_image"].as_u64().unwrap();
    let context = report["package"]["context"].as_u64().unwrap();
    let second = rows[6];
    let wanted = [
        ("runtime", None, None, 1),
        ("load", None, None, 1),
        ("preprocess", None, None, 2),
        ("encode", None, None, 2),
        ("project", None, None, 2),
        ("first-token", Some(70 + image), Some(0), 2),
        second,
        ("prefill", Some(16), Some(0), 2),
        ("prefill", Some(128), Some(0), 2),
        ("decode", Some(1), Some(0), 6),
        ("context-prefill", Some(context - 3), Some(0), 2),
        ("context-decode", Some(1), Some(context - 3), 6),
    ];
    assert_eq!(rows, wanted);
    // The picture and the text before it are not read again.
    let (what, read, cached, samples) = second;
    assert_eq!((what, samples), ("second-question", 2));
    assert!(read.unwrap() < 70 && cached.unwrap() > image, "{second:?}");
    assert_eq!(read.unwrap() + cached.unwrap(), 70 + image);
    assert_eq!(
        report["left_out"].as_array().unwrap(),
        &[format!("depth 700: at most {} fit into the context", context - 3)]
    );

    for row in report["measurements"].as_array().unwrap() {
        let samples = numbers(&row["samples_ms"]);
        let [min, median, max, mad] =
            ["min_ms", "median_ms", "max_ms", "mad_ms"].map(|key| row[key].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max && mad <= max - min, "{row}");
        assert!(samples.iter().all(|sample| (min..=max).contains(sample)), "{row}");
        let reads = ["prefill", "decode"].iter().any(|end| row["what"].as_str().unwrap().ends_with(end));
        assert_eq!(row["per_second"].is_number(), reads, "{row}");
    }
    assert_eq!(report["schema"], 1);
    assert_eq!(report["versions"]["llava_phi"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["settings"]["model"]["threads"], 1);
    assert_eq!(report["providers"]["decoder"]["threads"], 1);
    assert_eq!(report["providers"]["decoder"]["provider"], "cpu");
    if cfg!(target_os = "linux") {
        let marks = report["memory"].as_array().unwrap();
        let after: Vec<&str> = marks.iter().map(|mark| mark["after"].as_str().unwrap()).collect();
        let wanted = ["load", "preprocess", "encode", "first-token", "second-question"];
        assert_eq!(after[..5], wanted);
        assert_eq!(after[5..], ["prefill 16", "prefill 128", "decode 0", "context"]);
        for mark in marks {
            let [now, peak] = ["anonymous", "peak_anonymous"].map(|key| mark[key].as_u64().unwrap());
            assert!(0 < now && now <= peak && peak <= mark["peak"].as_u64().unwrap(), "{mark}");
        }
        assert!(report["busy"]["own"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn a_round_can_be_short() {
    let of = |args: &[&str]| {
        let report = report(args);
        let rows = report["measurements"].as_array().unwrap().iter();
        rows.skip(2)
            .map(|row| {
                (
                    row["what"].as_str().unwrap().to_owned(),
                    row["depth"].clone(),
                    numbers(&row["warm_up_ms"]).len(),
                )
            })
            .collect::<Vec<_>>()
    };
    assert!(of(&["--only", "load"]).is_empty());
    let rows = of(&[
        "--only",
        "decode,load",
        "--depths",
        "0,5",
        "--steps",
        "2",
        "--repetitions",
        "1",
        "--warm-up",
        "0",
    ]);
    assert_eq!(rows, [("decode".to_owned(), 0.into(), 0), ("decode".to_owned(), 5.into(), 0)]);
    let rows = of(&["--only", "ahead", "--depths", "9", "--repetitions", "1"]);
    assert_eq!(rows, [(); 4].map(|()| ("ahead".to_owned(), 9.into(), 1)));
    let rows = of(&["--only", "prefill", "--lengths", "5", "--repetitions", "100", "--budget", "0"]);
    assert_eq!(rows, [("prefill".to_owned(), 0.into(), 1)]);
}

#[test]
fn a_person_gets_a_table() {
    let run = run(&["--only", "decode", "--depths", "0", "--repetitions", "1", "--steps", "2"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    for wanted in ["median ms", "load ", "decode ", "decoder: cpu ", "ONNX Runtime "] {
        assert!(run.out.contains(wanted), "{wanted} in {}", run.out);
    }
    assert!(run.err.is_empty(), "a bar is for terminals: {}", run.err);
}

#[test]
fn what_cannot_be_measured_is_refused_with_what_can() {
    let check = |args: &[&str], wanted: &str| {
        let run = run(args);
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{run:?}");
        assert!(run.err.contains(wanted), "{}", run.err);
    };
    check(&["--lengths", "99999"], "length 99999 cannot be measured here; give 1 to ");
    check(&["--only", "decode", "--depths", "99999"], "depth 99999 cannot be measured here; give 0 to ");
    check(&["--only", "first-token", "--text", "1"], "give --text ");
    check(&["--only", "context", "--steps", "99999"], "give --steps 1 to ");
    check(&["--only", "everything"], "--help lists what can be given");
    check(&["--image", "missing.png"], "there is no such file");
}

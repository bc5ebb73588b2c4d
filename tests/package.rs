//! A package that was tampered with is refused in one sentence that names the thing, the value and the way out.

use std::{
    fs,
    path::{Path, PathBuf},
};

use llava_phi::{
    Error,
    engine::{Engine, EngineOptions, Request},
    error::ErrorKind,
    generate::params::GenerateParams,
    model::{ModelOptions, selection::VariantSelection},
    package::{Component, MANIFEST, ModelPackage},
    runtime::Step,
    text::Piece,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::support;

/// A copy of the miniature package.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        support::copy_directory(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package"),
            dir.path(),
        );
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn manifest(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path(MANIFEST)).unwrap()).unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest();
        change(&mut manifest);
        fs::write(self.path(MANIFEST), manifest.to_string()).unwrap();
    }

    /// Makes the manifest true again after the file `name` was changed.
    fn admit(&self, name: &str) {
        let bytes = fs::read(self.path(name)).unwrap();
        self.change(|manifest| manifest["files"][name] = info(&bytes));
    }

    fn open(&self) -> Result<ModelPackage, Error> {
        ModelPackage::open(self.dir.path())
    }

    fn engine(&self) -> Result<Engine, Error> {
        self.open().and_then(|package| engine(&package, None))
    }
}

fn info(bytes: &[u8]) -> Value {
    let sha256 = Sha256::digest(bytes).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    json!({ "bytes": bytes.len(), "sha256": sha256 })
}

fn engine(package: &ModelPackage, variant: Option<&str>) -> Result<Engine, Error> {
    let library = support::library();
    let variants = variant.map_or_else(VariantSelection::default, VariantSelection::of);
    let model = ModelOptions { variants, ..ModelOptions::default() };
    Engine::open(package, &EngineOptions { library, model, ..EngineOptions::default() })
}

fn refused<T>(result: Result<T, Error>, kind: ErrorKind, words: &[&str]) {
    let Err(error) = result else { panic!("was taken, and {words:?} should have been said") };
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    assert!(!text.contains('\n') && !text.ends_with('.'), "one sentence: {text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

/// Checks what is said about a manifest after `change`.
fn check(change: impl FnOnce(&mut Value), words: &[&str]) {
    let copy = Copy::new();
    copy.change(change);
    refused(copy.open(), ErrorKind::Package, words);
}

#[test]
fn a_directory_that_is_no_package() {
    let copy = Copy::new();
    let package = |path: PathBuf| ModelPackage::open(path);
    refused(
        package(copy.path("none")),
        ErrorKind::Package,
        &["none", "no such directory", "give the directory"],
    );
    refused(package(copy.path(MANIFEST)), ErrorKind::Package, &["this is a file", "give the directory"]);
    fs::remove_file(copy.path(MANIFEST)).unwrap();
    refused(copy.open(), ErrorKind::Package, &["manifest.json", "cannot be read", "llava-phi-export"]);
    fs::write(copy.path(MANIFEST), "# not JSON").unwrap();
    refused(copy.open(), ErrorKind::Package, &["manifest.json", "not a manifest", "line 1", "export again"]);
    fs::write(copy.path(MANIFEST), "{}").unwrap();
    refused(copy.open(), ErrorKind::Package, &["missing field `format`", "export again"]);
}

#[test]
fn a_manifest_of_another_format() {
    check(|m| m["format"] = json!(1), &["format 1", "reads format 3", "update llava-phi"]);
    check(|m| m["format"] = json!("one"), &["format \"one\"", "export again"]);
    check(|m| m["colour"] = json!("red"), &["unknown field `colour`", "export again"]);
    check(|m| m["decoder"]["colour"] = json!("red"), &["unknown field `colour`", "export again"]);
    check(|m| m["image"]["fit"] = json!("stretch"), &["stretch", "center_crop", "export again"]);
    check(|m| drop(m.as_object_mut().unwrap().remove("vision")), &["missing field `vision`"]);
}

#[test]
fn files_that_lie_elsewhere() {
    for name in ["../secret", "/etc/hostname", "shared/../../secret", "", "a\\b"] {
        check(
            |m| m["files"][name] = info(b""),
            &[&format!("file {name:?}"), "relative path inside the package", "export again"],
        );
    }
    check(
        |m| m["text"]["tokenizer"] = json!("../tokenizer.json"),
        &["\"../tokenizer.json\"", "not among the files"],
    );
    check(
        |m| m["variants"]["cpu-int4"]["projector"]["path"] = json!("/x.onnx"),
        &["cpu-int4", "\"/x.onnx\""],
    );
    check(
        |m| m["variants"]["cpu-int4"]["projector"]["data"] = json!(["tokenizer.json"]),
        &["\"tokenizer.json\"", "does not lie beside", "projector.onnx"],
    );
}

#[test]
#[cfg(unix)]
fn a_link_out_of_the_package() {
    let (copy, outside) = (Copy::new(), TempDir::new().unwrap());
    let secret = outside.path().join("secret");
    fs::rename(copy.path("tokenizer.json"), &secret).unwrap();
    std::os::unix::fs::symlink(&secret, copy.path("tokenizer.json")).unwrap();
    refused(
        copy.open(),
        ErrorKind::Package,
        &["tokenizer.json", "leads out of the package", "secret", "copy it"],
    );
    // A link within the package is no danger.
    fs::rename(&secret, copy.path("real.json")).unwrap();
    fs::remove_file(copy.path("tokenizer.json")).unwrap();
    std::os::unix::fs::symlink("real.json", copy.path("tokenizer.json")).unwrap();
    copy.open().unwrap();
}

#[test]
fn files_with_other_content() {
    let copy = Copy::new();
    let name = "goldens.safetensors";
    let mut weights = fs::read(copy.path(name)).unwrap();
    let last = weights.len() - 1;
    weights[last / 2] ^= 1;
    fs::write(copy.path(name), &weights).unwrap();
    refused(
        copy.open(),
        ErrorKind::Package,
        &[name, "not what was exported", "SHA-256", "copy the package again"],
    );
    weights.truncate(last);
    fs::write(copy.path(name), &weights).unwrap();
    let words = [name, &format!("has {last} bytes"), &format!("says {}", last + 1), "copy the package again"];
    refused(copy.open(), ErrorKind::Package, &words);
    fs::remove_file(copy.path(name)).unwrap();
    refused(copy.open(), ErrorKind::Package, &[name, "missing", "copy the package again"]);
    fs::create_dir(copy.path(name)).unwrap();
    refused(copy.open(), ErrorKind::Package, &[name, "not a file", "copy the package again"]);
    check(|m| m["files"]["embeddings.bin"]["sha256"] = json!("é".repeat(32)), &["embeddings.bin", "SHA-256"]);
}

#[test]
fn another_variant_serves_where_the_file_of_one_is_damaged_or_gone() {
    let copy = Copy::new();
    let name = "cpu-int4/decoder.onnx";
    let mut weights = fs::read(copy.path(name)).unwrap();
    let middle = weights.len() / 2;
    weights[middle] ^= 1;
    fs::write(copy.path(name), &weights).unwrap();
    let serves = |words: &[&str]| {
        let engine = copy.engine().unwrap();
        let reports = engine.reports();
        let decoder = reports.iter().find(|report| report.component == Component::Decoder).unwrap();
        assert_eq!(decoder.variant, "portable-f32");
        let refusal = &decoder.refused[0];
        assert_eq!((refusal.variant.as_str(), refusal.step), ("cpu-int4", Step::Package));
        for word in [name].iter().chain(words) {
            assert!(refusal.reason.contains(word), "{word:?} is not in {:?}", refusal.reason);
        }
    };
    serves(&["not what was exported", "SHA-256", "copy the package again"]);
    fs::remove_file(copy.path(name)).unwrap();
    serves(&["missing", "copy the package again"]);
    refused(copy.open().unwrap().verify(), ErrorKind::Package, &[name, "missing"]);

    let other = "portable-f32/decoder.onnx";
    fs::write(copy.path(other), b"no graph").unwrap();
    refused(copy.engine(), ErrorKind::Package, &[name, "missing", "copy the package again"]);
    copy.admit(other);
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package").join(name), copy.path(name))
        .unwrap();
    assert!(copy.engine().unwrap().reports().iter().all(|report| report.variant == "cpu-int4"));
}

/// Each component computes something else than the goldens say: nothing that is wrong serves.
#[test]
fn a_variant_that_computes_something_else_is_refused_and_the_next_one_serves() {
    let copy = Copy::new();
    // The first variant's decoder becomes that of other weights: some scale or weight in the middle of the file.
    let name = "cpu-int4/decoder.onnx";
    let mut graph = fs::read(copy.path(name)).unwrap();
    let half = graph.len() / 2;
    graph[half..half + 4096].fill(0x3a);
    fs::write(copy.path(name), &graph).unwrap();
    copy.admit(name);
    let engine = copy.engine().unwrap();
    let reports = engine.reports();
    let decoder = reports.iter().find(|report| report.component == Component::Decoder).unwrap();
    assert_eq!(decoder.variant, "portable-f32", "{:?}", decoder.self_check);
    assert_eq!(decoder.refused[0].step, Step::SelfCheck);
    assert!(decoder.refused.iter().all(|refusal| refusal.variant == "cpu-int4"), "{:?}", decoder.refused);
    assert!(decoder.refused[0].reason.contains("logits differ"), "{}", decoder.refused[0].reason);
    assert!(decoder.self_check.iter().all(llava_phi::model::goldens::Agreement::passes));

    copy.change(|m| m["serve"]["decoder"] = json!([{ "variant": "cpu-int4", "provider": "cpu" }]));
    refused(copy.engine(), ErrorKind::Provider, &["nothing serves the decoder", "self-check", "golden"]);
}

#[test]
fn a_tokenizer_that_is_none_or_another() {
    let copy = Copy::new();
    let name = "tokenizer.json";
    let whole = fs::read(copy.path(name)).unwrap();
    fs::remove_file(copy.path(name)).unwrap();
    refused(copy.open(), ErrorKind::Package, &[name, "missing", "copy the package again"]);

    fs::write(copy.path(name), b"not JSON").unwrap();
    copy.admit(name);
    refused(
        copy.engine(),
        ErrorKind::Package,
        &[name, "not a byte-level BPE tokenizer", "export the package"],
    );

    fs::write(copy.path(name), whole).unwrap();
    copy.admit(name);
    copy.change(|m| m["text"]["vocabulary"] = json!(577));
    refused(copy.engine(), ErrorKind::Package, &[name, "entries", "says 577", "export the package again"]);
}

#[test]
fn sizes_that_contradict_each_other() {
    check(|m| m["embedding"]["columns"] = json!(128), &["embedding.columns is 128", "decoder.hidden is 160"]);
    check(|m| m["embedding"]["rows"] = json!(641), &["embeddings.bin", " bytes", "641 rows"]);
    check(|m| m["embedding"]["rows"] = json!(u32::MAX), &["embeddings.bin has "]);
    check(|m| m["embedding"]["dtype"] = json!("i64"), &["embedding.dtype", "f16"]);
    check(|m| m["vision"]["tokens_per_image"] = json!(65), &["patch_features", "64", "65", "export again"]);
    check(|m| m["vision"]["tokens_per_image"] = json!(0), &["vision.tokens_per_image is 0"]);
    let shape = |m: &mut Value| {
        m["variants"]["cpu-int4"]["vision_encoder"]["outputs"]["cls_attention"] =
            json!({"dtype": "f32", "shape": ["batch", 65]});
    };
    check(shape, &["cls_attention", "65", "64"]);
    let tolerance = |m: &mut Value| {
        m["variants"]["cpu-int4"]["tolerance"].as_object_mut().unwrap().remove("cls_attention");
    };
    check(tolerance, &["variant cpu-int4", "tolerance.cls_attention is missing"]);
    let measured = |tokens: usize, right: usize| {
        let one = json!({"tokens": tokens, "benchmark": "shapes", "variant": "cpu-int4", "questions": 10,
            "right": right, "right_with_all": 10});
        move |m: &mut Value| m["vision"]["measured"] = json!([one])
    };
    check(measured(65, 9), &["vision.measured", "65 tokens", "an image has 64"]);
    check(measured(0, 9), &["vision.measured", "0 tokens"]);
    check(measured(16, 11), &["vision.measured", "11 of 10 right"]);
    check(|m| m["image"]["size"] = json!(32), &["pixel_values", "f32[batch, 3, 64, 64]", "32"]);
    check(|m| m["image"]["std"] = json!([0.0, 1.0, 1.0]), &["channel 0"]);
    check(|m| m["decoder"]["layers"] = json!(5), &["decoder has no input past_key_values.4.key"]);
    check(|m| m["decoder"]["layers"] = json!(u32::MAX), &["decoder has no input past_key_values.4.key"]);
    check(|m| m["decoder"]["layers"] = json!(3), &["past_key_values.3.key", "does not know"]);
    check(|m| m["decoder"]["head_dim"] = json!(64), &["past_key_values.0.key", "80", "64"]);
    check(|m| m["decoder"]["logits_width"] = json!(500), &["text.vocabulary is ", "logits_width is 500"]);
    check(|m| m["text"]["eos"] = json!([]), &["text.eos is empty"]);
    check(|m| m["text"]["eos"] = json!([640]), &["token 640", "embedding table of 640"]);
    let kv = |m: &mut Value| {
        m["variants"]["cpu-int4"]["decoder"]["kv"] = json!({"form": "concat", "dtype": "f32"});
    };
    check(kv, &["cpu-int4 decoder has no input position_ids"]);
    let kv = |m: &mut Value| m["variants"]["portable-f32"]["decoder"]["kv"]["dtype"] = json!("i8");
    check(kv, &["portable-f32: a cache of i8 is not read", "in the form shared"]);
    let kv = |m: &mut Value| m["variants"]["cpu-int4"]["decoder"]["kv"]["dtype"] = json!("f32");
    check(kv, &["past_key_values.0.key is i8", "the sizes ask for f32"]);
}

#[test]
fn variants_that_are_not_there() {
    check(
        |m| m["serve"]["decoder"][0]["variant"] = json!("gpu"),
        &["variant \"gpu\" has no decoder", "serve"],
    );
    check(|m| m["serve"]["decoder"] = json!([]), &["nothing serves the decoder"]);
    let package = ModelPackage::embedded().unwrap();
    let words = ["variant \"gpu\"", "llava-phi-tiny", "cpu-int4, portable-f32"];
    refused(engine(&package, Some("gpu")), ErrorKind::Request, &words);
    let copy = Copy::new();
    copy.change(|m| m["serve"]["decoder"] = json!([{ "variant": "cpu-int4", "provider": "abacus" }]));
    refused(
        copy.engine(),
        ErrorKind::Package,
        &["manifest.json", "serve.decoder", "abacus", "this version knows"],
    );
}

#[test]
fn graphs_that_are_not_those_of_the_manifest() {
    let copy = Copy::new();
    let [vision, projector] = ["shared/vision_encoder.onnx", "shared/projector.onnx"];
    fs::rename(copy.path(vision), copy.path("kept")).unwrap();
    fs::rename(copy.path(projector), copy.path(vision)).unwrap();
    fs::rename(copy.path("kept"), copy.path(projector)).unwrap();
    copy.admit(vision);
    copy.admit(projector);
    let words = [vision, "patch_features", "not in the manifest", "export again"];
    refused(copy.engine(), ErrorKind::Package, &words);

    fs::write(copy.path(vision), b"no graph").unwrap();
    copy.admit(vision);
    refused(copy.engine(), ErrorKind::Package, &[vision, "could not load", "export it again"]);
}

#[test]
fn verify_hashes_what_open_finds_too_large() {
    let copy = Copy::new();
    // A hole takes no room on disk. The limit is 64 MiB: hashing gigabytes at each start would be felt.
    let size = (64_u64 << 20) + 1;
    fs::File::create(copy.path("large.bin")).unwrap().set_len(size).unwrap();
    copy.change(|m| m["files"]["large.bin"] = json!({ "bytes": size, "sha256": "0".repeat(64) }));
    let package = copy.open().unwrap();
    refused(
        package.verify(),
        ErrorKind::Package,
        &["large.bin", "not what was exported", "copy the package again"],
    );
    Copy::new().open().unwrap().verify().unwrap();
}

#[test]
fn a_copy_answers_as_the_package_in_the_program() {
    let answer = |package: &ModelPackage, variant: Option<&str>| {
        let engine = engine(package, variant).unwrap();
        let prompt = engine.prompt(&[Piece::text("USER: Describe the image. ASSISTANT:")]).unwrap();
        let params = GenerateParams { max_new_tokens: Some(24), ..GenerateParams::default() };
        let request = Request::new(prompt, Vec::new(), params);
        engine.generate(request).unwrap().complete().unwrap().token_ids
    };
    let copy = Copy::new();
    for variant in [None, Some("portable-f32")] {
        let embedded = answer(&ModelPackage::embedded().unwrap(), variant);
        assert!(!embedded.is_empty());
        assert_eq!(answer(&copy.open().unwrap(), variant), embedded);
    }
}

/// Puts `value` where the `place`-th leaf or branch of `tree` is.
fn replace(tree: &mut Value, place: &mut usize, value: &Value) {
    if *place == 0 {
        *tree = value.clone();
    }
    *place = place.wrapping_sub(1);
    match tree {
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, place, value)),
        Value::Object(fields) => fields.values_mut().for_each(|item| replace(item, place, value)),
        _ => {}
    }
}

fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        (0_u64..700).prop_map(|n| json!(n)),
        Just(json!(u32::MAX)),
        ".{0,8}".prop_map(|text| json!(text)),
        Just(json!([])),
        Just(json!({})),
    ]
}

/// Opens a manifest that lies alone in a directory; what comes of it does not matter, that it comes back does.
fn survives(manifest: &[u8]) {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join(MANIFEST), manifest).unwrap();
    if let Err(error) = ModelPackage::open(dir.path()) {
        assert_eq!(error.kind(), ErrorKind::Package, "{error}");
    }
}

const TRUE: &[u8] = include_bytes!("../models/tiny/package/manifest.json");

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_bytes_are_no_manifest(bytes: Vec<u8>) {
        survives(&bytes);
    }

    #[test]
    fn a_manifest_with_changed_bytes_is_refused_or_read(at in 0..TRUE.len(), byte: u8, end in 0..TRUE.len()) {
        let mut bytes = TRUE.to_vec();
        bytes[at] = byte;
        survives(&bytes);
        survives(&bytes[..end]);
    }

    #[test]
    fn a_manifest_with_an_odd_value_is_refused_or_read(place in 0_usize..900, value in odd_value()) {
        let mut tree = serde_json::from_slice(TRUE).unwrap();
        replace(&mut tree, &mut { place }, &value);
        survives(tree.to_string().as_bytes());
    }
}

//! Fewer visual tokens: all of them change nothing, fewer are read as fewer, and no cache takes one for the other.

use std::{fs, path::Path};

use llava_phi::{
    Error,
    engine::{Engine, EngineOptions, Request, event::Completion},
    error::ErrorKind,
    model::{
        CausalModel as _, LlavaPhi, ModelOptions, position_keys, prefix::PrefixOptions,
        visual_tokens::VisualTokens,
    },
    package::{MANIFEST, ModelPackage},
    runtime::Runtime,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{self, Drawing, VARIANTS, distance, package, question};

fn options(variant: &str, visual_tokens: Option<usize>) -> ModelOptions {
    ModelOptions { visual_tokens, ..support::options(variant, 1) }
}

fn engine_in(package: &ModelPackage, visual_tokens: Option<usize>) -> Result<Engine, Error> {
    let model = options("cpu-int4", visual_tokens);
    Engine::open(package, &EngineOptions { library: support::library(), model, ..EngineOptions::default() })
}

fn model(variant: &str, visual_tokens: Option<usize>) -> LlavaPhi {
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    // Images are encoded anew, whatever was seen before.
    let prefixes = PrefixOptions { memory: Some(0), directory: None };
    LlavaPhi::open(package(), &ModelOptions { prefixes, ..options(variant, visual_tokens) }).unwrap()
}

fn answer(engine: &Engine, request: &Request) -> Completion {
    engine.generate(request.clone()).unwrap().complete().unwrap()
}

fn logits(model: &mut LlavaPhi, request: &Request) -> Vec<f32> {
    let mut cache = model.empty_cache().unwrap();
    model.prefill(&request.prompt, &request.images, &mut cache).unwrap().logits.values().to_vec()
}

#[test]
fn all_of_them_are_what_is_read_without_a_wish() {
    let all = package().manifest().vision.tokens_per_image;
    for variant in VARIANTS {
        let request =
            question(support::engine(variant), &[&Drawing::red_circle()], "what color is the shape?");
        let [free, asked] = [None, Some(all)].map(|wish| logits(&mut model(variant, wish), &request));
        assert_eq!(free, asked, "{variant}: every bit");
    }
    let asked = engine_in(package(), Some(all)).unwrap();
    assert_eq!(asked.facts().tokens_per_image, all);
    assert_eq!(asked.facts().visual_tokens, None);
    let request = question(&asked, &[&Drawing::red_circle()], "describe the image.");
    assert_eq!(answer(&asked, &request).token_ids, answer(support::engine("cpu-int4"), &request).token_ids);
}

#[test]
fn fewer_take_as_many_positions_and_are_cached_as_any_others() {
    let all = package().manifest().vision.tokens_per_image;
    let request =
        question(support::engine("cpu-int4"), &[&Drawing::red_circle()], "what color is the shape?");
    let whole = request.prompt.positions(all);
    for tokens in [1, 2, 7, 16, 32, all - 1] {
        let engine = engine_in(package(), Some(tokens)).unwrap();
        let first = answer(&engine, &request);
        assert_eq!((first.usage.image_tokens, first.usage.prompt_tokens), (tokens, whole - all + tokens));
        let again = answer(&engine, &request);
        assert_eq!(again.token_ids, first.token_ids, "{tokens}");
        assert_eq!(again.usage.cached_tokens, again.usage.prompt_tokens - 1);
        let report = engine.facts().visual_tokens.as_ref().unwrap();
        assert_eq!((report.tokens, report.of), (tokens, all));
    }
    // What was chosen still tells two pictures apart.
    let mut model = model("cpu-int4", Some(16));
    let other = question(support::engine("cpu-int4"), &[&Drawing::blue_square()], "what color is the shape?");
    assert!(distance(&logits(&mut model, &request), &logits(&mut model, &other)) > 1e-2);
}

#[test]
fn two_images_are_each_read_in_fewer() {
    let engine = engine_in(package(), Some(9)).unwrap();
    let pictures = [&Drawing::red_circle(), &Drawing::blue_square()];
    let request = question(&engine, &pictures, "what is in the second image?");
    assert_eq!(answer(&engine, &request).usage.image_tokens, 18);
}

#[test]
fn what_one_setting_read_is_not_taken_for_what_another_reads() {
    let request =
        question(support::engine("cpu-int4"), &[&Drawing::red_circle()], "what color is the shape?");
    let before = request.prompt.token_ids().count();
    let mut models = [None, Some(32), Some(16)].map(|tokens| model("cpu-int4", tokens));
    for from in 0..models.len() {
        for to in 0..models.len() {
            let mut cache = models[from].empty_cache().unwrap();
            models[from].prefill(&request.prompt, &request.images, &mut cache).unwrap();
            let found = models[to].prefill(&request.prompt, &request.images, &mut cache).unwrap();
            if from == to {
                assert!(found.cached > before, "{from}");
                continue;
            }
            // The text before the image is the same, and nothing more is.
            assert!(found.cached > 0 && found.cached < before, "{from} to {to}: {}", found.cached);
            assert_eq!(found.images_encoded, 1);
            let fresh = logits(&mut models[to], &request);
            let far = distance(found.logits.values(), &fresh);
            assert!(far < 1e-4, "{from} to {to}: {far}");
        }
    }
    let keys = [None, Some(32), Some(16)].map(|tokens| {
        let tokens = VisualTokens::new(package(), tokens).unwrap();
        position_keys(&request.prompt, &request.images, tokens).unwrap()
    });
    let common = |a: usize, b: usize| keys[a].iter().filter(|key| keys[b].contains(key)).count();
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        let images = keys[a].len() - before;
        assert!(common(a, b) <= before && images > 0, "{a} and {b} share a row of an image");
    }
}

#[test]
fn a_number_that_no_image_has_is_refused_before_anything_is_loaded() {
    let all = package().manifest().vision.tokens_per_image;
    for tokens in [0, all + 1, usize::MAX] {
        let error = VisualTokens::new(package(), Some(tokens)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Request);
        let wanted = format!(
            "{tokens} visual tokens were asked for and an image has 64; give 1 to 64, or nothing for all"
        );
        assert_eq!(error.to_string(), wanted);
        assert_eq!(engine_in(package(), Some(tokens)).unwrap_err().to_string(), wanted);
    }
}

/// The embedded package with another manifest.
fn changed(change: impl FnOnce(&mut Value)) -> (TempDir, ModelPackage) {
    let dir = TempDir::new().unwrap();
    support::copy_directory(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package"), dir.path());
    let path = dir.path().join(MANIFEST);
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(&path, manifest.to_string()).unwrap();
    let package = ModelPackage::open(dir.path()).unwrap();
    (dir, package)
}

#[test]
fn an_encoder_that_does_not_say_which_patches_matter_is_named() {
    let (_dir, package) = changed(|manifest| {
        let outputs = &mut manifest["variants"]["portable-f32"]["vision_encoder"]["outputs"];
        outputs.as_object_mut().unwrap().remove("cls_attention");
    });
    let error = VisualTokens::new(&package, Some(16)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Request);
    for word in ["llava-phi-tiny", "portable-f32", "cls_attention", "export it again", "all 64"] {
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(VisualTokens::new(&package, Some(64)).unwrap().is_all());
    assert!(package.manifest().image_positions().contains("portable-f32 gives no cls_attention"));
}

#[test]
fn what_a_package_says_was_measured_is_told() {
    let (_dir, package) = changed(|manifest| {
        manifest["vision"]["measured"] = json!([
            {"tokens": 16, "benchmark": "shapes", "variant": "cpu-int4", "questions": 10, "right": 8, "right_with_all": 9}
        ]);
    });
    let told = |tokens| {
        let engine = engine_in(&package, Some(tokens)).unwrap();
        engine.facts().visual_tokens.as_ref().unwrap().to_string()
    };
    assert!(
        told(16).ends_with("; measured: 8 of 10 right in shapes with cpu-int4, 9 with all"),
        "{}",
        told(16)
    );
    assert!(told(15).ends_with("was never measured for this package"), "{}", told(15));
}

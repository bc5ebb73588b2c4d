//! Every variant of the miniature model, on the processor, computes what the one in standard f32 operators computes.

use std::{path::PathBuf, sync::Arc};

use llava_phi::{
    Error,
    kernels::Kernels,
    model::{
        CausalModel as _, LlavaPhi, ModelOptions, goldens::distance, vision::ImageInput,
        visual_tokens::VisualTokens,
    },
    package::{Component, MANIFEST, ModelPackage, plan::MemoryPlan},
    runtime::{Runtime, Step},
    text::{Prompt, TokenId},
};

use crate::support::{self, Drawing};

/// The variant that the others are held against.
const REFERENCE: &str = "portable-f32";

/// A package with every variant, which `scripts/test.py` exports; without it these tests say so and pass.
fn package() -> Option<ModelPackage> {
    let Some(path) = std::env::var_os("LLAVA_PHI_TEST_PACKAGE").map(PathBuf::from) else {
        eprintln!(
            "skipped: LLAVA_PHI_TEST_PACKAGE names no package with all variants; scripts/test.py makes one"
        );
        return None;
    };
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    Some(ModelPackage::open(path).unwrap())
}

fn open(package: &ModelPackage, variant: &str, prefill_chunk: Option<usize>) -> LlavaPhi {
    let options = ModelOptions { prefill_chunk, ..support::options(variant, 1) };
    let model = LlavaPhi::open(package, &options).unwrap();
    for report in model.reports() {
        assert_eq!(report.provider.to_string(), "cpu");
        let nodes = &report.placement.as_ref().unwrap().nodes;
        assert!(nodes.len() == 1 && nodes["cpu"] > 0, "{variant}: {nodes:?}");
        assert!(report.self_check.iter().all(llava_phi::model::goldens::Agreement::passes));
        let own = package.graph(report.component, variant);
        assert!(own.is_none() || report.variant == variant, "{variant}: {report:?}");
    }
    model
}

/// Variants that have a decoder, and how far their logits may be from those of the reference: what the manifest says of
/// the goldens; twice, since other prompts are read here; and four times for weights of 4 bits, whose rounding costs more
/// on the prompts without sense that fill a context.
fn decoders(package: &ModelPackage) -> Vec<(String, f64)> {
    let variants = &package.manifest().variants;
    let has = variants.iter().filter(|(name, _)| package.graph(Component::Decoder, name).is_some());
    let factor = |name: &str| if name.contains("int4") { 4.0 } else { 2.0 };
    has.map(|(name, variant)| (name.clone(), factor(name) * variant.tolerance.logits)).collect()
}

fn tokens(length: usize, seed: usize) -> Vec<TokenId> {
    (0..length).map(|n| TokenId::try_from((n * 31 + seed * 17) % 500 + 1).unwrap()).collect()
}

/// Text, an image, text.
fn question(seed: usize) -> (Prompt, Vec<Arc<ImageInput>>) {
    let package = support::package();
    let engine = support::engine("cpu-int4");
    let request = support::question(engine, &[&Drawing::red_circle()], &format!("What is it, {seed}?"));
    assert_eq!(package.manifest().image.size, 64, "of the same model");
    (request.prompt, request.images)
}

/// The logits after the prompt and after each of `next`, read in one cache after another prompt was.
fn walk(
    model: &mut LlavaPhi,
    before: Option<&(Prompt, Vec<Arc<ImageInput>>)>,
    prompt: &(Prompt, Vec<Arc<ImageInput>>),
    next: &[TokenId],
) -> Vec<Vec<f32>> {
    let mut cache = model.empty_cache().unwrap();
    if let Some((prompt, images)) = before {
        model.prefill(prompt, images, &mut cache).unwrap();
        for token in next {
            model.decode(*token, &mut cache).unwrap();
        }
    }
    let first = model.prefill(&prompt.0, &prompt.1, &mut cache).unwrap();
    assert_eq!(before.is_some(), first.cached > 0);
    let mut all = vec![first.logits.values().to_vec()];
    for token in next {
        all.push(model.decode(*token, &mut cache).unwrap().values().to_vec());
    }
    all
}

fn worst(found: &[Vec<f32>], wanted: &[Vec<f32>]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let each = found.iter().zip(wanted).map(|(found, wanted)| distance(found.iter(), wanted.iter()));
    each.fold(0.0, f64::max)
}

#[test]
fn fewer_visual_tokens_are_projected_as_the_reference_projects_them() {
    let Some(package) = package() else { return };
    let (_, images) = question(1);
    let pixels = images[0].pixels().view();
    let fewer = VisualTokens::new(&package, Some(11)).unwrap();
    let mut reference = open(&package, REFERENCE, None);
    let features = reference.vision().unwrap().encode(&pixels).unwrap();
    let chosen = features.clone().chosen(fewer).unwrap();
    let wanted = reference.projector().unwrap().project(&chosen.view()).unwrap();
    for (name, variant) in &package.manifest().variants {
        if variant.vision_encoder.is_none() || variant.projector.is_none() {
            continue;
        }
        let mut model = open(&package, name, None);
        // A projector of fixed size is given the rows that are missing, and what it makes of them is dropped.
        let found = model.projector().unwrap().project(&chosen.view()).unwrap();
        assert_eq!(found.rows().dim(), wanted.rows().dim());
        let far = distance(found.rows().iter(), wanted.rows().iter());
        assert!(far <= variant.tolerance.image_embeds, "{name}: {far:.2e}");
        let own = model.vision().unwrap().encode(&pixels).unwrap();
        let far = distance(own.attention().unwrap().iter(), features.attention().unwrap().iter());
        assert!(far <= 2.0 * variant.tolerance.cls_attention.unwrap(), "{name}: {far:.2e}");
        assert_eq!(own.chosen(fewer).unwrap().view().dim(), chosen.view().dim());
    }
}

#[test]
fn prompts_in_pieces_steps_and_rewinding_agree_with_the_reference() {
    let Some(package) = package() else { return };
    let (one, other) = (question(1), question(2));
    let next = tokens(6, 3);
    let mut reference = open(&package, REFERENCE, None);
    let wanted = walk(&mut reference, None, &one, &next);
    for (variant, tolerance) in decoders(&package) {
        let mut whole = None;
        for chunk in [None, Some(1), Some(7), Some(64)] {
            let mut model = open(&package, &variant, chunk);
            let fresh = walk(&mut model, None, &one, &next);
            let far = worst(&fresh, &wanted);
            assert!(far <= tolerance, "{variant}, chunk {chunk:?}: {far:.2e} is beyond {tolerance:.0e}");
            let rewound = walk(&mut model, Some(&other), &one, &next);
            let far = worst(&rewound, &fresh);
            // The cache is the same; only the borders of the runs move.
            assert!(far <= tolerance / 4.0, "{variant}, chunk {chunk:?}, rewound: {far:.2e}");
            let whole = whole.get_or_insert_with(|| fresh.clone());
            assert!(worst(&fresh, whole) <= tolerance / 4.0, "{variant}, chunk {chunk:?} is not the whole");
        }
        println!("{variant}: {:.2e}", worst(whole.as_ref().unwrap(), &wanted));
    }
}

#[test]
fn a_full_context_agrees_with_the_reference_and_one_more_position_is_refused() {
    let Some(package) = package() else { return };
    let context = package.manifest().decoder.context;
    let tokenizer = &support::engine("cpu-int4").facts().tokenizer;
    let read = context - 4;
    let prompt = tokenizer.prompt(&[llava_phi::text::Piece::Tokens(tokens(read, 5))]).unwrap();
    let next = tokens(4, 7);
    let mut reference = open(&package, REFERENCE, None);
    let wanted = walk(&mut reference, None, &(prompt.clone(), Vec::new()), &next);
    for (variant, tolerance) in decoders(&package) {
        let mut model = open(&package, &variant, None);
        let mut cache = model.empty_cache().unwrap();
        let mut found = vec![model.prefill(&prompt, &[], &mut cache).unwrap().logits.values().to_vec()];
        for token in &next {
            found.push(model.decode(*token, &mut cache).unwrap().values().to_vec());
        }
        let far = worst(&found, &wanted);
        assert!(far <= tolerance, "{variant}: {far:.2e} is beyond {tolerance:.0e}");
        let error = model.decode(1, &mut cache).unwrap_err();
        assert!(
            matches!(error, Error::TooLong { capacity, .. } if capacity == context),
            "{variant}: {error}"
        );
        assert_eq!(cache.len(), context, "nothing was lost");
    }
}

#[test]
fn every_variant_gives_the_same_answers() {
    let Some(package) = package() else { return };
    let drawings = [Drawing::red_circle(), Drawing::blue_square()];
    let questions = ["What is in the image?", "What color is it?", "Is there a circle?"];
    let answers = |variant: &str| {
        let engine = support::open_in(&package, variant, 1);
        let mut ids = Vec::new();
        for drawing in &drawings {
            for text in questions {
                let request = support::question(&engine, &[drawing], text);
                ids.push(engine.generate(request).unwrap().complete().unwrap().token_ids);
            }
        }
        ids
    };
    let wanted = answers(REFERENCE);
    assert!(wanted.iter().all(|ids| !ids.is_empty()));
    for variant in package.manifest().variants.keys() {
        assert_eq!(answers(variant), wanted, "{variant}");
    }
}

/// The encoder leaves memory after each image and computes the same when it comes back.
#[test]
fn what_is_put_to_rest_comes_back_the_same() {
    let package = support::package();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let encode = |low_memory: bool| {
        let options = ModelOptions { low_memory, ..support::options("cpu-int4", 1) };
        let mut model = LlavaPhi::open(package, &options).unwrap();
        let (one, other) = (question(1), question(2));
        let mut all = walk(&mut model, None, &one, &tokens(2, 1));
        all.extend(walk(&mut model, Some(&other), &one, &tokens(2, 1)));
        all
    };
    assert_eq!(encode(true), encode(false));
}

#[test]
fn what_does_not_fit_into_memory_is_refused_with_the_plan() {
    let package = support::package();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let open = |limit: u64| {
        let options = ModelOptions { memory_limit: Some(limit), ..ModelOptions::default() };
        LlavaPhi::open(package, &options)
    };
    let error = open(1_000_000).unwrap_err().to_string();
    for word in ["at the step memory", "the plan takes", "1.0 MB are to be had", "the limit that was given"] {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
    open(1_000_000_000).unwrap();
}

/// The plan of the large decoder does not fit, that of the small one does, and the reports say so.
#[test]
fn a_smaller_variant_serves_where_the_first_does_not_fit() {
    let package = support::package();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let variant = |name: &str| MemoryPlan::new(package, Some(name)).unwrap().held();
    let (small, large) = (variant("cpu-int4"), variant(REFERENCE));
    assert!(small < large);
    let mut manifest = package.manifest().clone();
    manifest.serve.decoder.reverse();
    let dir = tempfile::TempDir::new().unwrap();
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package");
    support::copy_directory(&source, dir.path());
    std::fs::write(dir.path().join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    let reversed = ModelPackage::open(dir.path()).unwrap();
    let options = ModelOptions { memory_limit: Some(u64::midpoint(small, large)), ..ModelOptions::default() };
    let model = LlavaPhi::open(&reversed, &options).unwrap();
    let reports = model.reports();
    let decoder = reports.iter().find(|report| report.component == Component::Decoder).unwrap();
    assert_eq!(decoder.variant, "cpu-int4");
    let refused: Vec<&str> = decoder
        .refused
        .iter()
        .filter(|refusal| refusal.step == Step::Memory)
        .map(|refusal| refusal.variant.as_str())
        .collect();
    assert!(!refused.is_empty() && refused.iter().all(|variant| *variant == REFERENCE), "{refused:?}");
}

#[test]
fn own_kernels_compute_what_those_of_onnx_runtime_do_and_are_left_for_them() {
    let Some(kernels) = Kernels::here() else { return };
    let package = support::package();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let mut model = LlavaPhi::open(package, &ModelOptions::default()).unwrap();
    let serving = |model: &LlavaPhi| {
        let reports = model.reports();
        reports.into_iter().find(|report| report.component == Component::Decoder).unwrap()
    };
    let own = serving(&model).kernels.unwrap();
    assert_eq!(own.instructions, kernels.to_string());
    assert!(own.products > 4);
    let (prompt, next) = (question(1), tokens(3, 1));
    let first = walk(&mut model, None, &prompt, &next);
    let demotion = model.demote("decoder", "its logits are a test").unwrap();
    assert_eq!((demotion.variant.as_str(), serving(&model).kernels), ("cpu-int4", None));
    assert!(demotion.refusal.reason.contains(&own.instructions), "{}", demotion.refusal.reason);
    let second = walk(&mut model, None, &prompt, &next);
    assert!(worst(&second, &first) < 2e-2, "{}", worst(&second, &first));
    // Only then the next variant.
    assert_eq!(model.demote("decoder", "its logits are a test").unwrap().variant, REFERENCE);
}

#[test]
fn what_takes_over_reads_the_prompt_and_answers() {
    let package = support::package();
    Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let options = ModelOptions { kernels: None, ..ModelOptions::default() };
    let mut model = LlavaPhi::open(package, &options).unwrap();
    let (prompt, next) = (question(1), tokens(3, 1));
    let first = walk(&mut model, None, &prompt, &next);
    let demotion = model.demote("decoder", "its logits are a test").unwrap();
    assert_eq!((demotion.component, demotion.variant.as_str()), (Component::Decoder, REFERENCE));
    assert_eq!((demotion.refusal.variant.as_str(), demotion.refusal.step), ("cpu-int4", Step::Serving));
    let reports = model.reports();
    let decoder = reports.iter().find(|report| report.component == Component::Decoder).unwrap();
    assert_eq!(decoder.variant, REFERENCE);
    assert!(decoder.refused.contains(&demotion.refusal));
    assert!(model.recheck().unwrap());
    let second = walk(&mut model, None, &prompt, &next);
    assert_ne!(first, second, "another graph computed it");
    assert!(worst(&second, &first) < 0.3);

    // Nothing is left to take over: the error is told, and what serves goes on serving.
    let error = model.demote("decoder", "its logits are a test").unwrap_err().to_string();
    assert!(error.contains("decoder"), "{error}");
    assert_eq!(walk(&mut model, None, &prompt, &next), second);
}

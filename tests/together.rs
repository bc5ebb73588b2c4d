//! Several requests at once: each is answered as if it were alone.

use llava_phi::engine::{Engine, EngineOptions, Request};
use llava_phi::generate::params::GenerateParams;
use llava_phi::model::{CausalModel, LlavaPhi, ModelOptions};

use crate::support::{Drawing, VARIANTS, highest, library, options, package, question};

const QUESTIONS: [&str; 4] = [
    "what color is the shape?",
    "describe the image.",
    "is there a red shape?",
    "what shape is in the image?",
];

fn engine(variant: &str, parallel: usize) -> Engine {
    let model = ModelOptions { parallel, ..options(variant, 2) };
    Engine::open(package(), &EngineOptions { library: library(), model, ..EngineOptions::default() }).unwrap()
}

/// Each question about each of two pictures, and one about both.
fn requests(engine: &Engine) -> Vec<Request> {
    let pictures = [Drawing::red_circle(), Drawing::blue_square()];
    let about = |pictures: &[&Drawing], text: &str| Request {
        params: GenerateParams { max_new_tokens: Some(24), ..GenerateParams::default() },
        ..question(engine, pictures, text)
    };
    let mut requests: Vec<Request> = pictures
        .iter()
        .flat_map(|picture| QUESTIONS.iter().map(move |text| (picture, text)))
        .map(|(picture, text)| about(&[picture], text))
        .collect();
    requests.push(about(&[], "what can you do?"));
    requests.push(about(&[&pictures[0], &pictures[1]], "describe the images."));
    requests
}

#[test]
fn answers_given_together_are_those_given_alone() {
    for variant in VARIANTS {
        let alone = engine(variant, 1);
        let wanted: Vec<_> = requests(&alone)
            .into_iter()
            .map(|request| alone.generate(request).unwrap().complete().unwrap().token_ids)
            .collect();
        for parallel in [2, 5] {
            let together = engine(variant, parallel);
            let streams: Vec<_> =
                requests(&together).into_iter().map(|request| together.generate(request).unwrap()).collect();
            let found: Vec<_> =
                streams.into_iter().map(|stream| stream.complete().unwrap().token_ids).collect();
            assert_eq!(found, wanted, "{variant}, {parallel} at once");
            let load = together.load();
            let batched = together.reports().iter().any(|report| report.variant == "cpu-int4");
            assert_eq!(load.parallel, if batched { parallel } else { 1 }, "{:?}", load.limited_by);
            assert_eq!(load.limited_by.is_some(), !batched, "{:?}", load.limited_by);
            assert_eq!(load.step_tokens > load.steps, batched, "{load:?}");
        }
    }
}

#[test]
fn requests_about_one_image_encode_it_once() {
    let engine = engine("cpu-int4", 4);
    let picture = Drawing::red_circle();
    let streams: Vec<_> =
        QUESTIONS.iter().map(|text| engine.generate(question(&engine, &[&picture], text)).unwrap()).collect();
    let completions: Vec<_> = streams.into_iter().map(|stream| stream.complete().unwrap()).collect();
    assert_eq!(engine.load().encoded, 1);
    let image = package().manifest().vision.tokens_per_image;
    let reread = completions.iter().filter(|completion| completion.usage.cached_tokens < image).count();
    assert_eq!(reread, 1, "the others take its positions from the first");
}

#[test]
fn logits_of_a_sequence_do_not_depend_on_who_is_read_with_it() {
    llava_phi::runtime::Runtime::start(&library(), &mut |_| {}).unwrap();
    let open =
        |parallel| LlavaPhi::open(package(), &ModelOptions { parallel, ..options("cpu-int4", 2) }).unwrap();
    let (mut alone, mut together) = (open(1), open(6));
    let requests = requests(&engine("cpu-int4", 1));
    let (mut caches, mut tokens, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for request in requests.iter().take(6) {
        let mut cache = alone.empty_cache().unwrap();
        let first = alone.prefill(&request.prompt, &request.images, &mut cache).unwrap().logits;
        let token = highest(first.values());
        wanted.push(alone.decode(token, &mut cache).unwrap().values().to_vec());
        tokens.push(token);
        let mut cache = together.empty_cache().unwrap();
        together.prefill(&request.prompt, &request.images, &mut cache).unwrap();
        caches.push(cache);
    }
    // The second and the fourth wait; they lie between those that are read, and must not change.
    let picked = [0, 2, 4, 5];
    let mut read: Vec<_> = caches.iter_mut().enumerate().filter(|(at, _)| picked.contains(at)).collect();
    let some: Vec<u32> = picked.iter().map(|at| tokens[*at]).collect();
    let mut refs: Vec<_> = read.iter_mut().map(|(_, cache)| &mut **cache).collect();
    for (at, logits) in picked.iter().zip(together.decode_each(&some, &mut refs)) {
        assert_eq!(logits.unwrap().values(), wanted[*at], "sequence {at}");
    }
    for at in [1, 3] {
        let logits = together.decode(tokens[at], &mut caches[at]).unwrap();
        assert_eq!(logits.values(), wanted[at], "sequence {at}");
    }
}

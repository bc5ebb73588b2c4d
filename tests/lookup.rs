//! Looking ahead changes when tokens are read and nothing else.

use std::num::NonZeroUsize;

use llava_phi::{
    engine::{Engine, EngineOptions, Request, event::Completion},
    generate::params::{GenerateParams, Sampling},
    model::{CausalModel, LlavaPhi, goldens::distance},
    package::{Component, ModelPackage},
    text::{Piece, Prompt, TokenId},
};

use crate::support::{Drawing, VARIANTS, highest, library, model, open, options, package, question};

fn answer(engine: &Engine, request: &Request, params: &GenerateParams) -> Completion {
    engine.generate(Request { params: params.clone(), ..request.clone() }).unwrap().complete().unwrap()
}

fn params(sampling: Sampling, repetition_penalty: f32, stop: &[&str], most: usize) -> GenerateParams {
    GenerateParams {
        max_new_tokens: Some(most),
        sampling,
        repetition_penalty,
        stop: stop.iter().map(|stop| (*stop).to_owned()).collect(),
        ..GenerateParams::default()
    }
}

fn random(temperature: f32, top_k: usize) -> Sampling {
    Sampling::Random { temperature, top_k: Some(top_k), top_p: 1.0, min_p: 0.0 }
}

/// Ways to make an answer, of which each must be honoured token by token.
fn ways() -> Vec<GenerateParams> {
    let greedy = Sampling::Greedy;
    let mut ways = vec![
        params(greedy, 1.0, &[], 100),
        params(greedy, 1.3, &[], 100),
        params(greedy, 1.0, &["the", "circle r"], 100),
        params(random(0.7, 50), 1.0, &[], 100),
        params(random(5.0, 2), 1.1, &["e"], 100),
        params(random(30.0, 3), 1.0, &[], 100),
    ];
    ways.extend([1, 2, 3, 7].map(|most| params(random(3.0, 2), 1.0, &[], most)));
    ways
}

/// Questions with a picture and without, and text that repeats, so that there is much to look up.
fn requests(engine: &Engine) -> Vec<Request> {
    let plain = question(engine, &[], "is there a circle?");
    let repeated = Piece::text("a red circle and a blue triangle, ".repeat(6));
    let tokens = Piece::Tokens((0..90).map(|n| 40 + n % 9).collect());
    let of = |piece: Piece| Request { prompt: engine.prompt(&[piece]).unwrap(), ..plain.clone() };
    let picture = question(engine, &[&Drawing::red_circle()], "describe the image. describe the image.");
    vec![picture, of(repeated), of(tokens), plain.clone()]
}

/// Asks everything with a lookup of each size and without, and gives how many tokens were guessed and right.
fn check(plain: &Engine, ahead: &Engine, name: &str) -> (usize, usize) {
    let (mut guessed, mut right) = (0, 0);
    for (number, request) in requests(plain).iter().enumerate() {
        for (way, params) in ways().iter().enumerate() {
            for (seed, most) in [(1, 1), (2, 4), (3, 30)] {
                let seed = if params.sampling == Sampling::Greedy { 0 } else { seed };
                let params = GenerateParams { seed, ..params.clone() };
                let wanted = answer(plain, request, &params);
                let lookup = NonZeroUsize::new(most);
                let found = answer(ahead, request, &GenerateParams { lookup, ..params });
                let case = format!("{name}, request {number}, way {way}, at most {most}");
                assert_eq!(found.token_ids, wanted.token_ids, "{case}");
                assert_eq!(found.text, wanted.text, "{case}");
                assert_eq!(found.finish_reason, wanted.finish_reason, "{case}");
                assert_eq!(wanted.usage.lookup, None);
                let figures = found.usage.lookup.unwrap();
                assert!(figures.right <= figures.guessed, "{case}");
                guessed += figures.guessed;
                right += figures.right;
            }
        }
    }
    (guessed, right)
}

#[test]
fn an_answer_is_the_same_with_a_lookup_and_without() {
    for variant in VARIANTS {
        // Two engines, so that what one left in its cache does not help the other.
        let (guessed, right) = check(&open(variant, 1), &open(variant, 1), variant);
        // How much is guessed depends on what pays, that is on the clock.
        assert!(guessed > 0, "{variant}: {guessed} guessed, {right} right");
    }
}

/// The likeliest tokens after `prompt`, read one by one; none ends them.
fn plain(model: &mut LlavaPhi, prompt: &Prompt, count: usize) -> Vec<TokenId> {
    let mut cache = model.empty_cache().unwrap();
    let mut logits = model.prefill(prompt, &[], &mut cache).unwrap().logits;
    let mut ids = vec![highest(logits.values())];
    while ids.len() < count {
        logits = model.decode(*ids.last().unwrap(), &mut cache).unwrap();
        ids.push(highest(logits.values()));
    }
    ids
}

#[test]
fn guesses_that_are_right_wrong_or_partly_so_lead_to_the_same_tokens() {
    for variant in VARIANTS {
        let mut model = model(variant, None);
        let prompt =
            Prompt::new(&[Piece::Tokens((0..50).map(|n| n * 7).collect())], |_| Ok(Vec::new())).unwrap();
        let wanted = plain(&mut model, &prompt, 200);
        let mut cache = model.empty_cache().unwrap();
        let logits = model.prefill(&prompt, &[], &mut cache).unwrap().logits;
        let mut ids = vec![highest(logits.values())];
        for round in 0.. {
            // One to nine tokens as they will be, of which one may be made wrong.
            let length = (1 + round * 5 % 9).min(wanted.len() - ids.len());
            if length == 0 {
                break;
            }
            let mut guess = wanted[ids.len()..ids.len() + length].to_vec();
            if let Some(wrong) = guess.get_mut(round % 11) {
                *wrong ^= 1;
            }
            let run = [&ids[ids.len() - 1..], &guess].concat();
            let rows = model.decode_all(&run, &mut cache).unwrap();
            let chosen: Vec<TokenId> = rows.iter().map(|row| highest(row.values())).collect();
            let right = guess.iter().zip(&chosen).take_while(|(one, other)| one == other).count();
            model.forget(length - right, &mut cache).unwrap();
            ids.extend(&chosen[..=right]);
            ids.truncate(wanted.len());
        }
        assert_eq!(ids, wanted, "{variant}");
    }
}

#[test]
fn every_variant_looks_ahead_or_says_why_not() {
    let Some(path) = std::env::var_os("LLAVA_PHI_TEST_PACKAGE") else {
        eprintln!(
            "skipped: LLAVA_PHI_TEST_PACKAGE names no package with all variants; scripts/test.py makes one"
        );
        return;
    };
    let package = ModelPackage::open(path).unwrap();
    for variant in package.manifest().variants.keys() {
        if package.graph(Component::Decoder, variant).is_none() {
            continue;
        }
        let engine = || {
            let options =
                EngineOptions { library: library(), model: options(variant, 1), ..EngineOptions::default() };
            Engine::open(&package, &options).unwrap()
        };
        let (plain, ahead) = (engine(), engine());
        let lookup = GenerateParams { lookup: NonZeroUsize::new(4), ..params(Sampling::Greedy, 1.0, &[], 8) };
        let request = Request { params: lookup, ..requests(&ahead).remove(1) };
        match ahead.generate(request).unwrap().complete() {
            Ok(_) => {
                let (guessed, right) = check(&plain, &ahead, variant);
                assert!(guessed > 0, "{variant}: {guessed} guessed, {right} right");
            }
            Err(error) => {
                let begin = format!("the decoder {variant} gives the logits of one position a run");
                assert!(error.to_string().starts_with(&begin), "{error}");
                // Refusing takes nothing from the next question.
                answer(&ahead, &requests(&ahead)[1], &params(Sampling::Greedy, 1.0, &[], 8));
            }
        }
    }
}

#[test]
fn rows_of_one_run_are_those_of_single_steps_and_can_be_taken_back() {
    for variant in VARIANTS {
        let mut model = model(variant, None);
        let ids: Vec<TokenId> = (0..40).map(|n| (n * 37) % 500).collect();
        let prompt = |model: &mut LlavaPhi| {
            let prompt = Prompt::new(&[Piece::Tokens(ids.clone())], |_| Ok(Vec::new())).unwrap();
            let mut cache = model.empty_cache().unwrap();
            model.prefill(&prompt, &[], &mut cache).unwrap();
            cache
        };
        let next = [11, 12, 13, 14, 15];
        let mut alone = prompt(&mut model);
        let single: Vec<_> = next.iter().map(|token| model.decode(*token, &mut alone).unwrap()).collect();
        let mut together = prompt(&mut model);
        let rows = model.decode_all(&next, &mut together).unwrap();
        let tolerance = package().manifest().variants[variant].tolerance.logits;
        for (one, other) in single.iter().zip(&rows) {
            assert!(distance(one.values().iter(), other.values().iter()) <= tolerance, "{variant}");
        }
        // Three of them were wrong, as if they had never been read.
        model.forget(3, &mut together).unwrap();
        assert_eq!(together.len(), ids.len() + 2);
        let after = model.decode(13, &mut together).unwrap();
        assert!(distance(single[2].values().iter(), after.values().iter()) <= tolerance, "{variant}");
        let error = model.decode_all(&[], &mut together).unwrap_err().to_string();
        assert!(error.starts_with("0 positions cannot be read in one run; give 1 to"), "{error}");
    }
}

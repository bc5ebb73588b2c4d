//! Answers that have to look like something, and how likely they were, with the miniature model.

use std::{collections::BTreeMap, num::NonZeroUsize, sync::Arc};

use llava_phi::{
    engine::{
        Engine, Request,
        event::{Completion, Event},
    },
    generate::{
        constraint::{Constraint, ConstraintSpec},
        logprobs::Distribution,
        params::{GenerateParams, Sampling},
        sequence::FinishReason,
    },
    model::CausalModel,
    text::{Piece, TokenId},
};
use serde_json::{Value, json};

use crate::support::{Drawing, VARIANTS, engine, model, open, question};

fn answer(engine: &Engine, request: &Request, params: &GenerateParams) -> Completion {
    engine.generate(Request { params: params.clone(), ..request.clone() }).unwrap().complete().unwrap()
}

fn constrained(engine: &Engine, spec: &ConstraintSpec) -> GenerateParams {
    let constraint = Constraint::new(&engine.facts().tokenizer, spec).unwrap();
    GenerateParams { max_new_tokens: Some(60), constraint: Some(constraint), ..GenerateParams::default() }
}

fn choice(engine: &Engine, choices: &[&str]) -> GenerateParams {
    constrained(engine, &ConstraintSpec::Choice(choices.iter().map(|&text| text.to_owned()).collect()))
}

fn schema() -> ConstraintSpec {
    ConstraintSpec::JsonSchema(json!({
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue", "yellow"]},
            "shape": {"enum": ["circle", "rectangle", "triangle"]},
        },
        "required": ["color", "shape"],
        "additionalProperties": false,
    }))
}

#[test]
fn a_schema_holds_and_greedy_answers_do_not_change() {
    for variant in VARIANTS {
        let engine = engine(variant);
        let request = question(engine, &[&Drawing::red_circle()], "what is the color and the shape?");
        let params = constrained(engine, &schema());
        let first = answer(engine, &request, &params);
        assert_eq!(first.finish_reason, FinishReason::Stop, "{}", first.text);
        let fields: BTreeMap<String, String> = serde_json::from_str(&first.text).unwrap();
        assert_eq!(fields.keys().collect::<Vec<_>>(), ["color", "shape"], "{}", first.text);
        let ahead = GenerateParams { lookup: NonZeroUsize::new(7), ..params.clone() };
        for params in [&params, &ahead] {
            assert_eq!(answer(engine, &request, params).token_ids, first.token_ids, "{variant}");
        }
        let drawn = |seed| {
            let sampling = Sampling::Random { temperature: 20.0, top_k: None, top_p: 1.0, min_p: 0.0 };
            answer(engine, &request, &GenerateParams { sampling, seed, ..params.clone() }).text
        };
        for seed in 0..8 {
            let text = drawn(seed);
            serde_json::from_str::<BTreeMap<String, String>>(&text).unwrap();
            assert_eq!(drawn(seed), text);
        }
    }
}

#[test]
fn the_choice_is_what_the_picture_shows() {
    for variant in VARIANTS {
        let engine = engine(variant);
        // The miniature calls a square a rectangle in its own words, too.
        for (drawing, color, shape) in
            [(Drawing::red_circle(), "red", "circle"), (Drawing::blue_square(), "blue", "rectangle")]
        {
            let ask = |text: &str, choices: &[&str]| {
                let request = question(engine, &[&drawing], text);
                answer(engine, &request, &choice(engine, choices))
            };
            let colors = ["green", "blue", "yellow", "red"];
            let found = ask("what color is the shape?", &colors);
            assert_eq!((&found.text[..], found.finish_reason), (color, FinishReason::Stop), "{variant}");
            let shares = found.choices.unwrap();
            assert!(shares.iter().map(|(text, _)| &text[..]).eq(colors));
            assert!((shares.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9);
            let highest = shares.iter().max_by(|one, other| one.1.total_cmp(&other.1)).unwrap();
            assert_eq!(highest.0, color);
            assert_eq!(ask("what shape is in the image?", &["triangle", "rectangle", "circle"]).text, shape);
        }
    }
}

/// The share of each choice, each read on its own, a token at a time.
fn slowly(variant: &str, request: &Request, engine: &Engine, choices: &[&str]) -> Vec<f64> {
    let mut model = model(variant, None);
    let facts = engine.facts();
    let starts = |other: &&&str, text: &str| other.len() > text.len() && other.starts_with(text);
    let products: Vec<f64> = choices
        .iter()
        .map(|text| {
            let mut cache = model.empty_cache().unwrap();
            let mut logits = model.prefill(&request.prompt, &request.images, &mut cache).unwrap().logits;
            let tokens = facts.tokenizer.encode(&format!(" {text}")).unwrap();
            let mut product = 1.0;
            for (place, token) in tokens.iter().enumerate() {
                let vocabulary = facts.tokenizer.vocabulary();
                product *= Distribution::new(&logits.values()[..vocabulary]).logprob(*token).exp();
                let another = choices.iter().any(|other| starts(&other, text));
                if place + 1 < tokens.len() || another {
                    logits = model.decode(*token, &mut cache).unwrap();
                }
                if place + 1 == tokens.len() && another {
                    let end = Distribution::new(&logits.values()[..vocabulary]);
                    product *= facts.eos.iter().map(|id| end.logprob(*id).exp()).sum::<f64>();
                }
            }
            product
        })
        .collect();
    let sum: f64 = products.iter().sum();
    products.into_iter().map(|product| product / sum).collect()
}

#[test]
fn shares_are_the_products_of_the_models_probabilities() {
    let sets: [&[&str]; 3] = [
        &["red", "blue"],
        &["a red circle", "a red square", "a blue circle", "the shape is red"],
        &["red", "red circle", "red circle and blue square", "a triangle"],
    ];
    for variant in VARIANTS {
        // Nothing else has used this engine: what a choice leaves in its cache shows.
        let engine = open(variant, 1);
        let request = question(&engine, &[&Drawing::red_circle()], "describe the image.");
        let plain = answer(&engine, &request, &GenerateParams::default());
        let again = answer(&engine, &request, &GenerateParams::default());
        for choices in sets {
            let params = GenerateParams { logprobs: Some(1), ..choice(&engine, choices) };
            let found = answer(&engine, &request, &params);
            let wanted = slowly(variant, &request, &engine, choices);
            for ((text, share), wanted) in found.choices.unwrap().into_iter().zip(wanted) {
                // Several positions in one run are added up in another order.
                assert!((share - wanted).abs() < 2e-3, "{variant} {text}: {share} and {wanted}");
            }
            assert_eq!(found.logprobs.iter().map(|told| told.id).collect::<Vec<_>>(), found.token_ids);
            let bytes: Vec<u8> = found.logprobs.iter().flat_map(|told| told.bytes.clone()).collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), format!(" {}", found.text));
            let after = answer(&engine, &request, &GenerateParams::default());
            assert_eq!((&after.text, after.usage.cached_tokens), (&plain.text, again.usage.cached_tokens));
        }
    }
}

#[test]
fn a_choice_is_drawn_by_its_share_and_what_does_not_fit_is_refused() {
    let engine = engine(VARIANTS[0]);
    let request = question(engine, &[&Drawing::red_circle()], "what color is the shape?");
    let params = choice(engine, &["red", "green", "blue"]);
    let hot = Sampling::Random { temperature: 200.0, top_k: None, top_p: 1.0, min_p: 0.0 };
    let drawn =
        |seed| answer(engine, &request, &GenerateParams { sampling: hot, seed, ..params.clone() }).text;
    let met: std::collections::BTreeSet<String> = (0..40).map(drawn).collect();
    assert_eq!(met.len(), 3, "{met:?}");
    assert_eq!(drawn(11), drawn(11));

    let cut = answer(
        engine,
        &request,
        &GenerateParams { max_new_tokens: Some(1), ..choice(engine, &["red circle"]) },
    );
    assert_eq!((cut.finish_reason, cut.token_ids.len()), (FinishReason::Length, 1));

    let biased = GenerateParams { logit_bias: [(5, 1.0)].into(), ..params.clone() };
    let refusal = engine.generate(Request { params: biased, ..request.clone() }).unwrap_err().to_string();
    assert!(refusal.starts_with("logit-bias changes how likely tokens are"), "{refusal}");

    let context = engine.facts().context;
    let prompt = engine.prompt(&[Piece::Tokens(vec![65; context - 1])]).unwrap();
    let params = GenerateParams { max_new_tokens: None, ..choice(engine, &["a red circle and more"]) };
    let long = Request { prompt, images: vec![], params, ..request };
    let refusal = engine.generate(long).unwrap().complete().unwrap_err();
    assert!(refusal.to_string().contains(&format!("the context holds {context}")), "{refusal}");
}

#[test]
fn behind_white_space_a_choice_has_none_of_its_own() {
    let engine = engine(VARIANTS[0]);
    let request = question(engine, &[], "what color is it?");
    let params = choice(engine, &["red"]);
    let behind = |text: &str| {
        let prompt = engine.prompt(&[Piece::text(text)]).unwrap();
        answer(engine, &Request { prompt, ..request.clone() }, &params).token_ids
    };
    let tokens = |text: &str| engine.facts().tokenizer.encode(text).unwrap();
    assert_eq!([behind("it is"), behind("it is ")], [tokens(" red"), tokens("red")]);
}

#[test]
fn tokens_are_told_with_their_text_and_as_likely_as_the_model_finds_them() {
    for variant in VARIANTS {
        let engine = engine(variant);
        let request = question(engine, &[&Drawing::red_circle()], "describe the image.");
        let params =
            GenerateParams { logprobs: Some(3), max_new_tokens: Some(20), ..GenerateParams::default() };
        let (mut joined, mut told) = (String::new(), Vec::new());
        let mut completion = None;
        for event in engine.generate(Request { params: params.clone(), ..request.clone() }).unwrap() {
            match event.unwrap() {
                Event::Text(delta) => {
                    joined.push_str(&delta.text);
                    told.extend(delta.logprobs);
                }
                Event::Finished(finished) => completion = Some(finished),
                Event::Restarted(demotion) => panic!("{demotion:?}"),
            }
        }
        let completion = completion.unwrap();
        assert_eq!((&joined, &told), (&completion.text, &completion.logprobs));
        assert_eq!(told.iter().map(|told| told.id).collect::<Vec<_>>(), completion.token_ids);
        for token in &told {
            // Greedy takes the likeliest, and the others follow.
            assert_eq!((token.top.len(), token.top[0].id), (3, token.id));
            assert!(token.top.is_sorted_by(|one, other| one.logprob >= other.logprob));
            assert!(token.logprob <= 0.0);
        }
        // What changes the choice does not change what is told of the model.
        let first = told[0].id;
        let banned = GenerateParams { logit_bias: [(first, -100.0)].into(), ..params };
        let other = answer(engine, &request, &banned);
        assert_ne!(other.token_ids[0], first);
        // The prompt was read in one run, and its last position alone the second time.
        for (one, other) in told[0].top.iter().zip(&other.logprobs[0].top) {
            assert!(one.id == other.id && (one.logprob - other.logprob).abs() < 1e-3, "{one:?} {other:?}");
        }
    }
}

#[test]
fn penalties_keep_an_answer_from_repeating_itself() {
    let engine = engine(VARIANTS[1]);
    let prompt = engine.prompt(&[Piece::text("red red red red red red red red")]).unwrap();
    let request = Request { prompt, images: vec![], ..question(engine, &[], "x") };
    let say = |frequency_penalty: f32, presence_penalty: f32| {
        // An end would be no repetition either.
        let logit_bias = engine.facts().eos.iter().map(|id| (*id, -100.0)).collect();
        let params = GenerateParams {
            max_new_tokens: Some(40),
            frequency_penalty,
            presence_penalty,
            logit_bias,
            ..GenerateParams::default()
        };
        let ids = answer(engine, &request, &params).token_ids;
        assert_eq!(ids.len(), 40);
        ids.into_iter().collect::<std::collections::BTreeSet<TokenId>>().len()
    };
    let plain = say(0.0, 0.0);
    assert!(say(2.0, 0.0) > plain && say(0.0, 2.0) >= plain, "{plain}");
    assert!(say(-2.0, -2.0) <= plain);
}

#[test]
fn a_constraint_serves_many_requests_at_once() {
    let engine = engine(VARIANTS[0]);
    let request = question(engine, &[&Drawing::blue_square()], "what is the color and the shape?");
    let params = Arc::new(constrained(engine, &schema()));
    let alone = answer(engine, &request, &params).text;
    std::thread::scope(|scope| {
        let answers: Vec<_> =
            (0..4).map(|_| scope.spawn(|| answer(engine, &request, &params).text)).collect();
        for text in answers {
            assert_eq!(text.join().unwrap(), alone);
        }
    });
    assert!(serde_json::from_str::<Value>(&alone).unwrap().is_object());
}

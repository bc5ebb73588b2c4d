//! Answers of models that say anything, held to what was asked for.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::generate::params::{GenerateParams, Sampling};
use crate::generate::sequence::{Advance, FinishReason, Next, Sequence};
use crate::package::ModelPackage;

fn tokenizer() -> Arc<Tokenizer> {
    let package = ModelPackage::embedded().unwrap();
    let file = package.read(&package.manifest().text.tokenizer).unwrap();
    Arc::new(Tokenizer::from_bytes(Path::new("tokenizer.json"), &file).unwrap())
}

fn eos() -> Vec<TokenId> {
    ModelPackage::embedded().unwrap().manifest().text.eos.clone()
}

fn constraint(spec: &ConstraintSpec) -> Constraint {
    Constraint::new(&tokenizer(), spec).unwrap()
}

fn refused(spec: &ConstraintSpec) -> String {
    Constraint::new(&tokenizer(), spec).unwrap_err().to_string()
}

/// Logits that mean nothing, other ones for each seed and place.
fn noise(seed: u64, place: usize, vocabulary: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (place as u64 + 1);
    let mut number = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u16::try_from(state >> 48).map_or(0.0, |bits| f32::from(bits) / 65_536.0)
    };
    (0..vocabulary).map(|_| number() * 8.0).collect()
}

/// What a model says whose logits mean nothing, but for those of `likely`, which it likes.
fn say(
    tokenizer: &Arc<Tokenizer>,
    constraint: &Constraint,
    seed: u64,
    limit: usize,
    likely: &[TokenId],
) -> (String, FinishReason, Vec<TokenId>) {
    let sampling = Sampling::Random { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0 };
    let params =
        GenerateParams { sampling, seed, constraint: Some(constraint.clone()), ..GenerateParams::default() };
    let mut sequence = Sequence::new(tokenizer, &params, vec![1], eos(), limit).unwrap();
    let mut joined = String::new();
    for place in 0.. {
        let mut logits = noise(seed, place, tokenizer.vocabulary());
        for id in likely {
            logits[*id as usize] += 6.0;
        }
        let Advance { delta, next } = sequence.advance(&mut logits).unwrap();
        joined.push_str(&delta.text);
        if let Next::Finish(reason) = next {
            assert_eq!(joined, sequence.text());
            assert!(sequence.tokens().iter().all(|id| !tokenizer.is_special(*id)));
            return (joined, reason, sequence.tokens().to_vec());
        }
    }
    unreachable!("the limit ends it")
}

/// Tokens that end what noise would go on with for ever.
fn closing(tokenizer: &Tokenizer) -> Vec<TokenId> {
    let ends = ["\"", "}", "]", ","];
    (0..TokenId::try_from(tokenizer.vocabulary()).unwrap())
        .filter(|id| ends.iter().any(|end| tokenizer.token_bytes(*id) == Some(end.as_bytes())))
        .chain(eos())
        .collect()
}

fn shape() -> Value {
    json!({
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "dark blue", "green"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 12},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
            "sure": {"type": ["boolean", "null"]},
        },
        "required": ["color", "count", "sure"],
        "additionalProperties": false,
    })
}

fn has_shape(value: &Value) -> bool {
    let fields = value.as_object().unwrap();
    let tags = fields.get("tags").is_none_or(|tags| {
        let tags = tags.as_array().unwrap();
        tags.len() <= 3 && tags.iter().all(|tag| tag.as_str().unwrap().chars().count() <= 6)
    });
    fields.keys().all(|key| ["color", "count", "tags", "sure"].contains(&&key[..]))
        && ["red", "dark blue", "green"].contains(&fields["color"].as_str().unwrap())
        && (1..=12).contains(&fields["count"].as_i64().unwrap())
        && (fields["sure"].is_boolean() || fields["sure"].is_null())
        && tags
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_a_model_says_is_what_the_schema_describes(seed: u64) {
        let tokenizer = tokenizer();
        let constraint = Constraint::new(&tokenizer, &ConstraintSpec::JsonSchema(shape())).unwrap();
        let (text, reason, tokens) = say(&tokenizer, &constraint, seed, 400, &[]);
        prop_assert_eq!(reason, FinishReason::Stop, "{}", text);
        let value: Value = serde_json::from_str(&text).unwrap();
        prop_assert!(has_shape(&value), "{}", text);
        // The same numbers give the same answer, and a short limit the same beginning.
        let again = say(&tokenizer, &constraint, seed, 400, &[]);
        prop_assert_eq!(&again.2, &tokens);
        let cut = say(&tokenizer, &constraint, seed, 2, &[]);
        prop_assert_eq!((cut.1, &cut.2[..]), (FinishReason::Length, &tokens[..2]));
    }

    #[test]
    fn whatever_a_model_says_is_a_json_object(seed: u64) {
        let tokenizer = tokenizer();
        let constraint = Constraint::new(&tokenizer, &ConstraintSpec::JsonObject).unwrap();
        let (text, reason, _) = say(&tokenizer, &constraint, seed, 600, &closing(&tokenizer));
        prop_assume!(reason == FinishReason::Stop);
        prop_assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{}", text);
    }

    #[test]
    fn whatever_a_model_says_is_one_of_the_choices(seed: u64) {
        let choices = ["red", "red square", "a \"quoted\" \u{2603}", "7/8"].map(str::to_owned);
        let tokenizer = tokenizer();
        let spec = ConstraintSpec::Choice(choices.to_vec());
        let constraint = Constraint::new(&tokenizer, &spec).unwrap();
        let (text, reason, _) = say(&tokenizer, &constraint, seed, 100, &[]);
        prop_assert_eq!(reason, FinishReason::Stop);
        prop_assert!(choices.contains(&text), "{}", text);
    }
}

#[test]
fn a_pattern_and_a_grammar_say_where_white_space_belongs() {
    let tokenizer = tokenizer();
    let check = |spec: ConstraintSpec, allowed: &[&str]| {
        let constraint = Constraint::new(&tokenizer, &spec).unwrap();
        let mut met = std::collections::BTreeSet::new();
        for seed in 0..40 {
            let (text, reason, _) = say(&tokenizer, &constraint, seed, 60, &[]);
            assert_eq!(reason, FinishReason::Stop, "{text:?}");
            assert!(allowed.contains(&&text[..]), "{spec:?}: {text:?}");
            met.insert(text);
        }
        assert_eq!(met.len(), allowed.len(), "{met:?}");
    };
    let regex = |text: &str| ConstraintSpec::Regex(text.to_owned());
    check(regex("[ab]"), &["a", "b"]);
    check(regex(" ?[ab]"), &["a", "b", " a", " b"]);
    check(regex("[ab] "), &["a ", "b "]);
    check(regex("a/b|[0-3]"), &["a/b", "0", "1", "2", "3"]);
    let grammar = ConstraintSpec::Grammar("start: one \"-\" one\none: \"x\" | \"y\"".to_owned());
    check(grammar, &["x-x", "x-y", "y-x", "y-y"]);
}

#[test]
fn the_end_is_allowed_only_where_the_text_is_complete() {
    let tokenizer = tokenizer();
    let mut walk = constraint(&ConstraintSpec::Regex("ab(cd)*".to_owned())).begin();
    let eos = eos();
    let mut steps = Vec::new();
    for letter in ["a", "b", "c", "d"] {
        let mut logits = vec![1.0; tokenizer.vocabulary() + 3];
        walk.narrow(&mut logits, &eos).unwrap();
        let special = (0..).zip(&logits).filter(|(id, _)| tokenizer.is_special(*id));
        assert!(special.filter(|(id, _)| !eos.contains(id)).all(|(_, logit)| *logit == f32::NEG_INFINITY));
        // What is beyond the tokenizer is nothing that could follow.
        assert!(logits[tokenizer.vocabulary()..].iter().all(|logit| *logit == f32::NEG_INFINITY));
        steps.push(logits[eos[0] as usize] > f32::NEG_INFINITY);
        assert!(!walk.read(tokenizer.encode(letter).unwrap()[0]).unwrap());
    }
    assert_eq!(steps, [false, false, true, false]);
    // And where nothing may follow, the answer is over without it.
    let mut walk = constraint(&ConstraintSpec::Regex("a".to_owned())).begin();
    assert!(walk.read(tokenizer.encode("a").unwrap()[0]).unwrap());
}

#[test]
fn logits_that_are_no_numbers_are_not_hidden() {
    let tokenizer = tokenizer();
    let constraint = Some(constraint(&ConstraintSpec::Regex("a".to_owned())));
    let params = GenerateParams { constraint, ..GenerateParams::default() };
    let mut sequence = Sequence::new(&tokenizer, &params, vec![1], eos(), 9).unwrap();
    let mut logits = vec![0.0; tokenizer.vocabulary()];
    logits[tokenizer.encode("b").unwrap()[0] as usize] = f32::NAN;
    assert!(sequence.advance(&mut logits).unwrap_err().to_string().contains("the logits contain NaN"));
}

#[test]
fn what_cannot_be_followed_is_refused_with_a_reason() {
    let schema = ConstraintSpec::JsonSchema;
    let cases = [
        (schema(json!([1])), "the JSON schema is refused: it is no JSON object;"),
        (schema(json!(false)), "the JSON schema is refused:"),
        (schema(json!({"$ref": "#"})), "the JSON schema is refused: no text satisfies it;"),
        (schema(json!({"type": "objekt"})), "the JSON schema is refused:"),
        (schema(json!({"oneOf": [{"type": "string"}, {"maxLength": 3}]})), "oneOf"),
        (schema(json!({"$ref": "https://example.com/a.json"})), "https://example.com/a.json"),
        (schema(json!({"type": "string", "pattern": "("})), "the JSON schema is refused:"),
        (ConstraintSpec::Regex(String::new()), "the regex is refused: it is empty;"),
        (ConstraintSpec::Regex("(".to_owned()), "the regex is refused:"),
        (ConstraintSpec::Regex("a(?=b)".to_owned()), "the regex is refused:"),
        (ConstraintSpec::Regex("\\".to_owned()), "the regex is refused:"),
        (ConstraintSpec::Grammar(String::new()), "the grammar is refused:"),
        (ConstraintSpec::Grammar("start: other".to_owned()), "the grammar is refused:"),
        (ConstraintSpec::Grammar("start: <|endoftext|>".to_owned()), "the grammar is refused:"),
        (ConstraintSpec::Choice(vec![]), "there is no choice to choose from;"),
        (ConstraintSpec::Choice(vec![String::new()]), "choice 1 is empty;"),
        (ConstraintSpec::Choice(vec!["a".to_owned(), " b".to_owned()]), "choice \" b\" begins or ends"),
        (ConstraintSpec::Choice(vec!["a".to_owned(), "a".to_owned()]), "choice \"a\" is given twice;"),
    ];
    for (spec, wanted) in cases {
        let refusal = refused(&spec);
        assert!(refusal.contains(wanted), "{spec:?}: {refusal}");
        assert!(!refusal.contains('\n') && refusal.len() < 500, "{refusal}");
    }
}

/// Specifications that are made to hang what reads them, or to fill its memory or its stack.
fn hostile() -> Vec<ConstraintSpec> {
    let regex = |text: String| ConstraintSpec::Regex(text);
    let schema = ConstraintSpec::JsonSchema;
    // `json!` would walk through all of it for each level.
    let nested = |levels: usize| {
        (0..levels)
            .fold(json!({}), |inner, _| Value::Object([("items".to_owned(), inner)].into_iter().collect()))
    };
    let chain = |length: usize| {
        let links = (0..length).map(|n| (format!("a{n}"), json!({"$ref": format!("#/$defs/a{}", n + 1)})));
        let mut links: serde_json::Map<String, Value> = links.collect();
        links.insert(format!("a{length}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/a0", "$defs": links})
    };
    let all_of_any = |count: usize| {
        let any = |n: usize| json!({"anyOf": (0..8).map(|m| json!({"properties": {format!("p{n}_{m}"): {}}})).collect::<Vec<_>>()});
        json!({"type": "object", "allOf": (0..count).map(any).collect::<Vec<_>>()})
    };
    let rules = |length: usize| {
        let rules = (0..length).fold(String::new(), |text, n| text + &format!("r{n}: r{}\n", n + 1));
        format!("start: r0\n{rules}r{length}: \"x\"\n")
    };
    let doubling = |depth: usize| {
        let lines =
            (0..depth).fold(String::new(), |text, n| text + &format!("A{n}: A{} A{}\n", n + 1, n + 1));
        format!("start: A0\n{lines}A{depth}: \"x\"?\n")
    };
    let tokens = |length: usize| {
        let rules = (0..length).fold(String::new(), |text, n| text + &format!("R{n}: R{} \"a\"\n", n + 1));
        format!("start: R0\n{rules}R{length}: \"x\"\n")
    };
    vec![
        regex("(".repeat(50_000)),
        regex(format!("{}a{}", "(".repeat(60), "){1,60}".repeat(60))),
        regex("((((a{1000}){1000}){1000}){1000})".to_owned()),
        regex("a?".repeat(40_000)),
        regex("a?".repeat(4_000)),
        schema(json!({"type": "string", "pattern": "a?".repeat(4_000)})),
        regex("(a|b)".repeat(20_000)),
        regex("a|".repeat(60_000) + "b"),
        regex("x".repeat(MOST_BYTES)),
        regex("[a-z]*".repeat(2_000)),
        regex("(.*a){40}.*(b.{200}c){50}".to_owned()),
        schema(nested(60)),
        schema(nested(3_000)),
        schema(chain(3_000)),
        schema(json!({"$ref": "#"})),
        schema(json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]})),
        schema(json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})),
        schema(all_of_any(12)),
        schema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 1_000_001})),
        schema(json!({"type": "array", "items": {}, "minItems": 1_000_000, "maxItems": 2_000_000})),
        schema(json!({"type": "number", "multipleOf": 1e-300})),
        schema(json!({"type": "integer", "multipleOf": 982_451_653})),
        schema(json!({"type": "string", "pattern": "(a{900}){900}"})),
        schema(json!({"enum": (0..12_000).collect::<Vec<_>>()})),
        ConstraintSpec::Grammar(doubling(14)),
        ConstraintSpec::Grammar(doubling(60)),
        ConstraintSpec::Grammar(rules(6_000)),
        ConstraintSpec::Grammar(tokens(6_000)),
        ConstraintSpec::Grammar(format!("start: {}", "\"a\"? ".repeat(20_000))),
        ConstraintSpec::Grammar("start: start start | \"a\" |".to_owned()),
        ConstraintSpec::Grammar(format!("start: {}\"a\"{}", "(".repeat(40_000), ")".repeat(40_000))),
        ConstraintSpec::Grammar(format!("start: {}", "!".repeat(60_000))),
        ConstraintSpec::Grammar(format!("start: /a/{}", "~".repeat(60_000))),
    ]
}

#[test]
fn a_hostile_specification_is_refused_or_followed_and_does_not_hang() {
    let tokenizer = tokenizer();
    for spec in hostile() {
        let begin = Instant::now();
        let outcome = Constraint::new(&tokenizer, &spec);
        let compiled = begin.elapsed();
        let text = format!("{spec:?}").chars().take(80).collect::<String>();
        let mut steps = 0;
        let mut slowest = Duration::ZERO;
        if let Ok(constraint) = &outcome {
            let mut walk = constraint.begin();
            for place in 0..60 {
                let begin = Instant::now();
                let mut logits = noise(3, place, tokenizer.vocabulary());
                if walk.narrow(&mut logits, &eos()).is_err() {
                    break;
                }
                let best = (0..).zip(&logits).max_by(|one, other| one.1.total_cmp(other.1)).unwrap().0;
                slowest = slowest.max(begin.elapsed());
                steps += 1;
                if eos().contains(&best) || walk.read(best).unwrap_or(true) {
                    break;
                }
            }
        }
        let outcome = outcome.err().map_or_else(|| "ok".to_owned(), |error| error.to_string());
        println!("{compiled:>10.1?} {steps:>3} steps, {slowest:>10.1?}: {text}: {outcome}");
        // A deadline against hanging: each takes a fraction of it.
        assert!(compiled < Duration::from_secs(30) && slowest < Duration::from_secs(30), "{text}");
    }
}

#[test]
fn deep_brackets_are_counted() {
    assert_eq!([depth("a(b[c]{d})"), depth(")))("), depth("")], [2, 1, 0]);
    assert_eq!([depth_of(&json!(1)), depth_of(&json!({"a": [1, {"b": 2}]}))], [1, 4]);
}

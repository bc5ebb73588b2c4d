//! What a sampler keeps and draws equals the reference; `tests/reference/sampler.py` makes it.

use llava_phi::{
    generate::{
        params::{GenerateParams, Sampling},
        sampler::Sampler,
    },
    text::TokenId,
};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    logits: Vec<f32>,
    history: Vec<TokenId>,
    seed: u64,
    repetition_penalty: f32,
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
    min_p: f32,
    kept: Vec<TokenId>,
    chances: Vec<f64>,
    drawn: Vec<TokenId>,
}

#[test]
fn kept_and_drawn_tokens_equal_the_reference() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("reference/sampler.json")).unwrap();
    for case in cases {
        let Case { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = case;
        let sampling = Sampling::Random { temperature, top_k, top_p, min_p };
        let params = GenerateParams { sampling, repetition_penalty, seed, ..GenerateParams::default() };
        let mut sampler = Sampler::new(&params, case.logits.len()).unwrap();
        let candidates = sampler.candidates(&mut case.logits.clone(), &case.history).unwrap();
        let kept: Vec<TokenId> = candidates.iter().map(|candidate| candidate.id).collect();
        assert_eq!(kept, case.kept, "case {seed}");
        let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
        for (candidate, chance) in candidates.iter().zip(&case.chances) {
            // The reference divides by the temperature in f32.
            assert!((candidate.weight / total - chance).abs() < 1e-6, "case {seed}");
        }
        for id in &case.drawn {
            assert_eq!(sampler.pick(&mut case.logits.clone(), &case.history).unwrap(), *id, "case {seed}");
        }
    }
}

fn sampler(sampling: Sampling, seed: u64, vocabulary: usize) -> Sampler {
    let params = GenerateParams { sampling, seed, ..GenerateParams::default() };
    Sampler::new(&params, vocabulary).unwrap()
}

fn random(temperature: f32, top_k: Option<usize>, top_p: f32, min_p: f32) -> Sampling {
    Sampling::Random { temperature, top_k, top_p, min_p }
}

/// Few different values, so that equals are common.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(prop_oneof![(-3_i8..4).prop_map(f32::from), -30.0..30.0_f32], 1..600)
}

proptest! {
    #[test]
    fn one_candidate_is_the_greedy_one(logits in logits(), seed: u64, temperature in 0.01..4.0_f32) {
        let greedy = sampler(Sampling::Greedy, 0, logits.len()).pick(&mut logits.clone(), &[]).unwrap();
        for cut in [random(temperature, Some(1), 1.0, 0.0), random(temperature, None, 1e-9, 0.0)] {
            prop_assert_eq!(sampler(cut, seed, logits.len()).pick(&mut logits.clone(), &[]).unwrap(), greedy);
        }
    }

    #[test]
    fn one_seed_gives_one_sequence(logits in logits(), seed: u64) {
        let draw = || {
            let mut sampler = sampler(random(1.0, Some(50), 0.9, 0.01), seed, logits.len());
            (0..20).map(|_| sampler.pick(&mut logits.clone(), &[]).unwrap()).collect::<Vec<_>>()
        };
        prop_assert_eq!(draw(), draw());
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_never_chosen(
        logits in logits(), tail in logits(), seed: u64, top_k in prop::option::of(1_usize..9),
    ) {
        let both = [&logits[..], &tail].concat();
        for how in [Sampling::Greedy, random(3.0, top_k, 1.0, 0.0)] {
            let id = sampler(how, seed, logits.len()).pick(&mut both.clone(), &[]).unwrap();
            prop_assert!((id as usize) < logits.len());
        }
    }

    #[test]
    fn a_head_is_the_same_whether_all_is_sorted_or_not(
        logits in prop::collection::vec(-2.0..2.0_f32, 1000..1100), top_p in 0.001..0.999_f32,
    ) {
        let mut all = sampler(random(1.0, None, 1.0, 0.0), 0, logits.len());
        let all = all.candidates(&mut logits.clone(), &[]).unwrap();
        // Summed in the order of ids, as the sampler sums before it sorts.
        let mut by_id = all.to_vec();
        by_id.sort_by_key(|candidate| candidate.id);
        let bound = f64::from(top_p) * by_id.iter().map(|candidate| candidate.weight).sum::<f64>();
        let mut before = 0.0;
        let expected = all.iter().take_while(|candidate| {
            let kept = before < bound;
            before += candidate.weight;
            kept
        });
        let expected = expected.count();
        let mut head = sampler(random(1.0, None, top_p, 0.0), 0, logits.len());
        let head = head.candidates(&mut logits.clone(), &[]).unwrap();
        prop_assert_eq!(head, &all[..expected]);
    }

    #[test]
    fn nothing_panics_whatever_the_logits(
        bits in prop::collection::vec(any::<u32>(), 0..50), history in prop::collection::vec(any::<u32>(), 0..9),
        penalty in 1e-30..1e30_f32, temperature in 1e-40..1e30_f32, vocabulary in 0_usize..60,
    ) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for sampling in [Sampling::Greedy, random(temperature, Some(3), 0.5, 0.5)] {
            let params = GenerateParams { sampling, repetition_penalty: penalty, ..GenerateParams::default() };
            let mut sampler = Sampler::new(&params, vocabulary).unwrap();
            if let Ok(id) = sampler.pick(&mut logits.clone(), &history) {
                prop_assert!((id as usize) < vocabulary);
            }
        }
    }
}

//! Times the choice of a token from a row of logits: `cargo bench --bench sampling`. `TOKENIZER=.../tokenizer.json` has
//! answers that must be JSON made of its tokens, in place of the miniature's.

use std::path::Path;
use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use llava_phi::generate::constraint::{Constraint, ConstraintSpec};
use llava_phi::generate::params::{GenerateParams, Sampling};
use llava_phi::generate::sampler::Sampler;
use llava_phi::generate::sequence::{Next, Sequence};
use llava_phi::package::ModelPackage;
use llava_phi::text::{TokenId, Tokenizer};
use serde_json::json;

/// Logits of a row, as many as a Phi of the true size has.
const WIDTH: usize = 51_200;
/// Tokens that a penalty looks at.
const HISTORY: u32 = 700;

fn main() {
    divan::main();
}

/// Logits as they are spread in an answer: a few high ones above a broad hill.
fn logits() -> Vec<f32> {
    let unit = |n: u32| f32::from(n.wrapping_mul(2_654_435_761).to_be_bytes()[1]) / 255.0;
    let hill = |n: u32| (unit(n) + unit(n ^ 0x5bd1) + unit(n ^ 0x9e37) - 1.5) * 4.0;
    (0_u32..).map(|n| hill(n) + if n.is_multiple_of(5000) { 9.0 } else { 0.0 }).take(WIDTH).collect()
}

const WAYS: [(&str, Sampling, f32); 6] = [
    ("greedy", Sampling::Greedy, 1.0),
    ("greedy, penalty", Sampling::Greedy, 1.1),
    ("temperature", random(None, 1.0, 0.0), 1.0),
    ("top-k 40", random(Some(40), 1.0, 0.0), 1.0),
    ("top-p 0.9", random(None, 0.9, 0.0), 1.0),
    ("min-p 0.05", random(None, 1.0, 0.05), 1.0),
];

const fn random(top_k: Option<usize>, top_p: f32, min_p: f32) -> Sampling {
    Sampling::Random { temperature: 0.7, top_k, top_p, min_p }
}

#[divan::bench(args = WAYS.map(|(name, ..)| name), sample_count = 50)]
fn pick(bencher: Bencher, name: &str) {
    let (_, sampling, repetition_penalty) =
        WAYS.into_iter().find(|(known, ..)| *known == name).expect("the arguments are these names");
    let params = GenerateParams { sampling, repetition_penalty, ..GenerateParams::default() };
    let mut sampler = Sampler::new(&params, WIDTH).expect("the parameters are sound");
    let history: Vec<TokenId> = (0..HISTORY).map(|n| n * 7).collect();
    let logits = logits();
    // A penalty is written into the row: each choice has its own.
    bencher
        .counter(ItemsCount::new(1_usize))
        .with_inputs(|| logits.clone())
        .bench_local_values(|mut row| sampler.pick(&mut row, &history));
}

/// The tokenizer to be measured.
fn tokenizer() -> Arc<Tokenizer> {
    let package = ModelPackage::embedded().expect("the package is whole");
    let bytes = match std::env::var_os("TOKENIZER") {
        Some(path) => std::fs::read(path).expect("TOKENIZER is a file").into(),
        None => package.read(&package.manifest().text.tokenizer).expect("the package has a tokenizer"),
    };
    Arc::new(Tokenizer::from_bytes(Path::new("tokenizer.json"), &bytes).expect("it is one"))
}

fn schema() -> ConstraintSpec {
    ConstraintSpec::JsonSchema(json!({
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"type": "string"},
        },
        "required": ["color", "count", "tags", "note"],
    }))
}

/// The first constraint of a tokenizer, for which its tokens are put in order.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn first_constraint(bencher: Bencher) {
    let inputs = || (tokenizer(), schema());
    bencher.with_inputs(inputs).bench_local_values(|(tokenizer, spec)| Constraint::new(&tokenizer, &spec));
}

/// Another one.
#[divan::bench(sample_count = 50)]
fn next_constraint(bencher: Bencher) {
    let (tokenizer, spec) = (tokenizer(), schema());
    bencher.bench_local(|| Constraint::new(&tokenizer, &spec));
}

/// Sixty tokens of an answer, drawn, with a schema and without: the difference is what the schema costs.
#[divan::bench(args = [false, true], sample_count = 20, sample_size = 1)]
fn sixty_tokens(bencher: Bencher, constrained: bool) {
    let tokenizer = tokenizer();
    let constraint = constrained.then(|| Constraint::new(&tokenizer, &schema()).expect("it is sound"));
    let sampling = random(Some(40), 1.0, 0.0);
    let params = GenerateParams { sampling, constraint, ..GenerateParams::default() };
    let logits = logits();
    let rows = || -> Vec<Vec<f32>> { (0..60).map(|_| logits.clone()).collect() };
    let begin = || Sequence::new(&tokenizer, &params, vec![1], vec![], 60).expect("the parameters are sound");
    bencher.counter(ItemsCount::new(60_usize)).with_inputs(|| (begin(), rows())).bench_local_values(
        |(mut sequence, mut rows)| {
            for row in &mut rows {
                let advance = sequence.advance(row).expect("the logits are numbers");
                if let Next::Finish(_) = advance.next {
                    break;
                }
            }
        },
    );
}

//! Times tokens to text as they come: `cargo bench --bench detokenize`.

#[path = "support.rs"]
#[allow(dead_code)] // Each benchmark takes its part.
mod support;

use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use llava_phi::engine::ModelFacts;
use llava_phi::text::{Detokenizer, Piece, TokenId};

/// What is written again and again.
const TEXT: &str =
    "The shape in the middle is a red triangle, and 12 °C are written below it: naïve café ☕. ";

fn main() {
    support::start();
    divan::main();
}

#[divan::bench(args = [0, 1, 8])]
fn answer(bencher: Bencher, stop_strings: usize) {
    let facts = ModelFacts::new(&support::package()).expect("the package has its tokenizer");
    let prompt = facts.tokenizer.prompt(&[Piece::text(TEXT.repeat(8))]).expect("the text has tokens");
    let ids: Vec<TokenId> = prompt.token_ids().collect();
    // Each begins as the text does and never comes.
    let stop: Vec<String> = (0..stop_strings).map(|n| format!("The shape in the middle is {n}")).collect();
    bencher
        .counter(ItemsCount::new(ids.len()))
        .with_inputs(|| Detokenizer::new(Arc::clone(&facts.tokenizer), stop.clone()))
        .bench_local_values(|mut detokenizer| {
            let mut length = 0;
            for id in &ids {
                length += detokenizer.push(*id).map_or(0, |step| step.text.len());
            }
            length
        });
}

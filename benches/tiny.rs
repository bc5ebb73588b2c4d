//! Times the miniature model from its package to tokens, on one thread: `cargo bench --bench tiny`.

#[path = "support.rs"]
#[allow(dead_code)] // Each benchmark takes its part.
mod support;

use std::sync::Arc;

use divan::Bencher;
use llava_phi::engine::ModelFacts;
use llava_phi::image::Preprocessor;
use llava_phi::model::vision::ImageInput;
use llava_phi::model::{CausalModel, LlavaPhi};
use llava_phi::package::ModelPackage;
use llava_phi::text::{Piece, Prompt};

fn main() {
    support::start();
    divan::main();
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn open(bencher: Bencher) {
    let package = support::package();
    bencher.bench_local(|| support::open(&package));
}

fn question(package: &ModelPackage, text: &str) -> Prompt {
    let facts = ModelFacts::new(package).expect("the package has its tokenizer");
    let pieces = [Piece::text("USER: "), Piece::Image(0), Piece::text(text)];
    facts.tokenizer.prompt(&pieces).expect("the text has tokens")
}

fn image(package: &ModelPackage, number: u32) -> Arc<ImageInput> {
    let preprocessor = Preprocessor::new(&package.manifest().image);
    Arc::new(ImageInput::new(preprocessor.run(&support::picture(number), None)))
}

/// A picture that was never seen, and a question about it.
#[divan::bench(sample_count = 30, sample_size = 1)]
fn first_token(bencher: Bencher) {
    let package = support::package();
    let mut model = support::open(&package);
    let prompt = question(&package, "\nwhat is in the image? ASSISTANT:");
    let mut number = 0;
    let unseen = || {
        number += 1;
        image(&package, number)
    };
    bencher.with_inputs(unseen).bench_local_values(|image| {
        let mut cache = model.empty_cache()?;
        model.prefill(&prompt, &[image], &mut cache).map(|prefill| prefill.logits)
    });
}

/// Two questions about one picture in turn.
#[divan::bench(sample_count = 30, sample_size = 1)]
fn second_question(bencher: Bencher) {
    let package = support::package();
    let mut model = support::open(&package);
    let prompts = ["\nwhat is in the image? ASSISTANT:", "\nis there a circle? ASSISTANT:"]
        .map(|text| question(&package, text));
    let image = image(&package, 0);
    let mut cache = model.empty_cache().expect("there is memory for a cache");
    let mut asked = 0;
    bencher.bench_local(|| {
        asked += 1;
        let images = [Arc::clone(&image)];
        model.prefill(&prompts[asked % prompts.len()], &images, &mut cache).map(|prefill| prefill.logits)
    });
}

/// One more token behind a picture and a question, at a depth that grows to the context's end and begins anew.
#[divan::bench(sample_count = 100, sample_size = 1)]
fn decode(bencher: Bencher) {
    let package = support::package();
    let mut model = support::open(&package);
    let prompt = question(&package, "\nwhat is in the image? ASSISTANT:");
    let images = [image(&package, 0)];
    let read = |model: &mut LlavaPhi| {
        let mut cache = model.empty_cache()?;
        model.prefill(&prompt, &images, &mut cache).map(|_| cache)
    };
    let mut cache = read(&mut model).expect("the prompt can be read");
    let context = model.capacity().expect("there is a decoder");
    bencher.bench_local(|| {
        if cache.len() == context {
            cache = read(&mut model)?;
        }
        model.decode(1, &mut cache)
    });
}

//! Times the embedding of tokens and their splice with an image: `cargo bench --bench splice`.

#[path = "support.rs"]
#[allow(dead_code)] // Each benchmark takes its part.
mod support;

use divan::Bencher;
use divan::counter::ItemsCount;
use llava_phi::image::Preprocessor;
use llava_phi::model::embed::{Run, TokenEmbedder};
use llava_phi::text::TokenId;

fn main() {
    support::start();
    divan::main();
}

#[divan::bench(args = [1, 64, 576])]
fn embed(bencher: Bencher, tokens: u32) {
    let embedder = TokenEmbedder::open(&support::package()).expect("the package has its table");
    let ids: Vec<TokenId> = (0..tokens).map(|n| n % 300).collect();
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| embedder.embed(&ids));
}

#[divan::bench(args = [1, 9])]
fn splice(bencher: Bencher, images: usize) {
    let package = support::package();
    let mut model = support::open(&package);
    let pixels = Preprocessor::new(&package.manifest().image).run(&support::picture(0), None);
    let features = model.vision().and_then(|vision| vision.encode(&pixels.view())).expect("the encoder runs");
    let embeds = model
        .projector()
        .and_then(|projector| projector.project(&features.view()))
        .expect("the projector runs");
    let ids: Vec<TokenId> = (0..32).collect();
    let image = Run::Image { rows: 0..embeds.rows().nrows(), embeds: &embeds };
    let mut runs = vec![Run::Tokens(&ids)];
    runs.extend(vec![image; images]);
    runs.push(Run::Tokens(&ids));
    let positions: usize = runs.iter().map(Run::len).sum();
    bencher.counter(ItemsCount::new(positions)).bench_local(|| model.embedder().splice(&runs));
}

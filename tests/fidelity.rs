//! Every stage equals PyTorch; `tests/reference/tiny.py` says how, and makes the numbers.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use llava_phi::{
    chat::{conversation::Message, template},
    engine::ModelFacts,
    image::{Limits, Preprocessor, Rgb, decode},
    model::{CausalModel, LlavaPhi, vision::ImageInput},
    package::manifest::Fit,
    text::{Prompt, Span, TokenId},
};
use serde::Deserialize;

use crate::support::{Drawing, distance, highest, model, package};

#[derive(Deserialize)]
struct Reference {
    checkpoint: String,
    tokens: usize,
    images: BTreeMap<String, Picture>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Picture {
    draw: Option<Drawing>,
    file: Option<String>,
    fit: Option<Fit>,
    pixel_values: Stage,
    patch_features: Stage,
    image_embeds: Stage,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    images: Vec<String>,
    /// The prompt, an image being -200.
    ids: Vec<i64>,
    logits: Stage,
    /// Greedy tokens, past the end of the answer.
    answer: Vec<TokenId>,
}

/// Every `every`-th of `count` values, and the L2 norm of all.
#[derive(Deserialize)]
struct Stage {
    count: usize,
    every: usize,
    values: Vec<f32>,
    norm: f64,
}

impl Stage {
    /// The larger of two distances: of the sampled values, and of the norms of all.
    fn distance(&self, found: impl IntoIterator<Item = f32>) -> f64 {
        let found: Vec<f32> = found.into_iter().collect();
        assert_eq!(found.len(), self.count);
        let sample: Vec<f32> = found.iter().copied().step_by(self.every).collect();
        let norm = found.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        distance(&sample, &self.values).max((norm / self.norm - 1.0).abs())
    }
}

fn reference() -> Reference {
    let reference: Reference = serde_json::from_str(include_str!("reference/tiny.json")).unwrap();
    assert_eq!(
        reference.checkpoint,
        package().manifest().source.sha256,
        "models/tiny/package is of another checkpoint; run python tests/reference/tiny.py"
    );
    reference
}

impl Picture {
    fn input(&self) -> Arc<ImageInput> {
        let rgb: Rgb = match (&self.draw, &self.file) {
            (Some(drawing), None) => drawing.rgb(),
            (None, Some(file)) => {
                let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(file));
                decode(file, &bytes.unwrap(), &Limits::default()).unwrap()
            }
            _ => panic!("an image is drawn or is a file"),
        };
        let preprocessor = Preprocessor::new(&package().manifest().image);
        Arc::new(ImageInput::new(preprocessor.run(&rgb, self.fit)))
    }
}

impl Case {
    fn prompt(&self, facts: &ModelFacts) -> Prompt {
        let pieces = template::render(&facts.template, None, &self.messages).unwrap();
        facts.tokenizer.prompt(&pieces).unwrap()
    }

    /// The logits after the prompt and, for each token of the reference's answer, the one that the model would give
    /// after the reference's tokens before it.
    fn walk(
        &self,
        model: &mut LlavaPhi,
        images: &BTreeMap<String, Picture>,
        facts: &ModelFacts,
    ) -> (Vec<f32>, Vec<TokenId>) {
        let images: Vec<_> = self.images.iter().map(|name| images[name].input()).collect();
        let mut cache = model.empty_cache().unwrap();
        let mut logits = model.prefill(&self.prompt(facts), &images, &mut cache).unwrap().logits;
        let first = logits.values().to_vec();
        let mut ids = Vec::new();
        for token in &self.answer {
            ids.push(highest(logits.values()));
            logits = model.decode(*token, &mut cache).unwrap();
        }
        (first, ids)
    }
}

#[test]
fn prompts_have_the_ids_of_the_reference() {
    let facts = ModelFacts::new(package()).unwrap();
    for case in reference().cases {
        let prompt = case.prompt(&facts);
        let ids = prompt.spans().iter().flat_map(|span| match span {
            Span::Text(ids) => ids.iter().map(|id| i64::from(*id)).collect(),
            Span::Image(_) => vec![-200],
        });
        assert_eq!(ids.collect::<Vec<_>>(), case.ids, "{:?}", case.messages);
    }
}

#[test]
fn the_stages_of_an_image_equal_the_reference() {
    let mut model = model("portable-f32", None);
    let mut farthest = [0.0_f64; 2];
    for (name, image) in reference().images {
        let input = image.input();
        let pixels = image.pixel_values.distance(input.pixels().view().iter().copied());
        // The norm was summed in another order; the values themselves are equal.
        assert!(pixels < 1e-12, "{name}: pixel values {pixels}");
        let features = model.vision().unwrap().encode(&input.pixels().view()).unwrap();
        let embeds = model.projector().unwrap().project(&features.view()).unwrap();
        let distances = [
            image.patch_features.distance(features.view().iter().copied()),
            image.image_embeds.distance(embeds.rows().iter().copied()),
        ];
        // f32 sums in another order.
        assert!(distances.iter().all(|distance| *distance < 1e-4), "{name}: {distances:?}");
        farthest = [0, 1].map(|stage| farthest[stage].max(distances[stage]));
    }
    let [features, embeds] = farthest;
    eprintln!("portable-f32: patch features are apart at most {features:.1e}, image embeddings {embeds:.1e}");
}

#[test]
fn the_f32_decoder_answers_as_the_reference() {
    let reference = reference();
    let facts = ModelFacts::new(package()).unwrap();
    let mut model = model("portable-f32", None);
    let whole = reference.cases.iter().filter(|case| case.answer.len() == reference.tokens).count();
    // The others are cut where two logits nearly equal each other.
    assert!(whole * 4 >= reference.cases.len() * 3, "{whole} answers are of {} tokens", reference.tokens);
    let mut farthest = 0.0_f64;
    for case in &reference.cases {
        let (logits, ids) = case.walk(&mut model, &reference.images, &facts);
        let distance = case.logits.distance(logits);
        assert!(distance < 1e-4, "{:?}: logits {distance}", case.messages);
        assert_eq!(ids, case.answer, "{:?}", case.messages);
        farthest = farthest.max(distance);
    }
    eprintln!("portable-f32: logits are apart at most {farthest:.1e}");
}

#[test]
fn the_int4_decoder_answers_nearly_as_the_reference() {
    let reference = reference();
    let facts = ModelFacts::new(package()).unwrap();
    let mut model = model("cpu-int4", None);
    let (mut same, mut answers) = (0, 0);
    let mut apart = Vec::new();
    for case in &reference.cases {
        let (logits, ids) = case.walk(&mut model, &reference.images, &facts);
        apart.push(case.logits.distance(logits));
        // What comes after the end of an answer was never trained.
        let end =
            case.answer.iter().position(|id| facts.eos.contains(id)).map_or(case.answer.len(), |end| end + 1);
        same += usize::from(ids[..end] == case.answer[..end]);
        answers += 1;
    }
    apart.sort_by(f64::total_cmp);
    let (median, farthest) = (apart[apart.len() / 2], apart[apart.len() - 1]);
    eprintln!(
        "cpu-int4: {same} of {answers} answers are the same; logits are apart {median:.3}, at most {farthest:.3}"
    );
    // Weights of 4 bits, trained for it: nearly all answers are the same to their end.
    assert!(same * 10 >= answers * 9, "{same} of {answers} answers");
    assert!(median < 0.05 && farthest < 0.2, "logits are apart {median}, at most {farthest}");
}

//! Images stand in their places among the tokens, whatever the prompt.

use std::sync::OnceLock;

use llava_phi::{
    image::Preprocessor,
    model::{
        embed::{Run, TokenEmbedder},
        projector::ImageEmbeds,
    },
};
use proptest::prelude::*;

use crate::support::{Drawing, model, package};

struct Parts {
    embedder: TokenEmbedder,
    images: [ImageEmbeds; 2],
}

fn parts() -> &'static Parts {
    static PARTS: OnceLock<Parts> = OnceLock::new();
    PARTS.get_or_init(|| {
        let mut model = model("portable-f32", None);
        let preprocessor = Preprocessor::new(&package().manifest().image);
        let images = [Drawing::red_circle(), Drawing::blue_square()].map(|image| {
            let features =
                model.vision().unwrap().encode(&preprocessor.run(&image.rgb(), None).view()).unwrap();
            model.projector().unwrap().project(&features.view()).unwrap()
        });
        Parts { embedder: TokenEmbedder::open(package()).unwrap(), images }
    })
}

#[derive(Clone, Debug)]
enum Part {
    Tokens(Vec<u32>),
    Image(usize, std::ops::Range<usize>),
}

fn part() -> impl Strategy<Value = Part> {
    let rows = u32::try_from(package().manifest().embedding.rows).unwrap();
    let positions = package().manifest().vision.tokens_per_image;
    let range = (0..=positions, 0..=positions).prop_map(|(a, b)| a.min(b)..a.max(b));
    prop_oneof![
        prop::collection::vec(0..rows, 0..20).prop_map(Part::Tokens),
        (0..2_usize, range).prop_map(|(image, rows)| Part::Image(image, rows)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_is_the_tokens_or_the_images(parts_of_prompt in prop::collection::vec(part(), 0..8)) {
        let Parts { embedder, images } = parts();
        let mut runs = Vec::new();
        let mut wanted = Vec::new();
        for part in &parts_of_prompt {
            match part {
                Part::Tokens(ids) => {
                    runs.push(Run::Tokens(ids));
                    for id in ids {
                        wanted.push(embedder.embed(&[*id]).unwrap().row(0).to_owned());
                    }
                }
                Part::Image(image, rows) => {
                    runs.push(Run::Image { embeds: &images[*image], rows: rows.clone() });
                    wanted.extend(rows.clone().map(|row| images[*image].rows().row(row).to_owned()));
                }
            }
        }
        let embeds = embedder.splice(&runs).unwrap();
        prop_assert_eq!(embeds.dim(), (wanted.len(), package().manifest().decoder.hidden));
        for (row, wanted) in embeds.rows().into_iter().zip(&wanted) {
            prop_assert_eq!(row, wanted.view());
        }
    }
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "a caller may pass one")]
fn rows_that_do_not_exist_are_refused() {
    let Parts { embedder, images } = parts();
    let positions = package().manifest().vision.tokens_per_image;
    let rows = package().manifest().embedding.rows;
    let refusal = |run: Run<'_>| embedder.splice(&[run]).unwrap_err().to_string();
    for range in [0..positions + 1, positions + 1..positions + 1, positions..usize::MAX - positions, 5..3] {
        let error = refusal(Run::Image { embeds: &images[0], rows: range.clone() });
        assert_eq!(error, format!("an image has {positions} positions, not {range:?}"));
    }
    for id in [u32::try_from(rows).unwrap(), u32::MAX] {
        let error = refusal(Run::Tokens(&[0, id]));
        assert_eq!(error, format!("token {id} is beyond the {rows} rows of the embedding table"));
    }
}

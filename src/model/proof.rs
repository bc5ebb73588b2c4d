//! Whether a session computes what the package's goldens say.

use std::sync::Arc;

use ndarray::{Axis, concatenate, s};

use super::chain::{Chain, ComponentReport, Loader, Opened, Serving};
use super::decoder::Decoder;
use super::embed::TokenEmbedder;
use super::goldens::{self, ATTENTION_WEIGHTS, Agreement, Goldens, IMAGE_EMBEDDINGS, LOGITS, PATCH_FEATURES};
use super::head::Head;
use super::kv_cache::PositionKey;
use super::projector::Projector;
use super::rotary::RotaryTable;
use super::vision::VisionEncoder;
use crate::error::{Error, Result};
use crate::package::Component;
use crate::package::manifest::HIDDEN_STATES;

/// Checks a vision encoder.
pub(super) fn check_vision(opened: Opened, goldens: &Goldens) -> Result<(VisionEncoder, Vec<Agreement>)> {
    let tolerance = opened.tolerance.patch_features;
    let mut vision = VisionEncoder::new(opened.graph);
    if let Some(proved) = opened.proved {
        return Ok((vision, proved));
    }
    let features = vision.encode(&goldens.pixel_values.view())?;
    let distance = goldens::distance(features.view().iter(), goldens.patch_features.iter());
    let mut agreements = vec![Agreement { what: PATCH_FEATURES, distance, tolerance }];
    let wanted = goldens.cls_attention.as_ref().zip(opened.tolerance.cls_attention);
    if let (Some(attention), Some((golden, tolerance))) = (features.attention(), wanted) {
        let distance = goldens::distance(attention.iter(), golden.iter());
        agreements.push(Agreement { what: ATTENTION_WEIGHTS, distance, tolerance });
    }
    Ok((vision, agreements))
}

/// Checks a projector.
pub(super) fn check_projector(opened: Opened, goldens: &Goldens) -> Result<(Projector, Vec<Agreement>)> {
    let tolerance = opened.tolerance.image_embeds;
    let mut projector = Projector::new(opened.graph);
    if let Some(proved) = opened.proved {
        return Ok((projector, proved));
    }
    let embeds = projector.project(&goldens.patch_features.view())?;
    let distance = goldens::distance(embeds.rows().iter(), goldens.image_embeds.iter());
    Ok((projector, vec![Agreement { what: IMAGE_EMBEDDINGS, distance, tolerance }]))
}

/// Opens the decoder's head if it needs one, and checks both together.
pub(super) fn check_decoder(
    opened: Opened,
    loader: &Loader,
    goldens: &Goldens,
    embedder: &TokenEmbedder,
    rotary: Option<&Arc<RotaryTable>>,
    head_report: &mut Option<ComponentReport>,
) -> Result<(Decoder, Vec<Agreement>)> {
    let Opened { graph, kv, tolerance, proved, .. } = opened;
    *head_report = None;
    let kv = kv.ok_or_else(|| Error::graph("decoder", "the manifest does not say how its cache is kept"))?;
    let head = if graph.spec().outputs.contains_key(HIDDEN_STATES) {
        // It is proved by the logits, together with the decoder.
        let unproved = |opened: Opened| Ok((Head::new(opened.graph), Vec::new()));
        let (head, report) = Chain::new(loader, Component::Head)?.serve(loader, unproved)?;
        *head_report = Some(report);
        Some(head)
    } else {
        None
    };
    let spec = loader.package.manifest().decoder.clone();
    let run = loader.options.prefill_chunk.unwrap_or(usize::MAX);
    let mut decoder = Decoder::new(graph, head, spec, kv, rotary.cloned(), run);
    if let Some(proved) = proved {
        return Ok((decoder, proved));
    }
    let distance = golden_distance(&mut decoder, goldens, embedder)?;
    if let (Some(head), Some(report)) = (decoder.head(), head_report) {
        report.placement = head.graph().placement()?;
    }
    Ok((decoder, vec![Agreement { what: LOGITS, distance, tolerance: tolerance.logits }]))
}

/// Reads the golden prompt, then each of the next tokens, and gives the largest distance of their logits.
pub(super) fn golden_distance(
    decoder: &mut Decoder,
    goldens: &Goldens,
    embedder: &TokenEmbedder,
) -> Result<f64> {
    let mut cache = decoder.empty_cache()?;
    let before = embedder.embed(&goldens.tokens_before)?;
    let image = goldens.image_embeds.slice(s![0, ..goldens.image_rows, ..]);
    let after = embedder.embed(&goldens.tokens_after)?;
    let prompt = concatenate(Axis(0), &[before.view(), image, after.view()])
        .map_err(|e| Error::Request(format!("the golden prompt cannot be joined: {e}")))?;
    // What stands there is not looked up: the cache is dropped at the end.
    let keys = vec![PositionKey::Token(0); prompt.nrows()];
    let mut logits = decoder.forward(&prompt.view(), &keys, &mut cache)?;
    let mut worst = goldens::distance(logits.values().iter(), goldens.logits_after(0).iter());
    for (read, token) in goldens.next_tokens.iter().enumerate() {
        let row = embedder.embed(&[*token])?;
        logits = decoder.forward(&row.view(), &[PositionKey::Token(*token)], &mut cache)?;
        worst = worst.max(goldens::distance(logits.values().iter(), goldens.logits_after(read + 1).iter()));
    }
    Ok(worst)
}

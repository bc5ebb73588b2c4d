//! What a session must compute before it serves.

use std::path::Path;

use ndarray::{Array2, Array3, Array4, ArrayView1, Axis, Dimension, Ix2, Ix3, Ix4};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::package::ModelPackage;
use crate::package::manifest::{CLS_ATTENTION, GraphSpec, Manifest};
use crate::text::TokenId;

/// The goldens of a package; [`crate::package::manifest::GoldenSpec`] says what they are.
#[derive(Debug)]
pub struct Goldens {
    /// `[1, 3, size, size]`.
    pub(super) pixel_values: Array4<f32>,
    /// `[1, tokens_per_image, vision.hidden]`.
    pub(super) patch_features: Array3<f32>,
    /// `[1, tokens_per_image]`, where an encoder gives it.
    pub(super) cls_attention: Option<Array2<f32>>,
    /// `[1, tokens_per_image, hidden]`.
    pub(super) image_embeds: Array3<f32>,
    pub(super) tokens_before: Vec<TokenId>,
    pub(super) image_rows: usize,
    pub(super) tokens_after: Vec<TokenId>,
    pub(super) next_tokens: Vec<TokenId>,
    /// `[1 + next_tokens, logits_width]`.
    pub(super) logits: Array2<f32>,
}

/// How far a result is from its golden, and how far it may be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// What was compared.
    pub what: &'static str,
    /// The L2 norm of the difference by the L2 norm of the golden; infinite for results that are not numbers.
    #[serde(serialize_with = "finite")]
    pub distance: f64,
    /// The largest distance that passes.
    pub tolerance: f64,
}

/// What the vision encoder is compared by.
pub(super) const PATCH_FEATURES: &str = "patch features";
/// What the vision encoder is compared by, too, where it gives them.
pub(super) const ATTENTION_WEIGHTS: &str = "weights of attention";
/// What the projector is compared by.
pub(super) const IMAGE_EMBEDDINGS: &str = "image embeddings";
/// What the decoder is compared by.
pub(super) const LOGITS: &str = "logits";

impl Agreement {
    /// The name of what is compared, if `what` is one.
    pub(super) fn known(what: &str) -> Option<&'static str> {
        [PATCH_FEATURES, ATTENTION_WEIGHTS, IMAGE_EMBEDDINGS, LOGITS].into_iter().find(|known| *known == what)
    }

    /// Whether the result is near enough.
    pub fn passes(&self) -> bool {
        self.distance <= self.tolerance
    }
}

impl std::fmt::Display for Agreement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.distance.is_finite() {
            write!(
                f,
                "{} differ from the golden by {:.2e}, {:.0e} is allowed",
                self.what, self.distance, self.tolerance
            )
        } else {
            write!(f, "{} are not finite numbers", self.what)
        }
    }
}

/// JSON has no infinity: what is not finite is `null` there.
#[allow(clippy::trivially_copy_pass_by_ref)] // This is how serde hands it over.
fn finite<S: serde::Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    value.is_finite().then_some(*value).serialize(serializer)
}

impl Goldens {
    /// Reads the goldens of `package`.
    ///
    /// # Errors
    /// [`Error::Package`] when the file is not what the manifest says.
    pub fn open(package: &ModelPackage) -> Result<Self> {
        let manifest = package.manifest();
        let path = package.display_path(&manifest.goldens.file);
        let bytes = package.read(&manifest.goldens.file)?;
        Self::parse(&path, &bytes, manifest)
    }

    fn parse(path: &Path, bytes: &[u8], manifest: &Manifest) -> Result<Self> {
        let fault = |reason: String| Error::package(path, format!("{reason}; export again"));
        let file =
            SafeTensors::deserialize(bytes).map_err(|e| fault(format!("these are no goldens ({e})")))?;
        let tensor = |name: &str, dtype: Dtype| {
            let tensor = file.tensor(name).map_err(|_| fault(format!("the goldens have no {name}")))?;
            if tensor.dtype() != dtype {
                return Err(fault(format!("the golden {name} is {:?}, not {dtype:?}", tensor.dtype())));
            }
            Ok(tensor)
        };
        let rows = manifest.decoder.logits_width;
        let tokens = |name: &str| -> Result<Vec<TokenId>> {
            let tensor = tensor(name, Dtype::I64)?;
            let ids = tensor.data().chunks_exact(8).map(|id| {
                let id = id.try_into().map_or(-1, i64::from_le_bytes);
                TokenId::try_from(id).ok().filter(|id| (*id as usize) < manifest.embedding.rows)
            });
            ids.collect::<Option<Vec<_>>>()
                .ok_or_else(|| fault(format!("a token of the golden {name} has no row")))
        };
        let next_tokens = tokens("next_tokens")?;
        let image = manifest.image.size as usize;
        let patches = manifest.vision.tokens_per_image;
        let goldens = Self {
            pixel_values: array::<Ix4>(&tensor("pixel_values", Dtype::F32)?, (1, 3, image, image))
                .ok_or_else(|| fault("the golden pixel_values have another shape".to_owned()))?,
            patch_features: array::<Ix3>(
                &tensor("patch_features", Dtype::F32)?,
                (1, patches, manifest.vision.hidden),
            )
            .ok_or_else(|| fault("the golden patch_features have another shape".to_owned()))?,
            cls_attention: manifest
                .variants
                .values()
                .any(|variant| variant.vision_encoder.as_ref().is_some_and(GraphSpec::gives_attention))
                .then(|| {
                    array::<Ix2>(&tensor(CLS_ATTENTION, Dtype::F32)?, (1, patches))
                        .ok_or_else(|| fault(format!("the golden {CLS_ATTENTION} has another shape")))
                })
                .transpose()?,
            image_embeds: array::<Ix3>(
                &tensor("image_embeds", Dtype::F32)?,
                (1, patches, manifest.decoder.hidden),
            )
            .ok_or_else(|| fault("the golden image_embeds have another shape".to_owned()))?,
            tokens_before: tokens("tokens_before")?,
            image_rows: manifest.goldens.image_rows,
            tokens_after: tokens("tokens_after")?,
            logits: array::<Ix2>(&tensor("logits", Dtype::F32)?, (1 + next_tokens.len(), rows))
                .ok_or_else(|| fault("the golden logits have another shape".to_owned()))?,
            next_tokens,
        };
        let positions = goldens.prompt_length() + goldens.next_tokens.len();
        if goldens.prompt_length() == 0 || positions > manifest.decoder.context {
            let context = manifest.decoder.context;
            return Err(fault(format!("the goldens take {positions} positions of a context of {context}")));
        }
        Ok(goldens)
    }

    /// Positions of the golden prompt.
    pub(super) fn prompt_length(&self) -> usize {
        self.tokens_before.len() + self.image_rows + self.tokens_after.len()
    }

    /// The golden logits after the prompt (0) or after so many of the next tokens.
    pub(super) fn logits_after(&self, next: usize) -> ArrayView1<'_, f32> {
        self.logits.index_axis(Axis(0), next)
    }
}

fn array<D: Dimension>(
    tensor: &safetensors::tensor::TensorView<'_>,
    shape: D::Pattern,
) -> Option<ndarray::Array<f32, D>>
where
    D::Pattern: ndarray::IntoDimension<Dim = D>,
{
    use ndarray::IntoDimension as _;
    let dim = shape.into_dimension();
    if tensor.shape() != dim.slice() {
        return None;
    }
    let values = tensor.data().chunks_exact(4).map(|four| four.try_into().map(f32::from_le_bytes));
    let values = values.collect::<std::result::Result<Vec<f32>, _>>().ok()?;
    ndarray::Array::from_shape_vec(dim, values).ok()
}

/// The L2 norm of the difference by the L2 norm of `wanted`; infinite when `found` holds what is no number or has
/// another length.
pub fn distance<'a>(
    found: impl ExactSizeIterator<Item = &'a f32>,
    wanted: impl ExactSizeIterator<Item = &'a f32>,
) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (found, wanted) in found.zip(wanted) {
        let (found, wanted) = (f64::from(*found), f64::from(*wanted));
        difference += (found - wanted).powi(2);
        norm += wanted.powi(2);
    }
    let distance = (difference / norm).sqrt();
    if distance.is_finite() { distance } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_relative_and_infinite_for_what_is_no_number() {
        let far = |found: &[f32], wanted: &[f32]| distance(found.iter(), wanted.iter());
        assert!((far(&[3.0, 4.0], &[3.0, 4.0])).abs() < f64::EPSILON);
        assert!((far(&[0.0, 0.0], &[3.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!(far(&[f32::NAN, 4.0], &[3.0, 4.0]).is_infinite());
        assert!(far(&[f32::INFINITY, 4.0], &[3.0, 4.0]).is_infinite());
        assert!(far(&[3.0], &[3.0, 4.0]).is_infinite());
    }

    #[test]
    fn an_agreement_without_numbers_is_null_in_json_and_words_in_text() {
        let bad = Agreement { what: "logits", distance: f64::INFINITY, tolerance: 0.1 };
        assert!(!bad.passes());
        assert_eq!(bad.to_string(), "logits are not finite numbers");
        assert_eq!(
            serde_json::to_string(&bad).unwrap(),
            r#"{"what":"logits","distance":null,"tolerance":0.1}"#
        );
        let good = Agreement { distance: 0.05, ..bad };
        assert!(good.passes());
        assert_eq!(good.to_string(), "logits differ from the golden by 5.00e-2, 1e-1 is allowed");
    }
}

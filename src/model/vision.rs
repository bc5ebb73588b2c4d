//! Pixels to patch features.

use ndarray::{Array2, Array3, ArrayView1, ArrayView3, ArrayView4, Axis};
use sha2::{Digest, Sha256};

use super::chain::Serving;
use super::visual_tokens::VisualTokens;
use crate::error::{Error, Result};
use crate::image::PixelValues;
use crate::package::manifest::CLS_ATTENTION;
use crate::runtime::{Graph, Tensor};

/// An image that is ready for the encoder, and what identifies it.
///
/// Two images with the same pixel values are the same image, whatever their files were called.
#[derive(Clone, Debug)]
pub struct ImageInput {
    pixels: PixelValues,
    hash: [u8; 32],
}

impl ImageInput {
    /// Hashes `pixels`, which are `[1, 3, size, size]` f32.
    pub fn new(pixels: PixelValues) -> Self {
        let mut hasher = Sha256::new();
        for value in pixels.view() {
            hasher.update(value.to_le_bytes());
        }
        Self { pixels, hash: hasher.finalize().into() }
    }

    /// The pixel values.
    pub fn pixels(&self) -> &PixelValues {
        &self.pixels
    }

    /// SHA-256 of the pixel values.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }
}

/// What the encoder sees in each patch: `[1, tokens_per_image, vision.hidden]` f32, without the class token.
#[derive(Clone, Debug)]
pub struct PatchFeatures {
    rows: Array3<f32>,
    attention: Option<Array2<f32>>,
}

impl PatchFeatures {
    /// The features, `[1, tokens_per_image, vision.hidden]`.
    pub fn view(&self) -> ArrayView3<'_, f32> {
        self.rows.view()
    }

    /// How much the class token attends to each row, `[tokens_per_image]`; `None` of an encoder that does not say.
    pub fn attention(&self) -> Option<ArrayView1<'_, f32>> {
        self.attention.as_ref().map(|attention| attention.index_axis(Axis(0), 0))
    }

    /// The rows that `tokens` asks for, `[1, count, vision.hidden]`; as they are when it asks for all.
    ///
    /// # Errors
    /// [`Error::Graph`] when fewer are asked for and the encoder did not say which matter.
    pub fn chosen(self, tokens: VisualTokens) -> Result<Self> {
        if tokens.is_all() {
            return Ok(self);
        }
        let attention = self.attention().ok_or_else(|| {
            Error::graph("vision_encoder", format!("it gives no {CLS_ATTENTION}; export again"))
        })?;
        let rows = tokens.choose(&self.rows.index_axis(Axis(0), 0), &attention)?;
        Ok(Self { rows: rows.insert_axis(Axis(0)), attention: None })
    }
}

/// The CLIP encoder up to the layer that the projector was trained on.
#[derive(Debug)]
pub struct VisionEncoder {
    graph: Graph,
}

impl VisionEncoder {
    pub(super) fn new(graph: Graph) -> Self {
        Self { graph }
    }

    /// Encodes one image, `[1, 3, size, size]`.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] when ONNX Runtime fails, [`crate::Error::Cancelled`] when it was told to stop,
    /// [`crate::Error::Unsound`] when the features are not finite.
    pub fn encode(&mut self, pixels: &ArrayView4<'_, f32>) -> Result<PatchFeatures> {
        let input = Tensor::from_array(self.graph.input_dtype("pixel_values"), pixels)?;
        let mut outputs = self.graph.run(&[("pixel_values", &input)])?;
        let rows = outputs.take("patch_features")?.to_array()?;
        check_finite(&self.graph, "features", &rows.view())?;
        let mut attention: Option<Array2<f32>> = None;
        if self.graph.spec().gives_attention() {
            let weights = attention.insert(outputs.take(CLS_ATTENTION)?.to_array()?);
            check_finite(&self.graph, "weights of attention", &weights.view().insert_axis(Axis(0)))?;
        }
        Ok(PatchFeatures { rows, attention })
    }
}

impl Serving for VisionEncoder {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}

/// Refuses what no later stage can make sense of.
pub(super) fn check_finite(graph: &Graph, what: &str, values: &ArrayView3<'_, f32>) -> Result<()> {
    match values.indexed_iter().find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some(((_, row, column), value)) => Err(Error::Unsound {
            graph: graph.name().to_owned(),
            reason: format!("its {what} are not finite numbers ({value} at row {row}, column {column})"),
        }),
    }
}

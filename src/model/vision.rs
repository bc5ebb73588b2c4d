//! Pixels to patch features.

use ndarray::{Array3, ArrayView3};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::image::PixelValues;
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
pub struct PatchFeatures(pub(super) Array3<f32>);

impl PatchFeatures {
    /// The features, `[1, tokens_per_image, vision.hidden]`.
    pub fn view(&self) -> ArrayView3<'_, f32> {
        self.0.view()
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

    /// Encodes one image.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] when ONNX Runtime fails, [`crate::Error::Cancelled`] when it was told to stop.
    pub fn encode(&mut self, pixels: &PixelValues) -> Result<PatchFeatures> {
        let input = Tensor::from_array(&pixels.view())?;
        let mut outputs = self.graph.run(&[("pixel_values", &input)])?;
        outputs.take("patch_features")?.to_array().map(PatchFeatures)
    }
}

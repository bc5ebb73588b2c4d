//! Patch features to image embeddings.

use ndarray::{Array3, ArrayView2, Axis};

use super::vision::PatchFeatures;
use crate::error::Result;
use crate::runtime::{Graph, Tensor};

/// One image in the decoder's own terms: `[1, tokens_per_image, decoder.hidden]` f32.
#[derive(Clone, Debug)]
pub struct ImageEmbeds(Array3<f32>);

impl ImageEmbeds {
    /// One row a position, `[tokens_per_image, decoder.hidden]`.
    pub fn rows(&self) -> ArrayView2<'_, f32> {
        self.0.index_axis(Axis(0), 0)
    }
}

/// The two linear layers between the encoder and the decoder.
#[derive(Debug)]
pub struct Projector {
    graph: Graph,
}

impl Projector {
    pub(super) fn new(graph: Graph) -> Self {
        Self { graph }
    }

    /// Projects the features of one image.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] when ONNX Runtime fails, [`crate::Error::Cancelled`] when it was told to stop.
    pub fn project(&mut self, features: &PatchFeatures) -> Result<ImageEmbeds> {
        let input = Tensor::from_array(&features.view())?;
        let mut outputs = self.graph.run(&[("patch_features", &input)])?;
        outputs.take("image_embeds")?.to_array().map(ImageEmbeds)
    }
}

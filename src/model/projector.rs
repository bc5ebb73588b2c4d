//! Patch features to image embeddings.

use ndarray::{Array3, ArrayView2, ArrayView3, Axis};

use super::chain::Serving;
use super::vision::check_finite;
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

    /// Projects the features of one image, `[1, tokens_per_image, vision.hidden]`.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] when ONNX Runtime fails, [`crate::Error::Cancelled`] when it was told to stop,
    /// [`crate::Error::Unsound`] when the embeddings are not finite.
    pub fn project(&mut self, features: &ArrayView3<'_, f32>) -> Result<ImageEmbeds> {
        let input = Tensor::from_array(self.graph.input_dtype("patch_features"), features)?;
        let mut outputs = self.graph.run(&[("patch_features", &input)])?;
        let embeds = outputs.take("image_embeds")?.to_array()?;
        check_finite(&self.graph, "embeddings", &embeds)?;
        Ok(ImageEmbeds(embeds))
    }
}

impl Serving for Projector {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}

//! Patch features to image embeddings.

use ndarray::{Array3, ArrayView2, ArrayView3, Axis, s};

use super::chain::Serving;
use super::vision::check_finite;
use crate::error::Result;
use crate::package::manifest::Dim;
use crate::runtime::{Graph, Tensor};

/// One image in the decoder's own terms: `[1, rows, decoder.hidden]` f32, as many rows as positions.
#[derive(Clone, Debug)]
pub struct ImageEmbeds(Array3<f32>);

impl ImageEmbeds {
    /// One row a position, `[rows, decoder.hidden]`.
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

    /// Projects the features of one image, `[1, rows, vision.hidden]`, each row by itself: a graph for more rows is given
    /// zeros in the place of those that are missing.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] when ONNX Runtime fails, [`crate::Error::Cancelled`] when it was told to stop,
    /// [`crate::Error::Unsound`] when the embeddings are not finite.
    pub fn project(&mut self, features: &ArrayView3<'_, f32>) -> Result<ImageEmbeds> {
        let dtype = self.graph.input_dtype("patch_features");
        let rows = features.len_of(Axis(1));
        let input = match self.graph.spec().inputs.get("patch_features").map(|input| &input.shape[..]) {
            Some([_, Dim::Fixed(fixed), _]) if *fixed > rows => {
                let mut whole = Array3::zeros((1, *fixed, features.len_of(Axis(2))));
                whole.slice_mut(s![.., ..rows, ..]).assign(features);
                Tensor::from_array(dtype, &whole.view())?
            }
            _ => Tensor::from_array(dtype, features)?,
        };
        let mut outputs = self.graph.run(&[("patch_features", &input)])?;
        let mut embeds: Array3<f32> = outputs.take("image_embeds")?.to_array()?;
        if embeds.len_of(Axis(1)) > rows {
            embeds = embeds.slice(s![.., ..rows, ..]).to_owned();
        }
        check_finite(&self.graph, "embeddings", &embeds.view())?;
        Ok(ImageEmbeds(embeds))
    }
}

impl Serving for Projector {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}

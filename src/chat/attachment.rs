//! An image in a conversation: what was given, and what the model sees of it.

use std::sync::Arc;

use crate::engine::Engine;
use crate::error::Result;
use crate::model::vision::ImageInput;
use crate::package::manifest::Fit;

/// An image that was added to a conversation. Clones share the bytes.
#[derive(Clone, Debug)]
pub struct Attachment {
    name: String,
    bytes: Arc<[u8]>,
    fit: Option<Fit>,
    input: Arc<ImageInput>,
}

impl Attachment {
    /// Decodes and resizes the image file `bytes`. `name` is what errors call it; `fit` replaces the manifest's choice.
    ///
    /// # Errors
    /// [`crate::Error::Image`] for anything that is not a whole image within the engine's limits.
    pub fn new(
        engine: &Engine,
        name: impl Into<String>,
        bytes: impl Into<Arc<[u8]>>,
        fit: Option<Fit>,
    ) -> Result<Self> {
        let (name, bytes) = (name.into(), bytes.into());
        let input = engine.prepare_image(&name, &bytes, fit)?;
        Ok(Self { name, bytes, fit, input })
    }

    /// What the image is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image file as it was given.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How the picture is made square, where the manifest does not decide.
    pub fn fit(&self) -> Option<Fit> {
        self.fit
    }

    /// What the model sees.
    pub fn input(&self) -> &Arc<ImageInput> {
        &self.input
    }
}

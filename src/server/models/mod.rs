//! Which models answer, by name.
//!
//! A model is lent to each request that it answers. One that nobody has borrowed may be closed to make room.

mod directory;
mod place;
mod registry;

use std::sync::Arc;

use super::error::{Answer, ApiError};
use super::metrics::{Seen, Served};
use crate::engine::Engine;
use crate::error::Result;
use crate::package::Component;
use crate::package::manifest::Fit;
use registry::Registry;

pub use directory::ModelsDirectory;
pub(super) use place::{Condition, Tally};

/// A model that answers.
#[derive(Clone, Debug)]
pub struct Model {
    /// What requests call it.
    pub name: String,
    /// The engine behind it.
    pub engine: Engine,
    /// How pictures are made square, where the manifest does not decide.
    pub fit: Option<Fit>,
    /// When it was made or opened, in seconds since 1970.
    pub created: u64,
}

impl Model {
    /// What runs the decoder, which decides how fast answers are.
    pub(super) fn provider(&self) -> String {
        let reports = self.engine.reports();
        let decoder = reports.iter().find(|report| report.component == Component::Decoder);
        decoder.map(|report| report.provider.to_string()).unwrap_or_default()
    }

    fn served(&self) -> Served {
        Served { model: self.name.clone(), reports: self.engine.reports(), load: self.engine.load() }
    }
}

/// The models of one server. Clones share them.
#[derive(Clone, Debug)]
pub struct Models(Arc<Registry>);

impl Models {
    /// One model, which stays.
    pub fn one(model: Model) -> Self {
        Self(Arc::new(Registry::of_one(model)))
    }

    /// Every package in a directory, opened when it is asked for. Blocks while those that are named are opened.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request) for a directory that cannot be read or holds no package, a name that it
    /// does not hold, or more names than models may be open at once; and those of opening them.
    pub fn in_directory(directory: ModelsDirectory) -> Result<Self> {
        let preload = directory.preload.clone();
        let models = Self(Arc::new(directory.read()?));
        models.0.preload(&preload)?;
        Ok(models)
    }

    /// The model that requests call `name`, open or not; without a name the one that stays.
    ///
    /// # Errors
    /// When there is no such model, or none is named and those of a directory are served.
    pub(super) fn get(&self, name: Option<&str>) -> Answer<Offered> {
        let index = match name {
            Some(name) => self.0.position(name).ok_or_else(|| ApiError::no_model(name))?,
            None => self.0.only().ok_or_else(|| ApiError::unnamed_model(&self.0.names()))?,
        };
        Ok(Offered { name: self.0.name(index).to_owned(), registry: Arc::clone(&self.0), index })
    }

    /// How often each model came and went, and those that are open, as metrics show them.
    pub(super) fn seen(&self) -> Seen {
        Seen { served: self.served(), tallies: self.0.tallies() }
    }

    fn served(&self) -> Vec<Served> {
        let mut served = Vec::new();
        self.0.each(|_, condition| {
            if let Condition::Ready(model) = condition {
                served.push(model.served());
            }
        });
        served
    }

    /// Shows every model; the registry waits meanwhile.
    pub(super) fn each<T>(&self, mut show: impl FnMut(&Offer, Condition<'_>) -> T) -> Vec<T> {
        let mut shown = Vec::new();
        self.0.each(|offer, condition| shown.push(show(offer, condition)));
        shown
    }

    /// Opens no further model; whoever waits for one is told so.
    pub(super) fn close(&self) {
        self.0.close();
    }
}

/// What is known of a model that need not be open.
#[derive(Clone, Debug)]
pub(super) struct Offer {
    /// What requests call it.
    pub(super) name: String,
    /// When it was made or opened, in seconds since 1970.
    pub(super) created: u64,
    /// Positions of its context and of an image, where its manifest can be read.
    pub(super) positions: Option<(usize, usize)>,
}

/// A model that somebody asks for.
#[derive(Clone, Debug)]
pub(super) struct Offered {
    /// What requests call it.
    pub(super) name: String,
    registry: Arc<Registry>,
    index: usize,
}

impl Offered {
    /// The model, opened if it is not. It stays open as long as what is given is held.
    ///
    /// # Errors
    /// 503 when it cannot be opened, or there is no room for it beside models that are answering.
    pub(super) async fn borrow(&self) -> Answer<Arc<Model>> {
        self.registry.borrow(self.index).await
    }
}

//! Stopping a model from another thread.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::runtime;

/// Stops whichever graph of a model runs, at the next operator. Clones stop the same model.
#[derive(Clone, Debug, Default)]
pub struct Canceler {
    graphs: Vec<runtime::Canceler>,
    asked: Arc<AtomicBool>,
}

impl Canceler {
    pub(super) fn add(&mut self, graph: runtime::Canceler) {
        self.graphs.push(graph);
    }

    /// Ends the run in progress with [`crate::Error::Cancelled`], and those that follow until [`Canceler::reset`].
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.graphs.iter().for_each(runtime::Canceler::cancel);
    }

    /// Lets the graphs run again.
    pub fn reset(&self) {
        self.asked.store(false, Ordering::SeqCst);
        self.graphs.iter().for_each(runtime::Canceler::reset);
    }

    /// Whether the model is to stop; for a model that does work outside its graphs, or has none.
    pub fn is_cancelled(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

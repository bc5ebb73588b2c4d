//! Stopping a model from another thread.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::package::Component;
use crate::runtime;

/// Stops whichever graph of a model runs, at the next operator. Clones stop the same model.
#[derive(Clone, Debug, Default)]
pub struct Canceler {
    graphs: Arc<Mutex<BTreeMap<Component, runtime::Canceler>>>,
    asked: Arc<AtomicBool>,
}

impl Canceler {
    /// Lets `graph` be stopped from now on, instead of the one that served `component` before.
    pub(super) fn serve(&self, component: Component, graph: runtime::Canceler) {
        let mut graphs = self.graphs();
        if self.is_cancelled() {
            graph.cancel();
        }
        graphs.insert(component, graph);
    }

    /// Ends the run in progress with [`crate::Error::Cancelled`], and those that follow until [`Canceler::reset`].
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.graphs().values().for_each(runtime::Canceler::cancel);
    }

    /// Lets the graphs run again.
    pub fn reset(&self) {
        self.asked.store(false, Ordering::SeqCst);
        self.graphs().values().for_each(runtime::Canceler::reset);
    }

    /// Whether the model is to stop; for a model that does work outside its graphs, or has none.
    pub fn is_cancelled(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    fn graphs(&self) -> MutexGuard<'_, BTreeMap<Component, runtime::Canceler>> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

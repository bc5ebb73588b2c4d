//! Ends a run from another thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::session::RunOptions;

use crate::error::Error;

/// Ends a [`Graph`](super::Graph)'s run from another thread; ONNX Runtime looks between two operators.
#[derive(Clone)]
pub struct Canceler {
    pub(super) options: Arc<RunOptions>,
    asked: Arc<AtomicBool>,
}

impl Canceler {
    pub(super) fn new() -> ort::Result<Self> {
        Ok(Self { options: Arc::new(RunOptions::new()?), asked: Arc::new(AtomicBool::new(false)) })
    }

    /// Ends the run in progress, or the next one if none is, with [`Error::Cancelled`].
    ///
    /// Once a run has ended so, the graph can run again.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        // Setting a flag in a live object does not fail.
        let _ = self.options.terminate();
    }

    /// Forgets a [`Canceler::cancel`] that no run has seen.
    pub fn reset(&self) {
        self.asked.store(false, Ordering::SeqCst);
        let _ = self.options.unterminate();
    }

    pub(super) fn explain(&self, graph: &str, error: ort::Error) -> Error {
        if self.asked.load(Ordering::SeqCst) {
            self.reset();
            return Error::Cancelled;
        }
        Error::graph(graph, "ONNX Runtime could not run it").because(error)
    }
}

impl fmt::Debug for Canceler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceler").field("asked", &self.asked).finish_non_exhaustive()
    }
}

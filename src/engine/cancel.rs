//! Giving up on an answer from another thread.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::model::cancel::Canceler;

/// Stops one request: at the next token, or in the middle of a graph that runs for it. Clones stop the same request.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<State>);

#[derive(Default)]
struct State {
    cancelled: AtomicBool,
    /// What ends the graph that runs for the request.
    canceler: Mutex<Option<Canceler>>,
}

impl CancelToken {
    /// A token for one request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives up on the request. What was answered so far is kept.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        if let Some(canceler) = self.canceler().as_ref() {
            canceler.cancel();
        }
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Runs `work` on the model whose graphs `canceler` ends: at a cancellation meanwhile, at once if it was before, and
    /// not for one of somebody else that no graph has seen.
    pub(super) fn during<T>(&self, canceler: Canceler, work: impl FnOnce() -> T) -> T {
        canceler.reset();
        *self.canceler() = Some(canceler);
        if self.is_cancelled() {
            self.cancel();
        }
        let result = work();
        *self.canceler() = None;
        result
    }

    fn canceler(&self) -> MutexGuard<'_, Option<Canceler>> {
        self.0.canceler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

//! Giving up on an answer from another thread.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

type Hook = Box<dyn Fn() + Send>;

/// Stops one request: at the next token, or in the middle of a graph that runs for it. Clones stop the same request.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<State>);

#[derive(Default)]
struct State {
    cancelled: AtomicBool,
    hook: Mutex<Option<Hook>>,
}

impl CancelToken {
    /// A token for one request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives up on the request. What was answered so far is kept.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        let hook = self.0.hook.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(hook) = hook.as_ref() {
            hook();
        }
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Runs `work`; a cancellation meanwhile calls `hook`, one before calls it at once.
    pub(super) fn during<T>(&self, hook: impl Fn() + Send + 'static, work: impl FnOnce() -> T) -> T {
        *self.0.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
        if self.is_cancelled() {
            self.cancel();
        }
        let result = work();
        *self.0.hook.lock().unwrap_or_else(PoisonError::into_inner) = None;
        result
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

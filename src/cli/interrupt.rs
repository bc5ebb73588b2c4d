//! Ctrl-C as a cancellation of the answer that is being made.

use std::sync::{Mutex, Once, PoisonError};

use crate::engine::cancel::CancelToken;

static RUNNING: Mutex<Option<CancelToken>> = Mutex::new(None);
static HANDLER: Once = Once::new();

/// Runs `work`; Ctrl-C meanwhile cancels `token`, and a second one ends the program.
pub(super) fn cancels<T>(token: &CancelToken, work: impl FnOnce() -> T) -> T {
    HANDLER.call_once(|| {
        // Without a handler Ctrl-C ends the program at once, which is no worse.
        let _ = ctrlc::set_handler(on_interrupt);
    });
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
    let result = work();
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = None;
    result
}

fn on_interrupt() {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match running {
        Some(token) if !token.is_cancelled() => token.cancel(),
        #[allow(clippy::exit)] // A signal handler has nowhere to return an exit code to.
        _ => std::process::exit(i32::from(super::INTERRUPTED)),
    }
}

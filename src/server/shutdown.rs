//! How a server is told to end.

use std::sync::Arc;

use tokio::sync::watch;

/// Tells a server to end: the first time it finishes what it began, the second time it gives up on that. Clones tell
/// the same server.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<u32>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Shutdown {
    /// A server's own.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells the server once more.
    pub fn ask(&self) {
        self.0.send_modify(|asked| *asked = asked.saturating_add(1));
    }

    /// Waits until it was told so often.
    pub(super) async fn asked(&self, times: u32) {
        // The sender lives in `self`, so that this ends only when the number is reached.
        let _ = self.0.subscribe().wait_for(|asked| *asked >= times).await;
    }

    /// Asks whenever the system does: Ctrl-C, and on Unix SIGTERM.
    pub(super) async fn on_signals(self) {
        loop {
            if signal().await.is_err() {
                // Without a handler the signal ends the program at once, which is no worse.
                return;
            }
            self.ask();
        }
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}

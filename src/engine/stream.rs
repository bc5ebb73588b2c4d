//! Events as an iterator; dropping it cancels.

use std::{ops::ControlFlow, sync::mpsc};

use super::cancel::CancelToken;
use super::event::{Completion, Event, Sink};
use crate::error::{Error, Result};

/// The events of one request. Blocks until the next one; dropping it before the last one stops the request.
#[derive(Debug)]
pub struct GenerationStream {
    events: mpsc::Receiver<Result<Event>>,
    cancel: CancelToken,
    ended: bool,
}

impl GenerationStream {
    /// A sink and the stream that it fills.
    pub(super) fn new(cancel: CancelToken) -> (Sink, Self) {
        let (sender, events) = mpsc::channel();
        let sink = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        (Box::new(sink), Self { events, cancel, ended: false })
    }

    /// The request was not taken: there is nothing to stop, and the token is left for the next one.
    pub(super) fn refused(&mut self) {
        self.ended = true;
    }

    /// Waits for the end, dropping the pieces of text.
    ///
    /// # Errors
    /// The request's own error, and [`Error::Stopped`] when the engine ended without an answer.
    pub fn complete(self) -> Result<Completion> {
        self.complete_with(|_| ControlFlow::Continue(()))
    }

    /// Waits for the end; `on_event` sees the pieces of text, and whether the answer begins anew, as they come. `Break`
    /// stops the request, and what was answered so far is its completion.
    ///
    /// # Errors
    /// As [`GenerationStream::complete`].
    pub fn complete_with(
        mut self,
        mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<Completion> {
        while let Some(event) = self.next() {
            match event? {
                Event::Finished(completion) => return Ok(*completion),
                event => {
                    if on_event(&event).is_break() {
                        self.cancel.cancel();
                    }
                }
            }
        }
        Err(Error::Stopped("the request has no answer".to_owned()))
    }
}

impl Iterator for GenerationStream {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        let event = self.events.recv().ok();
        self.ended = !matches!(event, Some(Ok(Event::Text(_) | Event::Restarted(_))));
        event
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        // The token is the caller's: a request that has ended leaves it as it is, for the next one.
        if !self.ended {
            self.cancel.cancel();
        }
    }
}

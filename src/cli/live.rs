//! An answer on the terminal while it comes.

use std::{
    io::{self, Write as _},
    ops::ControlFlow,
};

use crate::engine::event::Event;
use crate::model::Demotion;

/// Writes what happens to an answer: text to standard output, a notice to standard error when it begins anew.
#[derive(Debug)]
pub(super) struct Live {
    written: io::Result<()>,
}

impl Live {
    pub(super) fn new() -> Self {
        Self { written: Ok(()) }
    }

    /// Writes one event; breaks once nobody reads.
    pub(super) fn show(&mut self, event: &Event) -> ControlFlow<()> {
        let mut stdout = io::stdout();
        self.written = match event {
            Event::Text(delta) => write!(stdout, "{}", delta.text).and_then(|()| stdout.flush()),
            Event::Restarted(demotion) => {
                writeln!(stdout).and_then(|()| writeln!(io::stderr(), "notice: {}", restarted(demotion)))
            }
            Event::Finished(_) => Ok(()),
        };
        if self.written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// What went wrong with the writing.
    pub(super) fn finish(self) -> io::Result<()> {
        self.written
    }
}

/// A sentence about an answer that begins anew.
pub(super) fn restarted(demotion: &Demotion) -> String {
    let Demotion { component, refusal, variant, provider } = demotion;
    format!(
        "the {} {} on {} was taken out of service ({}); {variant} on {provider} answers from the beginning",
        component.name(),
        refusal.variant,
        refusal.provider,
        refusal.reason
    )
}

//! How one model of several is, and how often it came and went.

use std::{sync::Arc, time::Instant};

use tokio::sync::watch;

use super::Model;
use crate::server::error::Answer;

/// A model of several.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// How it is.
    pub(super) state: State,
    /// Requests that wait for it.
    pub(super) waiting: usize,
    /// The count of uses when it was last borrowed.
    pub(super) used: u64,
    /// How often it came and went.
    pub(super) tally: Tally,
}

/// How often a model came and went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Tally {
    /// It was opened.
    pub(in crate::server) loaded: u64,
    /// It could not be opened.
    pub(in crate::server) failed: u64,
    /// There was no room for it.
    pub(in crate::server) no_room: u64,
    /// It was closed for another.
    pub(in crate::server) unloaded: u64,
}

impl Place {
    /// The place of a model that is open, and stays.
    pub(super) fn of(model: Model) -> Self {
        let tally = Tally { loaded: 1, ..Tally::default() };
        Self { state: State::Ready(Arc::new(model), 0), tally, ..Self::default() }
    }

    /// How it is, to be shown.
    pub(super) fn condition(&self) -> Condition<'_> {
        match &self.state {
            State::Unloaded => Condition::Unloaded,
            State::Loading(_) => Condition::Loading,
            State::Ready(model, _) => Condition::Ready(model),
            State::Failed(failure) => Condition::Failed(&failure.reason),
        }
    }

    /// Bytes that it takes, where that was planned.
    pub(super) fn held(&self) -> u64 {
        match self.state {
            State::Ready(_, held) => held,
            _ => 0,
        }
    }
}

/// An attempt to open a model, and once it has ended what came of it.
pub(super) type Attempt = watch::Receiver<Option<Answer<()>>>;

/// How a model is now, with what that takes.
#[derive(Debug, Default)]
pub(super) enum State {
    /// Nobody has asked for it, or it had to leave.
    #[default]
    Unloaded,
    /// It is being opened.
    Loading(Attempt),
    /// Open; with the bytes that it takes, where that was planned.
    Ready(Arc<Model>, u64),
    /// It could not be opened.
    Failed(Failure),
}

/// Why a model could not be opened.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// What clients are told.
    pub(super) reason: String,
    /// Until then it is not tried again.
    pub(super) until: Instant,
}

/// How a model is now, to be shown.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) enum Condition<'a> {
    /// Nobody has asked for it, or it had to leave.
    Unloaded,
    /// It is being opened.
    Loading,
    /// It answers.
    Ready(&'a Arc<Model>),
    /// It could not be opened, for this reason.
    Failed(&'a str),
}

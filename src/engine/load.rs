//! What an engine has to do, and what it has done.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// What an engine is busy with, and totals since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EngineLoad {
    /// Requests that were not begun.
    pub waiting: usize,
    /// Requests that were begun and are not over.
    pub active: usize,
    /// Requests that can be active at once.
    pub parallel: usize,
    /// Why that is less than was asked for, or why the positions are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<String>,
    /// Positions that the active requests may come to hold.
    pub positions: usize,
    /// How many they may hold together.
    pub positions_limit: usize,
    /// Requests that ended, however they did.
    pub completed: u64,
    /// Requests that were not taken since too many waited.
    pub refused: u64,
    /// Images that were encoded.
    pub encoded: u64,
    /// Pieces of prompts that were read.
    pub pieces: u64,
    /// Positions of prompts.
    pub prompt_positions: u64,
    /// Those of them that had been read before.
    pub cached_positions: u64,
    /// Steps in which one or more requests were decoded.
    pub steps: u64,
    /// Tokens that these steps read.
    pub step_tokens: u64,
}

/// The load, as the engine's thread last said.
#[derive(Clone, Debug, Default)]
pub(super) struct LoadReport(Arc<Mutex<EngineLoad>>);

impl LoadReport {
    /// As it was last said.
    pub(super) fn get(&self) -> EngineLoad {
        self.load().clone()
    }

    /// Changes what is said.
    pub(super) fn update(&self, change: impl FnOnce(&mut EngineLoad)) {
        change(&mut self.load());
    }

    /// The most requests that are taken at once where `queue` may wait beyond those that can be active.
    pub(super) fn most(&self, queue: Option<usize>) -> usize {
        queue.map_or(usize::MAX, |queue| self.load().parallel.saturating_add(queue))
    }

    /// Counts one more request if there are fewer than [`LoadReport::most`]; tells how many wait otherwise.
    pub(super) fn enter(&self, queue: Option<usize>) -> Result<(), usize> {
        let most = self.most(queue);
        let mut load = self.load();
        if load.waiting + load.active >= most {
            load.refused += 1;
            return Err(load.waiting);
        }
        load.waiting += 1;
        Ok(())
    }

    fn load(&self) -> MutexGuard<'_, EngineLoad> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! One request's answers while they are made; dropping them gives up on all.

use std::{
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;

use super::error::{Answer, ApiError, CHAT};
use super::log::Entry;
use super::models::{Model, Offered};
use super::state::AppState;
use crate::engine::Request;
use crate::engine::cancel::CancelToken;
use crate::engine::event::{Completion, Event, Usage};
use crate::error::{Error, Result};
use crate::generate::sequence::FinishReason;

/// What gives up on the answers of one request.
#[derive(Debug, Default)]
pub(super) struct Leash(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    pulled: bool,
    tokens: Vec<CancelToken>,
}

impl Leash {
    /// Takes one more answer, which is given up on at once where the others were.
    fn take(&self, token: CancelToken) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.pulled {
            token.cancel();
        }
        held.tokens.push(token);
    }

    fn is_pulled(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pulled
    }

    /// Gives up on all answers.
    pub(super) fn pull(&self) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.pulled = true;
        for token in &held.tokens {
            token.cancel();
        }
    }
}

/// What a request holds while it is answered: its place among all, and its leash.
#[derive(Debug)]
struct Guard {
    state: AppState,
    leash: Arc<Leash>,
    number: u64,
    entry: Entry,
    _place: OwnedSemaphorePermit,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Whoever has ended does not mind.
        self.leash.pull();
        self.state.forget(self.number);
    }
}

/// The answers to one request while they are made, in whatever order their pieces come. Dropping them gives up on those
/// that have not ended.
#[derive(Debug)]
pub(super) struct Generation {
    events: mpsc::UnboundedReceiver<(usize, Result<Event>)>,
    left: usize,
    deadline: Instant,
    guard: Guard,
    /// It stays open as long as it answers.
    _model: Arc<Model>,
}

impl Generation {
    /// Prepares requests on a thread that may block, and queues them.
    ///
    /// # Errors
    /// Those of `prepare`, and what the engine refuses, with parameters called as chats do.
    pub(super) async fn start(
        state: &AppState,
        model: &Offered,
        entry: Entry,
        prepare: impl FnOnce(&Model) -> Answer<Vec<Request>> + Send + 'static,
    ) -> Answer<Self> {
        let place = state.admit()?;
        let leash = Arc::new(Leash::default());
        let number = state.watch(&leash);
        let deadline = entry.arrived() + state.options().limits.request_time;
        let guard = Guard { state: state.clone(), leash: Arc::clone(&leash), number, entry, _place: place };
        let (sender, events) = mpsc::unbounded_channel();
        let (metrics, trace) = (state.metrics().clone(), guard.entry.trace());
        let queue = move |model: &Model| {
            // Whoever left while this waited for a thread needs nothing prepared.
            if leash.is_pulled() {
                return Err(ApiError::going());
            }
            let requests = prepare(model)?;
            let (count, provider) = (requests.len(), model.provider());
            let most = model.engine.most_requests();
            if count > most {
                // Told to come again, a client would come for ever.
                let why = format!(
                    "{count} answers are asked for and the server takes {most} at once; ask for fewer"
                );
                return Err(ApiError::value("n", why));
            }
            for (index, mut request) in requests.into_iter().enumerate() {
                request.deadline = Some(deadline);
                leash.take(request.cancel.clone());
                let sender = sender.clone();
                let mut watch = metrics.watch(&model.name, &provider, trace.clone());
                let sink = move |event| {
                    watch.see(&event);
                    match sender.send((index, event)) {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(_) => ControlFlow::Break(()),
                    }
                };
                // What it refuses and does not name is the prompt: everything else was looked at before.
                let refused = |error| ApiError::from(error).or_about(CHAT);
                model.engine.submit(request, Box::new(sink)).map_err(refused)?;
            }
            Ok(count)
        };
        let prepared = async {
            let model = model.borrow().await?;
            let borrowed = Arc::clone(&model);
            let turn = state.turn().await?;
            // They go along, since the thread goes on when nobody waits for it any more.
            let queue = move || (queue(&borrowed), borrowed, turn).0;
            let left = spawn_blocking(queue).await.map_err(|_| ApiError::internal())??;
            Ok::<_, ApiError>((left, model))
        };
        let (left, model) =
            timeout_at(deadline.into(), prepared).await.map_err(|_| ApiError::deadline())??;
        Ok(Self { events, left, deadline, guard, _model: model })
    }

    /// The next thing that happened to an answer, and the answer's place; `None` after all have ended.
    ///
    /// # Errors
    /// The engine's, and when the answers take longer than they may. Nothing follows an error.
    pub(super) async fn next(&mut self) -> Option<Answer<(usize, Event)>> {
        if self.left == 0 {
            return None;
        }
        let result = match timeout_at(self.deadline.into(), self.events.recv()).await {
            Err(_) => Err(ApiError::deadline()),
            Ok(None) => Err(Error::Stopped("a request has no answer".to_owned()).into()),
            Ok(Some((_, Err(error)))) => Err(error.into()),
            // Nobody else gives up on an answer while somebody waits for it.
            Ok(Some((_, Ok(Event::Finished(completion)))))
                if completion.finish_reason == FinishReason::Cancelled =>
            {
                Err(ApiError::going())
            }
            Ok(Some((index, Ok(event)))) => {
                if let Event::Finished(completion) = &event {
                    self.left -= 1;
                    let Usage { prompt_tokens, completion_tokens, .. } = completion.usage;
                    self.guard.entry.add(prompt_tokens, completion_tokens);
                }
                Ok((index, event))
            }
        };
        if let Err(error) = &result {
            self.guard.entry.ended(error.status());
            self.left = 0;
            self.guard.leash.pull();
        }
        Some(result)
    }

    /// Waits for the end of all answers.
    ///
    /// # Errors
    /// As [`Generation::next`].
    pub(super) async fn complete(mut self) -> Answer<Vec<Completion>> {
        let mut completions = Vec::new();
        while let Some(event) = self.next().await {
            if let (index, Event::Finished(completion)) = event? {
                completions.push((index, *completion));
            }
        }
        completions.sort_by_key(|(index, _)| *index);
        Ok(completions.into_iter().map(|(_, completion)| completion).collect())
    }
}

//! Models that come and go: who is open, who waits, and who has to leave.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::directory::ModelsDirectory;
use super::place::{Attempt, Condition, Failure, Place, State, Tally};
use super::{Model, Offer};
use crate::error::{Error, Result, size};
use crate::machine::{Memory, Roots};
use crate::server::error::{Answer, ApiError};

/// The models of a server, in a fixed order.
#[derive(Debug)]
pub(super) struct Registry {
    offers: Vec<Offer>,
    /// What opens them; without it they are open.
    directory: Option<ModelsDirectory>,
    places: Mutex<Vec<Place>>,
    uses: AtomicU64,
    closed: watch::Sender<bool>,
    /// Held while a model is opened: what one takes is only known when it is there.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// Why a model is not open.
enum Refused {
    /// Models that answer take the room.
    Busy(String),
    /// It cannot be opened.
    Failed(Error),
}

impl Registry {
    pub(super) fn of_one(model: Model) -> Self {
        let facts = model.engine.facts();
        let positions = Some((facts.context, facts.tokens_per_image));
        let offer = Offer { name: model.name.clone(), created: model.created, positions };
        let places = vec![Place::of(model)];
        Self { places: Mutex::new(places), ..Self::new(vec![offer], None) }
    }

    pub(super) fn new(offers: Vec<Offer>, directory: Option<ModelsDirectory>) -> Self {
        let places = Mutex::new(offers.iter().map(|_| Place::default()).collect());
        let (uses, closed) = (AtomicU64::new(1), watch::Sender::new(false));
        Self { offers, directory, places, uses, closed, turn: Arc::default() }
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.offers.iter().position(|offer| offer.name == name)
    }

    /// The place of the model that is served alone and stays.
    pub(super) fn only(&self) -> Option<usize> {
        (self.directory.is_none() && self.offers.len() == 1).then_some(0)
    }

    /// What requests call the model at `index`.
    pub(super) fn name(&self, index: usize) -> &str {
        &self.offers[index].name
    }

    /// What requests call the models.
    pub(super) fn names(&self) -> Vec<&str> {
        self.offers.iter().map(|offer| &offer.name[..]).collect()
    }

    /// Shows every model and how it is. No model is borrowed meanwhile.
    pub(super) fn each(&self, mut show: impl FnMut(&Offer, Condition<'_>)) {
        let places = self.places();
        for (offer, place) in self.offers.iter().zip(places.iter()) {
            show(offer, place.condition());
        }
    }

    /// How often each model came and went, by its name.
    pub(super) fn tallies(&self) -> Vec<(String, Tally)> {
        let places = self.places();
        self.offers
            .iter()
            .zip(places.iter())
            .map(|(offer, place)| (offer.name.clone(), place.tally))
            .collect()
    }

    pub(super) fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Opens these models; none is closed for another.
    ///
    /// # Errors
    /// [`Error::Request`] for a name that there is not, or where there is no room for all; and those of opening.
    pub(super) fn preload(&self, names: &[String]) -> Result<()> {
        for name in names {
            let index = self.position(name).ok_or_else(|| {
                let names = self.names().join(", ");
                Error::Request(format!(
                    "--preload {name}: there is no such model in the models directory; there are {names}"
                ))
            })?;
            if matches!(self.places()[index].state, State::Ready(..)) {
                continue;
            }
            let opened = self.open(index, false);
            self.settle(index, opened).map_err(|refused| match refused {
                Refused::Busy(reason) => Error::Request(format!("--preload {name}: {reason}; preload fewer")),
                Refused::Failed(error) => error,
            })?;
        }
        Ok(())
    }

    /// The model at `index`, once it is open.
    pub(super) async fn borrow(self: &Arc<Self>, index: usize) -> Answer<Arc<Model>> {
        let _waiting = Waiting::new(self, index);
        let mut closed = self.closed.subscribe();
        loop {
            let mut attempt = match self.look(index)? {
                Look::Ready(model) => return Ok(model),
                Look::Loading(attempt) => attempt,
            };
            tokio::select! {
                _ = closed.wait_for(|closed| *closed) => return Err(ApiError::going()),
                outcome = attempt.wait_for(Option::is_some) => match outcome.as_deref() {
                    Ok(Some(Err(error))) => return Err(error.clone()),
                    Ok(_) => {}
                    Err(_) => return Err(ApiError::internal()),
                },
            }
        }
    }

    /// The model, or the attempt to open it, which is begun where there is none.
    fn look(self: &Arc<Self>, index: usize) -> Answer<Look> {
        if *self.closed.borrow() {
            return Err(ApiError::going());
        }
        let uses = self.uses.fetch_add(1, Ordering::Relaxed);
        let mut places = self.places();
        let place = &mut places[index];
        match &place.state {
            State::Ready(model, _) => {
                place.used = uses;
                return Ok(Look::Ready(Arc::clone(model)));
            }
            State::Loading(attempt) => return Ok(Look::Loading(attempt.clone())),
            State::Failed(failure) if failure.until > Instant::now() => {
                return Err(failed(&self.offers[index].name, &failure.reason));
            }
            State::Failed(_) | State::Unloaded => {}
        }
        let (sender, attempt) = watch::channel(None);
        place.state = State::Loading(attempt.clone());
        drop(places);
        // Of its own: whoever asked first may leave before the others.
        tokio::spawn(Arc::clone(self).attempt(index, sender));
        Ok(Look::Loading(attempt))
    }

    async fn attempt(self: Arc<Self>, index: usize, told: watch::Sender<Option<Answer<()>>>) {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let registry = Arc::clone(&self);
        // The turn goes along, since the thread goes on when nobody waits for it any more.
        let opened = spawn_blocking(move || (registry.open(index, true), turn).0).await;
        let opened =
            opened.unwrap_or_else(|_| Err(Refused::Failed(Error::Stopped("opening it failed".to_owned()))));
        let name = &self.offers[index].name;
        let outcome = self.settle(index, opened).map_err(|refused| match refused {
            Refused::Busy(reason) => ApiError::away(format!(
                "there is no room for model {name} now: {reason}; ask again in a while"
            ))
            .coded("model_busy"),
            Refused::Failed(error) => failed(name, &self.told(name, &error)),
        });
        told.send_replace(Some(outcome));
    }

    /// Opens a model, on a thread that may block. Models that nobody has borrowed are closed for it where they may be.
    fn open(&self, index: usize, may_close: bool) -> Result<(Model, u64), Refused> {
        let Offer { name, created, .. } = self.offers[index].clone();
        let Some(directory) = &self.directory else {
            return Err(Refused::Failed(Error::Stopped(format!("model {name} is gone"))));
        };
        let begin = Instant::now();
        let (package, held) = directory.package(&name).map_err(Refused::Failed)?;
        while let Some(reason) = self.short(directory, held) {
            match self.idle().filter(|_| may_close) {
                // Here, where waiting for the end of its thread keeps nobody.
                Some(model) => {
                    tracing::info!(model = model.name, "closing a model to make room");
                    drop(model);
                }
                None if self.count() > 0 => return Err(Refused::Busy(reason)),
                // Alone, it is refused or served by whatever fits when it is opened.
                None => break,
            }
        }
        let engine = (directory.open)(&package).map_err(Refused::Failed)?;
        let ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(model = name, ms, "opened a model");
        Ok((Model { name, engine, fit: directory.fit, created }, held.unwrap_or_default()))
    }

    /// Why one more model that takes `held` bytes has no room beside those that are open.
    fn short(&self, directory: &ModelsDirectory, held: Option<u64>) -> Option<String> {
        let most = directory.most.max(1);
        let open = self.count();
        if open >= most {
            return Some(format!("{open} of at most {most} models are open"));
        }
        let held = held?;
        let taken = self.places().iter().map(Place::held).fold(0, u64::saturating_add);
        let wanted = size(held);
        if let Some(limit) = directory.memory.filter(|limit| taken.saturating_add(held) > *limit) {
            let (taken, limit) = (size(taken), size(limit));
            return Some(format!("it takes {wanted}, and those that are open {taken} of at most {limit}"));
        }
        let memory = Memory::probe(&Roots::default());
        (held > memory.budget()).then(|| format!("it takes {wanted} and there is not so much memory left"))
    }

    /// Models that are open.
    fn count(&self) -> usize {
        self.places().iter().filter(|place| matches!(place.state, State::Ready(..))).count()
    }

    /// Takes out the model that was used longest ago of those that nobody has borrowed or waits for.
    fn idle(&self) -> Option<Arc<Model>> {
        let mut places = self.places();
        // Only the registry and whoever has borrowed it hold a model, and nobody borrows while the lock is held.
        let idle = places.iter_mut().filter(|place| {
            place.waiting == 0
                && matches!(&place.state, State::Ready(model, _) if Arc::strong_count(model) == 1)
        });
        let place = idle.min_by_key(|place| place.used)?;
        match mem::replace(&mut place.state, State::Unloaded) {
            State::Ready(model, _) => {
                place.tally.unloaded += 1;
                Some(model)
            }
            _ => None,
        }
    }

    /// Remembers how opening a model went.
    fn settle(&self, index: usize, opened: Result<(Model, u64), Refused>) -> Result<(), Refused> {
        let count: fn(&mut Tally) -> &mut u64 = match &opened {
            Ok(_) => |tally| &mut tally.loaded,
            Err(Refused::Busy(_)) => |tally| &mut tally.no_room,
            Err(Refused::Failed(_)) => |tally| &mut tally.failed,
        };
        let (state, result) = match opened {
            Ok((model, held)) => (State::Ready(Arc::new(model), held), Ok(())),
            Err(Refused::Busy(reason)) => (State::Unloaded, Err(Refused::Busy(reason))),
            Err(Refused::Failed(error)) => {
                tracing::warn!(model = self.offers[index].name, error = %error, "a model cannot be opened");
                let retry = self.directory.as_ref().map_or(Duration::ZERO, |directory| directory.retry);
                let failure = Failure {
                    reason: self.told(&self.offers[index].name, &error),
                    until: Instant::now() + retry,
                };
                (State::Failed(failure), Err(Refused::Failed(error)))
            }
        };
        let mut places = self.places();
        places[index].used = self.uses.fetch_add(1, Ordering::Relaxed);
        places[index].state = state;
        *count(&mut places[index].tally) += 1;
        result
    }

    fn told(&self, name: &str, error: &Error) -> String {
        self.directory.as_ref().map_or_else(|| error.to_string(), |directory| directory.told(name, error))
    }
}

fn failed(name: &str, reason: &str) -> ApiError {
    ApiError::away(format!("model {name} cannot be opened: {reason}")).coded("model_failed")
}

/// What somebody who asks for a model finds.
enum Look {
    Ready(Arc<Model>),
    Loading(Attempt),
}

/// A request that waits for a model, which is not closed meanwhile.
struct Waiting<'a> {
    registry: &'a Registry,
    index: usize,
}

impl<'a> Waiting<'a> {
    fn new(registry: &'a Registry, index: usize) -> Self {
        registry.places()[index].waiting += 1;
        Self { registry, index }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.registry.places()[self.index].waiting -= 1;
    }
}

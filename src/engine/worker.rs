//! The thread that owns the model, and works on all requests in turns.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use super::entry::{After, Entry, Job, State};
use super::load::LoadReport;
use super::scheduler::{Id, Scheduler, Turn};
use super::{ModelFacts, Reports};
use crate::error::{Error, Result};
use crate::generate::sequence::FinishReason;
use crate::model::{CausalModel, Prefill, Room, Shared};
use crate::package::Component;

/// Positions of a prompt that are read while others wait for their next token.
const PIECE: usize = 128;
/// The same while nobody does; one who comes then waits so long.
const LONG_PIECE: usize = 512;
/// A cache is used for another prompt although so many of its positions are lost.
const LOST: usize = 16;

/// The model, and the requests that are worked on with it.
struct Workshop<'a, M: CausalModel> {
    model: M,
    facts: &'a ModelFacts,
    reports: &'a Reports,
    load: &'a LoadReport,
    room: Room,
    scheduler: Scheduler,
    entries: BTreeMap<Id, Entry<M>>,
    /// What requests that are over have read, the longest unused first: a follow-up reads only what is new.
    idle: VecDeque<M::Cache>,
    next: Id,
}

/// Works on jobs until every sender is gone and all are answered.
pub(super) fn work<M: CausalModel>(
    model: M,
    facts: &ModelFacts,
    reports: &Reports,
    load: &LoadReport,
    jobs: &mpsc::Receiver<Job>,
) {
    let room = model.room();
    let scheduler = Scheduler::new(room.sequences, room.positions);
    let mut workshop = Workshop {
        model,
        facts,
        reports,
        load,
        room,
        scheduler,
        entries: BTreeMap::new(),
        idle: VecDeque::new(),
        next: 0,
    };
    loop {
        while let Ok(job) = jobs.try_recv() {
            workshop.enter(job);
        }
        workshop.give_up();
        let turn = workshop.scheduler.next();
        workshop.tell_load();
        match turn {
            Turn::Wait => match jobs.recv() {
                Ok(job) => workshop.enter(job),
                Err(_) => return,
            },
            Turn::Admit(id) => workshop.admit(id),
            Turn::Read(id) => workshop.read(id),
            Turn::Decode(ids) => workshop.decode(&ids),
        }
    }
}

impl<M: CausalModel> Workshop<'_, M> {
    fn enter(&mut self, job: Job) {
        let (id, priority) = (self.next, job.request.priority);
        self.next += 1;
        let entry = Entry::new(job, self.facts);
        self.scheduler.submit(id, priority, entry.positions());
        self.entries.insert(id, entry);
    }

    fn tell_load(&self) {
        let Self { scheduler, room, .. } = self;
        self.load.update(|load| {
            load.active = scheduler.active();
            (load.positions, load.positions_limit) = (scheduler.held(), room.positions);
            load.parallel = room.sequences;
            load.limited_by.clone_from(&room.limited_by);
        });
    }

    /// Ends the requests that nobody waits for any more, and those whose time is over.
    fn give_up(&mut self) {
        let given_up = self.entries.iter().filter_map(|(id, entry)| Some((*id, entry.given_up()?)));
        let given_up: Vec<_> = given_up.collect();
        for (id, end) in given_up {
            self.end(id, end);
        }
    }

    fn admit(&mut self, id: Id) {
        self.load.update(|load| load.waiting = load.waiting.saturating_sub(1));
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.begin();
        }
    }

    /// The next piece of work on a prompt.
    fn read(&mut self, id: Id) {
        let Some(mut entry) = self.entries.remove(&id) else { return self.scheduler.end(id) };
        let ready = match entry.state {
            State::Fresh => entry.prepare(&self.model, self.facts),
            _ => Ok(()),
        };
        let cache = ready.and_then(|()| entry.cache.take().map_or_else(|| self.cache_for(&entry), Ok));
        let done = match cache {
            Ok(mut cache) => {
                let done = self.read_piece(&mut entry, &mut cache);
                entry.cache = Some(cache);
                done
            }
            Err(error) => Err(error),
        };
        let after = done.and_then(|prefill| match prefill {
            None => Ok(After::On),
            Some(prefill) => {
                self.scheduler.read(id);
                self.load.update(|load| {
                    load.prompt_positions += entry.prompt_positions() as u64;
                    load.cached_positions += prefill.cached as u64;
                    load.encoded += prefill.images_encoded as u64;
                });
                entry.begin_answer(&mut self.model, self.facts, prefill)
            }
        });
        self.entries.insert(id, entry);
        self.after(id, after);
    }

    fn read_piece(&mut self, entry: &mut Entry<M>, cache: &mut M::Cache) -> Result<Option<Prefill>> {
        let others: Vec<&M::Cache> =
            self.entries.values().filter_map(|other| other.cache.as_ref()).chain(&self.idle).collect();
        let decoding = self.entries.values().any(|other| matches!(other.state, State::Answering));
        let most = match self.room.sequences {
            1 => usize::MAX,
            _ if decoding => PIECE,
            _ => LONG_PIECE,
        };
        let Entry { job, state, .. } = entry;
        let request = &job.request;
        let model = &mut self.model;
        self.load.update(|load| load.pieces += 1);
        request.cancel.during(model.canceler(), || {
            let mut reading = match std::mem::replace(state, State::Fresh) {
                State::Reading(reading) => reading,
                _ => model.begin(&request.prompt, &request.images, cache, &others)?,
            };
            let prefill = model.read_on(&mut reading, most, cache)?;
            *state = State::Reading(reading);
            Ok(prefill)
        })
    }

    /// The cache in which most of the prompt is already, if little else is lost by that; a new one while there is room.
    fn cache_for(&mut self, entry: &Entry<M>) -> Result<M::Cache> {
        let Self { model, idle, entries, room, scheduler, .. } = self;
        let request = &entry.job.request;
        let shared = |cache: &M::Cache| model.shared(&request.prompt, &request.images, cache);
        let mut held = idle.iter().map(shared).collect::<Result<Vec<Shared>>>()?;
        let best = (0..held.len()).max_by_key(|at| held[*at].common);
        if let Some(at) = best.filter(|at| room.sequences == 1 || fits(held[*at]))
            && let Some(cache) = idle.remove(at)
        {
            return Ok(cache);
        }
        while scheduler.held() + held.iter().map(|held| held.held).sum::<usize>() > room.positions
            && !held.is_empty()
        {
            held.remove(0);
            idle.pop_front();
        }
        let live = entries.values().filter(|other| other.cache.is_some()).count() + idle.len();
        if live >= room.sequences
            && let Some(oldest) = idle.pop_front()
        {
            return Ok(oldest);
        }
        model.empty_cache()
    }

    /// Lets each of `ids` say one more token.
    fn decode(&mut self, ids: &[Id]) {
        let mut together = Vec::new();
        for id in ids {
            match self.entries.get(id) {
                Some(entry) if entry.is_plain() && ids.len() > 1 => together.push(*id),
                Some(_) => self.decode_alone(*id),
                None => self.scheduler.end(*id),
            }
        }
        if together.is_empty() {
            return;
        }
        self.model.canceler().reset();
        let (mut tokens, mut caches, mut read) = (Vec::new(), Vec::new(), Vec::new());
        for id in together {
            let Some(Entry { answer: Some(answer), cache, .. }) = self.entries.get_mut(&id) else { continue };
            let Some(cache) = cache.take() else { continue };
            tokens.push(answer.token);
            caches.push(cache);
            read.push(id);
        }
        self.count_step(tokens.len());
        let results = self.model.decode_each(&tokens, &mut caches.iter_mut().collect::<Vec<_>>());
        // All of them first: what one result leads to may end the others, or void what they have read.
        for (id, cache) in read.iter().zip(caches) {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.cache = Some(cache);
            }
        }
        for (id, result) in read.iter().zip(results) {
            let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.answer.is_some()) else {
                continue;
            };
            let after = result.and_then(|mut logits| entry.say(logits.values_mut()));
            self.after(*id, after);
        }
    }

    fn decode_alone(&mut self, id: Id) {
        self.count_step(1);
        let model = &mut self.model;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (Some(answer), Some(cache)) = (&mut entry.answer, &mut entry.cache) else { return };
        let logits = entry.job.request.cancel.during(model.canceler(), || answer.read(model, cache));
        let after = logits.and_then(|mut logits| entry.say(logits.values_mut()));
        self.after(id, after);
    }

    fn count_step(&self, tokens: usize) {
        self.load.update(|load| {
            load.steps += 1;
            load.step_tokens += tokens as u64;
        });
    }

    /// Does what follows from a piece of work on a request.
    fn after(&mut self, id: Id, after: Result<After>) {
        match after {
            Ok(After::On) => {}
            Ok(After::Over(reason)) => self.end(id, Ok(reason)),
            Ok(After::Suspicious) => match self.recheck(id) {
                Ok(true) => {}
                Ok(false) => self.replace(id, Component::Decoder.name(), LOOPED),
                Err(error) => self.after(id, Err(error)),
            },
            Err(Error::Cancelled) => self.end(id, Ok(FinishReason::Cancelled)),
            Err(Error::Unsound { graph, reason }) => self.replace(id, &graph, &reason),
            Err(error) => {
                // What its cache holds is in doubt.
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.cache = None;
                }
                self.end(id, Err(error));
            }
        }
    }

    fn recheck(&mut self, id: Id) -> Result<bool> {
        let model = &mut self.model;
        let Some(entry) = self.entries.get(&id) else { return Ok(true) };
        entry.job.request.cancel.during(model.canceler(), || model.recheck())
    }

    /// Puts something else in the place of `graph`, and has everybody who was begun begin anew.
    fn replace(&mut self, id: Id, graph: &str, reason: &str) {
        tracing::warn!(graph, "taken out of service: {reason}");
        self.idle.clear();
        let demotion = self.model.demote(graph, reason);
        self.reports.set(self.model.reports());
        self.room = self.model.room();
        self.scheduler.resize(self.room.sequences, self.room.positions);
        let begun: Vec<Id> =
            self.entries.iter().filter(|(_, entry)| entry.has_begun()).map(|(id, _)| *id).collect();
        match demotion {
            Ok(demotion) => {
                self.scheduler.restart();
                for id in begun {
                    if let Some(entry) = self.entries.get_mut(&id) {
                        entry.restart(&demotion);
                    }
                }
            }
            Err(error) => {
                let mut error = Some(error);
                for other in begun {
                    if let Some(entry) = self.entries.get_mut(&other) {
                        entry.cache = None;
                    }
                    let unsound = || Error::Unsound { graph: graph.to_owned(), reason: reason.to_owned() };
                    let own = if other == id { error.take() } else { None };
                    self.end(other, Err(own.unwrap_or_else(unsound)));
                }
            }
        }
    }

    /// Tells a request how it ended, and keeps what was read for it.
    fn end(&mut self, id: Id, end: Result<FinishReason>) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        if !entry.has_begun() {
            self.load.update(|load| load.waiting = load.waiting.saturating_sub(1));
        }
        self.scheduler.end(id);
        let reason = end.as_ref().map_or(FinishReason::Cancelled, |reason| *reason);
        let end = match entry.stop(&mut self.model, reason) {
            Ok(()) => {
                self.idle.extend(entry.cache.take());
                end
            }
            Err(error) => end.and(Err(error)),
        };
        self.load.update(|load| {
            load.completed += 1;
            load.active = self.scheduler.active();
        });
        entry.tell(end, self.model.prefixes());
    }
}

const LOOPED: &str = "the answer goes round in circles, and it no longer computes what its goldens say";

/// Whether a cache can be used for a prompt of which it holds so much.
fn fits(Shared { common, held }: Shared) -> bool {
    common > 0 && held - common < LOST
}

/// The thread that owns the model.
#[derive(Debug)]
pub(super) struct Worker {
    /// Both are `None` once it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Queues a job.
    pub(super) fn send(&self, job: Job) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(Error::Stopped("its thread has ended".to_owned())) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        // A sink may hold the last engine, and it is dropped on the thread itself.
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        {
            // A thread that panicked has told its requests already.
            let _ = thread.join();
        }
    }
}

/// Starts the thread.
pub(super) fn start<M: CausalModel + 'static>(
    model: M,
    facts: Arc<ModelFacts>,
    reports: Reports,
    load: LoadReport,
) -> Result<Worker> {
    let (sender, jobs) = mpsc::channel();
    let room = model.room();
    load.update(|load| {
        (load.parallel, load.positions_limit) = (room.sequences, room.positions);
        load.limited_by = room.limited_by;
    });
    let thread = thread::Builder::new()
        .name("llava-phi engine".to_owned())
        .spawn(move || work(model, &facts, &reports, &load, &jobs))
        .map_err(|e| Error::Stopped(format!("its thread cannot be started: {e}")))?;
    Ok(Worker { jobs: Some(sender), thread: Some(thread) })
}

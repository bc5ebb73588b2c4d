//! Who runs next: arithmetic without a model, a clock or a thread.
//!
//! Requests wait, are admitted, have their prompt read in pieces, and are then decoded, all of them together, a token a
//! step. A piece of a prompt and a step of the others take turns, so that neither a long prompt nor long answers hold
//! anybody up for more than one piece or one step.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Names a request to the scheduler; later ones have larger numbers.
pub(super) type Id = u64;

/// Who goes first among those that wait and those whose prompts are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Behind all others, unless many have gone before.
    Low,
    /// As most are.
    #[default]
    Normal,
    /// Before all others.
    High,
}

/// So many requests may be admitted before one that came earlier with a lower priority; then it goes first.
const OVERTAKEN: usize = 16;

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing, until a request comes.
    Wait,
    /// Begin this request.
    Admit(Id),
    /// Read a piece of this request's prompt.
    Read(Id),
    /// Let each of these say one more token.
    Decode(Vec<Id>),
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    priority: Priority,
    /// Positions of the prompt and of the longest answer.
    positions: usize,
    overtaken: usize,
}

#[derive(Clone, Copy, Debug)]
struct Admitted {
    priority: Priority,
    positions: usize,
    reading: bool,
}

/// The requests, and whose turn it is.
#[derive(Debug)]
pub(super) struct Scheduler {
    sequences: usize,
    positions: usize,
    waiting: BTreeMap<Id, Waiting>,
    admitted: BTreeMap<Id, Admitted>,
    /// The last turn read a prompt.
    read_last: bool,
}

impl Scheduler {
    /// Room for `sequences` at once, which hold at most `positions` together.
    pub(super) fn new(sequences: usize, positions: usize) -> Self {
        Self {
            sequences: sequences.max(1),
            positions,
            waiting: BTreeMap::new(),
            admitted: BTreeMap::new(),
            read_last: false,
        }
    }

    /// The model has another room from now on. Nobody who was admitted is sent away.
    pub(super) fn resize(&mut self, sequences: usize, positions: usize) {
        (self.sequences, self.positions) = (sequences.max(1), positions);
    }

    /// A request came that may hold up to `positions`.
    pub(super) fn submit(&mut self, id: Id, priority: Priority, positions: usize) {
        self.waiting.insert(id, Waiting { priority, positions, overtaken: 0 });
    }

    /// The prompt of `id` was read; from now on it is decoded.
    pub(super) fn read(&mut self, id: Id) {
        if let Some(admitted) = self.admitted.get_mut(&id) {
            admitted.reading = false;
        }
    }

    /// The prompts of all that were admitted must be read again.
    pub(super) fn restart(&mut self) {
        self.admitted.values_mut().for_each(|admitted| admitted.reading = true);
    }

    /// The request is over, or was given up while it waited.
    pub(super) fn end(&mut self, id: Id) {
        self.waiting.remove(&id);
        self.admitted.remove(&id);
    }

    /// Requests that were not admitted yet.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that were admitted and are not over.
    pub(super) fn active(&self) -> usize {
        self.admitted.len()
    }

    /// Positions that those may hold.
    pub(super) fn held(&self) -> usize {
        self.admitted.values().map(|admitted| admitted.positions).sum()
    }

    /// What to do next. A request that is to be admitted counts as admitted from now on.
    pub(super) fn next(&mut self) -> Turn {
        if let Some(id) = self.admissible() {
            self.admit(id);
            return Turn::Admit(id);
        }
        let reading = self.admitted.iter().filter(|(_, admitted)| admitted.reading);
        let reading = reading.max_by_key(|(id, admitted)| (admitted.priority, std::cmp::Reverse(**id)));
        let reading = reading.map(|(id, _)| *id);
        let decoding = self.admitted.iter().filter(|(_, admitted)| !admitted.reading);
        let decoding: Vec<Id> = decoding.map(|(id, _)| *id).collect();
        match reading {
            Some(id) if decoding.is_empty() || !self.read_last => {
                self.read_last = true;
                Turn::Read(id)
            }
            _ if decoding.is_empty() => Turn::Wait,
            _ => {
                self.read_last = false;
                Turn::Decode(decoding)
            }
        }
    }

    /// Who is first of those that wait, if there is room. Nobody behind goes first because it needs less: it could go on
    /// like that for ever.
    fn admissible(&self) -> Option<Id> {
        let first = |(id, waiting): &(&Id, &Waiting)| {
            (waiting.overtaken >= OVERTAKEN, waiting.priority, std::cmp::Reverse(**id))
        };
        let (id, waiting) = self.waiting.iter().max_by_key(first)?;
        let alone = self.admitted.is_empty();
        let fits = self.held().saturating_add(waiting.positions) <= self.positions;
        (alone || (self.admitted.len() < self.sequences && fits)).then_some(*id)
    }

    fn admit(&mut self, id: Id) {
        let Some(Waiting { priority, positions, .. }) = self.waiting.remove(&id) else { return };
        self.admitted.insert(id, Admitted { priority, positions, reading: true });
        self.waiting.range_mut(..id).for_each(|(_, waiting)| waiting.overtaken += 1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_prompt_and_the_others_take_turns() {
        let mut scheduler = Scheduler::new(2, 100);
        scheduler.submit(1, Priority::Normal, 10);
        assert_eq!(scheduler.next(), Turn::Admit(1));
        assert_eq!(scheduler.next(), Turn::Read(1));
        assert_eq!(scheduler.next(), Turn::Read(1), "nobody else has anything to do");
        scheduler.read(1);
        assert_eq!(scheduler.next(), Turn::Decode(vec![1]));
        scheduler.submit(2, Priority::Normal, 10);
        scheduler.submit(3, Priority::High, 10);
        assert_eq!(scheduler.next(), Turn::Admit(3));
        assert_eq!(scheduler.next(), Turn::Read(3));
        assert_eq!(scheduler.next(), Turn::Decode(vec![1]));
        assert_eq!(scheduler.next(), Turn::Read(3));
        scheduler.read(3);
        assert_eq!(scheduler.next(), Turn::Decode(vec![1, 3]));
        scheduler.end(1);
        assert_eq!(scheduler.next(), Turn::Admit(2));
        scheduler.end(2);
        scheduler.end(3);
        assert_eq!(scheduler.next(), Turn::Wait);
    }

    #[test]
    fn what_needs_more_than_there_is_runs_alone_and_nobody_behind_it_goes_first() {
        let mut scheduler = Scheduler::new(4, 100);
        scheduler.submit(1, Priority::Normal, 60);
        scheduler.submit(2, Priority::Normal, 150);
        scheduler.submit(3, Priority::Normal, 10);
        assert_eq!(scheduler.next(), Turn::Admit(1));
        scheduler.read(1);
        assert_eq!(scheduler.next(), Turn::Decode(vec![1]));
        scheduler.end(1);
        assert_eq!(scheduler.next(), Turn::Admit(2));
        assert_eq!(scheduler.next(), Turn::Read(2));
    }

    #[test]
    fn a_low_priority_is_overtaken_so_often_and_no_more() {
        let mut scheduler = Scheduler::new(1, 100);
        scheduler.submit(0, Priority::Low, 1);
        let mut before = 0;
        for id in 1.. {
            scheduler.submit(id, Priority::High, 1);
            let Turn::Admit(admitted) = scheduler.next() else { panic!("there is room") };
            scheduler.end(admitted);
            if admitted == 0 {
                break;
            }
            before += 1;
        }
        // Only those that came later overtake.
        assert_eq!(before, OVERTAKEN);
    }

    /// What happens to a scheduler.
    #[derive(Clone, Debug)]
    enum Step {
        Submit(u8, usize),
        Work,
        End(usize),
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0_u8..3, 1_usize..120).prop_map(|(priority, positions)| Step::Submit(priority, positions)),
            6 => Just(Step::Work),
            1 => (0_usize..8).prop_map(Step::End),
            1 => Just(Step::Restart),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn room_is_kept_nobody_is_forgotten_and_steps_come_between_pieces(
            sequences in 1_usize..5,
            steps in steps(),
        ) {
            let mut scheduler = Scheduler::new(sequences, 100);
            let (mut next, mut live) = (0, BTreeSet::new());
            let mut pieces: BTreeMap<Id, usize> = BTreeMap::new();
            let mut read_last = false;
            let work = |scheduler: &mut Scheduler, pieces: &mut BTreeMap<Id, usize>, read_last: &mut bool| {
                let turn = scheduler.next();
                match &turn {
                    Turn::Admit(id) => {
                        pieces.insert(*id, 2);
                        assert!(scheduler.active() <= sequences.max(1));
                        assert!(scheduler.held() <= 100 || scheduler.active() == 1);
                    }
                    Turn::Read(id) => {
                        let decoding = pieces.values().any(|left| *left == 0);
                        assert!(!(*read_last && decoding), "two pieces while others wait for a step");
                        *read_last = true;
                        let left = pieces.get_mut(id).unwrap();
                        *left -= 1;
                        if *left == 0 {
                            scheduler.read(*id);
                        }
                    }
                    Turn::Decode(ids) => {
                        *read_last = false;
                        let wanted: Vec<Id> =
                            pieces.iter().filter(|(_, left)| **left == 0).map(|(id, _)| *id).collect();
                        assert_eq!(ids, &wanted, "all that can say something do");
                    }
                    Turn::Wait => assert!(pieces.is_empty() && scheduler.waiting() == 0),
                }
                turn
            };
            for step in steps {
                match step {
                    Step::Submit(priority, positions) => {
                        let priority = [Priority::Low, Priority::Normal, Priority::High][usize::from(priority)];
                        scheduler.submit(next, priority, positions);
                        live.insert(next);
                        next += 1;
                    }
                    Step::Work => drop(work(&mut scheduler, &mut pieces, &mut read_last)),
                    Step::End(nth) => {
                        if let Some(id) = live.iter().nth(nth).copied() {
                            live.remove(&id);
                            pieces.remove(&id);
                            scheduler.end(id);
                        }
                    }
                    Step::Restart => {
                        scheduler.restart();
                        for left in pieces.values_mut() {
                            *left = 2;
                        }
                    }
                }
            }
            // Everybody who is left says three tokens and is done.
            let mut said: BTreeMap<Id, usize> = BTreeMap::new();
            for _ in 0..live.len() * 16 {
                if let Turn::Decode(ids) = work(&mut scheduler, &mut pieces, &mut read_last) {
                    for id in ids {
                        let said = said.entry(id).or_default();
                        *said += 1;
                        if *said == 3 {
                            scheduler.end(id);
                            pieces.remove(&id);
                            live.remove(&id);
                        }
                    }
                }
            }
            prop_assert!(live.is_empty(), "{live:?} starve");
        }
    }
}

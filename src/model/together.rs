//! One new position of each of several sequences, read in one run of the decoder.

use std::ops::Range;

use ndarray::{ArrayView2, Axis};

use super::kv_cache::{CacheNames, KvCache, PRESENT, PositionKey, integer};
use crate::error::{Error, Result};
use crate::package::manifest::DecoderSpec;
use crate::runtime::{Graph, Outputs, Slots, Tensor};

/// Slots between two sequences that are read along with them: so many rows cost less than another run.
const BRIDGED: usize = 3;

/// Groups slots that one run reads: ascending, and with what lies between them. `spare` tells whether a slot that is
/// not asked for has room for the row that the run writes behind what it holds.
pub(super) fn groups(mut slots: Vec<usize>, spare: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    slots.sort_unstable();
    let mut groups: Vec<Range<usize>> = Vec::new();
    for slot in slots {
        match groups.last_mut() {
            Some(last) if slot - last.end <= BRIDGED && (last.end..slot).all(&spare) => last.end = slot + 1,
            _ => groups.push(slot..slot + 1),
        }
    }
    groups
}

/// Sequences whose caches lie in `group` of `slots`, each with one new row.
pub(super) struct Together<'a, 'c> {
    pub(super) slots: &'a Slots,
    pub(super) group: Range<usize>,
    /// Row of the new positions, and the cache that it belongs to, by ascending slot.
    pub(super) members: &'a mut [(usize, &'c mut KvCache)],
}

impl Together<'_, '_> {
    /// Runs `graph` over the rows of `embeds` that are asked for, `[rows, hidden]`, of which `keys` say what each is, and
    /// gives the logits of each member, in their order. The caches grow by one position.
    ///
    /// # Errors
    /// Those of [`Graph::run_in_place`]; the caches are then as they were.
    pub(super) fn step(
        &mut self,
        graph: &mut Graph,
        spec: &DecoderSpec,
        embeds: &ArrayView2<'_, f32>,
        keys: &[PositionKey],
    ) -> Result<Outputs> {
        let first = self.group.start;
        // Behind what a slot holds, so that nothing is lost of those between.
        let mut used: Vec<usize> = self.group.clone().map(|slot| self.slots.used(slot)).collect();
        let mut rows = vec![0.0; used.len() * spec.hidden];
        let mut index = Vec::with_capacity(self.members.len());
        for (row, cache) in self.members.iter() {
            let place = cache.slot().and_then(|slot| slot.checked_sub(first)).filter(|at| *at < used.len());
            let place = place.ok_or_else(|| Error::graph("decoder", "a cache is not where its slot says"))?;
            used[place] = cache.len();
            let to = &mut rows[place * spec.hidden..][..spec.hidden];
            to.iter_mut().zip(embeds.index_axis(Axis(0), *row)).for_each(|(to, from)| *to = *from);
            index.push(integer(place)?);
        }
        let count = used.len();
        let length = |used: usize| {
            i32::try_from(used).map_err(|_| Error::TooLong { needed: used, capacity: spec.context })
        };
        let seqlens: Vec<i32> = used.iter().map(|used| length(*used)).collect::<Result<_>>()?;
        let total = length(used.iter().max().map_or(0, |most| most + 1))?;
        let embeds = Tensor::from_reals(graph.input_dtype("inputs_embeds"), &[count, 1, spec.hidden], &rows)?;
        let seqlens = Tensor::from_i32(&[count], seqlens)?;
        let total = Tensor::from_i32(&[], [total])?;
        let index = Tensor::from_i64(&[index.len()], index)?;
        let inputs = [
            ("inputs_embeds", &embeds),
            ("seqlens_k", &seqlens),
            ("total_sequence_length", &total),
            ("logits_index", &index),
        ];
        let names = CacheNames::new(spec.layers, PRESENT);
        let mut tensors = self.slots.tensors(&self.group)?;
        let outputs = graph.run_in_place(&inputs, &mut names.in_place(&mut tensors))?;
        for (row, cache) in self.members.iter_mut() {
            cache.grew(keys[*row]);
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slots_side_by_side_and_small_gaps_are_one_run() {
        let of = |slots: &[usize], full: usize| {
            let groups = groups(slots.to_vec(), |slot| slot != full);
            groups.iter().map(|group| (group.start, group.end)).collect::<Vec<_>>()
        };
        assert_eq!(of(&[2, 0, 1], 9), [(0, 3)]);
        assert_eq!(of(&[0, 4], 9), [(0, 5)]);
        assert_eq!(of(&[0, 5], 9), [(0, 1), (5, 6)]);
        assert_eq!(of(&[0, 2, 3], 1), [(0, 1), (2, 4)]);
        assert_eq!(of(&[], 9), []);
    }

    proptest! {
        #[test]
        fn every_slot_is_in_one_run_and_a_full_one_in_none(
            asked in proptest::collection::btree_set(0_usize..20, 0..12),
            full in proptest::collection::btree_set(0_usize..20, 0..12),
        ) {
            let groups = groups(asked.iter().copied().collect(), |slot| !full.contains(&slot));
            for slot in 0..20 {
                let runs = groups.iter().filter(|group| group.contains(&slot)).count();
                if asked.contains(&slot) {
                    prop_assert_eq!(runs, 1);
                } else {
                    prop_assert!(runs <= usize::from(!full.contains(&slot)));
                }
            }
        }
    }
}

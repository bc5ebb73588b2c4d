//! The threads of a session, for what its operators compute.

use ort::operator::ComputeContext;

use crate::kernels::Parallel;

/// The threads of the session.
pub(super) struct Threads<'a>(pub(super) &'a ComputeContext);

impl Parallel for Threads<'_> {
    fn for_each(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        if count == 1 || self.0.par_for(count, 0, work).is_err() {
            (0..count).for_each(work);
        }
    }
}

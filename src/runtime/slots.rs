//! Caches of several sequences side by side, so that one run of a graph can read and write all of them.
#![allow(
    unsafe_code,
    reason = "a part of a tensor as a tensor of its own has no safe form that a binding accepts"
)]

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use ort::AsPointer;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::value::DynValue;

use crate::error::{Error, Result};
use crate::package::manifest::DType;

use super::cache_memory::CacheMemory;
use super::tensor::{Tensor, element_type};

/// Tensors `[slots, ..shape]`, of which each slot belongs to one sequence.
///
/// On the host, memory is taken by what is written: a slot that was never used, or was given back, takes none where the
/// system can be told so (Unix).
pub struct Slots {
    shared: Arc<Shared>,
}

struct Shared {
    count: usize,
    shape: Vec<usize>,
    dtype: DType,
    tensors: Vec<Backing>,
    /// Slots that nobody has, the lowest last: runs are of slots beside each other.
    free: Mutex<Vec<usize>>,
    /// Rows that each slot holds, as whoever has it says.
    used: Vec<AtomicUsize>,
}

enum Backing {
    Host(MmapRaw),
    Device(Tensor),
}

/// The right to one slot; dropping it gives the slot back.
pub struct Slot {
    index: usize,
    shared: Arc<Shared>,
}

impl Slots {
    /// Room for `count` sequences in `tensors` tensors, each of `shape` a sequence.
    ///
    /// # Errors
    /// [`Error::Request`] when the memory cannot be had.
    pub fn new(
        memory: &CacheMemory,
        dtype: DType,
        tensors: usize,
        count: usize,
        shape: &[usize],
    ) -> Result<Self> {
        let make = |_| {
            if !memory.is_host() {
                let whole: Vec<usize> = [count].into_iter().chain(shape.iter().copied()).collect();
                return Ok(Backing::Device(memory.zeros(dtype, &whole)?));
            }
            let bytes = shape.iter().try_fold(count * dtype.bytes(), |bytes, dim| bytes.checked_mul(*dim));
            let map = bytes.ok_or_else(|| "it is more than can be addressed".to_owned());
            let map =
                map.and_then(|bytes| MmapOptions::new().len(bytes).map_anon().map_err(|e| e.to_string()));
            let map = map.map_err(|why| {
                Error::Request(format!(
                    "no memory for the caches of {count} sequences ({why}); ask for fewer"
                ))
            })?;
            Ok(Backing::Host(map.into()))
        };
        let tensors = (0..tensors).map(make).collect::<Result<_>>()?;
        let free = Mutex::new((0..count).rev().collect());
        let used = (0..count).map(|_| AtomicUsize::new(0)).collect();
        Ok(Self { shared: Arc::new(Shared { count, shape: shape.to_vec(), dtype, tensors, free, used }) })
    }

    /// A slot that nobody has, if there is one.
    pub fn take(&self) -> Option<Slot> {
        let index = self.shared.free().pop()?;
        Some(Slot { index, shared: Arc::clone(&self.shared) })
    }

    /// How many rows whoever has `slot` said that it holds; 0 when nobody has it.
    pub fn used(&self, slot: usize) -> usize {
        self.shared.used.get(slot).map_or(0, |used| used.load(Ordering::Relaxed))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.shared.count
    }

    /// The tensors of `slots` as tensors `[slots.len(), ..shape]`, over the same memory.
    ///
    /// # Errors
    /// [`Error::Request`] for slots that there are not; [`Error::Graph`] when ONNX Runtime cannot make the tensors.
    pub fn tensors(&self, slots: &Range<usize>) -> Result<Vec<Tensor>> {
        self.shared.tensors(slots)
    }
}

impl Slot {
    /// Which one of all.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Says how many rows it holds.
    pub fn holds(&self, rows: usize) {
        self.shared.used[self.index].store(rows, Ordering::Relaxed);
    }

    /// Its tensors, `[1, ..shape]`.
    ///
    /// # Errors
    /// As [`Slots::tensors`].
    pub fn tensors(&self) -> Result<Vec<Tensor>> {
        self.shared.tensors(&(self.index..self.index + 1))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.release(self.index);
        self.holds(0);
        let mut free = self.shared.free();
        free.push(self.index);
        free.sort_unstable_by(|one, other| other.cmp(one));
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }

    fn tensors(self: &Arc<Self>, slots: &Range<usize>) -> Result<Vec<Tensor>> {
        if slots.start >= slots.end || slots.end > self.count {
            return Err(Error::Request(format!("there are no slots {slots:?} of {}", self.count)));
        }
        let shape: Vec<usize> = [slots.len()].into_iter().chain(self.shape.iter().copied()).collect();
        let bytes = self.slot_bytes();
        (0..self.tensors.len()).map(|tensor| self.view(tensor, slots.start * bytes, &shape)).collect()
    }

    /// A tensor of `shape` that begins `offset` bytes into a backing.
    fn view(self: &Arc<Self>, tensor: usize, offset: usize, shape: &[usize]) -> Result<Tensor> {
        let failed =
            |e: ort::Error| Error::graph("decoder", "a slot of its caches cannot be used").because(e);
        let host;
        let (base, memory) = match &self.tensors[tensor] {
            Backing::Host(map) => {
                host = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)
                    .map_err(failed)?;
                (map.as_mut_ptr(), &host)
            }
            Backing::Device(whole) => {
                (whole.value().data_ptr().cast_mut().cast::<u8>(), whole.value().memory_info())
            }
        };
        let dims: Vec<i64> = shape.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect();
        let bytes = shape.iter().product::<usize>() * self.dtype.bytes();
        let mut value = null_mut();
        // SAFETY: the caller keeps `offset` and `shape` within the backing, and the tensor keeps the backing alive. The
        // host reads and writes a slot only through the tensors of whoever has the slot.
        let status = unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                memory.ptr(),
                base.add(offset).cast::<c_void>(),
                bytes,
                dims.as_ptr(),
                dims.len(),
                element_type(self.dtype).into(),
                &raw mut value,
            )
        };
        // SAFETY: a status that the call above gave.
        unsafe { ort::Error::result_from_status(status) }.map_err(failed)?;
        let value = NonNull::new(value).ok_or_else(|| Error::graph("decoder", "a slot has no tensor"))?;
        // SAFETY: a value that nobody else has. Its allocator is asked for nothing: the memory is not its own.
        let value: DynValue = unsafe { DynValue::from_ptr(value, Some(&Allocator::default())) };
        Tensor::over(value, Arc::clone(self) as _)
            .ok_or_else(|| Error::graph("decoder", "a slot of its caches is no tensor"))
    }

    /// Gives the memory of a slot back to the system. What it held is lost.
    fn release(&self, slot: usize) {
        #[cfg(unix)]
        for backing in &self.tensors {
            let Backing::Host(map) = backing else { continue };
            let bytes = self.slot_bytes();
            // SAFETY: nobody has the slot, so nobody reads what turns to zeros.
            let advised = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, slot * bytes, bytes)
            };
            if let Err(error) = advised {
                tracing::debug!(%error, slot, "its memory is kept");
            }
        }
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("index", &self.index).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    fn slots(count: usize) -> Slots {
        testing::start();
        Slots::new(&CacheMemory::default(), DType::F32, 2, count, &[2, 3]).unwrap()
    }

    #[test]
    fn what_one_slot_holds_is_seen_beside_the_others() {
        let slots = slots(4);
        let held: Vec<Slot> = (0..3).map(|_| slots.take().unwrap()).collect();
        assert_eq!(held.iter().map(Slot::index).collect::<Vec<_>>(), [0, 1, 2]);
        held[1].tensors().unwrap()[1].f32s_mut().unwrap().fill(1.5);
        let all = slots.tensors(&(0..3)).unwrap();
        assert_eq!(all[1].shape(), [3, 2, 3]);
        let wanted: Vec<f32> = [0.0, 1.5, 0.0].iter().flat_map(|value| [*value; 6]).collect();
        assert_eq!(all[1].f32s().unwrap(), wanted);
        assert_eq!(all[0].f32s().unwrap(), [0.0; 18]);
        drop(slots);
        assert_eq!(all[1].f32s().unwrap(), wanted, "a tensor keeps what it is over");
    }

    #[test]
    fn a_slot_that_was_given_back_is_the_next_one_taken_when_it_is_the_lowest() {
        let slots = slots(3);
        let mut held: Vec<Slot> = (0..3).map(|_| slots.take().unwrap()).collect();
        assert!(slots.take().is_none());
        held.remove(2);
        held.remove(0);
        assert_eq!(slots.take().unwrap().index(), 0);
    }

    #[test]
    fn slots_that_there_are_not_are_refused() {
        let slots = slots(2);
        for range in [1..3, 0..0, 2..3] {
            assert!(slots.tensors(&range).is_err(), "{range:?}");
        }
    }
}

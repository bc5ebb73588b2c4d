//! What a decoder computes most, for processors on which it is faster than ONNX Runtime's own.
//!
//! [`Kernels::attend`] is attention over a cache. [`Kernels::multiply`] is ONNX Runtime's `MatMulNBits` at accuracy level 4:
//! activations are rounded to 8 bits with one scale a block, as its own kernels do, multiplied as integers, and summed in f32.
//! The weights stay as they lie in the package: a prompt unpacks them panel by panel while it goes, one token reads them once.
//! Nothing is packed beforehand, so that a memory-mapped file is all the memory that they take, and a session opens without
//! reading them.

#![cfg_attr(not(target_arch = "x86_64"), allow(unused, reason = "there are kernels for x86-64 alone"))]

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod matrix;
mod rounded;

use std::fmt;
use std::ops::Range;

use attention::{Room, Seen};

pub use attention::{Attention, AttentionSizes, Heads, Held, Rotation};
pub use matrix::{Bits, Matrix};
pub use rounded::Rounded;

/// Calls a function for each number below another, on as many threads as it likes.
pub trait Parallel {
    /// Calls `work` once for each number below `count`, and returns when all calls have.
    fn for_each(&self, count: usize, work: &(dyn Fn(usize) + Sync));
}

/// Kernels for the instructions that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels(Instructions);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => f.write_str("avx512-vnni"),
        }
    }
}

impl Kernels {
    /// Which of these kernels compute the same: the instructions, and how often what they compute was changed.
    pub fn identity(self) -> String {
        const CHANGES: usize = 1;
        format!("{self} {CHANGES}")
    }

    /// The kernels for this processor; `None` when there are none.
    pub fn here() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if avx512::is_here() {
            return Some(Self(Instructions::Avx512Vnni));
        }
        None
    }

    /// `y = x * weights^T + bias`: `x` is `[rows, weights.columns]`, `bias` `[weights.rows]`, and `y`
    /// `[rows, weights.rows]`, all f32 and row-major. `rounded` is room that is used again.
    ///
    /// # Panics
    /// When the lengths do not belong together.
    pub fn multiply(
        self,
        parallel: &impl Parallel,
        x: &[f32],
        weights: &Matrix<'_>,
        bias: Option<&[f32]>,
        rounded: &mut Rounded,
        y: &mut [f32],
    ) {
        let rows = x.len() / weights.columns();
        assert_eq!(x.len(), rows * weights.columns(), "x has no whole number of rows");
        assert_eq!(y.len(), rows * weights.rows(), "y is not [rows, weights.rows]");
        assert!(bias.is_none_or(|bias| bias.len() == weights.rows()), "bias is not [weights.rows]");
        let Plan { way, tile, unit, width } = self.plan(rows, weights);
        rounded.fill(parallel, x, weights, [tile, unit]);
        let (rounded, y) = (&*rounded, Columns::new(y, weights.rows()));
        let work = |unit: usize| {
            let first = unit * width;
            let columns = first..(first + width).min(weights.rows());
            let product = Product { rounded, weights, bias, y: &y };
            self.compute(&product, way, columns);
        };
        parallel.for_each(weights.rows().div_ceil(width), &work);
    }

    fn plan(self, rows: usize, weights: &Matrix<'_>) -> Plan {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => avx512::plan(rows, weights),
        }
    }

    fn compute(self, product: &Product<'_>, way: Way, columns: Range<usize>) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => avx512::compute(product, way, columns),
        }
    }

    /// `numbers` in whole registers.
    fn whole_registers(self, numbers: usize) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => numbers.next_multiple_of(avx512::LANES),
        }
    }

    fn see<T: Held>(self, seen: &Seen<'_, T>, room: &mut Room) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => avx512::see(seen, room),
        }
    }
}

/// What is done with the weights.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// They are unpacked into panels, by which all rows of activations pass.
    Panels,
    /// Four rows share each register.
    Quads,
    /// One row is read after another.
    Rows,
}

/// How a product is computed.
struct Plan {
    way: Way,
    /// Rows of activations in a tile of [`Rounded`].
    tile: usize,
    /// Columns of a row that stand together there.
    unit: usize,
    /// Rows of weights that are one unit of work.
    width: usize,
}

/// What one call of [`Kernels::multiply`] computes.
struct Product<'a> {
    rounded: &'a Rounded,
    weights: &'a Matrix<'a>,
    bias: Option<&'a [f32]>,
    y: &'a Columns<'a>,
}

use columns::Columns;

/// A matrix whose columns are written by several threads.
mod columns {
    #![allow(
        unsafe_code,
        reason = "rows of a matrix whose columns are shared out have no slices of their own"
    )]

    use std::marker::PhantomData;

    pub(super) struct Columns<'a> {
        values: *mut f32,
        width: usize,
        len: usize,
        borrowed: PhantomData<&'a mut [f32]>,
    }

    // SAFETY: `write` is the only access; units of work have columns of their own.
    unsafe impl Sync for Columns<'_> {}

    impl<'a> Columns<'a> {
        /// `values` as `[_, width]`.
        pub(super) fn new(values: &'a mut [f32], width: usize) -> Self {
            Self { values: values.as_mut_ptr(), width, len: values.len(), borrowed: PhantomData }
        }

        /// Writes `values` from `[row, column]` on. No other thread may write there.
        pub(super) fn write(&self, row: usize, column: usize, values: &[f32]) {
            let first = row * self.width + column;
            assert!(column + values.len() <= self.width && first + values.len() <= self.len);
            // SAFETY: inside, as just asserted; only this unit of work writes these columns, and nobody reads meanwhile.
            unsafe { self.values.add(first).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
    }
}

#[cfg(test)]
mod tests;

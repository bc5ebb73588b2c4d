//! Few-bit weights as they lie in a package.

/// Bits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// Two weights a byte, the earlier one in the lower half.
    Four,
    /// One weight a byte.
    Eight,
}

impl Bits {
    fn number(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// What stands for zero where no zero points are given.
    fn middle(self) -> i32 {
        match self {
            Self::Four => 8,
            Self::Eight => 128,
        }
    }
}

/// A `[rows, columns]` matrix of unsigned integers with a scale, and perhaps a zero point, for each block of a row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    packed: &'a [u8],
    scales: &'a [f32],
    zero_points: Option<&'a [u8]>,
    bits: Bits,
    rows: usize,
    columns: usize,
    block: usize,
    blocks: usize,
}

impl<'a> Matrix<'a> {
    /// The inputs of `MatMulNBits`: `packed` is `[rows, blocks, block * bits / 8]`, `scales` `[rows, blocks]`, and
    /// `zero_points` `[rows, blocks * bits / 8]`, rounded up. `None` when the sizes do not belong together or
    /// `block` is none of 32, 64, 128 and 256.
    pub fn new(
        packed: &'a [u8],
        scales: &'a [f32],
        zero_points: Option<&'a [u8]>,
        bits: Bits,
        [rows, columns]: [usize; 2],
        block: usize,
    ) -> Option<Self> {
        let blocks = columns.div_ceil(block.max(1));
        let matrix = Self { packed, scales, zero_points, bits, rows, columns, block, blocks };
        let whole = matches!(block, 32 | 64 | 128 | 256)
            && rows > 0
            && columns > 0
            && packed.len() == rows * matrix.row_bytes()
            && scales.len() == rows * blocks
            && zero_points.is_none_or(|zeros| zeros.len() == rows * (blocks * bits.number()).div_ceil(8));
        whole.then_some(matrix)
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn bits(&self) -> Bits {
        self.bits
    }

    /// Columns that share a scale.
    pub(super) fn block(&self) -> usize {
        self.block
    }

    /// Blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The weights of row `row`.
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        &self.packed[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// The scales of row `row`.
    pub(super) fn scales(&self, row: usize) -> &'a [f32] {
        &self.scales[row * self.blocks..][..self.blocks]
    }

    /// The zero of every block, when it is the same.
    pub(super) fn zero(&self) -> Option<i32> {
        self.zero_points.is_none().then(|| self.bits.middle())
    }

    /// The zero of block `block` of row `row`.
    pub(super) fn zero_point(&self, row: usize, block: usize) -> i32 {
        let Some(zeros) = self.zero_points else { return self.bits.middle() };
        match self.bits {
            Bits::Four => {
                let byte = zeros[row * self.blocks.div_ceil(2) + block / 2];
                i32::from(if block.is_multiple_of(2) { byte & 15 } else { byte >> 4 })
            }
            Bits::Eight => i32::from(zeros[row * self.blocks + block]),
        }
    }

    fn row_bytes(&self) -> usize {
        self.blocks * self.block * self.bits.number() / 8
    }
}

//! Rows of a tensor as bytes.

use std::ops::Range;

use half::f16;
use ort::value::PrimitiveTensorElementType;

use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::package::manifest::DType;

/// Rows of a tensor, little endian: `height` of them for every index of the dimensions before, one after another.
#[derive(Clone, Copy, Debug)]
pub struct RowBytes<'a> {
    /// The numbers.
    pub bytes: &'a [u8],
    /// Rows of each index.
    pub height: usize,
}

/// A number that is kept as bytes.
trait Element: PrimitiveTensorElementType + Copy {
    fn put(self, bytes: &mut [u8]);
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($($number:ty),+) => { $(
        impl Element for $number {
            fn put(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }

            fn get(bytes: &[u8]) -> Self {
                let mut number = [0; size_of::<Self>()];
                number.copy_from_slice(bytes);
                Self::from_le_bytes(number)
            }
        }
    )+ };
}
element!(f32, f16, i8, i32, i64);

impl Tensor {
    /// Appends `rows` of the last but one dimension to `bytes`, for every index of the dimensions before.
    ///
    /// # Errors
    /// [`Error::Request`] when the tensor has fewer rows.
    pub fn read_rows(&self, rows: &Range<usize>, bytes: &mut Vec<u8>) -> Result<()> {
        match self.dtype() {
            DType::F32 => self.read_rows_of::<f32>(rows, bytes),
            DType::F16 => self.read_rows_of::<f16>(rows, bytes),
            DType::I8 => self.read_rows_of::<i8>(rows, bytes),
            DType::I32 => self.read_rows_of::<i32>(rows, bytes),
            DType::I64 => self.read_rows_of::<i64>(rows, bytes),
        }
    }

    /// Writes the rows `from` of `source` over those from `start` on.
    ///
    /// # Errors
    /// [`Error::Request`] when the tensor or the source has fewer rows, or the source is of another width.
    pub fn write_rows(&mut self, start: usize, source: RowBytes<'_>, from: &Range<usize>) -> Result<()> {
        match self.dtype() {
            DType::F32 => self.write_rows_of::<f32>(start, source, from),
            DType::F16 => self.write_rows_of::<f16>(start, source, from),
            DType::I8 => self.write_rows_of::<i8>(start, source, from),
            DType::I32 => self.write_rows_of::<i32>(start, source, from),
            DType::I64 => self.write_rows_of::<i64>(start, source, from),
        }
    }

    fn read_rows_of<T: Element>(&self, rows: &Range<usize>, bytes: &mut Vec<u8>) -> Result<()> {
        let (height, width) = self.height_and_width()?;
        if rows.start > rows.end || rows.end > height {
            return Err(self.lacks(rows));
        }
        if rows.is_empty() || width == 0 {
            return Ok(());
        }
        for block in self.slice::<T>(self.dtype())?.chunks_exact(height * width) {
            let numbers = &block[rows.start * width..rows.end * width];
            let at = bytes.len();
            bytes.resize(at + size_of_val(numbers), 0);
            for (number, place) in numbers.iter().zip(bytes[at..].chunks_exact_mut(size_of::<T>())) {
                number.put(place);
            }
        }
        Ok(())
    }

    fn write_rows_of<T: Element>(
        &mut self,
        start: usize,
        source: RowBytes<'_>,
        from: &Range<usize>,
    ) -> Result<()> {
        let (height, width) = self.height_and_width()?;
        if from.start > from.end || from.end > source.height || from.len() > height.saturating_sub(start) {
            return Err(self.lacks(&(start..start.saturating_add(from.len()))));
        }
        if from.is_empty() || width == 0 {
            return Ok(());
        }
        let (dtype, row) = (self.dtype(), width * size_of::<T>());
        let blocks = self.shape().iter().rev().skip(2).product::<usize>();
        let lacking = self.lacks(from);
        if blocks.checked_mul(source.height * row) != Some(source.bytes.len()) {
            return Err(lacking);
        }
        let target = self.slice_mut::<T>(dtype)?.chunks_exact_mut(height * width);
        for (target, bytes) in target.zip(source.bytes.chunks_exact(source.height * row)) {
            let bytes = bytes[from.start * row..from.end * row].chunks_exact(size_of::<T>());
            for (number, bytes) in target[start * width..].iter_mut().zip(bytes) {
                *number = T::get(bytes);
            }
        }
        Ok(())
    }

    fn height_and_width(&self) -> Result<(usize, usize)> {
        match self.shape().split_last_chunk() {
            Some((_, &[height, width])) => Ok((height, width)),
            None => Err(Error::Request(format!("a tensor {} has no rows", self.describe()))),
        }
    }

    fn lacks(&self, rows: &Range<usize>) -> Error {
        Error::Request(format!("rows {rows:?} cannot be copied from or to a tensor {}", self.describe()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    #[test]
    fn rows_travel_as_bytes_in_every_type() {
        testing::start();
        for dtype in [DType::F32, DType::F16] {
            let numbers: Vec<f32> = (0_u8..24).map(f32::from).collect();
            let tensor = Tensor::from_reals(dtype, &[1, 2, 4, 3], &numbers).unwrap();
            let mut bytes = Vec::new();
            tensor.read_rows(&(1..4), &mut bytes).unwrap();
            assert_eq!(bytes.len(), 18 * dtype.bytes());
            let mut other = Tensor::zeros(dtype, &[1, 2, 5, 3]).unwrap();
            other.write_rows(3, RowBytes { bytes: &bytes, height: 3 }, &(1..3)).unwrap();
            let mut wanted = vec![0.0; 30];
            wanted[9..15].copy_from_slice(&numbers[6..12]);
            wanted[24..30].copy_from_slice(&numbers[18..24]);
            assert_eq!(other.reals().unwrap().as_ref(), wanted);
        }
    }

    #[test]
    fn rows_that_are_not_there_are_refused() {
        testing::start();
        let mut tensor = Tensor::zeros(DType::F32, &[2, 3, 4]).unwrap();
        assert!(tensor.read_rows(&(1..4), &mut Vec::new()).is_err());
        let bytes = vec![0; 2 * 2 * 4 * 4];
        let source = RowBytes { bytes: &bytes, height: 2 };
        assert!(tensor.write_rows(1, source, &(0..2)).is_ok());
        assert!(tensor.write_rows(2, source, &(0..2)).is_err());
        assert!(tensor.write_rows(0, source, &(1..3)).is_err());
        assert!(tensor.write_rows(0, RowBytes { bytes: &bytes[1..], height: 2 }, &(0..1)).is_err());
        assert!(Tensor::zeros(DType::F32, &[3]).unwrap().read_rows(&(0..1), &mut Vec::new()).is_err());
    }
}

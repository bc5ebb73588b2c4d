//! The rotary embedding's angles, for graphs that take them as inputs.

use crate::error::Result;
use crate::package::ModelPackage;
use crate::package::manifest::{DType, RotarySpec};

/// Cosines and sines of every position.
#[derive(Debug)]
pub(super) struct RotaryTable {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    columns: usize,
}

impl RotaryTable {
    /// Reads the table of `package`, if it has one. Its size was checked when the package was opened.
    ///
    /// # Errors
    /// [`crate::Error::Package`] when the file cannot be read.
    pub(super) fn open(package: &ModelPackage) -> Result<Option<Self>> {
        let Some(RotarySpec { file, dim }) = &package.manifest().decoder.rotary else { return Ok(None) };
        let bytes = package.read(file)?;
        let numbers = bytes.chunks_exact(DType::F32.bytes());
        let values: Vec<f32> =
            numbers.filter_map(|four| four.try_into().ok().map(f32::from_le_bytes)).collect();
        let (cosines, sines) = values.split_at(values.len() / 2);
        Ok(Some(Self { cosines: cosines.to_vec(), sines: sines.to_vec(), columns: dim / 2 }))
    }

    /// Cosines and sines of the positions from `start` on, `rows` x `columns` each. Beyond the table the last row
    /// stands: nothing that such a position gives is read.
    pub(super) fn rows(&self, start: usize, rows: usize) -> (Vec<f32>, Vec<f32>) {
        let last = (self.cosines.len() / self.columns).saturating_sub(1);
        let pick = |table: &[f32]| {
            let row =
                |position: usize| position.min(last) * self.columns..(position.min(last) + 1) * self.columns;
            (start..start + rows).flat_map(|position| table[row(position)].iter().copied()).collect()
        };
        (pick(&self.cosines), pick(&self.sines))
    }

    /// Numbers of a row: half of what is rotated.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_picked_and_the_last_one_stands_for_those_beyond() {
        let table = RotaryTable {
            cosines: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            sines: vec![10.0, 20.0, 30.0, 40.0, 50.0, 60.0],
            columns: 2,
        };
        let (cosines, sines) = table.rows(1, 3);
        assert_eq!(cosines, [3.0, 4.0, 5.0, 6.0, 5.0, 6.0]);
        assert_eq!(sines, [30.0, 40.0, 50.0, 60.0, 50.0, 60.0]);
        assert_eq!(table.columns(), 2);
    }
}

//! Tokens to embeddings, and images into their places among them.
//!
//! ```text
//! text  [45, hidden]  ─┐
//!                      ├─> [621, hidden]    an image placeholder takes no position, its image takes 576
//! image [576, hidden] ─┘
//! ```
//!
//! Follows `prepare_inputs_labels_for_multimodal` in zhuyiche/llava-phi, `llava_phi/model/llava_arch.py`.

use std::{fs::File, ops::Range, path::PathBuf};

use half::f16;
use memmap2::Mmap;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::projector::ImageEmbeds;
use crate::disk::map;
use crate::error::{Error, Result};
use crate::package::manifest::{DType, EmbeddingSpec};
use crate::package::{FileSource, ModelPackage};
use crate::text::TokenId;

/// The token embedding table, read row by row where it lies.
#[derive(Debug)]
pub struct TokenEmbedder {
    table: Table,
    spec: EmbeddingSpec,
    path: PathBuf,
}

#[derive(Debug)]
enum Table {
    Mapped(Mmap),
    Memory(&'static [u8]),
}

impl TokenEmbedder {
    /// Maps the table of `package`.
    ///
    /// # Errors
    /// [`Error::Package`] when the file cannot be mapped or has another size than its rows take.
    pub fn open(package: &ModelPackage) -> Result<Self> {
        let spec = package.manifest().embedding.clone();
        let path = package.display_path(&spec.file);
        let table = match package.file(&spec.file)? {
            FileSource::Memory(bytes) => Table::Memory(bytes),
            FileSource::Path(file) => {
                let unreadable = |e: std::io::Error| {
                    Error::package(&path, "the embedding table cannot be mapped").because(e)
                };
                let file = File::open(file).map_err(unreadable)?;
                Table::Mapped(map(&file).map_err(unreadable)?)
            }
        };
        let embedder = Self { table, spec, path };
        let needed = embedder.spec.rows * embedder.row_bytes();
        if embedder.bytes().len() != needed {
            return Err(Error::package(
                &embedder.path,
                format!("the embedding table has {} bytes instead of {needed}", embedder.bytes().len()),
            ));
        }
        Ok(embedder)
    }

    fn bytes(&self) -> &[u8] {
        match &self.table {
            Table::Mapped(map) => map,
            Table::Memory(bytes) => bytes,
        }
    }

    fn row_bytes(&self) -> usize {
        self.spec.columns * self.spec.dtype.bytes()
    }

    /// Looks up `ids`, giving `[ids.len(), hidden]` f32.
    ///
    /// # Errors
    /// [`Error::Request`] for an id that the table has no row for.
    pub fn embed(&self, ids: &[TokenId]) -> Result<Array2<f32>> {
        let mut rows = Array2::zeros((ids.len(), self.spec.columns));
        self.write(ids, rows.view_mut())?;
        Ok(rows)
    }

    fn write(&self, ids: &[TokenId], mut rows: ArrayViewMut2<'_, f32>) -> Result<()> {
        for (&id, mut row) in ids.iter().zip(rows.rows_mut()) {
            let start = id as usize * self.row_bytes();
            let bytes = self.bytes().get(start..start + self.row_bytes()).ok_or_else(|| {
                Error::Request(format!(
                    "token {id} is beyond the {} rows of the embedding table",
                    self.spec.rows
                ))
            })?;
            match self.spec.dtype {
                DType::F16 => {
                    for (value, bytes) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                        *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                    }
                }
                _ => {
                    for (value, bytes) in row.iter_mut().zip(bytes.chunks_exact(4)) {
                        *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
            }
        }
        Ok(())
    }

    /// Embeds the positions that `runs` name, in order: `[positions, hidden]` f32.
    ///
    /// # Errors
    /// [`Error::Request`] for an id without a row, or rows that an image does not have.
    pub fn splice(&self, runs: &[Run<'_>]) -> Result<Array2<f32>> {
        for run in runs {
            if let Run::Image { embeds, rows } = run {
                image_rows(embeds, rows)?;
            }
        }
        let mut embeds = Array2::zeros((runs.iter().map(Run::len).sum(), self.spec.columns));
        let mut at = 0;
        for run in runs {
            let mut place = embeds.slice_mut(s![at..at + run.len(), ..]);
            match run {
                Run::Tokens(ids) => self.write(ids, place)?,
                Run::Image { embeds, rows } => place.assign(&image_rows(embeds, rows)?),
            }
            at += run.len();
        }
        Ok(embeds)
    }
}

/// Positions that stand together in a prompt.
#[derive(Clone, Debug)]
pub enum Run<'a> {
    /// One position a token.
    Tokens(&'a [TokenId]),
    /// These rows of an image.
    Image {
        /// The whole image.
        embeds: &'a ImageEmbeds,
        /// The rows that are wanted.
        rows: Range<usize>,
    },
}

impl Run<'_> {
    /// How many positions the run takes.
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Image { rows, .. } => rows.len(),
        }
    }

    /// Whether the run takes no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn image_rows<'a>(embeds: &'a ImageEmbeds, rows: &Range<usize>) -> Result<ArrayView2<'a, f32>> {
    let all = embeds.rows();
    if rows.start > rows.end || rows.end > all.nrows() {
        return Err(Error::Request(format!("an image has {} positions, not {rows:?}", all.nrows())));
    }
    Ok(all.slice_move(s![rows.clone(), ..]))
}

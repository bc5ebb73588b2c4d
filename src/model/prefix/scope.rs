//! What decides the rows of a position: the model as it is served, and everything that stands before.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::super::kv_cache::{PositionKey, RowLayout};
use crate::disk::hex;
use crate::text::TokenId;

/// A SHA-256.
pub(super) type Digest = [u8; 32];

/// What computes rows. Rows of two scopes that differ anywhere are never mixed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// The version of this program.
    pub program: String,
    /// SHA-256 of the package's manifest, and so of everything that it lists but snapshots.
    pub package: String,
    /// What serves each component.
    pub components: Vec<Served>,
    /// ONNX Runtime's version.
    pub runtime: String,
    /// The kind of processor: its kernels round in their own way.
    pub processor: String,
    /// What a position is made of.
    pub layout: RowLayout,
}

/// What serves one component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Served {
    /// The component.
    pub component: String,
    /// Its variant.
    pub variant: String,
    /// The provider, with its device where one was named.
    pub provider: String,
    /// This program's own kernels, where they compute a part of it: they round in their own way.
    pub kernels: Option<String>,
    /// What the provider was told.
    pub options: BTreeMap<String, String>,
}

impl Scope {
    pub(super) fn digest(&self) -> Digest {
        let text = serde_json::to_string(self).expect("text and numbers can always be written");
        Sha256::digest(text.as_bytes()).into()
    }

    /// The variant that serves `component`; empty when nothing does.
    pub fn variant(&self, component: &str) -> &str {
        self.components.iter().find(|one| one.component == component).map_or("", |one| &one.variant)
    }
}

/// The digest of what stands before a position: of `before`, and of `keys` after it.
pub(super) fn after(before: &Digest, keys: &[PositionKey]) -> Digest {
    let mut hash = Sha256::new();
    hash.update(before);
    for key in keys {
        match key {
            PositionKey::Token(id) => {
                hash.update([0]);
                hash.update(id.to_le_bytes());
            }
            PositionKey::Image { hash: pixels, row } => {
                hash.update([1]);
                hash.update(pixels);
                hash.update((*row as u64).to_le_bytes());
            }
        }
    }
    hash.finalize().into()
}

/// Positions that stand together, as a snapshot names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Stretch {
    /// Tokens, one a position.
    Tokens(Vec<TokenId>),
    /// Rows of one image.
    Image {
        /// SHA-256 of the image's pixel values, hexadecimal.
        pixels: String,
        /// The first row.
        from: usize,
        /// The row after the last.
        to: usize,
    },
}

impl Stretch {
    /// `keys` in few words.
    pub(super) fn of(keys: &[PositionKey]) -> Vec<Self> {
        let mut all = Vec::new();
        for key in keys {
            match (key, all.last_mut()) {
                (PositionKey::Token(id), Some(Self::Tokens(ids))) => ids.push(*id),
                (PositionKey::Token(id), _) => all.push(Self::Tokens(vec![*id])),
                (PositionKey::Image { hash, row }, Some(Self::Image { pixels, to, .. }))
                    if *to == *row && *pixels == hex(hash) =>
                {
                    *to += 1;
                }
                (PositionKey::Image { hash, row }, _) => {
                    all.push(Self::Image { pixels: hex(hash), from: *row, to: row.saturating_add(1) });
                }
            }
        }
        all
    }

    /// How many positions these are.
    fn len(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Image { from, to, .. } => to.saturating_sub(*from),
        }
    }

    /// The positions again, if they are `positions` in all.
    pub(super) fn keys(all: &[Self], positions: usize) -> Option<Vec<PositionKey>> {
        // Before anything is allocated: the numbers come from a file.
        let total = all.iter().try_fold(0_usize, |sum, one| sum.checked_add(one.len()))?;
        if total != positions {
            return None;
        }
        let mut keys = Vec::new();
        for one in all {
            match one {
                Self::Tokens(ids) => keys.extend(ids.iter().map(|id| PositionKey::Token(*id))),
                Self::Image { pixels, from, to } => {
                    let hash = unhex(pixels)?;
                    keys.extend((*from..*to).map(|row| PositionKey::Image { hash, row }));
                }
            }
        }
        Some(keys)
    }
}

fn unhex(text: &str) -> Option<Digest> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, place) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[place..place + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Where the last image among `keys` ends; `None` when there is none.
pub(super) fn last_image_end(keys: &[PositionKey]) -> Option<usize> {
    keys.iter().rposition(is_image).map(|last| last + 1)
}

pub(super) fn is_image(key: &PositionKey) -> bool {
    matches!(key, PositionKey::Image { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(pixels: u8, rows: std::ops::Range<usize>) -> impl Iterator<Item = PositionKey> {
        rows.map(move |row| PositionKey::Image { hash: [pixels; 32], row })
    }

    fn tokens(ids: &[TokenId]) -> impl Iterator<Item = PositionKey> + '_ {
        ids.iter().map(|id| PositionKey::Token(*id))
    }

    #[test]
    fn positions_are_the_same_after_being_written_in_few_words() {
        let keys: Vec<PositionKey> = tokens(&[5, 6])
            .chain(image(1, 0..4))
            .chain(image(1, 0..4))
            .chain(image(2, 0..4))
            .chain(tokens(&[7]))
            .chain(image(2, 0..2))
            .collect();
        let words = Stretch::of(&keys);
        assert_eq!(words.len(), 6);
        assert_eq!(Stretch::keys(&words, keys.len()).unwrap(), keys);
        assert_eq!(Stretch::keys(&words, keys.len() + 1), None);
        assert_eq!(last_image_end(&keys), Some(17));
    }

    #[test]
    fn a_row_count_from_a_file_allocates_nothing() {
        let huge = Stretch::Image { pixels: "00".repeat(32), from: 0, to: usize::MAX };
        assert_eq!(Stretch::keys(&[huge.clone(), huge], 4), None);
        let bad = Stretch::Image { pixels: "é".repeat(32), from: 0, to: 1 };
        assert_eq!(Stretch::keys(&[bad], 1), None);
    }

    #[test]
    fn what_stands_before_decides() {
        let root = [0; 32];
        let [a, b]: [Vec<_>; 2] = [tokens(&[1, 2]).collect(), tokens(&[2, 1]).collect()];
        assert_ne!(after(&root, &a), after(&root, &b));
        assert_ne!(after(&root, &a), after(&[1; 32], &a));
        let rows: Vec<_> = image(0, 0..1).collect();
        assert_ne!(after(&root, &rows), after(&root, &a));
    }
}

//! Strings to tokens and back.

pub mod detokenize;
mod file;
pub mod prompt;
pub mod tokenizer;

pub use detokenize::{Detokenizer, Step};
pub use prompt::{Piece, Prompt, Span};
pub use tokenizer::Tokenizer;

/// The number of a token: a row of the embedding table and a column of the logits.
pub type TokenId = u32;

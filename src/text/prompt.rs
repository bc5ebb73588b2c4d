//! What the decoder reads: spans of tokens and images.
//!
//! ```text
//! pieces  Text "USER: " | Image 0 | Text "\n" | Text "What is it?" | Tokens [50256]
//! spans   Text [29904, 25, 220] | Image 0 | Text [198, 2061, ..., 50256]
//! ```
//!
//! Neighbouring text pieces are joined before they are encoded, because a merge may cross their border.
//! An image and given tokens part texts, as in `tokenizer_image_token` of zhuyiche/llava-phi, which encodes
//! what stands between two images alone.

use super::TokenId;
use crate::error::Result;

/// One part of a prompt before it is encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text; whatever it says, it never becomes a special token or an image.
    Text(String),
    /// Tokens as they are: special ones, or those of an answer that the model gave.
    Tokens(Vec<TokenId>),
    /// The image of this number among the images of the request, counted from 0.
    Image(usize),
}

impl Piece {
    /// A text piece.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }
}

/// One part of a [`Prompt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Span {
    /// Tokens, at least one; each takes one position.
    Text(Vec<TokenId>),
    /// The image of this number; it takes as many positions as an image has tokens.
    Image(usize),
}

/// What the decoder reads: no two text spans are neighbours and none is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    spans: Vec<Span>,
}

impl Prompt {
    /// Encodes the texts between images and given tokens with `encode`, each as one string.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn new(pieces: &[Piece], mut encode: impl FnMut(&str) -> Result<Vec<TokenId>>) -> Result<Self> {
        let mut prompt = Self::default();
        let mut text = String::new();
        for piece in pieces {
            if let Piece::Text(more) = piece {
                text.push_str(more);
                continue;
            }
            prompt.add_text(&mut text, &mut encode)?;
            match piece {
                Piece::Tokens(ids) => prompt.add_tokens(ids),
                Piece::Image(index) => prompt.spans.push(Span::Image(*index)),
                Piece::Text(_) => {}
            }
        }
        prompt.add_text(&mut text, &mut encode)?;
        Ok(prompt)
    }

    /// The spans in the order in which the decoder reads them.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Positions that the prompt takes when an image takes `tokens_per_image` of them.
    pub fn positions(&self, tokens_per_image: usize) -> usize {
        self.images().saturating_mul(tokens_per_image).saturating_add(self.tokens())
    }

    /// Places at which an image stands; one image may stand at several.
    pub fn images(&self) -> usize {
        self.spans.iter().filter(|span| matches!(span, Span::Image(_))).count()
    }

    /// Tokens of all text spans.
    pub fn tokens(&self) -> usize {
        self.token_ids().count()
    }

    /// The ids of all text spans, in order.
    pub fn token_ids(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.spans
            .iter()
            .filter_map(|span| match span {
                Span::Text(ids) => Some(ids),
                Span::Image(_) => None,
            })
            .flatten()
            .copied()
    }

    fn add_text(
        &mut self,
        text: &mut String,
        encode: &mut impl FnMut(&str) -> Result<Vec<TokenId>>,
    ) -> Result<()> {
        if !text.is_empty() {
            self.add_tokens(&encode(text)?);
            text.clear();
        }
        Ok(())
    }

    fn add_tokens(&mut self, ids: &[TokenId]) {
        if ids.is_empty() {
            return;
        }
        if let Some(Span::Text(last)) = self.spans.last_mut() {
            last.extend_from_slice(ids);
        } else {
            self.spans.push(Span::Text(ids.to_vec()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// One token a string: the number of its characters; so a border inside a text shows.
    fn lengths(pieces: &[Piece]) -> Vec<Span> {
        let count = |text: &str| Ok(vec![TokenId::try_from(text.chars().count()).unwrap()]);
        Prompt::new(pieces, count).unwrap().spans
    }

    #[test]
    fn neighbouring_texts_are_encoded_as_one() {
        assert_eq!(lengths(&[Piece::text("ab"), Piece::text(""), Piece::text("c")]), [Span::Text(vec![3])]);
    }

    #[test]
    fn an_image_parts_texts() {
        let spans = lengths(&[Piece::text("ab"), Piece::Image(0), Piece::text("c"), Piece::text("d")]);
        assert_eq!(spans, [Span::Text(vec![2]), Span::Image(0), Span::Text(vec![2])]);
    }

    #[test]
    fn given_tokens_part_texts_and_join_their_span() {
        let spans = lengths(&[Piece::text("ab"), Piece::Tokens(vec![70, 71]), Piece::text("c")]);
        assert_eq!(spans, [Span::Text(vec![2, 70, 71, 1])]);
    }

    #[test]
    fn empty_pieces_leave_no_span() {
        let spans = lengths(&[Piece::text(""), Piece::Image(1), Piece::Tokens(vec![]), Piece::Image(0)]);
        assert_eq!(spans, [Span::Image(1), Span::Image(0)]);
    }

    #[test]
    fn an_image_takes_its_positions_and_its_placeholder_takes_none() {
        let count = |_: &str| Ok(vec![1, 2, 3]);
        let pieces = [Piece::text("a"), Piece::Image(0), Piece::text("b"), Piece::Image(0)];
        let prompt = Prompt::new(&pieces, count).unwrap();
        assert_eq!((prompt.images(), prompt.tokens(), prompt.positions(576)), (2, 6, 2 * 576 + 6));
        assert_eq!(prompt.positions(usize::MAX), usize::MAX);
    }

    #[test]
    fn a_failure_to_encode_is_handed_on() {
        let fail = |_: &str| Err(Error::Request("no".to_owned()));
        assert_eq!(Prompt::new(&[Piece::text("a")], fail).unwrap_err().to_string(), "no");
    }
}

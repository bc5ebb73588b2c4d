//! Messages made of text and images.

use serde::{Deserialize, Serialize};

use crate::text::TokenId;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The person who asks.
    User,
    /// The model.
    Assistant,
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Text as it was written.
    Text(String),
    /// The image of this number among the images of the conversation, counted from 0.
    Image(usize),
}

/// What one side said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who said it.
    pub role: Role,
    /// What was said, in order.
    pub parts: Vec<Part>,
    /// The tokens of an answer as the model gave them. They stand for the text when the conversation is read
    /// again, so that what the model remembers of it stays true to the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenId>>,
}

impl Message {
    /// What the user says.
    pub fn user(parts: impl IntoIterator<Item = Part>) -> Self {
        Self { role: Role::User, parts: parts.into_iter().collect(), tokens: None }
    }

    /// An answer of which only the text is known.
    pub fn assistant(text: impl Into<String>) -> Self {
        Self { role: Role::Assistant, parts: vec![Part::Text(text.into())], tokens: None }
    }

    /// An answer that the model gave, with its tokens from the first to the last.
    pub fn generated(text: impl Into<String>, tokens: Vec<TokenId>) -> Self {
        Self { tokens: Some(tokens), ..Self::assistant(text) }
    }

    /// The texts of the message, joined.
    pub fn text(&self) -> String {
        let text = |part: &'_ Part| match part {
            Part::Text(text) => Some(text.clone()),
            Part::Image(_) => None,
        };
        self.parts.iter().filter_map(text).collect()
    }

    /// The images of the message, in order.
    pub fn images(&self) -> impl Iterator<Item = usize> + '_ {
        self.parts.iter().filter_map(|part| match part {
            Part::Text(_) => None,
            Part::Image(index) => Some(*index),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_tells_its_text_and_its_images() {
        let parts = [Part::Image(2), Part::Text("a".to_owned()), Part::Image(0), Part::Text("b".to_owned())];
        let message = Message::user(parts);
        assert_eq!(message.text(), "ab");
        assert_eq!(message.images().collect::<Vec<_>>(), [2, 0]);
    }

    #[test]
    fn a_message_survives_being_written_down() {
        let answer = Message::generated("A cat.", vec![317, 3797, 13]);
        let written = serde_json::to_string(&answer).unwrap();
        assert_eq!(written, r#"{"role":"assistant","parts":[{"text":"A cat."}],"tokens":[317,3797,13]}"#);
        assert_eq!(serde_json::from_str::<Message>(&written).unwrap(), answer);
        let question = Message::user([Part::Image(0)]);
        let written = serde_json::to_string(&question).unwrap();
        assert_eq!(written, r#"{"role":"user","parts":[{"image":0}]}"#);
        assert_eq!(serde_json::from_str::<Message>(&written).unwrap(), question);
    }
}

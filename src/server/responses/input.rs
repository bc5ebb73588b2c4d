//! The chat of a request to `/v1/responses`, as that of any other.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde_json::Value;

use super::super::error::{Answer, ApiError};
use super::super::json::without_nulls;
use super::super::messages::{ChatMessage, Content, ContentPart, Detail, ImageUrl, Messages};

/// The question as text, or the chat so far, oldest first.
#[derive(Debug)]
pub(super) enum Input {
    /// A question without images.
    Text(String),
    /// Messages in order.
    Items(Vec<Item>),
}

/// One message.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    /// What the item is.
    #[serde(default, rename = "type")]
    kind: Kind,
    /// Who said it.
    role: Role,
    /// What was said and shown.
    content: ItemContent,
    /// What an earlier answer called this item; it names nothing here, since nothing is stored.
    #[serde(default, rename = "id")]
    _id: Option<String>,
    /// Whether an earlier answer ended by itself; its text is read as it stands.
    #[serde(default, rename = "status")]
    _status: Option<Status>,
}

/// What an item is.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// A message.
    #[default]
    Message,
}

/// Who said it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    /// What holds for the whole chat. Such messages come before all others.
    System,
    /// The same as `system`.
    Developer,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

/// How an earlier answer ended.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    /// Not yet.
    InProgress,
    /// By itself.
    Completed,
    /// At a limit.
    Incomplete,
}

/// Text, or parts in order.
#[derive(Debug)]
enum ItemContent {
    /// Text alone.
    Text(String),
    /// Text and images.
    Parts(Vec<ItemPart>),
}

/// One part of a message.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ItemPart {
    /// Text.
    InputText {
        /// The text as it is.
        text: String,
    },
    /// An image, in a message of the user.
    InputImage {
        /// A data URI: `data:image/png;base64,...`. JPEG, PNG, WebP, GIF, BMP, TIFF and PNM are read, whatever it says.
        image_url: String,
        /// How closely the image is looked at; the model knows one way only.
        #[serde(default)]
        detail: Detail,
    },
    /// Text of an earlier answer, in a message of the assistant.
    OutputText {
        /// The text as it is.
        text: String,
        /// What came with it; it is not read again.
        #[serde(default, rename = "annotations")]
        _annotations: Vec<Value>,
        /// The same.
        #[serde(default, rename = "logprobs")]
        _logprobs: Vec<Value>,
    },
}

impl Default for Input {
    fn default() -> Self {
        Self::Items(Vec::new())
    }
}

impl<'de> Deserialize<'de> for Input {
    /// A fault names the item by its place, from 0.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = |(index, value)| {
            serde_json::from_value(without_nulls(value))
                .map_err(|fault| de::Error::custom(format!("item {index}: {fault}")))
        };
        match deserializer.deserialize_any(Either)? {
            TextOr::Text(text) => Ok(Self::Text(text)),
            TextOr::List(values) => {
                values.into_iter().enumerate().map(read).collect::<Result<_, _>>().map(Self::Items)
            }
        }
    }
}

impl<'de> Deserialize<'de> for ItemContent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = |(index, value)| {
            serde_json::from_value(value).map_err(|fault| de::Error::custom(format!("part {index}: {fault}")))
        };
        match deserializer.deserialize_any(Either)? {
            TextOr::Text(text) => Ok(Self::Text(text)),
            TextOr::List(values) => {
                values.into_iter().enumerate().map(read).collect::<Result<_, _>>().map(Self::Parts)
            }
        }
    }
}

enum TextOr {
    Text(String),
    List(Vec<Value>),
}

/// Reads text or a list, and says so of anything else.
struct Either;

impl<'de> Visitor<'de> for Either {
    type Value = TextOr;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a list")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<TextOr, E> {
        Ok(TextOr::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<TextOr, E> {
        Ok(TextOr::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<TextOr, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(items)).map(TextOr::List)
    }
}

impl Input {
    /// The chat in the form that all endpoints share.
    ///
    /// # Errors
    /// When a message of the user holds a part that only an answer has.
    pub(super) fn into_messages(self) -> Answer<Messages> {
        let items = match self {
            Self::Text(text) => {
                return Ok(Messages(vec![ChatMessage::User { content: Content::Text(text) }]));
            }
            Self::Items(items) => items,
        };
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| item.into_message(index))
            .collect::<Answer<_>>()
            .map(Messages)
    }
}

impl Item {
    fn into_message(self, index: usize) -> Answer<ChatMessage> {
        let Self { kind: Kind::Message, role, content, .. } = self;
        let content = match content {
            ItemContent::Text(text) => Content::Text(text),
            ItemContent::Parts(parts) => Content::Parts(
                parts.into_iter().map(|part| part.into_part(index, role)).collect::<Answer<_>>()?,
            ),
        };
        Ok(match role {
            Role::System => ChatMessage::System { content },
            Role::Developer => ChatMessage::Developer { content },
            Role::User => ChatMessage::User { content },
            Role::Assistant => ChatMessage::Assistant { content },
        })
    }
}

impl ItemPart {
    fn into_part(self, index: usize, role: Role) -> Answer<ContentPart> {
        match self {
            Self::OutputText { .. } if !matches!(role, Role::Assistant) => Err(ApiError::value(
                "input",
                format!("item {index} is not of the assistant and holds output_text; make it input_text"),
            )),
            Self::InputText { text } | Self::OutputText { text, .. } => Ok(ContentPart::Text { text }),
            Self::InputImage { image_url, detail } => {
                Ok(ContentPart::ImageUrl { image_url: ImageUrl { url: image_url, detail } })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(input: Value) -> Result<Messages, String> {
        let input: Input = serde_json::from_value(input).map_err(|fault| fault.to_string())?;
        input.into_messages().map_err(|error| error.body()["error"]["message"].as_str().unwrap().to_owned())
    }

    fn check(input: Value, wanted: Value) {
        let wanted: Messages = serde_json::from_value(wanted).unwrap();
        assert_eq!(format!("{:?}", read(input).unwrap()), format!("{wanted:?}"));
    }

    #[test]
    fn a_text_is_a_question_and_items_are_a_chat() {
        check(json!("What?"), json!([{"role": "user", "content": "What?"}]));
        check(
            json!([
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [
                    {"type": "input_text", "text": "What?"},
                    {"type": "input_image", "image_url": "data:,", "detail": "high", "file_id": null},
                ]},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": null, "content": [
                    {"type": "output_text", "text": "A cat.", "annotations": [], "logprobs": []},
                ]},
                {"role": "assistant", "content": "More."},
                {"role": "system", "content": [{"type": "input_text", "text": "Late."}]},
            ]),
            json!([
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
                {"role": "assistant", "content": "More."},
                {"role": "system", "content": [{"type": "text", "text": "Late."}]},
            ]),
        );
    }

    #[test]
    fn what_is_not_read_is_refused_with_its_place() {
        let part =
            |part: Value| json!([{"role": "user", "content": [{"type": "input_text", "text": "a"}, part]}]);
        for (input, wanted) in [
            (json!(7), "invalid type: integer `7`, expected text or a list"),
            (json!({"role": "user"}), "invalid type: map, expected text or a list"),
            (json!(["a"]), "item 0: invalid type: string \"a\""),
            (
                json!([{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]),
                "item 1: unknown variant `tool`",
            ),
            (json!([{"type": "function_call_output", "call_id": "1", "output": "a"}]), "item 0: unknown"),
            (json!([{"type": "item_reference", "id": "msg_1"}]), "item 0: unknown"),
            (json!([{"role": "user"}]), "item 0: missing field `content`"),
            (json!([{"role": "user", "content": "a", "name": "b"}]), "item 0: unknown field `name`"),
            (
                part(json!({"type": "input_file", "file_id": "f"})),
                "item 0: part 1: unknown variant `input_file`",
            ),
            (part(json!({"type": "input_image", "file_id": "f"})), "item 0: part 1: unknown field `file_id`"),
            (
                part(json!({"type": "input_image", "image_url": "data:,", "detail": "max"})),
                "item 0: part 1: unknown variant `max`",
            ),
            (part(json!({"type": "text", "text": "a"})), "item 0: part 1: unknown variant `text`"),
            (
                part(json!({"type": "output_text", "text": "a"})),
                "item 0 is not of the assistant and holds output_text",
            ),
        ] {
            let refusal = read(input.clone()).unwrap_err();
            assert!(refusal.starts_with(wanted), "{input}: {refusal}");
        }
    }
}

//! The messages of a chat, from OpenAI's form to what the model reads.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde_json::Value;

use super::error::{Answer, ApiError};
use super::json::without_nulls;
use super::limits::ServerLimits;
use crate::chat::conversation::{Message, Part, Role};
use crate::chat::template;
use crate::package::manifest::Template;
use crate::text::Piece;

/// The messages of a chat, oldest first.
#[derive(Debug, Default)]
pub(super) struct Messages(pub(super) Vec<ChatMessage>);

impl<'de> Deserialize<'de> for Messages {
    /// A fault names the message by its place, from 0.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = Vec::<Value>::deserialize(deserializer)?;
        let read = |(index, value)| {
            serde_json::from_value(without_nulls(value))
                .map_err(|fault| de::Error::custom(format!("message {index}: {fault}")))
        };
        values.into_iter().enumerate().map(read).collect::<Result<_, _>>().map(Self)
    }
}

/// One message. Parameters that are `null` are as if they were not there.
#[derive(Debug, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum ChatMessage {
    /// What holds for the whole chat; it takes the place of the model's own. Several are read as one, a line each. They
    /// come before everything else.
    System {
        /// The text.
        content: Content,
    },
    /// The same as `system`.
    Developer {
        /// The text.
        content: Content,
    },
    /// What the user says and shows. Several in a row are read as one, a line each.
    User {
        /// Text and images. The images of a message are shown before its text.
        content: Content,
    },
    /// What the model said before. The last message may be one: it is the beginning of the answer, which goes on from
    /// there and holds only what is new.
    Assistant {
        /// The text.
        content: Content,
    },
}

/// Text, or parts in order.
#[derive(Debug)]
pub(super) enum Content {
    /// Text alone.
    Text(String),
    /// Text and images.
    Parts(Vec<ContentPart>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or a list of parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(parts)).map(Content::Parts)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl Content {
    fn into_parts(self) -> Vec<ContentPart> {
        match self {
            Self::Text(text) => vec![ContentPart::Text { text }],
            Self::Parts(parts) => parts,
        }
    }
}

/// One part of a message.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum ContentPart {
    /// Text.
    Text {
        /// The text as it is.
        text: String,
    },
    /// An image, in a message of the user.
    ImageUrl {
        /// Where it is.
        image_url: ImageUrl,
    },
}

/// An image.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageUrl {
    /// A data URI: `data:image/png;base64,...`. JPEG, PNG, WebP, GIF, BMP, TIFF and PNM are read, whatever it says.
    pub(super) url: String,
    /// How closely the image is looked at. The model reads every image at one resolution, so that all three say the same.
    #[serde(default)]
    #[allow(dead_code)] // Only read to refuse what is none.
    pub(super) detail: Detail,
}

/// How closely an image is looked at; the model knows one way only.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Detail {
    /// As the model does.
    #[default]
    Auto,
    /// The same.
    Low,
    /// The same.
    High,
}

/// A chat as the model reads it, but for its images.
#[derive(Debug)]
pub(super) struct Conversation {
    system: Option<String>,
    messages: Vec<Message>,
    begun: Option<String>,
    /// The URLs of the images, which the messages name by place.
    pub(super) images: Vec<String>,
}

impl Conversation {
    /// Reads `messages`.
    ///
    /// # Errors
    /// When there is none, one of the user is empty, one of the system comes late, another than the user's shows an
    /// image, or there is more than `limits` allow.
    pub(super) fn new(messages: Messages, limits: &ServerLimits) -> Answer<Self> {
        let mut chat = Self { system: None, messages: Vec::new(), begun: None, images: Vec::new() };
        let mut chars = 0_usize;
        for (index, message) in messages.0.into_iter().enumerate() {
            let (role, parts) = match message {
                ChatMessage::System { content } | ChatMessage::Developer { content } => {
                    (None, content.into_parts())
                }
                ChatMessage::User { content } => (Some(Role::User), content.into_parts()),
                ChatMessage::Assistant { content } => (Some(Role::Assistant), content.into_parts()),
            };
            for part in &parts {
                if let ContentPart::Text { text } = part {
                    chars = chars.saturating_add(text.chars().count());
                }
            }
            if chars > limits.prompt_chars {
                return Err(refused(format!(
                    "the messages have more than {} characters; shorten them",
                    limits.prompt_chars
                ))
                .coded("prompt_too_long"));
            }
            match role {
                Some(role) => chat.say(index, role, parts, limits)?,
                None => chat.instruct(index, parts)?,
            }
        }
        chat.finish()
    }

    /// The same chat, for all of which `text` holds as well, before what the chat itself says of that.
    ///
    /// # Errors
    /// When there is more text than `limits` allow.
    pub(super) fn instructed(mut self, text: Option<&str>, limits: &ServerLimits) -> Answer<Self> {
        let Some(text) = text else { return Ok(self) };
        if text.chars().count() > limits.prompt_chars {
            let most = limits.prompt_chars;
            let why = format!("instructions have more than {most} characters; shorten them");
            return Err(ApiError::value("instructions", why).coded("prompt_too_long"));
        }
        self.system = Some(match self.system {
            Some(system) => format!("{text}\n{system}"),
            None => text.to_owned(),
        });
        Ok(self)
    }

    fn instruct(&mut self, index: usize, parts: Vec<ContentPart>) -> Answer<()> {
        if !self.messages.is_empty() {
            return Err(refused(format!(
                "message {index} is of the system and comes after the first question; put it first"
            )));
        }
        let text = text_of(index, "system", parts)?;
        match &mut self.system {
            Some(system) => system.extend(["\n", &text]),
            None => self.system = Some(text),
        }
        Ok(())
    }

    fn say(
        &mut self,
        index: usize,
        role: Role,
        parts: Vec<ContentPart>,
        limits: &ServerLimits,
    ) -> Answer<()> {
        let parts = match role {
            Role::User => self.shown(index, parts, limits)?,
            Role::Assistant => vec![Part::Text(text_of(index, "assistant", parts)?)],
        };
        match self.messages.last_mut() {
            Some(last) if last.role == role => {
                last.parts.push(Part::Text("\n".to_owned()));
                last.parts.extend(parts);
            }
            _ => self.messages.push(Message { role, parts, tokens: None }),
        }
        Ok(())
    }

    /// The parts of what the user says; the images among them get their numbers and stand before the text, wherever a
    /// client put them: the model was trained on `<image>` followed by the question, as `LLaVA`'s own templates write it,
    /// and reads an image behind its question badly.
    fn shown(&mut self, index: usize, parts: Vec<ContentPart>, limits: &ServerLimits) -> Answer<Vec<Part>> {
        let blank = |part: &ContentPart| matches!(part, ContentPart::Text { text } if text.trim().is_empty());
        if parts.iter().all(blank) {
            return Err(refused(format!("message {index} is empty; give a question or an image")));
        }
        let parts = parts.into_iter().map(|part| match part {
            ContentPart::Text { text } => Ok(Part::Text(text)),
            ContentPart::ImageUrl { image_url } => {
                if self.images.len() >= limits.images {
                    return Err(refused(format!("there are more than {} images; show fewer", limits.images))
                        .coded("too_many_images"));
                }
                self.images.push(image_url.url);
                Ok(Part::Image(self.images.len() - 1))
            }
        });
        let (images, texts): (Vec<Part>, Vec<Part>) =
            parts.collect::<Answer<Vec<_>>>()?.into_iter().partition(|part| matches!(part, Part::Image(_)));
        Ok(images.into_iter().chain(texts).collect())
    }

    fn finish(mut self) -> Answer<Self> {
        if self.messages.first().is_none_or(|first| first.role != Role::User) {
            return Err(refused("there is no question before the first answer; begin with the user"));
        }
        if let Some(last) = self.messages.pop_if(|last| last.role == Role::Assistant) {
            self.begun = Some(last.text());
        }
        Ok(self)
    }

    /// What the model reads.
    pub(super) fn pieces(&self, template: &Template) -> Answer<Vec<Piece>> {
        let mut pieces = template::render(template, self.system.as_deref(), &self.messages)?;
        if let Some(begun) = &self.begun {
            pieces.extend([Piece::text(&template.answer_separator), Piece::text(begun)]);
        }
        Ok(pieces)
    }
}

/// The text of a message that holds no image.
fn text_of(index: usize, role: &str, parts: Vec<ContentPart>) -> Answer<String> {
    let texts = parts.into_iter().map(|part| match part {
        ContentPart::Text { text } => Ok(text),
        ContentPart::ImageUrl { .. } => Err(refused(format!(
            "message {index} is of the {role} and holds an image; only the user can show images"
        ))),
    });
    texts.collect()
}

fn refused(why: impl Into<String>) -> ApiError {
    ApiError::value("messages", why)
}

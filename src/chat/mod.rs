//! Conversations: ask, answer, remember.

pub mod attachment;
pub mod conversation;
pub mod saved;
pub mod template;

use std::{ops::ControlFlow, sync::Arc};

use crate::engine::cancel::CancelToken;
use crate::engine::event::{Completion, Event};
use crate::engine::{Engine, Request};
use crate::error::{Error, Result};
use crate::generate::params::GenerateParams;
use attachment::Attachment;
use conversation::{Message, Part};

/// A conversation with a model. What was read once is not read again: a follow-up reads only what is new.
#[derive(Debug)]
pub struct Chat {
    engine: Engine,
    system: Option<String>,
    messages: Vec<Message>,
    images: Vec<Attachment>,
}

impl Chat {
    /// An empty conversation.
    pub fn new(engine: Engine) -> Self {
        Self { engine, system: None, messages: Vec::new(), images: Vec::new() }
    }

    /// Asks, and waits for the answer. `on_event` sees it as it comes; `Break` stops it, and what was said is kept.
    ///
    /// `parts` name images by their place in `images`, which are new to the conversation.
    ///
    /// # Errors
    /// As [`Engine::submit`]. The conversation is then as it was before.
    pub fn ask(
        &mut self,
        parts: Vec<Part>,
        images: Vec<Attachment>,
        params: GenerateParams,
        cancel: &CancelToken,
        on_event: &mut dyn FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let held = (self.messages.len(), self.images.len());
        let shifted = parts.into_iter().map(|part| match part {
            Part::Image(index) => Part::Image(held.1 + index),
            Part::Text(text) => Part::Text(text),
        });
        self.messages.push(Message::user(shifted));
        self.images.extend(images);
        let result = self.answer(params, cancel, on_event);
        if let Ok(completion) = &result {
            self.messages.push(self.remembered(completion));
        } else {
            self.messages.truncate(held.0);
            self.images.truncate(held.1);
        }
        result
    }

    fn answer(
        &self,
        params: GenerateParams,
        cancel: &CancelToken,
        on_event: &mut dyn FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let template = &self.engine.facts().template;
        let pieces = template::render(template, self.system.as_deref(), &self.messages)?;
        let prompt = self.engine.prompt(&pieces)?;
        let images = self.images.iter().map(|image| Arc::clone(image.input())).collect();
        let request = Request { cancel: cancel.clone(), ..Request::new(prompt, images, params) };
        self.engine.generate(request)?.complete_with(on_event)
    }

    /// An answer as the conversation keeps it: by its tokens, unless a stop string cut the text short of them.
    fn remembered(&self, completion: &Completion) -> Message {
        let Completion { text, token_ids, .. } = completion;
        match self.engine.facts().tokenizer.decode(token_ids) {
            Ok(whole) if whole.trim() == text => Message::generated(text, token_ids.clone()),
            _ => Message::assistant(text),
        }
    }

    /// The system text in place of the model's own; `None` is the model's own.
    pub fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    /// The system text in place of the model's own.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// What was said so far, questions and answers in turn.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The images of the conversation, which messages name by place.
    pub fn images(&self) -> &[Attachment] {
        &self.images
    }

    /// Takes up a conversation that was written down: messages, and the images that they name.
    ///
    /// # Errors
    /// [`Error::Request`] when a message names an image that is not among `images`.
    pub fn restore(&mut self, messages: Vec<Message>, images: Vec<Attachment>) -> Result<()> {
        if let Some(index) = messages.iter().flat_map(Message::images).find(|&index| index >= images.len()) {
            return Err(Error::Request(format!(
                "the conversation names image {} and holds {}",
                index + 1,
                images.len()
            )));
        }
        self.messages = messages;
        self.images = images;
        Ok(())
    }

    /// Forgets everything but the system text.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.images.clear();
    }

    /// Forgets the oldest question and its answer, so that there is room again. Gives whether there was one.
    pub fn drop_oldest(&mut self) -> bool {
        if self.messages.len() < 2 {
            return false;
        }
        self.messages.drain(..2);
        self.renumber_images();
        true
    }

    /// Drops the images that no message names, since prompts hand over exactly those that they name.
    fn renumber_images(&mut self) {
        let mut kept = Vec::new();
        for part in self.messages.iter_mut().flat_map(|message| &mut message.parts) {
            if let Part::Image(index) = part {
                let image = self.images[*index].clone();
                *index = kept.len();
                kept.push(image);
            }
        }
        self.images = kept;
    }

    /// The engine that answers.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

//! A conversation as the model was trained to read it.
//!
//! ```text
//! {system}{after_system}{before_user}<image>{after_image}{question}{after_user}{before_answer}
//!     {answer_separator}{answer}<after_answer>{before_user}{question}{after_user}{before_answer} ...
//! ```
//!
//! Follows `conv_phi_v0` in the `conversation.py` of zhuyiche/llava-phi.

use super::conversation::{Message, Part, Role};
use crate::error::{Error, Result};
use crate::package::manifest::Template;
use crate::text::Piece;

/// Lays out `messages` up to where the model begins to answer.
///
/// `system` takes the place of the template's own system text; an empty one leaves what follows it in place.
/// An image stands where its part does, followed by the template's `after_image`. An answer that has tokens is
/// given as these tokens in place of its text and of the separator before it, which they begin with.
///
/// # Errors
/// [`Error::Request`] when the messages do not alternate from a user's to a user's, when one of the user has
/// no parts, or when an answer holds an image.
pub fn render(template: &Template, system: Option<&str>, messages: &[Message]) -> Result<Vec<Piece>> {
    if messages.is_empty() {
        return Err(Error::Request("the conversation is empty; ask a question first".to_owned()));
    }
    let system = system.unwrap_or(&template.system);
    let mut pieces = vec![Piece::text(system), Piece::text(&template.after_system)];
    for (number, message) in (1..).zip(messages) {
        let due = if number % 2 == 1 { Role::User } else { Role::Assistant };
        if message.role != due {
            return Err(Error::Request(format!(
                "message {number} is of the {} and must be of the {}; \
                 user and assistant take turns and the user begins",
                name(message.role),
                name(due),
            )));
        }
        match message.role {
            Role::User => question(template, number, message, &mut pieces)?,
            Role::Assistant => answer(template, number, message, &mut pieces)?,
        }
    }
    if messages.len().is_multiple_of(2) {
        return Err(Error::Request(format!(
            "message {} is an answer and nothing follows it; ask a question",
            messages.len()
        )));
    }
    Ok(pieces)
}

fn question(template: &Template, number: usize, message: &Message, pieces: &mut Vec<Piece>) -> Result<()> {
    if message.parts.is_empty() {
        return Err(Error::Request(format!("message {number} is empty; give a question or an image")));
    }
    pieces.push(Piece::text(&template.before_user));
    for part in &message.parts {
        match part {
            Part::Text(text) => pieces.push(Piece::text(text)),
            Part::Image(index) => pieces.extend([Piece::Image(*index), Piece::text(&template.after_image)]),
        }
    }
    pieces.extend([Piece::text(&template.after_user), Piece::text(&template.before_answer)]);
    Ok(())
}

fn answer(template: &Template, number: usize, message: &Message, pieces: &mut Vec<Piece>) -> Result<()> {
    if let Some(image) = message.images().next() {
        return Err(Error::Request(format!(
            "message {number} is an answer and holds image {image}; only the user can show images"
        )));
    }
    let end = template.after_answer;
    match &message.tokens {
        // An answer that the model ended itself may hold the token that ends it.
        Some(tokens) if tokens.last() == Some(&end) => pieces.push(Piece::Tokens(tokens.clone())),
        Some(tokens) => pieces.push(Piece::Tokens([&tokens[..], &[end]].concat())),
        None => {
            pieces.push(Piece::text(&template.answer_separator));
            pieces.push(Piece::text(message.text()));
            pieces.push(Piece::Tokens(vec![end]));
        }
    }
    Ok(())
}

fn name(role: Role) -> &'static str {
    match role {
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 7;

    fn template() -> Template {
        Template {
            system: "Be kind.".to_owned(),
            after_system: " ".to_owned(),
            before_user: "USER: ".to_owned(),
            after_user: " ".to_owned(),
            before_answer: "ASSISTANT:".to_owned(),
            answer_separator: " ".to_owned(),
            after_answer: END,
            after_image: "\n".to_owned(),
        }
    }

    fn ask(text: &str) -> Message {
        Message::user([Part::Text(text.to_owned())])
    }

    /// The pieces as one line: an image in angle brackets, tokens in square ones.
    fn line(system: Option<&str>, messages: &[Message]) -> String {
        let piece = |piece: Piece| match piece {
            Piece::Text(text) => text,
            Piece::Tokens(ids) => format!("{ids:?}"),
            Piece::Image(index) => format!("<{index}>"),
        };
        render(&template(), system, messages).unwrap().into_iter().map(piece).collect()
    }

    fn refusal(messages: &[Message]) -> String {
        render(&template(), None, messages).unwrap_err().to_string()
    }

    #[test]
    fn one_turn() {
        let message = Message::user([Part::Image(0), Part::Text("What?".to_owned())]);
        assert_eq!(line(None, &[message]), "Be kind. USER: <0>\nWhat? ASSISTANT:");
    }

    #[test]
    fn images_stand_where_their_parts_do() {
        let text = |text: &str| Part::Text(text.to_owned());
        let message = Message::user([text("a "), Part::Image(1), text("b "), Part::Image(0), Part::Image(2)]);
        assert_eq!(line(None, &[message]), "Be kind. USER: a <1>\nb <0>\n<2>\n ASSISTANT:");
    }

    #[test]
    fn several_turns() {
        let messages = [ask("Hi"), Message::assistant("Hello."), ask("Why?")];
        assert_eq!(line(Some("Sys."), &messages), "Sys. USER: Hi ASSISTANT: Hello.[7]USER: Why? ASSISTANT:");
    }

    #[test]
    fn tokens_stand_for_the_answer_and_end_once() {
        for ids in [vec![3, 4], vec![3, 4, END]] {
            let messages = [ask("Hi"), Message::generated("Hello.", ids), ask("Why?")];
            assert_eq!(line(None, &messages), "Be kind. USER: Hi ASSISTANT:[3, 4, 7]USER: Why? ASSISTANT:");
        }
    }

    #[test]
    fn an_answer_without_tokens_still_ends() {
        let messages = [ask("Hi"), Message::generated("", vec![]), ask("Why?")];
        assert_eq!(line(None, &messages), "Be kind. USER: Hi ASSISTANT:[7]USER: Why? ASSISTANT:");
    }

    #[test]
    fn messages_out_of_turn_are_refused() {
        assert_eq!(refusal(&[]), "the conversation is empty; ask a question first");
        assert_eq!(
            refusal(&[ask("a"), ask("b")]),
            "message 2 is of the user and must be of the assistant; user and assistant take turns and the user begins"
        );
        assert_eq!(
            refusal(&[Message::assistant("a")]),
            "message 1 is of the assistant and must be of the user; user and assistant take turns and the user begins"
        );
        assert_eq!(
            refusal(&[ask("a"), Message::assistant("b")]),
            "message 2 is an answer and nothing follows it; ask a question"
        );
    }

    #[test]
    fn an_empty_question_and_an_image_in_an_answer_are_refused() {
        assert_eq!(refusal(&[Message::user([])]), "message 1 is empty; give a question or an image");
        let mut shown = Message::assistant("a");
        shown.parts.push(Part::Image(3));
        assert_eq!(
            refusal(&[ask("a"), shown, ask("b")]),
            "message 2 is an answer and holds image 3; only the user can show images"
        );
    }
}

//! Any messages give a prompt that says what they say, or one sentence of refusal.
//!
//! Input: lines; the first letter of a line says what it is: `u` and `a` begin a message of the user or the
//! assistant, `i` is an image, `t` are the answer's tokens, everything else is text.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llava_phi::{
    chat::{
        conversation::{Message, Part, Role},
        template::render,
    },
    package::manifest::Template,
    text::{Piece, Span, TokenId, Tokenizer},
};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let file = include_bytes!("../../tests/reference/text-tokenizer.json");
    Tokenizer::from_bytes("text-tokenizer.json".as_ref(), file).expect("the committed tokenizer is sound")
});

fn template() -> Template {
    Template {
        system: "A chat.".to_owned(),
        after_system: " ".to_owned(),
        before_user: "USER: ".to_owned(),
        after_user: " ".to_owned(),
        before_answer: "ASSISTANT:".to_owned(),
        answer_separator: " ".to_owned(),
        after_answer: 1000,
        after_image: "\n".to_owned(),
    }
}

fn messages(text: &str) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    for line in text.split('\n') {
        let mut letters = line.chars();
        let first = letters.next();
        let rest = letters.as_str();
        let role = if first == Some('a') { Role::Assistant } else { Role::User };
        if matches!(first, Some('u' | 'a')) || messages.is_empty() {
            messages.push(Message { role, parts: Vec::new(), tokens: None });
        }
        let message = messages.last_mut().expect("one was pushed");
        match first {
            Some('i') => message.parts.push(Part::Image(rest.len())),
            Some('t') => message.tokens = Some(rest.chars().map(TokenId::from).collect()),
            _ => message.parts.push(Part::Text(rest.to_owned())),
        }
    }
    messages
}

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let (system, text) = text.split_once('\0').map_or((None, &*text), |(system, text)| (Some(system), text));
    let Ok(pieces) = render(&template(), system, &messages(text)) else { return };
    let prompt = TOKENIZER.prompt(&pieces).expect("byte-level BPE encodes any text");

    // Read back, the prompt says what the pieces say, image for image.
    let mut said = vec![String::new()];
    let mut given: Vec<u32> = Vec::new();
    for piece in &pieces {
        match piece {
            Piece::Text(text) => said.last_mut().expect("one at least").push_str(text),
            Piece::Tokens(ids) => given.extend(ids.iter().filter(|id| TOKENIZER.is_special(**id))),
            Piece::Image(_) => said.push(String::new()),
        }
    }
    let special: Vec<TokenId> = prompt.token_ids().filter(|id| TOKENIZER.is_special(*id)).collect();
    assert_eq!(special, given, "only tokens that were given are special");
    assert_eq!(prompt.images() + 1, said.len());
    assert_eq!(prompt.positions(0), prompt.tokens());
    if pieces.iter().all(|piece| !matches!(piece, Piece::Tokens(_))) {
        let mut read = vec![String::new()];
        for span in prompt.spans() {
            match span {
                Span::Text(ids) => {
                    read.last_mut().expect("one at least").push_str(&TOKENIZER.decode(ids).expect("decodes"))
                }
                Span::Image(_) => read.push(String::new()),
            }
        }
        assert_eq!(read, said);
    }
});

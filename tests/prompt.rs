//! Token ids and prompts equal those of the reference tokenizer; `tests/reference/text.py` makes the references.

use std::{env, fs, path::PathBuf, sync::Arc};

use llava_phi::{
    chat::{
        conversation::{Message, Part},
        template::render,
    },
    package::manifest::Template,
    text::{Detokenizer, Piece, Span, TokenId, Tokenizer},
};
use serde::Deserialize;

const SMALL: &[u8] = include_bytes!("reference/text-tokenizer.json");
const IMAGE: i64 = -200;

#[derive(Deserialize)]
struct Reference {
    system: String,
    end: Both<TokenId>,
    vocabulary: Both<usize>,
    prompts: Vec<Encoded>,
    conversations: Vec<Conversation>,
    answers: Vec<Answer>,
}

/// One value for each of the two tokenizers.
#[derive(Deserialize)]
struct Both<T> {
    small: T,
    codegen: T,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    #[serde(flatten)]
    ids: Both<Vec<TokenId>>,
}

#[derive(Deserialize)]
struct Conversation {
    system: Option<String>,
    turns: Vec<(String, Option<String>)>,
    #[serde(flatten)]
    ids: Both<Vec<i64>>,
}

#[derive(Deserialize)]
struct Answer {
    ids: Vec<TokenId>,
    text: String,
}

impl<T> Both<T> {
    fn of(&self, tokenizer: Kind) -> &T {
        match tokenizer {
            Kind::Small => &self.small,
            Kind::Codegen => &self.codegen,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Trained on a small text; committed.
    Small,
    /// That of `CodeGen` and Phi-2: 2 MB, there once `text.py --codegen` has run.
    Codegen,
}

fn reference() -> Reference {
    serde_json::from_str(include_str!("reference/text.json")).unwrap()
}

fn small() -> Tokenizer {
    Tokenizer::from_bytes("text-tokenizer.json".as_ref(), SMALL).unwrap()
}

/// The tokenizers that are there, with a word on the one that is not.
fn tokenizers() -> Vec<(Kind, Tokenizer)> {
    let mut all = vec![(Kind::Small, small())];
    let path = env::var_os("LLAVA_PHI_CODEGEN_TOKENIZER").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/reference/codegen-tokenizer.json"),
        PathBuf::from,
    );
    match fs::read(&path) {
        Ok(bytes) => all.push((Kind::Codegen, Tokenizer::from_bytes(&path, &bytes).unwrap())),
        Err(error) => eprintln!(
            "not compared with CodeGen's own tokenizer: {}: {error}; run python tests/reference/text.py --codegen",
            path.display()
        ),
    }
    all
}

fn template(system: &str, end: TokenId) -> Template {
    Template {
        system: system.to_owned(),
        after_system: " ".to_owned(),
        before_user: "USER: ".to_owned(),
        after_user: " ".to_owned(),
        before_answer: "ASSISTANT:".to_owned(),
        answer_separator: " ".to_owned(),
        after_answer: end,
        after_image: "\n".to_owned(),
    }
}

/// The parts of a question of the reference, in which each image is written `<image>` and a line's end.
fn parts(question: &str, images: &mut usize) -> Vec<Part> {
    let mut parts = Vec::new();
    for (number, text) in question.split("<image>\n").enumerate() {
        if number > 0 {
            parts.push(Part::Image(*images));
            *images += 1;
        }
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
    }
    parts
}

fn flat(spans: &[Span]) -> Vec<i64> {
    let ids = |span: &Span| match span {
        Span::Text(ids) => ids.iter().copied().map(i64::from).collect(),
        Span::Image(_) => vec![IMAGE],
    };
    spans.iter().flat_map(ids).collect()
}

#[test]
fn ids_equal_the_reference_on_a_thousand_prompts() {
    let reference = reference();
    assert_eq!(reference.prompts.len(), 1000);
    for (kind, tokenizer) in tokenizers() {
        assert_eq!(tokenizer.vocabulary(), *reference.vocabulary.of(kind));
        for prompt in &reference.prompts {
            let ids = tokenizer.encode(&prompt.text).unwrap();
            assert_eq!(&ids, prompt.ids.of(kind), "{kind:?}: {:?}", prompt.text);
            assert_eq!(tokenizer.decode(&ids).unwrap(), prompt.text, "{kind:?}");
        }
    }
}

#[test]
fn answers_read_as_the_reference_reads_them_at_once_and_token_by_token() {
    let tokenizer = Arc::new(small());
    for answer in &reference().answers {
        assert_eq!(tokenizer.decode(&answer.ids).unwrap(), answer.text, "{:?}", answer.ids);
        let mut stream = Detokenizer::new(tokenizer.clone(), Vec::new());
        let mut text: String = answer.ids.iter().map(|id| stream.push(*id).unwrap().text).collect();
        text.push_str(&stream.finish().unwrap());
        assert_eq!(text, answer.text, "{:?}", answer.ids);
    }
}

#[test]
fn conversations_equal_the_reference() {
    let reference = reference();
    for (kind, tokenizer) in tokenizers() {
        let template = template(&reference.system, *reference.end.of(kind));
        for conversation in &reference.conversations {
            let (mut messages, mut images) = (Vec::new(), 0);
            for (question, answer) in &conversation.turns {
                messages.push(Message::user(parts(question, &mut images)));
                messages.extend(answer.iter().map(Message::assistant));
            }
            let pieces = render(&template, conversation.system.as_deref(), &messages).unwrap();
            let prompt = tokenizer.prompt(&pieces).unwrap();
            assert_eq!(
                &flat(prompt.spans()),
                conversation.ids.of(kind),
                "{kind:?}: {:?}",
                conversation.turns
            );
            assert_eq!(prompt.images(), images);
        }
    }
}

#[test]
fn an_answer_kept_as_tokens_gives_the_prompt_that_its_text_gives() {
    let reference = reference();
    for (kind, tokenizer) in tokenizers() {
        let end = *reference.end.of(kind);
        let template = template(&reference.system, end);
        let ask = |text: &str| Message::user([Part::Text(text.to_owned())]);
        let written = [ask("What?"), Message::assistant("A cat."), ask("Why?")];
        // The reference encodes "ASSISTANT: A cat." whole; its pre-tokenizer parts it where the answer begins.
        let generated = tokenizer.encode(" A cat.").unwrap();
        for ids in [generated.clone(), [generated, vec![end]].concat()] {
            let kept = [ask("What?"), Message::generated("A cat.", ids), ask("Why?")];
            let [written, kept] = [&written, &kept]
                .map(|messages| tokenizer.prompt(&render(&template, None, messages).unwrap()).unwrap());
            assert_eq!(written, kept, "{kind:?}");
        }
    }
}

#[test]
fn text_never_becomes_a_special_token_or_an_image() {
    for (kind, tokenizer) in tokenizers() {
        for text in ["<|endoftext|>", "a <|endoftext|><|endoftext|>\nb", "<image>", "  <|endoftext|>  "] {
            let prompt = tokenizer.prompt(&[Piece::text(text)]).unwrap();
            assert_eq!(prompt.images(), 0);
            assert!(!prompt.token_ids().any(|id| tokenizer.is_special(id)), "{kind:?}: {text:?}");
            assert_eq!(tokenizer.decode(&prompt.token_ids().collect::<Vec<_>>()).unwrap(), text);
        }
    }
}

#[test]
fn a_forged_end_token_is_encoded_as_its_ordinary_pieces() {
    for (kind, tokenizer) in tokenizers() {
        let ids = tokenizer.encode("a<|endoftext|>").unwrap();
        let pieces = ["a", "<|", "endoftext", "|>"].map(|piece| tokenizer.encode(piece).unwrap()).concat();
        assert_eq!(ids, pieces, "{kind:?}");
    }
}

#[test]
fn ids_that_are_no_token_add_nothing() {
    for (_, tokenizer) in tokenizers() {
        let tail = TokenId::try_from(tokenizer.vocabulary()).unwrap();
        let ids = [tokenizer.encode("ab").unwrap(), vec![tail, tail + 1, TokenId::MAX]].concat();
        assert_eq!(tokenizer.decode(&ids).unwrap(), "ab");
        assert_eq!(tokenizer.token_bytes(tail), None);
    }
}

#[test]
fn a_run_of_line_ends_as_long_as_a_context_is_parted_like_a_short_one() {
    // The pre-tokenizer's pattern leaves the last line end to the word behind; a pattern that gave up on a long
    // run would leave all of them to it.
    for (kind, tokenizer) in tokenizers() {
        for length in [3, 4, 100_000] {
            let ids = tokenizer.encode(&("\n".repeat(length) + "a")).unwrap();
            let parts = ["\n".repeat(length - 1), "\n".to_owned(), "a".to_owned()];
            let parts = parts.map(|part| tokenizer.encode(&part).unwrap()).concat();
            assert!(ids == parts, "{kind:?}: {length}");
        }
    }
}

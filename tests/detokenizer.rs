//! Streamed text equals the decoded whole, and a stop string ends it wherever the borders between tokens lie.

use std::sync::{Arc, LazyLock};

use llava_phi::text::{Detokenizer, TokenId, Tokenizer};
use proptest::prelude::*;

const FILE: &[u8] = include_bytes!("reference/text-tokenizer.json");

static OURS: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_bytes("text-tokenizer.json".as_ref(), FILE).unwrap()));
static THEIRS: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_bytes(FILE).unwrap());

/// What came out step by step and at the end, joined; and whether a stop string was met before the end.
fn stream(ids: &[TokenId], stop: &[String]) -> (String, bool) {
    let mut stream = Detokenizer::new(OURS.clone(), stop.to_vec());
    let (mut text, mut stopped) = (String::new(), false);
    for id in ids {
        let step = stream.push(*id).unwrap();
        assert!(!stopped || step.stopped && step.text.is_empty(), "nothing follows a stop string");
        text.push_str(&step.text);
        stopped = step.stopped;
    }
    text.push_str(&stream.finish().unwrap());
    (text, stopped)
}

/// `text` up to the stop string that is complete first, read a character at a time.
fn cut<'a>(text: &'a str, stop: &[String]) -> &'a str {
    let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
    for end in ends {
        if let Some(longest) = stop.iter().filter(|stop| text[..end].ends_with(*stop)).map(String::len).max()
        {
            return &text[..end - longest];
        }
    }
    text
}

/// Mostly single bytes, so that characters are broken often; the end token and ids beyond the last token too.
fn ids() -> impl Strategy<Value = Vec<TokenId>> {
    prop::collection::vec(prop_oneof![0..256_u32, 0..1045_u32], 0..40)
}

proptest! {
    #[test]
    fn decode_equals_that_of_the_reference_library(ids in ids()) {
        prop_assert_eq!(OURS.decode(&ids).unwrap(), THEIRS.decode(&ids, true).unwrap());
    }

    #[test]
    fn steps_joined_equal_the_decoded_whole(ids in ids()) {
        prop_assert_eq!(stream(&ids, &[]).0, OURS.decode(&ids).unwrap());
    }

    #[test]
    fn any_text_comes_back_from_its_tokens(text in "\\PC{0,40}|[ \t\n\u{0}-\u{10ffff}]{0,40}") {
        let ids = OURS.encode(&text).unwrap();
        prop_assert!(ids.iter().all(|id| !OURS.is_special(*id)));
        prop_assert_eq!(stream(&ids, &[]).0, text);
    }

    #[test]
    fn a_stop_string_never_leaks_and_nothing_before_it_is_lost(
        text in "[abé<>| ]{0,30}",
        stop in prop::collection::vec("[abé<>| ]{1,4}", 0..4),
    ) {
        let expected = cut(&text, &stop);
        let ids = OURS.encode(&text).unwrap();
        let (streamed, stopped) = stream(&ids, &stop);
        prop_assert_eq!(&streamed, expected);
        prop_assert_eq!(stopped, expected.len() < text.len());
        // The same text with a token for every byte: other borders, same outcome.
        let bytes: Vec<TokenId> =
            text.chars().flat_map(|letter| OURS.encode(letter.encode_utf8(&mut [0; 4])).unwrap()).collect();
        prop_assert_eq!(stream(&bytes, &stop), (streamed, stopped));
    }

    #[test]
    fn a_stop_string_is_found_in_broken_text_too(
        ids in ids(),
        stop in prop::collection::vec("[a-c\u{fffd}]{1,2}", 0..3),
    ) {
        let whole = OURS.decode(&ids).unwrap();
        prop_assert_eq!(stream(&ids, &stop).0, cut(&whole, &stop));
    }
}

#[test]
fn a_character_comes_out_whole() {
    let ids = OURS.encode("😀").unwrap();
    assert!(ids.len() > 1, "the small tokenizer has no token for it");
    let mut stream = Detokenizer::new(OURS.clone(), Vec::new());
    let steps: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap().text).collect();
    assert_eq!(steps.last().unwrap(), "😀");
    assert!(steps[..steps.len() - 1].iter().all(String::is_empty));
}

#[test]
fn only_what_may_begin_a_stop_string_is_held_back() {
    let mut stream = Detokenizer::new(OURS.clone(), vec!["USER:".to_owned(), "\n\n".to_owned()]);
    let mut steps = Vec::new();
    for text in ["a", " ", "U", "S", "A", "\n", "b", "\n"] {
        for id in OURS.encode(text).unwrap() {
            steps.push(stream.push(id).unwrap().text);
        }
    }
    assert_eq!(steps, ["a", " ", "", "", "USA", "", "\nb", ""]);
    assert_eq!(stream.finish().unwrap(), "\n");
    assert_eq!(stream.finish().unwrap(), "");
}

//! Any tokens with any stop strings: the steps joined are the decoded whole up to the first stop string.
//!
//! Input: stop strings, each ended by a zero byte, at most four; then token ids of two bytes each.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use llava_phi::text::{Detokenizer, TokenId, Tokenizer};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let file = include_bytes!("../../tests/reference/text-tokenizer.json");
    let tokenizer = Tokenizer::from_bytes("text-tokenizer.json".as_ref(), file);
    Arc::new(tokenizer.expect("the committed tokenizer is sound"))
});

/// `text` up to the stop string that is complete first, read a character at a time.
fn cut<'a>(text: &'a str, stop: &[String]) -> &'a str {
    for end in text.char_indices().map(|(at, letter)| at + letter.len_utf8()) {
        let complete = stop.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(*stop));
        if let Some(longest) = complete.map(String::len).max() {
            return &text[..end - longest];
        }
    }
    text
}

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    let mut stop = Vec::new();
    while stop.len() < 4 {
        let Some(end) = rest.iter().position(|byte| *byte == 0) else { break };
        stop.push(String::from_utf8_lossy(&rest[..end]).into_owned());
        rest = &rest[end + 1..];
    }
    // 11 bits reach a little beyond the 1,039 entries.
    let ids: Vec<TokenId> =
        rest.chunks_exact(2).map(|two| TokenId::from(u16::from_le_bytes([two[0], two[1]]) & 0x7ff)).collect();

    let mut stream = Detokenizer::new(TOKENIZER.clone(), stop.clone());
    let (mut text, mut stopped) = (String::new(), false);
    for id in &ids {
        let step = stream.push(*id).expect("any id is taken");
        assert!(!stopped || step.stopped && step.text.is_empty(), "nothing follows a stop string");
        text.push_str(&step.text);
        stopped = step.stopped;
    }
    text.push_str(&stream.finish().expect("ends"));
    let whole = TOKENIZER.decode(&ids).expect("any ids decode");
    assert_eq!(text, cut(&whole, &stop));
});

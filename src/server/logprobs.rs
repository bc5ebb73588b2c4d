//! How likely tokens were, in OpenAI's forms.

use serde_json::{Map, Value, json};

use crate::generate::sequence::TokenLogprobs;

/// The form of chats. Bytes tell what the text of a token cannot where it ends inside a character.
pub(super) fn chat(tokens: &[TokenLogprobs]) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({"token": text(bytes), "logprob": logprob, "bytes": bytes});
    let content = tokens.iter().map(|token| {
        let mut told = one(&token.bytes, token.logprob);
        told["top_logprobs"] = token.top.iter().map(|top| one(&top.bytes, top.logprob)).collect();
        told
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// The form of completions, which tells at which character of the text each token begins.
#[derive(Debug, Default)]
pub(super) struct Offsets {
    chars: usize,
    begun: bool,
}

impl Offsets {
    /// Tells of the next tokens of an answer. White space at its beginning is no part of its text.
    pub(super) fn tell(&mut self, tokens: &[TokenLogprobs]) -> Value {
        let mut offsets = Vec::new();
        for token in tokens {
            offsets.push(self.chars);
            let bytes = if self.begun { &token.bytes[..] } else { token.bytes.trim_ascii_start() };
            self.begun |= !bytes.is_empty();
            // A byte that goes on with a character begins none.
            self.chars += bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        }
        let top = tokens.iter().map(|token| {
            let top = token.top.iter().map(|top| (text(&top.bytes), json!(top.logprob)));
            Value::Object(top.collect::<Map<_, _>>())
        });
        json!({
            "tokens": tokens.iter().map(|token| text(&token.bytes)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": top.collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::sequence::TokenLogprob;

    fn token(bytes: &[u8], top: &[&[u8]]) -> TokenLogprobs {
        let top = top.iter().map(|bytes| TokenLogprob { id: 1, bytes: bytes.to_vec(), logprob: -0.5 });
        TokenLogprobs { id: 0, bytes: bytes.to_vec(), logprob: -1.5, top: top.collect() }
    }

    #[test]
    fn a_chat_tells_text_bytes_and_what_was_likely_in_its_place() {
        assert_eq!(
            chat(&[token(b" a", &[b"b", b"\xe2"])]),
            json!({"content": [{"token": " a", "logprob": -1.5, "bytes": [32, 97], "top_logprobs": [
                {"token": "b", "logprob": -0.5, "bytes": [98]},
                {"token": "\u{fffd}", "logprob": -0.5, "bytes": [226]},
            ]}], "refusal": null})
        );
    }

    #[test]
    fn a_completion_tells_where_each_token_begins_in_its_text() {
        let mut offsets = Offsets::default();
        let told = offsets.tell(&[
            token(b" ", &[]),
            token(b" a", &[b"b"]),
            token(b"\xc3", &[]),
            token(b"\xa4", &[]),
        ]);
        assert_eq!(told["text_offset"], json!([0, 0, 1, 2]));
        assert_eq!(told["top_logprobs"], json!([{}, {"b": -0.5}, {}, {}]));
        assert_eq!(offsets.tell(&[token(b" c", &[])])["text_offset"], json!([2]));
    }
}

//! Byte-level BPE: the one file that names `tokenizers`.

use std::{
    any::Any,
    collections::HashMap,
    path::Path,
    sync::{Arc, OnceLock},
};

use tokenizers::PostProcessor;

use super::{Piece, Prompt, TokenId, file::File};
use crate::error::{Error, Result};
use crate::package::manifest::TextSpec;

/// Text that any byte-level tokenizer gives back unchanged; the leading space leaves a prefix space no work.
const PROBE: &str = " A\tb\r\n  \u{e9}\u{6f22}\u{1f600}\u{0}";

/// Turns text into token ids and back.
///
/// Text never becomes a special token: `<|endoftext|>` in a question is encoded as the characters it is.
/// Added tokens that are not special, such as runs of spaces, are found in text as the reference finds them.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    tokens: Vec<Token>,
    /// What was made of it; see [`Tokenizer::beside`].
    beside: OnceLock<Arc<dyn Any + Send + Sync>>,
}

/// What a token adds to the text.
#[derive(Debug)]
struct Token {
    bytes: Box<[u8]>,
    special: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of the byte-level kind; `path` is only named in errors.
    ///
    /// # Errors
    /// [`Error::Package`] when the file is not a tokenizer, is not byte-level, lacks a byte, numbers its tokens
    /// with holes, or adds tokens of its own to every text.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let file = File::read(path, bytes)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|cause| {
            Error::package(path, "is not a tokenizer that this version reads; export the package again")
                .because(cause)
        })?;
        // The library numbers an added token anew when it does not follow the others.
        if let Some(moved) =
            file.added_tokens.iter().find(|added| inner.token_to_id(&added.content) != Some(added.id))
        {
            return Err(Error::package(
                path,
                format!("adds token {:?} as {}, which is not the next free id", moved.content, moved.id),
            ));
        }
        let added = inner.get_post_processor().map_or(0, |after| after.added_tokens(false));
        if added > 0 {
            return Err(Error::package(
                path,
                format!(
                    "adds {added} tokens to every text; remove its post-processor, prompts spell them out"
                ),
            ));
        }
        // Limits in the file are for training batches: a prompt would be cut or filled in silence.
        inner.with_truncation(None).map_err(|cause| {
            Error::package(path, "does not let go of its truncation; export the package again").because(cause)
        })?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let tokens = tokens(path, &inner)?;
        let tokenizer = Self { inner, tokens, beside: OnceLock::new() };
        let probed = tokenizer.encode(PROBE).map(|ids| tokenizer.decode_bytes(&ids));
        if !probed.is_ok_and(|bytes| bytes == PROBE.as_bytes()) {
            return Err(Error::package(
                path,
                "does not give a text back that it encoded; this version reads byte-level BPE tokenizers only",
            ));
        }
        Ok(tokenizer)
    }

    /// Checks that this is the tokenizer that a manifest describes; `path` is only named in errors.
    ///
    /// # Errors
    /// [`Error::Package`] when it has another number of entries, or when a token that ends answers is not special:
    /// a question could then hold it.
    pub fn check(&self, path: &Path, spec: &TextSpec) -> Result<()> {
        if self.vocabulary() != spec.vocabulary {
            return Err(Error::package(
                path,
                format!(
                    "has {} entries and the manifest says {}; export the package again",
                    self.vocabulary(),
                    spec.vocabulary,
                ),
            ));
        }
        match spec.eos.iter().chain([&spec.template.after_answer]).find(|id| !self.is_special(**id)) {
            None => Ok(()),
            Some(id) => Err(Error::package(
                path,
                format!("does not mark token {id} special, with which the manifest ends answers; mark it so"),
            )),
        }
    }

    /// Entries, added tokens included: every id below this is a token and no other id is.
    pub fn vocabulary(&self) -> usize {
        self.tokens.len()
    }

    /// Whether `id` is a special token: text never becomes it and it adds nothing to text.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.token(id).is_some_and(|token| token.special)
    }

    /// The bytes that `id` adds to the text: none for a special token, `None` for an id that is no token.
    ///
    /// They may begin or end inside a character.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.token(id).map(|token| if token.special { &[][..] } else { &token.bytes[..] })
    }

    /// The token ids of `text`, none of them special and nothing added before or after.
    ///
    /// # Errors
    /// [`Error::Request`] when the tokenizer cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let refuse = |why: &str| Error::Request(format!("text {}: {why}", excerpt(text)));
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|cause| refuse(&format!("the tokenizer cannot encode it: {cause}")))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|id| self.is_special(**id)) {
            None => Ok(ids),
            Some(id) => Err(refuse(&format!(
                "the tokenizer makes special token {id} of it, which text may not become; take it out"
            ))),
        }
    }

    /// Encodes the texts of `pieces` and lays all out as spans.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn prompt(&self, pieces: &[Piece]) -> Result<Prompt> {
        Prompt::new(pieces, |text| self.encode(text))
    }

    /// The text of `ids`: special tokens and ids that are no token add nothing, and a byte sequence that is not
    /// UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// None: byte-level tokens always decode.
    pub fn decode(&self, ids: &[TokenId]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned())
    }

    /// What `make` makes of this tokenizer, made once: a floor above keeps here what takes long to make. There is room for
    /// one type; another one is made anew each time.
    pub(crate) fn beside<T: Any + Send + Sync>(&self, make: impl Fn() -> T) -> Arc<T> {
        let kept = self.beside.get_or_init(|| Arc::new(make()));
        Arc::clone(kept).downcast().unwrap_or_else(|_| Arc::new(make()))
    }

    fn decode_bytes(&self, ids: &[TokenId]) -> Vec<u8> {
        ids.iter().filter_map(|id| self.token_bytes(*id)).flatten().copied().collect()
    }

    fn token(&self, id: TokenId) -> Option<&Token> {
        self.tokens.get(usize::try_from(id).ok()?)
    }
}

/// The table of tokens by id.
fn tokens(path: &Path, inner: &tokenizers::Tokenizer) -> Result<Vec<Token>> {
    let vocabulary = inner.get_vocab(true);
    let alphabet = alphabet();
    if let Some((letter, byte)) =
        alphabet.iter().filter(|(letter, _)| !vocabulary.contains_key(&letter.to_string())).min()
    {
        return Err(Error::package(
            path,
            format!("has no token for byte {byte:#04x} ({letter:?}); train it with the full byte alphabet"),
        ));
    }
    let highest = vocabulary.values().max().copied().unwrap_or_default();
    let added = inner.get_added_vocabulary();
    (0..=highest)
        .map(|id| {
            let token = inner.id_to_token(id).ok_or_else(|| {
                Error::package(
                    path,
                    format!("has token {highest} but no token {id}; ids must run from 0 without a hole"),
                )
            })?;
            let bytes: Option<Vec<u8>> = token.chars().map(|letter| alphabet.get(&letter).copied()).collect();
            Ok(Token {
                special: added.is_special_token(&token),
                // A token with a character outside the alphabet, such as a run of spaces, stands for itself.
                bytes: bytes.unwrap_or_else(|| token.clone().into_bytes()).into(),
            })
        })
        .collect()
}

/// The character that stands for each byte in a byte-level vocabulary, as in the `encoder.py` of GPT-2:
/// printable Latin-1 stands for itself, the other 68 bytes take U+0100 and on.
fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let themselves = (0..=u8::MAX).filter(printable).map(|byte| (char::from(byte), byte));
    let others = ('\u{100}'..).zip((0..=u8::MAX).filter(|byte| !printable(byte)));
    themselves.chain(others).collect()
}

/// The first characters of a text, quoted, for an error.
fn excerpt(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    if short.len() < text.len() { format!("{short:?}...") } else { format!("{short:?}") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A tokenizer of the 256 bytes and of one special token, without merges.
    fn bytes_only() -> Value {
        let mut letters: Vec<char> = alphabet().into_keys().collect();
        letters.sort_unstable();
        let vocab: HashMap<String, usize> = letters.iter().map(char::to_string).zip(0..).collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [
                {"id": 256, "content": "<end>", "special": true, "normalized": false, "single_word": false,
                 "lstrip": false, "rstrip": false},
                {"id": 257, "content": "   ", "special": false, "normalized": true, "single_word": false,
                 "lstrip": false, "rstrip": false},
            ],
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        })
    }

    fn read(file: &Value) -> Result<Tokenizer> {
        Tokenizer::from_bytes(Path::new("tokenizer.json"), file.to_string().as_bytes())
    }

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        let mut file = bytes_only();
        change(&mut file);
        read(&file).unwrap_err().to_string()
    }

    #[test]
    fn the_alphabet_has_a_letter_for_every_byte() {
        let alphabet = alphabet();
        let mut bytes: Vec<u8> = alphabet.values().copied().collect();
        bytes.sort_unstable();
        assert!(bytes.into_iter().eq(0..=u8::MAX));
        assert_eq!([alphabet[&'A'], alphabet[&'\u{120}'], alphabet[&'\u{10a}']], [b'A', b' ', b'\n']);
    }

    #[test]
    fn added_tokens_are_found_in_text_unless_they_are_special() {
        let tokenizer = read(&bytes_only()).unwrap();
        assert_eq!(tokenizer.vocabulary(), 258);
        assert_eq!(tokenizer.encode("   ").unwrap(), [257]);
        assert_eq!(tokenizer.encode("<end>").unwrap().len(), 5);
        assert!(tokenizer.is_special(256) && !tokenizer.is_special(257) && !tokenizer.is_special(258));
        assert_eq!(tokenizer.token_bytes(256), Some(&b""[..]));
        assert_eq!(tokenizer.token_bytes(257), Some(&b"   "[..]));
        assert_eq!(tokenizer.token_bytes(258), None);
        assert_eq!(tokenizer.decode(&[256, 257, 258, TokenId::MAX]).unwrap(), "   ");
    }

    #[test]
    fn a_manifest_that_describes_another_tokenizer_is_refused() {
        let tokenizer = read(&bytes_only()).unwrap();
        let check = |vocabulary: usize, eos: TokenId, after_answer: TokenId| {
            let spec = json!({"tokenizer": "tokenizer.json", "vocabulary": vocabulary, "eos": [eos], "template": {
                "system": "", "after_system": "", "before_user": "", "after_user": "", "before_answer": "",
                "answer_separator": "", "after_answer": after_answer, "after_image": ""}});
            tokenizer
                .check(Path::new("tokenizer.json"), &serde_json::from_value(spec).unwrap())
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(258, 256, 256), Ok(()));
        assert_eq!(
            check(257, 256, 256).unwrap_err(),
            "package tokenizer.json: has 258 entries and the manifest says 257; export the package again"
        );
        for (eos, after_answer) in [(257, 256), (256, 257)] {
            assert_eq!(
                check(258, eos, after_answer).unwrap_err(),
                "package tokenizer.json: does not mark token 257 special, with which the manifest ends answers; \
                 mark it so"
            );
        }
    }

    #[test]
    fn limits_meant_for_training_are_lifted() {
        let mut file = bytes_only();
        file["truncation"] =
            json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
        assert_eq!(read(&file).unwrap().encode("abcd").unwrap().len(), 4);
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        for bytes in [&b""[..], b"{", b"[]", b"{\"version\": \"1.0\"}", b"\xff\xfe"] {
            let error = Tokenizer::from_bytes(Path::new("p/tokenizer.json"), bytes).unwrap_err();
            assert_eq!(
                error.to_string(),
                "package p/tokenizer.json: is not a byte-level BPE tokenizer in the Hugging Face form; \
                 export the package again"
            );
            assert!(std::error::Error::source(&error).is_some());
        }
    }

    #[test]
    fn a_tokenizer_of_another_kind_is_refused() {
        let decoder = refusal(|file| file["decoder"] = json!({"type": "Fuse"}));
        assert!(decoder.contains("decoder other than ByteLevel"), "{decoder}");
        let split = refusal(|file| file["pre_tokenizer"] = json!({"type": "Whitespace"}));
        assert!(split.contains("does not give a text back"), "{split}");
        let normal = refusal(|file| file["normalizer"] = json!({"type": "Lowercase"}));
        assert!(normal.contains("does not give a text back"), "{normal}");
    }

    #[test]
    fn a_tokenizer_that_lacks_a_byte_or_a_number_is_refused() {
        let byte = refusal(|file| {
            file["model"]["vocab"].as_object_mut().unwrap().remove("A");
            file["model"]["vocab"]["zz"] = json!(256);
            file["added_tokens"] = json!([]);
        });
        assert_eq!(
            byte,
            "package tokenizer.json: has no token for byte 0x41 ('A'); train it with the full byte alphabet"
        );
        let hole = refusal(|file| {
            file["model"]["vocab"]["zz"] = json!(4_000_000_000_u32);
            file["added_tokens"] = json!([]);
        });
        assert_eq!(
            hole,
            "package tokenizer.json: has token 4000000000 but no token 256; ids must run from 0 without a hole"
        );
        let moved = refusal(|file| file["added_tokens"][1]["id"] = json!(300));
        assert_eq!(moved, "package tokenizer.json: adds token \"   \" as 300, which is not the next free id");
    }

    #[test]
    fn a_model_that_contradicts_itself_is_refused() {
        let kind = refusal(|file| file["model"]["type"] = json!("WordPiece"));
        assert!(kind.contains("has a model of kind WordPiece;"), "{kind}");
        let dropout = refusal(|file| file["model"]["dropout"] = json!(0.1));
        assert!(dropout.contains("leaves out merges at random, dropout 0.1,"), "{dropout}");
        let mark = refusal(|file| file["model"]["continuing_subword_prefix"] = json!("##"));
        assert!(mark.contains("marks parts of words with \"##\""), "{mark}");
        for merge in [json!(["A", "B"]), json!("A B"), json!("AB")] {
            let merge = refusal(|file| file["model"]["merges"] = json!([merge]));
            assert!(merge.contains("has merge 1 that joins no two entries to a third"), "{merge}");
        }
        let mut sound = bytes_only();
        sound["model"]["vocab"]["AB"] = json!(256);
        sound["added_tokens"] = json!([]);
        sound["model"]["merges"] = json!(["A B"]);
        assert_eq!(read(&sound).unwrap().encode("AB").unwrap(), [256]);
    }

    #[test]
    fn a_tokenizer_that_adds_tokens_to_every_text_is_refused() {
        let error = refusal(|file| {
            file["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<end>": {"id": "<end>", "ids": [256], "tokens": ["<end>"]}}});
        });
        assert!(error.contains("adds 1 tokens to every text"), "{error}");
    }

    #[test]
    fn text_that_would_become_special_all_the_same_is_refused() {
        // Without a pattern the pre-tokenizer leaves the text whole, and the vocabulary is asked for it first.
        let mut file = bytes_only();
        file["pre_tokenizer"]["use_regex"] = json!(false);
        file["model"]["ignore_merges"] = json!(true);
        file["model"]["vocab"]["<end>"] = json!(256);
        let error = read(&file).unwrap().encode("<end>").unwrap_err().to_string();
        assert!(error.starts_with("text \"<end>\": the tokenizer makes special token 256 of it"), "{error}");
    }
}

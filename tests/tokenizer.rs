//! A damaged tokenizer is read or refused with a sentence, and nothing panics.

use std::path::Path;

use llava_phi::text::Tokenizer;
use proptest::{prelude::*, sample::Index};

const FILE: &[u8] = include_bytes!("reference/text-tokenizer.json");

#[derive(Clone, Debug)]
enum Damage {
    /// The file ends here.
    End(Index),
    /// A byte is another one.
    Byte(Index, u8),
    /// The next digit is another one.
    Digit(Index, u8),
    /// Some bytes are missing.
    Gap(Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"\"\\,:[]{}0 ".to_vec())];
    prop_oneof![
        1 => any::<Index>().prop_map(Damage::End),
        4 => (any::<Index>(), byte).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        4 => (any::<Index>(), b'0'..=b'9').prop_map(|(at, digit)| Damage::Digit(at, digit)),
        4 => (any::<Index>(), 1_usize..40).prop_map(|(at, length)| Damage::Gap(at, length)),
    ]
}

fn apply(file: &mut Vec<u8>, damage: &Damage) {
    if file.is_empty() {
        return;
    }
    match damage {
        Damage::End(at) => file.truncate(at.index(file.len())),
        Damage::Byte(at, byte) => *at.get_mut(file) = *byte,
        Damage::Digit(at, digit) => {
            let rest = at.index(file.len());
            if let Some(found) = file[rest..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                *found = *digit;
            }
        }
        Damage::Gap(at, length) => {
            let start = at.index(file.len());
            file.drain(start..(start + length).min(file.len()));
        }
    }
}

proptest! {
    #[test]
    fn a_damaged_tokenizer_is_read_or_refused(damages in prop::collection::vec(damage(), 1..4)) {
        let mut file = FILE.to_vec();
        for damage in &damages {
            apply(&mut file, damage);
        }
        match Tokenizer::from_bytes(Path::new("t.json"), &file) {
            Ok(tokenizer) => {
                let text = " a <|endoftext|> b   \n";
                if let Ok(ids) = tokenizer.encode(text) {
                    prop_assert!(ids.iter().all(|id| !tokenizer.is_special(*id)));
                    prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocabulary()));
                    tokenizer.decode(&ids).unwrap();
                }
            }
            Err(error) => prop_assert!(error.to_string().starts_with("package t.json: "), "{}", error),
        }
    }
}

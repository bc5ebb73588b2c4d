//! How long the terminals of a grammar are once what they refer to is written out.
//!
//! A few lines can write out to millions of bytes (`A: B B`, `B: C C`, ...), which is what a matcher has to read.

use std::collections::HashMap;

/// A terminal: what it is called, and its definition.
type Definition<'a> = (&'a str, String);

/// Bytes of the longest terminal of a grammar in the form of Lark, written out; of what stands outside of terminals, the
/// longest line. Terminals that refer to themselves have no end, and give the highest number. Words in texts that are called as a terminal count as the terminal.
pub(super) fn longest(grammar: &str) -> usize {
    let definitions = definitions(grammar);
    let names: HashMap<&str, usize> =
        definitions.iter().zip(0..).map(|((name, _), at)| (*name, at)).collect();
    let references: Vec<Vec<usize>> = definitions
        .iter()
        .map(|(_, body)| words(body).filter_map(|word| names.get(word).copied()).collect())
        .collect();
    let mut bytes: Vec<usize> = definitions.iter().map(|(_, body)| body.len()).collect();
    let own = bytes.clone();
    // One more reference deep with each turn; one that is left after as many turns as there are terminals never ends.
    let mut ends = false;
    for _ in 0..=definitions.len() {
        let next: Vec<usize> = (0..bytes.len())
            .map(|at| references[at].iter().fold(own[at], |sum, other| sum.saturating_add(bytes[*other])))
            .collect();
        if next == bytes || next.iter().any(|bytes| *bytes > super::constraint::MOST_BYTES) {
            ends = true;
            bytes = next;
            break;
        }
        bytes = next;
    }
    if !ends {
        return usize::MAX;
    }
    let line = grammar.lines().map(str::len).max().unwrap_or_default();
    bytes.into_iter().max().unwrap_or_default().max(line)
}

/// The terminals, each with all of its lines.
fn definitions(grammar: &str) -> Vec<Definition<'_>> {
    let mut definitions: Vec<Definition<'_>> = Vec::new();
    let mut inside = false;
    for line in grammar.lines() {
        if let Some(name) = defined(line) {
            inside = name.trim_start_matches('_').starts_with(|letter: char| letter.is_ascii_uppercase());
            if inside {
                definitions.push((name, String::new()));
            }
        }
        if let (true, Some((name, body))) = (inside, definitions.last_mut()) {
            let own = line.trim_start().strip_prefix(*name).filter(|_| body.is_empty());
            body.push_str(own.unwrap_or(line));
            body.push('\n');
        }
    }
    definitions
}

/// The name that `line` begins to define.
fn defined(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let end = line.find(|letter: char| !is_word(letter)).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    // Between a name and its colon stand a priority and options.
    let before = rest.split(['"', '/', '|']).next().unwrap_or_default();
    (!name.is_empty() && before.contains(':')).then_some(name)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|letter: char| !is_word(letter)).filter(|word| !word.is_empty())
}

fn is_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_written_out() {
        let doubling = |depth: usize| {
            let lines =
                (0..depth).fold(String::new(), |text, n| text + &format!("A{n}: A{} A{}\n", n + 1, n + 1));
            longest(&format!("start: A0\n{lines}A{depth}: \"x\"?\n"))
        };
        assert!(doubling(3) < 300);
        assert!(doubling(12) > 8 * 1024);
        assert!(doubling(300) > 8 * 1024);
        assert!(longest("A: B\n  | B B\n\nB.2: C C\nC[lazy]: \"c\"\n") > longest("A: B\nB: C\nC: \"c\""));
        assert_eq!(longest("start: A\nA: A A"), usize::MAX);
        assert_eq!(longest(""), 0);
    }

    #[test]
    fn rules_are_not_written_out() {
        let rules = (0..300).fold(String::new(), |text, n| text + &format!("r{n}: r{} r{}\n", n + 1, n + 1));
        assert!(longest(&format!("start: r0\n{rules}r300: \"x\"")) < 100);
    }
}

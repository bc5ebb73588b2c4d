//! What an answer has to look like: JSON, a pattern, one of several choices, or a grammar.
//!
//! ```text
//! schema, regex, choices, grammar ─ once a request ─> Constraint ─ a token at a time ─> which tokens may follow
//! ```
//!
//! The grammar is followed by `llguidance`. Which token follows is still the model's choice: the others' logits become
//! minus infinity before it is made.

use std::{fmt, sync::Arc, thread};

use llguidance::Matcher;
use llguidance::api::{GrammarWithLexer, ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::SimpleVob;
use serde_json::{Value, json};

use super::terminals;
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::text::{TokenId, Tokenizer};

/// The most bytes of a specification, a schema written as JSON.
pub(super) const MOST_BYTES: usize = 128 * 1024;
/// The most bytes of patterns: what `a?` in a row, 4000 times, takes is 130 MB and 0.2 s, and four times that for twice
/// as many.
const MOST_PATTERN: usize = 8 * 1024;
/// The most brackets within each other, in a schema, a pattern or a grammar.
const DEEPEST: usize = 64;
/// The most choices.
const MOST_CHOICES: usize = 512;
/// The stack on which a specification is read: what refers to each other in it is followed by calls within calls.
const STACK: usize = 64 << 20;
/// Why something is refused that leaves nothing to say.
const NO_TEXT: &str = "no text satisfies it";

/// What an answer has to look like, as it is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum ConstraintSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that a JSON schema describes, with one space at most between its parts; `x-guidance` in it may say otherwise. See the documentation of `llguidance` for the keywords that it follows. What it
    /// does not follow is refused.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text that a grammar produces, in the form of Lark that `llguidance` reads.
    Grammar(String),
}

impl ConstraintSpec {
    /// What it is called in messages.
    fn name(&self) -> &'static str {
        match self {
            Self::JsonObject => "the JSON object",
            Self::JsonSchema(_) => "the JSON schema",
            Self::Regex(_) => "the regex",
            Self::Choice(_) => "the choice",
            Self::Grammar(_) => "the grammar",
        }
    }
}

/// What an answer has to look like, ready to be followed. Clones share what was compiled.
#[derive(Clone)]
pub struct Constraint {
    compiled: Arc<Compiled>,
}

struct Compiled {
    spec: ConstraintSpec,
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
    around: Around,
}

/// What stands around the text that was asked for, in what the model says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Around {
    /// White space, which is no part of the answer.
    #[default]
    Space,
    /// One space before it, or none. The text may end in white space of its own.
    OneBefore,
    /// Nothing: the text may begin and end in white space of its own.
    Nothing,
}

impl Constraint {
    /// Compiles `spec` for the tokens of `tokenizer`. The first one for a tokenizer takes longer: its tokens are put in
    /// order, and what comes of it is kept beside it.
    ///
    /// The model may begin with a space, as it was trained to, which is no part of the answer; so choices neither begin nor
    /// end with white space, and a pattern or grammar that allows a space at the beginning gets none before it.
    ///
    /// # Errors
    /// [`Error::Request`] that says why when `spec` contradicts itself, uses what `llguidance` does not follow, or takes
    /// more than a request may: 128 KiB, of which 8 KiB of patterns or for one terminal of a grammar, 64 brackets within
    /// each other, 512 choices, and the limits of `llguidance` for what comes of it.
    pub fn new(tokenizer: &Arc<Tokenizer>, spec: &ConstraintSpec) -> Result<Self> {
        let grammar = grammar(spec)?;
        let vocabulary = Vocabulary::of(tokenizer)?;
        // It calls itself for what lies within, or is referred to.
        let (matcher, around) = thread::scope(|scope| {
            thread::Builder::new()
                .name("llava-phi constraint".to_owned())
                .stack_size(STACK)
                .spawn_scoped(scope, || compile(&vocabulary, spec, grammar))
                .map_err(|e| Error::Request(format!("there is no memory to read {}: {e}", spec.name())))?
                .join()
                .unwrap_or_else(|_| Err(refusal(spec, "it cannot be read")))
        })?;
        Ok(Self { compiled: Arc::new(Compiled { spec: spec.clone(), matcher, vocabulary, around }) })
    }

    /// What was asked for.
    pub fn spec(&self) -> &ConstraintSpec {
        &self.compiled.spec
    }

    /// The texts of which the answer is one, when that is what was asked for.
    pub fn choices(&self) -> Option<&[String]> {
        match &self.compiled.spec {
            ConstraintSpec::Choice(choices) => Some(choices),
            _ => None,
        }
    }

    pub(super) fn around(&self) -> Around {
        self.compiled.around
    }

    /// Begins an answer.
    pub(super) fn begin(&self) -> Walk {
        let vocabulary = Arc::clone(&self.compiled.vocabulary);
        // With states of its own: what one answer has met must not decide where another one finds the limit.
        Walk { matcher: self.compiled.matcher.deep_clone(), vocabulary, name: self.compiled.spec.name() }
    }
}

impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        self.compiled.spec == other.compiled.spec
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Constraint").field(&self.compiled.spec).finish()
    }
}

/// One answer's way through a constraint.
pub(super) struct Walk {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
    name: &'static str,
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Walk {
    /// Makes the logits of all tokens minus infinity that may not follow. Those of `eos` may where the text is complete; no
    /// other special token ever may.
    ///
    /// # Errors
    /// [`Error::Request`] when what may follow takes more to find out than `llguidance` allows, and when nothing may.
    pub(super) fn narrow(&mut self, logits: &mut [f32], eos: &[TokenId]) -> Result<()> {
        let complete = self.matcher.is_accepting().map_err(|e| self.lost(&e))?;
        let mut allowed = match self.matcher.compute_mask() {
            Ok(mask) => mask,
            // What was thought to go on has no token: the text is complete, or this is a dead end.
            Err(_) if complete && self.matcher.stop_reason() == StopReason::NoExtensionBias => {
                SimpleVob::alloc(self.vocabulary.tokens())
            }
            Err(error) => return Err(self.lost(&error)),
        };
        let ends = complete || self.vocabulary.end().is_some_and(|end| allowed.get(end));
        for id in self.vocabulary.special() {
            allowed.disallow_token(*id);
        }
        if ends {
            let known = |id: &&TokenId| (**id as usize) < self.vocabulary.tokens();
            eos.iter().filter(known).for_each(|id| allowed.allow_token(*id));
        }
        if allowed.is_zero() {
            return Err(Error::Request(format!(
                "{} leaves no token that could follow; the answer so far has no end that it allows",
                self.name
            )));
        }
        for (bits, logits) in allowed.as_slice().iter().zip(logits.chunks_mut(32)) {
            if *bits != u32::MAX {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if bits & (1 << bit) == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the token that was chosen, and tells whether the text is complete and nothing may follow.
    ///
    /// # Errors
    /// [`Error::Request`] as [`Walk::narrow`].
    pub(super) fn read(&mut self, token: TokenId) -> Result<bool> {
        self.matcher.consume_token(token).map_err(|e| self.lost(&e))?;
        Ok(self.matcher.is_stopped())
    }

    fn lost(&self, error: &impl fmt::Display) -> Error {
        Error::Request(format!(
            "{} cannot be followed any further: {}; simplify it",
            self.name,
            first_line(&error.to_string())
        ))
    }
}

/// What is compiled for `spec`, the texts in it checked.
fn grammar(spec: &ConstraintSpec) -> Result<GrammarWithLexer> {
    let text = match spec {
        ConstraintSpec::JsonObject => String::new(),
        ConstraintSpec::JsonSchema(schema) => {
            if depth_of(schema) > DEEPEST {
                return Err(refusal(spec, format!("it is more than {DEEPEST} levels deep")));
            }
            check_patterns(spec, pattern_bytes(schema))?;
            schema.to_string()
        }
        ConstraintSpec::Regex(text) => {
            check_depth(spec, text)?;
            check_patterns(spec, text.len())?;
            if text.chars().rev().take_while(|letter| *letter == '\\').count() % 2 == 1 {
                return Err(refusal(spec, "it ends in a backslash"));
            }
            text.clone()
        }
        ConstraintSpec::Grammar(text) => {
            check_depth(spec, text)?;
            match terminals::longest(text) {
                usize::MAX => return Err(refusal(spec, "a terminal of it refers to itself")),
                bytes => check_patterns(spec, bytes)?,
            }
            text.clone()
        }
        ConstraintSpec::Choice(choices) => choices.concat(),
    };
    if text.len() > MOST_BYTES {
        return Err(refusal(spec, format!("it has {} bytes and may have {MOST_BYTES}", text.len())));
    }
    Ok(match spec {
        ConstraintSpec::JsonObject => GrammarWithLexer::from_json_schema(spaced(json!({"type": "object"}))),
        ConstraintSpec::JsonSchema(Value::Bool(true)) => {
            GrammarWithLexer::from_json_schema(spaced(json!({})))
        }
        ConstraintSpec::JsonSchema(schema @ (Value::Object(_) | Value::Bool(_))) => {
            GrammarWithLexer::from_json_schema(spaced(schema.clone()))
        }
        ConstraintSpec::JsonSchema(_) => return Err(refusal(spec, "it is no JSON object")),
        ConstraintSpec::Regex(text) if text.is_empty() => return Err(refusal(spec, "it is empty")),
        ConstraintSpec::Regex(text) => GrammarWithLexer::from_regex(text),
        ConstraintSpec::Grammar(text) => GrammarWithLexer::from_lark(text.clone()),
        ConstraintSpec::Choice(choices) => {
            check_choices(choices)?;
            let quoted: Vec<String> =
                choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
            GrammarWithLexer::from_lark(format!("start: {}", quoted.join(" | ")))
        }
    })
}

fn check_depth(spec: &ConstraintSpec, text: &str) -> Result<()> {
    if depth(text) > DEEPEST {
        return Err(refusal(spec, format!("it has more than {DEEPEST} brackets within each other")));
    }
    Ok(())
}

fn check_patterns(spec: &ConstraintSpec, bytes: usize) -> Result<()> {
    if bytes > MOST_PATTERN {
        return Err(refusal(spec, format!("its patterns have {bytes} bytes and may have {MOST_PATTERN}")));
    }
    Ok(())
}

/// Bytes of all patterns in a schema.
fn pattern_bytes(schema: &Value) -> usize {
    match schema {
        Value::Array(items) => items.iter().map(pattern_bytes).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| match (&name[..], value) {
                ("pattern" | "whitespace_pattern", Value::String(pattern)) => pattern.len(),
                ("patternProperties", Value::Object(patterns)) => {
                    patterns.iter().map(|(pattern, inner)| pattern.len() + pattern_bytes(inner)).sum()
                }
                _ => pattern_bytes(value),
            })
            .sum(),
        _ => 0,
    }
}

/// A schema whose JSON stands in one line, `{"a": 1, "b": [2, 3]}`, unless it says otherwise itself: where white space is
/// free, a model that hesitates fills its answer with it.
fn spaced(mut schema: Value) -> Value {
    if let Value::Object(keywords) = &mut schema {
        let options = keywords.entry("x-guidance").or_insert_with(|| json!({}));
        if let Value::Object(options) = options
            && !options.contains_key("whitespace_flexible")
            && !options.contains_key("whitespace_pattern")
        {
            options.insert("whitespace_flexible".to_owned(), Value::from(false));
            for (name, text) in [("item_separator", ", "), ("key_separator", ": ")] {
                options.entry(name).or_insert_with(|| Value::from(text));
            }
        }
    }
    schema
}

fn check_choices(choices: &[String]) -> Result<()> {
    let refuse = |why: String| Err(Error::Request(why));
    if choices.is_empty() {
        return refuse("there is no choice to choose from; give at least one".to_owned());
    }
    if choices.len() > MOST_CHOICES {
        return refuse(format!("there are {} choices; give at most {MOST_CHOICES}", choices.len()));
    }
    for (place, choice) in choices.iter().enumerate() {
        if choice.trim().is_empty() {
            return refuse(format!("choice {} is empty; leave it out", place + 1));
        }
        if choice.trim() != choice {
            return refuse(format!(
                "choice {choice:?} begins or ends with white space, of which answers have none; leave it out"
            ));
        }
        if choices[..place].contains(choice) {
            return refuse(format!("choice {choice:?} is given twice; give each once"));
        }
    }
    Ok(())
}

/// Compiles `grammar`, with room for a space before it unless it begins with one itself.
fn compile(
    vocabulary: &Vocabulary,
    spec: &ConstraintSpec,
    grammar: GrammarWithLexer,
) -> Result<(Matcher, Around)> {
    // Alone first: what no text satisfies would not show behind a space that satisfies it.
    let mut alone = matcher(vocabulary, spec, TopLevelGrammar::from_grammar(grammar.clone()))?;
    let around = match spec {
        ConstraintSpec::JsonObject | ConstraintSpec::JsonSchema(_) | ConstraintSpec::Choice(_) => {
            Around::Space
        }
        ConstraintSpec::Regex(_) | ConstraintSpec::Grammar(_) => {
            let may_begin = match vocabulary.space() {
                Some(space) => alone.validate_tokens(&[space]).map_err(|e| refusal(spec, e))? > 0,
                None => false,
            };
            if may_begin {
                return Ok((alone, Around::Nothing));
            }
            Around::OneBefore
        }
    };
    let before = GrammarWithLexer::from_lark(r#"start: " "? @answer"#.to_owned());
    let grammar = GrammarWithLexer { name: Some("answer".to_owned()), ..grammar };
    let whole = TopLevelGrammar { grammars: vec![before, grammar], max_tokens: None };
    Ok((matcher(vocabulary, spec, whole)?, around))
}

fn matcher(vocabulary: &Vocabulary, spec: &ConstraintSpec, grammar: TopLevelGrammar) -> Result<Matcher> {
    let limits = ParserLimits {
        // Each takes up to 2 KB; the default would let one answer take half a gigabyte.
        max_lexer_states: 20_000,
        // A second and 100 MB at the default of a million.
        initial_lexer_fuel: 300_000,
        max_grammar_size: 100_000,
        // A state and a grammar in an error help nobody who sent them.
        verbose_errors: false,
        ..ParserLimits::default()
    };
    // It says so where it first looks, which may be while it is made.
    let refuse = |why: &str| refusal(spec, if why.contains("NoExtensionBias") { NO_TEXT } else { why });
    let matcher = vocabulary.matcher(grammar, limits);
    if let Some(why) = matcher.get_error() {
        return Err(refuse(&why));
    }
    // What no text satisfies, and what takes too much from the beginning, is better known before a prompt is read.
    let mut first = matcher.deep_clone();
    let complete = first.is_accepting().map_err(|e| refuse(&e.to_string()))?;
    match first.compute_mask() {
        Err(_) if !complete && first.stop_reason() == StopReason::NoExtensionBias => {
            Err(refusal(spec, NO_TEXT))
        }
        Err(error) if !complete => Err(refuse(&error.to_string())),
        _ => Ok(matcher),
    }
}

fn refusal(spec: &ConstraintSpec, why: impl fmt::Display) -> Error {
    Error::Request(format!(
        "{} is refused: {}; change it or leave it out",
        spec.name(),
        first_line(&why.to_string())
    ))
}

/// What a message says first, at most 300 characters of it.
fn first_line(message: &str) -> String {
    // A limit that it does not check itself.
    if message.starts_with("panic:") {
        return "it is too complex to be followed, or names a token of the model's own".to_owned();
    }
    let mut lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    // What is wrong with a regular expression stands below a drawing of it.
    let reason = lines.clone().find_map(|line| line.strip_prefix("error: "));
    let line = reason.or_else(|| lines.next()).unwrap_or("no reason is given");
    line.trim_end_matches([';', '.', ' ']).chars().take(300).collect()
}

/// Levels of a JSON value.
fn depth_of(value: &Value) -> usize {
    let mut level = vec![value];
    let mut depth = 0;
    while !level.is_empty() {
        depth += 1;
        level = level
            .into_iter()
            .flat_map(|value| -> Box<dyn Iterator<Item = &Value>> {
                match value {
                    Value::Array(items) => Box::new(items.iter()),
                    Value::Object(fields) => Box::new(fields.values()),
                    _ => Box::new(std::iter::empty()),
                }
            })
            .collect();
    }
    depth
}

/// The most brackets of `text` that are open at once, wherever they stand.
fn depth(text: &str) -> usize {
    let (mut open, mut most) = (0_usize, 0);
    for letter in text.chars() {
        match letter {
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

#[cfg(test)]
mod tests;

//! The tokens of a tokenizer as `llguidance` reads them.

use std::sync::{Arc, Weak};

use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Logger, Matcher, ParserFactory};

use crate::error::{Error, Result};
use crate::text::{TokenId, Tokenizer};

/// Stands for the end of a text where a tokenizer has no special token.
const NO_END: TokenId = TokenId::MAX;

/// The tokens of a tokenizer, in the order of their bytes.
pub(super) struct Vocabulary {
    factory: ParserFactory,
    special: Vec<TokenId>,
    tokens: usize,
    space: Option<TokenId>,
}

impl Vocabulary {
    /// That of `tokenizer`, made once and kept beside it.
    ///
    /// # Errors
    /// [`Error::Request`] when its tokens cannot be put in order.
    pub(super) fn of(tokenizer: &Arc<Tokenizer>) -> Result<Arc<Self>> {
        let made = tokenizer.beside(|| Self::new(tokenizer));
        match &*made {
            Ok(vocabulary) => Ok(Arc::clone(vocabulary)),
            Err(why) => Err(Error::Request(format!(
                "the tokenizer serves no constraint ({why}); ask without a schema, regex, choice or grammar"
            ))),
        }
    }

    fn new(tokenizer: &Arc<Tokenizer>) -> std::result::Result<Arc<Self>, String> {
        let ids = 0..TokenId::try_from(tokenizer.vocabulary()).map_err(|e| e.to_string())?;
        // Special tokens have no bytes, so that nothing leads to them.
        let bytes: Vec<Vec<u8>> =
            ids.clone().map(|id| tokenizer.token_bytes(id).unwrap_or_default().to_vec()).collect();
        let special: Vec<TokenId> = ids.clone().filter(|id| tokenizer.is_special(*id)).collect();
        // Which token ends an answer is another question; here one of them stands for the end.
        let info = TokRxInfo::new(ids.end, special.first().copied().unwrap_or(NO_END));
        let trie = TokTrie::from(&info, &bytes);
        let space = ids.clone().find(|id| tokenizer.token_bytes(*id) == Some(b" "));
        let tokens: TokEnv = Arc::new(Tokens { trie, tokenizer: Arc::downgrade(tokenizer) });
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
            .map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Arc::new(Self { factory, special, tokens: tokenizer.vocabulary(), space }))
    }

    /// What follows `grammar`, or holds the reason why it cannot be followed.
    pub(super) fn matcher(&self, grammar: TopLevelGrammar, limits: ParserLimits) -> Matcher {
        // Nothing of what it has to say goes to standard error.
        let logger = Logger::new(0, 0);
        let grammar = GrammarInit::Serialized(grammar);
        let capabilities = InferenceCapabilities::default();
        Matcher::new(self.factory.create_parser_from_init_ext(grammar, logger, capabilities, limits))
    }

    /// Special tokens: none of them is text.
    pub(super) fn special(&self) -> &[TokenId] {
        &self.special
    }

    /// How many tokens there are.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Where a set of tokens says that the text may end.
    pub(super) fn end(&self) -> Option<usize> {
        self.special.first().and_then(|id| usize::try_from(*id).ok())
    }

    /// The token that is one space.
    pub(super) fn space(&self) -> Option<TokenId> {
        self.space
    }
}

/// The tokens, and how text is cut into them.
struct Tokens {
    trie: TokTrie,
    // The tokenizer keeps the tokens, so they must not keep it.
    tokenizer: Weak<Tokenizer>,
}

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let tokenizer = self.tokenizer.upgrade();
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let encoded = tokenizer.as_ref().and_then(|tokenizer| tokenizer.encode(text).ok());
            encoded.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }
}

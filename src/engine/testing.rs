//! A model that says what a test wants.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::error::{Error, Result};
use crate::model::cancel::Canceler;
use crate::model::decoder::Logits;
use crate::model::prefix::{CachedFrom, PrefixReport};
use crate::model::vision::ImageInput;
use crate::model::{CausalModel, ComponentReport, Demotion, Prefill, Room, Shared};
use crate::package::Component;
use crate::runtime::{Refusal, Step, Target};
use crate::text::{Prompt, TokenId};

/// One call of a model, in the order of the log. Caches are numbered as they are made, from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Prefill { tokens: Vec<TokenId>, images: usize, cache: usize },
    Decode { token: TokenId, cache: usize },
    Recheck,
    Demote { graph: String, reason: String },
}

impl Call {
    pub(super) fn is_prefill(&self) -> bool {
        matches!(self, Self::Prefill { .. })
    }

    pub(super) fn cache(&self) -> usize {
        match self {
            Self::Prefill { cache, .. } | Self::Decode { cache, .. } => *cache,
            Self::Recheck | Self::Demote { .. } => panic!("{self:?} has no cache"),
        }
    }
}

/// What the model was asked to do so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Log(Arc<Mutex<Vec<Call>>>);

impl Log {
    pub(super) fn calls(&self) -> Vec<Call> {
        self.0.lock().unwrap().clone()
    }
}

/// What a script answers to [`Call::Recheck`] when the model no longer computes what it should.
pub(super) const BROKEN: TokenId = TokenId::MAX;

/// Gives the token that each call answers with; the model is certain of it.
type Script = Box<dyn FnMut(&Call, &Canceler) -> Result<TokenId> + Send>;

/// A model without graphs.
pub(super) struct ScriptedModel {
    vocabulary: usize,
    script: Script,
    log: Log,
    canceler: Canceler,
    caches: usize,
    /// Tokens that it reads in one run; `None` refuses to read several.
    pub(super) at_once: Option<usize>,
    pub(super) room: Room,
}

/// What a scripted model remembers: the number of its cache and the tokens in it.
pub(super) struct ScriptedCache {
    number: usize,
    tokens: Vec<TokenId>,
}

impl ScriptedModel {
    pub(super) fn new(
        vocabulary: usize,
        script: impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static,
    ) -> (Self, Log) {
        let log = Log::default();
        let model = Self {
            vocabulary,
            script: Box::new(script),
            log: log.clone(),
            canceler: Canceler::default(),
            caches: 0,
            at_once: None,
            room: Room { sequences: 1, positions: usize::MAX, limited_by: None },
        };
        (model, log)
    }

    fn answer(&mut self, call: &Call) -> Result<Logits> {
        self.log.0.lock().unwrap().push(call.clone());
        let token = (self.script)(call, &self.canceler)?;
        let mut logits = vec![0.0; self.vocabulary];
        logits[token as usize] = 1.0;
        Ok(Logits::new(logits))
    }
}

impl CausalModel for ScriptedModel {
    type Cache = ScriptedCache;
    type Reading = (Vec<TokenId>, usize);

    fn empty_cache(&mut self) -> Result<ScriptedCache> {
        self.caches += 1;
        Ok(ScriptedCache { number: self.caches - 1, tokens: Vec::new() })
    }

    fn room(&self) -> Room {
        self.room.clone()
    }

    fn shared(&self, prompt: &Prompt, _: &[Arc<ImageInput>], cache: &ScriptedCache) -> Result<Shared> {
        Ok(Shared {
            common: common(cache, &prompt.token_ids().collect::<Vec<_>>()),
            held: cache.tokens.len(),
        })
    }

    fn begin(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        _: &mut ScriptedCache,
        _: &[&ScriptedCache],
    ) -> Result<Self::Reading> {
        Ok((prompt.token_ids().collect(), images.len()))
    }

    fn read_on(
        &mut self,
        (tokens, images): &mut Self::Reading,
        most: usize,
        cache: &mut ScriptedCache,
    ) -> Result<Option<Prefill>> {
        let cached = common(cache, tokens);
        if tokens.len() - cached > most {
            cache.tokens.truncate(cached);
            cache.tokens.extend_from_slice(&tokens[cached..cached + most]);
            return Ok(None);
        }
        let call = Call::Prefill { tokens: tokens.clone(), images: *images, cache: cache.number };
        let logits = self.answer(&call)?;
        cache.tokens.clone_from(tokens);
        let from = CachedFrom { working: cached, ..CachedFrom::default() };
        let none = Duration::ZERO;
        let (restore, vision, decoder) = (none, none, none);
        Ok(Some(Prefill { logits, cached, from, images_encoded: 0, restore, vision, decoder }))
    }

    fn decode(&mut self, token: TokenId, cache: &mut ScriptedCache) -> Result<Logits> {
        let logits = self.answer(&Call::Decode { token, cache: cache.number })?;
        cache.tokens.push(token);
        Ok(logits)
    }

    fn decode_each(&mut self, tokens: &[TokenId], caches: &mut [&mut ScriptedCache]) -> Vec<Result<Logits>> {
        tokens.iter().zip(caches).map(|(token, cache)| self.decode(*token, cache)).collect()
    }

    fn most_at_once(&self) -> Result<usize> {
        self.at_once.ok_or_else(|| Error::Request("one at a time".to_owned()))
    }

    fn decode_all(&mut self, tokens: &[TokenId], cache: &mut ScriptedCache) -> Result<Vec<Logits>> {
        assert!(self.at_once.is_some_and(|most| tokens.len() <= most), "{tokens:?}");
        tokens.iter().map(|token| self.decode(*token, cache)).collect()
    }

    fn forget(&mut self, count: usize, cache: &mut ScriptedCache) -> Result<()> {
        cache.tokens.truncate(cache.tokens.len() - count);
        Ok(())
    }

    fn canceler(&self) -> Canceler {
        self.canceler.clone()
    }

    fn reports(&self) -> Vec<ComponentReport> {
        Vec::new()
    }

    fn prefixes(&self) -> PrefixReport {
        PrefixReport::default()
    }

    fn recheck(&mut self) -> Result<bool> {
        self.log.0.lock().unwrap().push(Call::Recheck);
        (self.script)(&Call::Recheck, &self.canceler).map(|answer| answer != BROKEN)
    }

    fn demote(&mut self, graph: &str, reason: &str) -> Result<Demotion> {
        let call = Call::Demote { graph: graph.to_owned(), reason: reason.to_owned() };
        self.log.0.lock().unwrap().push(call.clone());
        (self.script)(&call, &self.canceler)?;
        let refusal = Refusal {
            provider: Target::default(),
            variant: "first".to_owned(),
            step: Step::Serving,
            reason: reason.to_owned(),
        };
        let variant = "second".to_owned();
        Ok(Demotion { component: Component::Decoder, refusal, variant, provider: Target::default() })
    }
}

fn common(cache: &ScriptedCache, tokens: &[TokenId]) -> usize {
    cache.tokens.iter().zip(tokens).take_while(|(held, wanted)| held == wanted).count()
}

/// What a graph does when it is cancelled: nothing until then, and the error.
pub(super) fn until_cancelled<T>(canceler: &Canceler) -> Result<T> {
    let begin = Instant::now();
    while !canceler.is_cancelled() {
        assert!(begin.elapsed() < Duration::from_secs(20), "nobody cancelled");
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Error::Cancelled)
}

//! Tokens that are guessed ahead.

use super::*;

/// Ten letters in a circle: what follows a token is known by it alone.
fn circle() -> (Vec<TokenId>, impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static) {
    let letters: Vec<TokenId> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"].map(letter).to_vec();
    let ring = letters.clone();
    let next = move |call: &Call, _: &Canceler| match call {
        Call::Decode { token, .. } => {
            Ok(ring[(ring.iter().position(|id| id == token).map_or(0, |place| place + 1)) % ring.len()])
        }
        _ => Ok(ring[0]),
    };
    (letters, next)
}

fn looking_ahead(
    script: impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static,
    at_once: Option<usize>,
) -> (Engine, Log) {
    let facts = facts();
    let (mut model, log) = ScriptedModel::new(facts.tokenizer.vocabulary(), script);
    model.at_once = at_once;
    let preprocessor = Preprocessor::new(&ModelPackage::embedded().unwrap().manifest().image);
    (Engine::with_model(model, facts, preprocessor, Limits::default()).unwrap(), log)
}

#[test]
fn an_answer_that_was_looked_up_is_the_same_and_leaves_the_same_cache() {
    let lookup = |most: usize, params| GenerateParams { lookup: std::num::NonZeroUsize::new(most), ..params };
    for (at_once, most, length) in [(8, 7, 60), (2, 7, 60), (1, 7, 30), (8, 1, 33), (64, 50, 94), (8, 7, 1)] {
        let (letters, script) = circle();
        let (engine, log) = looking_ahead(script, Some(at_once));
        // The prompt goes on otherwise than the answer will: the first guess is wrong.
        let prompt = ["a", "b", "d", "a", "b", "d"].map(letter).to_vec();
        let asked = request(engine.prompt(&[Piece::Tokens(prompt.clone())]).unwrap());
        let asked = Request { params: lookup(most, at_most(length)), ..asked };
        let found = engine.generate(asked).unwrap().complete().unwrap();
        let wanted: Vec<TokenId> = letters.iter().copied().cycle().take(length).collect();
        assert_eq!(found.token_ids, wanted);
        assert_eq!(found.finish_reason, FinishReason::Length);
        let guessed = found.usage.lookup.unwrap().guessed;
        assert_eq!(guessed > 0, at_once > 1 && length > 20, "{at_once} {length}");
        // Nothing is read that no token could follow.
        let reads = log.calls().iter().filter(|call| matches!(call, Call::Decode { .. })).count();
        assert!(reads < length + guessed, "{reads}");
        // All that was read of the answer, which is all but its last token, and nothing more.
        let whole = [prompt.clone(), wanted, vec![6]].concat();
        if whole.len() < CONTEXT {
            let again = request(engine.prompt(&[Piece::Tokens(whole)]).unwrap());
            let again = Request { params: at_most(1), ..again };
            let cached = engine.generate(again).unwrap().complete().unwrap().usage.cached_tokens;
            assert_eq!(cached, prompt.len() + length - 1, "{at_once} {most} {length}");
        }
    }
}

#[test]
fn a_lookup_is_refused_where_logits_come_one_position_at_a_time() {
    let (_, script) = circle();
    let (engine, log) = looking_ahead(script, None);
    let params = GenerateParams { lookup: Some(std::num::NonZeroUsize::MIN), ..at_most(5) };
    let error = engine.generate(Request { params, ..request(tokens(3)) }).unwrap().complete().unwrap_err();
    assert_eq!((error.to_string().as_str(), log.calls().len()), ("one at a time", 0));
    let plain = Request { params: at_most(5), ..request(tokens(3)) };
    assert_eq!(engine.generate(plain).unwrap().complete().unwrap().token_ids.len(), 5);
}

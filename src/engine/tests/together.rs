//! Requests that are worked on at once.

use super::*;

/// As [`engine`], with room for several at once, and so many that may wait.
fn several(
    sequences: usize,
    queue: Option<usize>,
    script: impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static,
) -> (Engine, Log) {
    let facts = facts();
    let (mut model, log) = ScriptedModel::new(facts.tokenizer.vocabulary(), script);
    model.room = Room { sequences, positions: CONTEXT * sequences, limited_by: None };
    let preprocessor = Preprocessor::new(&ModelPackage::embedded().unwrap().manifest().image);
    let engine = Engine::with_model(model, facts, preprocessor, Limits::default()).unwrap();
    (Engine { queue, ..engine }, log)
}

/// Says the letter `a` until a gate is opened, and then ends every answer.
fn gated() -> (impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static, Arc<AtomicBool>) {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let open = Arc::new(AtomicBool::new(false));
    let gate = Arc::clone(&open);
    let script = move |_: &Call, _: &Canceler| {
        let open = gate.load(Ordering::SeqCst);
        if !open {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(if open { eos } else { a })
    };
    (script, open)
}

/// Waits for the first text of an answer.
fn begun(stream: &mut GenerationStream) {
    assert!(matches!(stream.next(), Some(Ok(Event::Text(_)))));
}

#[test]
fn requests_join_and_leave_between_steps_and_each_has_its_own_cache() {
    let (script, open) = gated();
    let (engine, log) = several(3, None, script);
    let ask = |length| engine.generate(request(tokens(length))).unwrap();
    let mut streams = [ask(3), ask(4)];
    streams.iter_mut().for_each(begun);
    let mut third = ask(5);
    begun(&mut third);
    assert_eq!(engine.load().active, 3);
    // One leaves and the others go on.
    drop(third);
    streams.iter_mut().for_each(begun);
    open.store(true, Ordering::SeqCst);
    for stream in streams {
        assert_eq!(stream.complete().unwrap().finish_reason, FinishReason::Stop);
    }
    let prefills: Vec<usize> = log.calls().iter().filter(|call| call.is_prefill()).map(Call::cache).collect();
    assert_eq!(prefills, [0, 1, 2]);
    let load = engine.load();
    assert_eq!((load.completed, load.active, load.waiting), (3, 0, 0));
    assert!(load.step_tokens > load.steps, "steps read several tokens: {load:?}");
}

#[test]
fn no_more_wait_than_may_and_what_is_refused_can_be_asked_again() {
    let (script, open) = gated();
    let (engine, _log) = several(1, Some(1), script);
    let mut first = engine.generate(request(tokens(3))).unwrap();
    begun(&mut first);
    let second = engine.generate(request(tokens(3))).unwrap();
    let refused = engine.generate(request(tokens(3))).unwrap_err();
    assert!(matches!(refused, Error::Busy { waiting: 1, limit: 1 }), "{refused:?}");
    open.store(true, Ordering::SeqCst);
    assert_eq!(first.complete().unwrap().finish_reason, FinishReason::Stop);
    assert_eq!(second.complete().unwrap().finish_reason, FinishReason::Stop);
    assert_eq!(ask(&engine).unwrap().finish_reason, FinishReason::Stop);
    assert_eq!(engine.load().refused, 1);
}

#[test]
fn time_that_is_over_ends_a_request_whether_or_not_it_was_begun() {
    let (script, _open) = gated();
    let (engine, _log) = several(1, None, script);
    let mut first = engine.generate(request(tokens(3))).unwrap();
    begun(&mut first);
    let late = || Request { deadline: Some(Instant::now()), ..request(tokens(3)) };
    let waited = engine.generate(late()).unwrap().complete().unwrap_err();
    assert!(matches!(waited, Error::Deadline), "{waited:?}");
    drop(first);
    let a = letter("a");
    let (engine, _log) = several(1, None, move |_, _| {
        thread::sleep(Duration::from_millis(20));
        Ok(a)
    });
    // Time to begin on a busy machine, and less than the whole answer takes.
    let soon = Instant::now() + Duration::from_secs(1);
    let mut stream = engine.generate(Request { deadline: Some(soon), ..request(tokens(3)) }).unwrap();
    begun(&mut stream);
    let late = stream.complete().unwrap_err();
    assert!(matches!(late, Error::Deadline), "{late:?}");
}

#[test]
fn what_is_taken_out_of_service_begins_all_answers_anew_and_keeps_none() {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let mut calls = 0;
    let mut broken = false;
    let (engine, log) = several(2, None, move |call, _| match call {
        Call::Demote { .. } => {
            broken = true;
            Ok(0)
        }
        _ if broken => Ok(eos),
        _ => {
            // Once both have begun.
            calls += usize::from(call.cache() == 1);
            thread::sleep(Duration::from_millis(1));
            let reason = "it gave no number".to_owned();
            // The first of the two, so that the other is still to be told what came of the step.
            if calls > 4 && call.cache() == 0 {
                Err(Error::Unsound { graph: "decoder".to_owned(), reason })
            } else {
                Ok(a)
            }
        }
    });
    let streams = [3, 4].map(|length| engine.generate(request(tokens(length))).unwrap());
    for stream in streams {
        let completion = stream.complete().unwrap();
        assert_eq!((&completion.text[..], completion.demotions.len()), ("", 1));
    }
    let calls = log.calls();
    let demoted = calls.iter().position(|call| matches!(call, Call::Demote { .. })).unwrap();
    let again: Vec<usize> = calls[demoted + 1..].iter().map(Call::cache).collect();
    assert!(
        again.len() == 2 && again.iter().all(|cache| *cache > 1),
        "what was read before serves nobody: {again:?}"
    );
}

#[test]
fn one_that_fails_takes_nobody_with_it() {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let mut said = [0; 2];
    let (engine, _log) = several(2, None, move |call, _| {
        let cache = call.cache();
        said[cache.min(1)] += 1;
        match (cache, said[cache.min(1)]) {
            (0, 5) => Err(Error::graph("decoder", "broke")),
            (_, 9) => Ok(eos),
            _ => Ok(a),
        }
    });
    let [first, second] = [3, 4].map(|length| engine.generate(request(tokens(length))).unwrap());
    assert_eq!(first.complete().unwrap_err().to_string(), "graph decoder: broke");
    assert_eq!(second.complete().unwrap().text, "a".repeat(8));
}

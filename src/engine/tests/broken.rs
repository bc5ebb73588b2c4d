//! Graphs that fail, or give what no answer can be made of.

use super::*;

#[test]
fn a_failure_reaches_its_request_and_the_next_one_starts_afresh() {
    let a = letter("a");
    for failing in [0, 2] {
        let mut calls = 0;
        let (engine, log) = engine(move |_, _| {
            calls += 1;
            if calls == failing + 1 { Err(Error::graph("decoder", "broke")) } else { Ok(a) }
        });
        let events: Vec<Result<Event>> = engine.generate(request(tokens(3))).unwrap().collect();
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last.as_ref().unwrap_err().to_string(), "graph decoder: broke");
        assert_eq!(before.len(), failing);
        assert!(before.iter().all(|event| matches!(event, Ok(Event::Text(_)))));
        assert_eq!(ask(&engine).unwrap().usage.cached_tokens, 0);
        assert_eq!(log.calls().last().unwrap().cache(), 1);
    }
}

#[test]
fn an_answer_begins_anew_on_what_serves_instead_of_a_graph_that_gave_no_numbers() {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let mut broken = true;
    let mut said = 0;
    let (engine, log) = engine(move |call, _| match call {
        Call::Prefill { .. } => {
            said = 1;
            Ok(a)
        }
        Call::Decode { .. } if broken && said == 2 => {
            Err(Error::Unsound { graph: "decoder".to_owned(), reason: "its logits are NaN".to_owned() })
        }
        Call::Decode { .. } => {
            said += 1;
            Ok(if said > 3 { eos } else { a })
        }
        Call::Demote { .. } => {
            broken = false;
            Ok(0)
        }
        Call::Recheck => panic!("nothing loops"),
    });
    let events: Vec<Event> = engine.generate(request(tokens(3))).unwrap().map(Result::unwrap).collect();
    let restarts: Vec<usize> =
        (0..events.len()).filter(|&n| matches!(events[n], Event::Restarted(_))).collect();
    assert_eq!(restarts, [2], "after the two tokens that were said before: {events:?}");
    let Some(Event::Finished(completion)) = events.last() else { panic!("{events:?}") };
    assert_eq!(completion.token_ids, [a; 3], "what was said before does not count");
    assert_eq!(completion.text, "aaa");
    let [demotion] = &completion.demotions[..] else { panic!("{:?}", completion.demotions) };
    assert_eq!(demotion.refusal.reason, "its logits are NaN");
    assert_eq!((demotion.variant.as_str(), completion.usage.cached_tokens), ("second", 0));
    let caches: Vec<usize> = log.calls().iter().filter(|call| call.is_prefill()).map(Call::cache).collect();
    assert_eq!(caches, [0, 1], "what the broken graph read is not used again");
    assert!(ask(&engine).unwrap().demotions.is_empty());
}

#[test]
fn an_answer_that_nothing_else_can_give_fails() {
    let (engine, _log) = engine(|call, _| match call {
        Call::Demote { .. } => Err(Error::graph("decoder", "no other")),
        _ => Err(Error::Unsound { graph: "decoder".to_owned(), reason: "NaN".to_owned() }),
    });
    let error = engine.generate(request(tokens(3))).unwrap().complete().unwrap_err();
    assert_eq!(error.to_string(), "graph decoder: no other");
}

#[test]
fn a_loop_that_is_the_models_own_stays_and_that_of_a_broken_graph_does_not() {
    for sound in [true, false] {
        let a = letter("a");
        let mut demoted = false;
        let (engine, log) = engine(move |call, _| match call {
            Call::Recheck if !sound && !demoted => Ok(BROKEN),
            Call::Demote { .. } => {
                demoted = true;
                Ok(0)
            }
            _ => Ok(a),
        });
        let params = GenerateParams { max_new_tokens: Some(80), ..GenerateParams::default() };
        let request = Request { params, ..request(tokens(3)) };
        let completion = engine.generate(request).unwrap().complete().unwrap();
        assert_eq!(completion.token_ids, [a; 80]);
        assert_eq!(completion.demotions.len(), usize::from(!sound));
        let checks = log.calls().iter().filter(|call| **call == Call::Recheck).count();
        assert_eq!(checks, if sound { 1 } else { 2 }, "one for each time that it was answered");
    }
}

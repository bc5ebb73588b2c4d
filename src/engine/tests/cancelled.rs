//! Requests that are given up on.

use super::*;

#[test]
fn a_sink_that_breaks_stops_its_request_and_no_other() {
    let a = letter("a");
    let (engine, log) = engine(move |_, _| Ok(a));
    let (sender, finished) = mpsc::channel();
    let sink = move |event: Result<Event>| {
        if let Event::Finished(completion) = event.unwrap() {
            sender.send(completion).unwrap();
        }
        ControlFlow::Break(())
    };
    engine.submit(request(tokens(3)), Box::new(sink)).unwrap();
    let completion = finished.recv().unwrap();
    assert_eq!((completion.finish_reason, &completion.text[..]), (FinishReason::Cancelled, "a"));
    assert_eq!(log.calls().len(), 1);
    assert_eq!(ask(&engine).unwrap().finish_reason, FinishReason::Length);
}

#[test]
fn dropping_the_stream_stops_the_request() {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let mut requests = 0;
    let (engine, _log) = engine(move |call, canceler| {
        requests += usize::from(call.is_prefill());
        match call {
            _ if requests > 1 => Ok(eos),
            Call::Prefill { .. } => Ok(a),
            _ => until_cancelled(canceler),
        }
    });
    let mut stream = engine.generate(request(tokens(3))).unwrap();
    assert!(matches!(stream.next(), Some(Ok(Event::Text(delta))) if delta.text == "a"));
    drop(stream);
    assert_eq!(ask(&engine).unwrap().finish_reason, FinishReason::Stop);
}

#[test]
fn a_token_outlives_a_request_that_ended_by_itself() {
    let (engine, _log) = engine(saying("red"));
    let cancel = CancelToken::new();
    for _ in 0..2 {
        let request = || Request { cancel: cancel.clone(), ..request(tokens(3)) };
        assert_eq!(engine.generate(request()).unwrap().complete().unwrap().text, "red");
        for event in engine.generate(request()).unwrap() {
            if let Event::Finished(completion) = event.unwrap() {
                assert_eq!(completion.finish_reason, FinishReason::Stop);
                break;
            }
        }
        assert!(!cancel.is_cancelled());
    }
}

/// Cancels a request when the model is at `call` of it, the prefill being call 0.
fn cancelled_at(at: usize) -> (Completion, Log) {
    let (a, eos) = (letter("a"), facts().eos[0]);
    let (sender, reached) = mpsc::channel();
    let mut calls = 0;
    let (engine, log) = engine(move |_, canceler| {
        calls += 1;
        if calls == at + 1 {
            sender.send(()).unwrap();
            return until_cancelled(canceler);
        }
        assert!(!canceler.is_cancelled(), "a cancellation is for one request");
        Ok(if calls > at { eos } else { a })
    });
    let cancel = CancelToken::new();
    let stream = engine.generate(Request { cancel: cancel.clone(), ..request(tokens(3)) }).unwrap();
    reached.recv().unwrap();
    cancel.cancel();
    let completion = stream.complete().unwrap();
    assert_eq!(completion.finish_reason, FinishReason::Cancelled);
    let next = ask(&engine).unwrap();
    assert_eq!((next.finish_reason, next.token_ids.len()), (FinishReason::Stop, 0));
    (completion, log)
}

#[test]
fn a_cancellation_while_the_prompt_is_read_leaves_an_empty_answer() {
    let (completion, log) = cancelled_at(0);
    assert_eq!((&completion.text[..], completion.token_ids), ("", vec![]));
    // A cancelled prefill leaves a prefix of the prompt in the cache, which is good for the next request.
    assert!(log.calls().iter().all(|call| call.cache() == 0));
}

#[test]
fn a_cancellation_while_the_answer_is_made_keeps_what_was_said() {
    for said in [1, 4] {
        let (completion, _log) = cancelled_at(said);
        assert_eq!((completion.text, completion.token_ids.len()), ("a".repeat(said), said));
    }
}

#[test]
fn a_request_that_was_cancelled_while_it_waited_is_not_begun() {
    let (engine, log) = engine(saying(""));
    let cancel = CancelToken::new();
    cancel.cancel();
    let completion = engine.generate(Request { cancel, ..request(tokens(3)) }).unwrap().complete().unwrap();
    assert_eq!(completion.finish_reason, FinishReason::Cancelled);
    assert_eq!(log.calls(), []);
    assert_eq!(ask(&engine).unwrap().finish_reason, FinishReason::Stop);
}

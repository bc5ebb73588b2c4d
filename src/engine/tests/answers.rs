//! What is refused, and where an answer ends.

use super::*;

#[test]
fn what_cannot_be_answered_is_refused_before_anything_runs() {
    let (engine, log) = engine(saying("red"));
    let pieces = |pieces: &[Piece]| request(engine.prompt(pieces).unwrap());
    let one = pieces(&[Piece::Image(0), Piece::text("a")]);
    let with = |params| Request { params, ..request(tokens(3)) };
    let random = |temperature, top_p| Sampling::Random { temperature, top_k: None, top_p, min_p: 0.0 };
    let cases = [
        (one.clone(), "the prompt names image 1 and 0 were given"),
        (Request { images: vec![image(), image()], ..one }, "image 2 of 2 has no place in the prompt"),
        (Request { images: vec![image()], ..request(tokens(3)) }, "image 1 of 1 has no place"),
        (
            Request { images: vec![image()], ..pieces(&[Piece::Image(1)]) },
            "the prompt names image 2 and 1 were given",
        ),
        (Request { images: vec![image()], ..pieces(&[Piece::Image(usize::MAX)]) }, "and 1 were given"),
        (request(Prompt::default()), "the prompt is empty"),
        (request(tokens(CONTEXT)), "the prompt takes 101 positions and the context holds 100"),
        (
            Request { images: vec![image()], ..pieces(&[Piece::Image(0), Piece::Tokens(vec![5; 90])]) },
            "the prompt takes 101 positions",
        ),
        (
            with(at_most(98)),
            "98 new tokens do not fit: the prompt takes 3 of 100 positions; ask for at most 97",
        ),
        (with(at_most(0)), "max-new-tokens is 0"),
        (with(GenerateParams { sampling: random(-1.0, 1.0), ..at_most(1) }), "temperature is -1"),
        (with(GenerateParams { sampling: random(1.0, f32::NAN), ..at_most(1) }), "NaN"),
        (with(GenerateParams { repetition_penalty: 0.0, ..at_most(1) }), "repetition-penalty is 0"),
        (with(GenerateParams { stop: vec![String::new()], ..at_most(1) }), "a stop string is empty"),
    ];
    for (request, expected) in cases {
        let error = engine.generate(request).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} and not {expected:?}");
    }
    let error = engine.generate(request(tokens(CONTEXT + 1))).unwrap_err();
    assert!(matches!(error, Error::TooLong { needed: 102, capacity: CONTEXT }), "{error:?}");
    assert_eq!(log.calls(), []);
}

#[test]
fn an_image_may_stand_at_two_places() {
    let (engine, log) = engine(saying("red"));
    let prompt = engine.prompt(&[Piece::Image(0), Piece::Tokens(vec![5]), Piece::Image(0)]).unwrap();
    let usage = engine
        .generate(Request { images: vec![image()], ..request(prompt) })
        .unwrap()
        .complete()
        .unwrap()
        .usage;
    assert_eq!((usage.prompt_tokens, usage.image_tokens), (2 * IMAGE + 1, 2 * IMAGE));
    assert!(log.calls()[0].is_prefill());
}

#[test]
fn an_answer_ends_where_the_model_the_stop_string_or_the_limit_says() {
    let stop = |stop: &str| GenerateParams { stop: vec![stop.to_owned()], ..GenerateParams::default() };
    // What the model says, the parameters, the answer, why it ended, and how many tokens the model read of it.
    let cases = [
        ("a", GenerateParams::default(), "a", FinishReason::Stop, 1),
        ("", GenerateParams::default(), "", FinishReason::Stop, 0),
        ("a b c", at_most(1), "a", FinishReason::Length, 0),
        ("x\u{1f600}y", stop("\u{1f600}"), "x", FinishReason::Stop, usize::MAX),
        (" red, and more", stop(", a"), "red", FinishReason::Stop, usize::MAX),
        ("red", stop("red"), "", FinishReason::Stop, usize::MAX),
        ("red blue", stop("blues"), "red blue", FinishReason::Stop, usize::MAX),
    ];
    for (says, params, text, reason, read) in cases {
        let (engine, log) = engine(saying(says));
        let stream = engine.generate(Request { params, ..request(tokens(3)) }).unwrap();
        let mut joined = String::new();
        let mut finished = None;
        for event in stream {
            match event.unwrap() {
                Event::Text(delta) => {
                    assert!(finished.is_none() && !delta.text.is_empty());
                    joined.push_str(&delta.text);
                }
                Event::Finished(completion) => finished = Some(completion),
                Event::Restarted(demotion) => panic!("{demotion:?}"),
            }
        }
        let completion = finished.unwrap();
        assert_eq!((&completion.text[..], completion.finish_reason), (text, reason), "{says:?}");
        assert_eq!(joined, text);
        assert_eq!(completion.usage.completion_tokens, completion.token_ids.len());
        if read != usize::MAX {
            assert_eq!(log.calls().len(), 1 + read, "{says:?}");
        }
    }
}

#[test]
fn an_answer_fills_the_context_and_no_more() {
    for left in [1, 2, 7] {
        let a = letter("a");
        let (engine, log) = engine(move |_, _| Ok(a));
        let completion = engine.generate(request(tokens(CONTEXT - left))).unwrap().complete().unwrap();
        assert_eq!((completion.finish_reason, completion.token_ids), (FinishReason::Length, vec![a; left]));
        // The last token of an answer is never read.
        assert_eq!(log.calls().len(), left);
    }
}

#[test]
fn a_follow_up_uses_the_cache_of_the_request_before() {
    let (engine, log) = engine(saying("red"));
    assert_eq!(ask(&engine).unwrap().usage.cached_tokens, 0);
    let usage = ask(&engine).unwrap().usage;
    assert_eq!((usage.cached_tokens, usage.prompt_tokens), (3, 3));
    assert!(log.calls().iter().all(|call| call.cache() == 0));
}

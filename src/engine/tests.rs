//! What the engine promises, with a model that follows a script.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::cancel::CancelToken;
use super::event::{Completion, Event};
use super::stream::GenerationStream;
use super::testing::{BROKEN, Call, Log, ScriptedModel, until_cancelled};
use super::{Engine, ModelFacts, Request};
use crate::error::{Error, Result};
use crate::generate::constraint::{Constraint, ConstraintSpec};
use crate::generate::params::{GenerateParams, Sampling};
use crate::generate::sequence::FinishReason;
use crate::image::{Limits, Preprocessor, Rgb};
use crate::model::Room;
use crate::model::cancel::Canceler;
use crate::model::vision::ImageInput;
use crate::package::ModelPackage;
use crate::text::{Piece, Prompt, TokenId};

/// Positions that the context of the tests holds, and that an image takes.
const CONTEXT: usize = 100;
const IMAGE: usize = 10;

fn facts() -> ModelFacts {
    let facts = ModelFacts::new(&ModelPackage::embedded().unwrap()).unwrap();
    ModelFacts { context: CONTEXT, tokens_per_image: IMAGE, ..facts }
}

fn engine(script: impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static) -> (Engine, Log) {
    let facts = facts();
    let (model, log) = ScriptedModel::new(facts.tokenizer.vocabulary(), script);
    let preprocessor = Preprocessor::new(&ModelPackage::embedded().unwrap().manifest().image);
    let engine = Engine::with_model(model, facts, preprocessor, Limits::default()).unwrap();
    (engine, log)
}

/// Says `text` to every prompt and ends.
fn saying(text: &str) -> impl FnMut(&Call, &Canceler) -> Result<TokenId> + Send + 'static {
    let facts = facts();
    let tokens = facts.tokenizer.encode(text).unwrap();
    let mut said = 0;
    move |call, _| {
        said = if call.is_prefill() { 0 } else { said + 1 };
        Ok(tokens.get(said).copied().unwrap_or(facts.eos[0]))
    }
}

fn letter(text: &str) -> TokenId {
    facts().tokenizer.encode(text).unwrap()[0]
}

fn image() -> Arc<ImageInput> {
    let package = ModelPackage::embedded().unwrap();
    let rgb = Rgb::new(1, 1, vec![1, 2, 3]).unwrap();
    Arc::new(ImageInput::new(Preprocessor::new(&package.manifest().image).run(&rgb, None)))
}

/// A prompt of so many tokens.
fn tokens(length: usize) -> Prompt {
    facts().tokenizer.prompt(&[Piece::Tokens(vec![5; length])]).unwrap()
}

fn request(prompt: Prompt) -> Request {
    Request::new(prompt, Vec::new(), GenerateParams::default())
}

fn ask(engine: &Engine) -> Result<Completion> {
    engine.generate(request(tokens(3)))?.complete()
}

fn at_most(max_new_tokens: usize) -> GenerateParams {
    GenerateParams { max_new_tokens: Some(max_new_tokens), ..GenerateParams::default() }
}

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

#[test]
fn requests_are_answered_in_the_order_in_which_they_came() {
    let (engine, log) = engine(saying("red"));
    let (sender, answered) = mpsc::channel();
    for number in 0..10 {
        let sender = sender.clone();
        let sink = move |event: Result<Event>| {
            if let Event::Finished(_) = event.unwrap() {
                sender.send(number).unwrap();
            }
            ControlFlow::Continue(())
        };
        engine.submit(request(tokens(10 + number)), Box::new(sink)).unwrap();
    }
    drop(sender);
    assert_eq!(answered.iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    let prompts = log.calls().into_iter().filter_map(|call| match call {
        Call::Prefill { tokens, .. } => Some(tokens.len()),
        _ => None,
    });
    assert!(prompts.eq(10..20));
}

#[test]
fn each_thread_gets_the_answers_to_its_own_questions() {
    // The answer to a prompt is its first token, three times.
    let eos = facts().eos[0];
    let mut says = Vec::new();
    let (engine, _log) = engine(move |call, _| {
        if let Call::Prefill { tokens, .. } = call {
            says = vec![eos, tokens[0], tokens[0], tokens[0]];
        }
        Ok(says.pop().unwrap())
    });
    let letters = ["a", "b", "c", "d"].map(letter);
    thread::scope(|scope| {
        for letter in letters {
            let engine = engine.clone();
            scope.spawn(move || {
                for _ in 0..10 {
                    let prompt = engine.prompt(&[Piece::Tokens(vec![letter, 5])]).unwrap();
                    let completion = engine.generate(request(prompt)).unwrap().complete().unwrap();
                    assert_eq!(completion.token_ids, [letter; 3]);
                }
            });
        }
    });
}

#[test]
fn an_engine_is_for_every_thread() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    fn sent<T: Send + 'static>() {}
    shared::<Engine>();
    shared::<CancelToken>();
    shared::<Request>();
    sent::<super::stream::GenerationStream>();
}

#[test]
fn the_thread_ends_with_the_last_engine_after_the_requests_that_wait() {
    // The model owns a sender; when it is gone, the thread has ended.
    let (sender, model_lives) = mpsc::channel::<()>();
    let mut say = saying("red");
    let (engine, _log) = engine(move |call, canceler| {
        let _ = &sender;
        say(call, canceler)
    });
    let other = engine.clone();
    drop(engine);
    let brief = model_lives.recv_timeout(Duration::from_millis(20));
    assert_eq!(brief, Err(mpsc::RecvTimeoutError::Timeout));
    let waiting: Vec<_> = (0..3).map(|_| other.generate(request(tokens(3))).unwrap()).collect();
    drop(other);
    for stream in waiting {
        assert_eq!(stream.complete().unwrap().text, "red");
    }
    let end = model_lives.recv_timeout(Duration::from_secs(20));
    assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn an_engine_whose_thread_died_says_so() {
    let (engine, _log) = engine(|_, _| panic!("this panic is part of a test"));
    let waiting = [0; 2].map(|_| engine.generate(request(tokens(3))));
    for stream in waiting.into_iter().flatten() {
        assert!(matches!(stream.complete(), Err(Error::Stopped(_))));
    }
    let error = loop {
        match engine.generate(request(tokens(3))) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => break error,
        }
    };
    assert_eq!(error.to_string(), "the engine has stopped: its thread has ended");
}

#[test]
fn a_sink_may_ask_the_next_question() {
    let (engine, _log) = engine(saying("red"));
    let (sender, texts) = mpsc::channel();
    let inner = Mutex::new(Some((engine.clone(), sender.clone())));
    let sink = move |event: Result<Event>| {
        if let Event::Finished(completion) = event.unwrap() {
            sender.send(completion.text).unwrap();
            let (engine, sender) = inner.lock().unwrap().take().unwrap();
            let sink = move |event: Result<Event>| {
                if let Event::Finished(completion) = event.unwrap() {
                    sender.send(completion.text).unwrap();
                }
                ControlFlow::Continue(())
            };
            engine.submit(request(tokens(4)), Box::new(sink)).unwrap();
        }
        ControlFlow::Continue(())
    };
    engine.submit(request(tokens(3)), Box::new(sink)).unwrap();
    drop(engine);
    assert_eq!(texts.iter().collect::<Vec<_>>(), ["red", "red"]);
}

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
    let soon = Instant::now() + Duration::from_millis(20);
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

fn choosing(texts: &[&str], params: GenerateParams) -> GenerateParams {
    let spec = ConstraintSpec::Choice(texts.iter().map(|&text| text.to_owned()).collect());
    let constraint = Some(Constraint::new(&facts().tokenizer, &spec).unwrap());
    GenerateParams { constraint, ..params }
}

#[test]
fn a_choice_reads_what_its_texts_share_once_and_leaves_the_cache_as_it_was() {
    let vocabulary = f64::from(u32::try_from(facts().tokenizer.vocabulary()).unwrap());
    // What the scripted model is certain of has a logit of 1 among zeros.
    let (hit, miss) = (1.0_f64.exp(), 1.0);
    let whole = hit + vocabulary - 1.0;
    for at_once in [None, Some(2), Some(8)] {
        let [a, b] = ["a", "b"].map(letter);
        let (mut model, log) =
            ScriptedModel::new(facts().tokenizer.vocabulary(), move |call, _| match call {
                Call::Decode { token, .. } if *token == a => Ok(b),
                _ => Ok(a),
            });
        model.at_once = at_once;
        let preprocessor = Preprocessor::new(&ModelPackage::embedded().unwrap().manifest().image);
        let engine = Engine::with_model(model, facts(), preprocessor, Limits::default()).unwrap();
        let choose = |texts: &[&str], params| {
            // Behind white space the texts begin as they are.
            let prompt = engine.prompt(&[Piece::text("x ")]).unwrap();
            let asked = Request { prompt, params: choosing(texts, params), ..request(tokens(1)) };
            let before = log.calls().len();
            let found = engine.generate(asked).unwrap().complete().unwrap();
            (found, log.calls().len() - before)
        };
        let shares = |products: &[f64]| -> Vec<f64> {
            products.iter().map(|product| product / products.iter().sum::<f64>()).collect()
        };
        let check = |texts: &[&str], wanted: &[f64], answer: &str, calls: usize| {
            let (found, read) = choose(texts, GenerateParams::default());
            assert_eq!((&found.text[..], found.finish_reason), (answer, FinishReason::Stop), "{texts:?}");
            assert_eq!(found.token_ids, facts().tokenizer.encode(answer).unwrap());
            for ((text, share), wanted) in found.choices.unwrap().iter().zip(shares(wanted)) {
                assert!((share - wanted).abs() < 1e-9, "{texts:?} {text}: {share} and {wanted}");
            }
            assert_eq!(read, calls, "{at_once:?} {texts:?}");
            // The prompt is all that the next request finds.
            let (again, _) = choose(texts, GenerateParams::default());
            assert_eq!(again.usage.cached_tokens, again.usage.prompt_tokens);
        };
        // One token each: nothing is read behind the prompt.
        check(&["q", "a"], &[miss, hit], "a", 1);
        // `ab` goes on from `a`, which therefore counts with its end; only `a` is read.
        check(&["a", "ab"], &[hit * miss / whole, hit * hit / whole], "ab", 2);
        // Of `qa` the `q` is read, and of `a` nothing.
        check(&["qa", "a"], &[miss * hit / whole, hit], "a", 2);
        check(&["qab", "z"], &[miss * hit * hit / whole / whole, miss], "z", 3);
    }
}

#[test]
fn a_choice_tells_its_tokens_and_ends_where_a_limit_or_a_stop_string_does() {
    let (engine, _log) = engine(saying("a"));
    let ask = |params| {
        let asked = Request { params: choosing(&["red square", "zy"], params), ..request(tokens(3)) };
        engine.generate(asked).unwrap().complete().unwrap()
    };
    let whole = ask(GenerateParams { logprobs: Some(0), ..GenerateParams::default() });
    let told: Vec<TokenId> = whole.logprobs.iter().map(|told| told.id).collect();
    assert_eq!(told, whole.token_ids);
    let cut = ask(GenerateParams { max_new_tokens: Some(1), ..GenerateParams::default() });
    assert_eq!((cut.finish_reason, &cut.token_ids[..]), (FinishReason::Length, &whole.token_ids[..1]));
    let stop = vec![whole.text[1..].to_owned()];
    let stopped = ask(GenerateParams { stop, ..GenerateParams::default() });
    assert_eq!((stopped.finish_reason, &stopped.text[..]), (FinishReason::Stop, &whole.text[..1]));
}

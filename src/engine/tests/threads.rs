//! Callers on many threads, and the one that answers them.

use super::*;

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
    sent::<GenerationStream>();
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

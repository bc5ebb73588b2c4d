//! Answers that are one of several texts.

use super::*;

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

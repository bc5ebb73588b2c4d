use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::runtime::testing;

// The sizes of tests/reference/gqa.py.
const HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const WIDTH: usize = HEADS * HEAD_DIM;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
}

fn tensor(dtype: DType, shape: &str) -> TensorSpec {
    let dim = |dim: &str| dim.parse().map_or_else(|_| Dim::Named(dim.to_owned()), Dim::Fixed);
    TensorSpec { dtype, shape: shape.split_whitespace().map(dim).collect() }
}

fn spec(inputs: &[(&str, DType, &str)], outputs: &[(&str, DType, &str)]) -> GraphSpec {
    let all = |list: &[(&str, DType, &str)]| {
        list.iter().map(|(name, dtype, shape)| ((*name).to_owned(), tensor(*dtype, shape))).collect()
    };
    GraphSpec { path: String::new(), data: Vec::new(), inputs: all(inputs), outputs: all(outputs) }
}

fn open(file: &str, spec: &GraphSpec) -> Result<Graph> {
    testing::start();
    let options = SessionOptions { threads: Some(1), ..SessionOptions::default() };
    Graph::open("decoder", &GraphSource::File(reference(file)), spec, &options).map_err(|e| match e {
        OpenError::Failed(error) => error,
        OpenError::Refused { reason, .. } => panic!("the processor refused: {reason}"),
    })
}

fn gqa_spec() -> GraphSpec {
    let cache = "batch 2 capacity 32";
    spec(
        &[
            ("q", DType::F32, "batch new 64"),
            ("k", DType::F32, "batch new 64"),
            ("v", DType::F32, "batch new 64"),
            ("past.key", DType::F32, cache),
            ("past.value", DType::F32, cache),
            ("seqlens_k", DType::I32, "batch"),
            ("total_sequence_length", DType::I32, ""),
        ],
        &[
            ("out", DType::F32, "batch new 64"),
            ("present.key", DType::F32, cache),
            ("present.value", DType::F32, cache),
        ],
    )
}

fn external_spec() -> GraphSpec {
    spec(
        &[("past", DType::F32, "past 2"), ("x", DType::F32, "new 2")],
        &[("present", DType::F32, "total 2"), ("y", DType::F32, "total 256")],
    )
}

/// Numbers between -0.5 and 0.5 that look random and are the same in every run.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap()) / 65_536.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

struct Cache {
    key: Tensor,
    value: Tensor,
}

impl Cache {
    fn new(batch: usize, capacity: usize) -> Self {
        let zeros = || Tensor::zeros(DType::F32, &[batch, HEADS, capacity, HEAD_DIM]).unwrap();
        Self { key: zeros(), value: zeros() }
    }
}

/// Reads `new` positions of every row, `before[row]` positions being in its cache.
fn step(graph: &mut Graph, cache: &mut Cache, qkv: &[Vec<f32>; 3], new: usize, before: &[usize]) -> Tensor {
    let batch = before.len();
    let [q, k, v] = qkv.each_ref().map(|x| Tensor::from_f32(&[batch, new, WIDTH], x).unwrap());
    let last: Vec<i32> = before.iter().map(|n| i32::try_from(n + new - 1).unwrap()).collect();
    let total = last.iter().max().unwrap() + 1;
    let seqlens_k = Tensor::from_i32(&[batch], last).unwrap();
    let total = Tensor::from_i32(&[], [total]).unwrap();
    let mut outputs = graph
        .run_in_place(
            &[("q", &q), ("k", &k), ("v", &v), ("seqlens_k", &seqlens_k), ("total_sequence_length", &total)],
            &mut [
                ("past.key", "present.key", &mut cache.key),
                ("past.value", "present.value", &mut cache.value),
            ],
        )
        .unwrap();
    assert!(outputs.take("present.key").is_err(), "what is written in place is not given again");
    outputs.take("out").unwrap()
}

/// The part of `[batch, total, WIDTH]` that holds the positions `range` of `row`.
fn positions(x: &[f32], total: usize, row: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    x[(row * total + range.start) * WIDTH..(row * total + range.end) * WIDTH].to_vec()
}

fn close(one: &[f32], other: &[f32]) {
    assert_eq!(one.len(), other.len());
    let worst = one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Sums of 32 products of numbers below 1, in another order.
    assert!(worst < 1e-5, "they differ by {worst}");
}

#[test]
fn a_cache_is_written_in_place_and_a_position_at_a_time_is_as_good_as_all_at_once() {
    let mut graph = open("gqa.onnx", &gqa_spec()).unwrap();
    let (total, capacity) = (7, 12);
    let qkv = [1, 2, 3].map(|seed| noise(total * WIDTH, seed));
    let whole = step(&mut graph, &mut Cache::new(1, capacity), &qkv, total, &[0]);

    let mut cache = Cache::new(1, capacity);
    let place = cache.key.f32s().unwrap().as_ptr();
    let mut parts = Vec::new();
    for (from, to) in [(0, 4), (4, 5), (5, 6), (6, 7)] {
        let part = qkv.each_ref().map(|x| positions(x, total, 0, from..to));
        let out = step(&mut graph, &mut cache, &part, to - from, &[from]);
        parts.extend_from_slice(out.f32s().unwrap());
        let key = cache.key.f32s().unwrap();
        assert_eq!(key.as_ptr(), place, "the cache stays where it was");
        let filled = |row: usize| key[row * HEAD_DIM..(row + 1) * HEAD_DIM].iter().any(|&x| x != 0.0);
        let rows: Vec<usize> = (0..HEADS * capacity).filter(|&row| filled(row)).collect();
        let expected: Vec<usize> = (0..HEADS).flat_map(|h| (0..to).map(move |p| h * capacity + p)).collect();
        assert_eq!(rows, expected, "exactly the positions that were read are written");
    }
    close(whole.f32s().unwrap(), &parts);
}

#[test]
fn two_conversations_of_different_length_in_one_batch_answer_as_each_alone() {
    let mut graph = open("gqa.onnx", &gqa_spec()).unwrap();
    let (total, capacity, lengths) = (6, 9, [5_usize, 2]);
    let qkv = [4, 5, 6].map(|seed| noise(2 * total * WIDTH, seed));
    let mut alone = Vec::new();
    let mut batch = Cache::new(2, capacity);
    for (row, &length) in lengths.iter().enumerate() {
        let mut cache = Cache::new(1, capacity);
        let read = qkv.each_ref().map(|x| positions(x, total, row, 0..length));
        step(&mut graph, &mut cache, &read, length, &[0]);
        let size = HEADS * capacity * HEAD_DIM;
        for (from, to) in [(&cache.key, &mut batch.key), (&cache.value, &mut batch.value)] {
            to.f32s_mut().unwrap()[row * size..(row + 1) * size].copy_from_slice(from.f32s().unwrap());
        }
        let next = qkv.each_ref().map(|x| positions(x, total, row, length..length + 1));
        let out = step(&mut graph, &mut cache, &next, 1, &[length]);
        alone.extend_from_slice(out.f32s().unwrap());
    }
    let next = qkv
        .each_ref()
        .map(|x| (0..2).flat_map(|row| positions(x, total, row, lengths[row]..lengths[row] + 1)).collect());
    let together = step(&mut graph, &mut batch, &next, 1, &lengths);
    assert_eq!(together.shape(), [2, 1, WIDTH]);
    close(&alone, together.f32s().unwrap());
}

#[test]
fn a_past_without_positions_is_an_input_like_any_other() {
    let mut graph = open("external.onnx", &external_spec()).unwrap();
    let mut past = Tensor::zeros(DType::F32, &[0, 2]).unwrap();
    assert!(past.f32s().unwrap().is_empty());
    for count in 1..=3 {
        let x = Tensor::from_f32(&[1, 2], [1.0, -1.0]).unwrap();
        let mut outputs = graph.run(&[("past", &past), ("x", &x)]).unwrap();
        let place = outputs.values.iter().find(|(name, _)| name == "present").unwrap();
        let place = place.1.f32s().unwrap().as_ptr();
        past = outputs.take("present").unwrap();
        assert_eq!(past.f32s().unwrap().as_ptr(), place, "taking does not copy");
        assert_eq!(past.shape(), [count, 2]);
        close(&outputs.take("y").unwrap().f32s().unwrap()[..1], &[-4.0]);
        assert!(outputs.take("y").unwrap_err().to_string().contains("no output y is left"));
    }
}

#[test]
fn a_graph_in_memory_finds_its_external_data_in_memory() {
    testing::start();
    let leak = |name: &str| -> &'static [u8] { std::fs::read(reference(name)).unwrap().leak() };
    let graph = leak("external.onnx");
    let data = leak("external.onnx.data");
    let x = Tensor::from_f32(&[1, 2], [1.0, -1.0]).unwrap();
    let past = Tensor::zeros(DType::F32, &[0, 2]).unwrap();
    let options = SessionOptions::default();
    let source = |data| GraphSource::Memory { graph, data };
    let held = source(vec![("external.onnx.data".to_owned(), data)]);
    let mut memory = Graph::open("decoder", &held, &external_spec(), &options).unwrap();
    // Freed memory would be written over by this.
    let _other: Vec<Vec<u8>> = (0..64).map(|_| vec![0xff; data.len()]).collect();
    let inputs = [("past", &past), ("x", &x)];
    let y = memory.run(&inputs).unwrap().take("y").unwrap();
    let mut file = open("external.onnx", &external_spec()).unwrap();
    assert_eq!(y.f32s().unwrap(), file.run(&inputs).unwrap().take("y").unwrap().f32s().unwrap());

    let error = Graph::open("decoder", &source(Vec::new()), &external_spec(), &options);
    let Err(OpenError::Failed(error)) = error else { panic!("a graph without its weights was loaded") };
    assert!(error.to_string().starts_with("graph decoder: ONNX Runtime could not load it"), "{error}");
}

#[test]
fn a_graph_that_is_not_what_the_manifest_says_is_refused() {
    let changed = |change: fn(&mut GraphSpec)| {
        let mut spec = gqa_spec();
        change(&mut spec);
        open("gqa.onnx", &spec).unwrap_err().to_string()
    };
    assert_eq!(
        changed(|spec| spec.inputs.get_mut("past.key").unwrap().dtype = DType::F16),
        "graph decoder: input past.key is f32[batch, 2, capacity, 32], \
         the manifest says f16[batch, 2, capacity, 32]; export again"
    );
    assert_eq!(
        changed(|spec| spec.outputs.get_mut("out").unwrap().shape[2] = Dim::Fixed(32)),
        "graph decoder: output out is f32[batch, new, 64], the manifest says f32[batch, new, 32]; export again"
    );
    assert_eq!(
        changed(|spec| spec.inputs.get_mut("q").unwrap().shape[2] = Dim::Named("width".to_owned())),
        "graph decoder: input q is f32[batch, new, 64], the manifest says f32[batch, new, width]; export again"
    );
    assert_eq!(
        changed(|spec| drop(spec.inputs.remove("v"))),
        "graph decoder: input v (f32[batch, new, 64]) is not in the manifest; export again"
    );
    assert_eq!(
        changed(|spec| drop(spec.outputs.insert("logits".to_owned(), tensor(DType::F32, "batch")))),
        "graph decoder: output logits is in the manifest but not in the graph; export again"
    );
}

#[test]
fn inputs_that_are_missing_unknown_doubled_or_wrong_are_refused_by_name() {
    let mut graph = open("external.onnx", &external_spec()).unwrap();
    let x = Tensor::zeros(DType::F32, &[1, 2]).unwrap();
    let wide = Tensor::zeros(DType::F32, &[1, 3]).unwrap();
    let whole = Tensor::zeros(DType::I64, &[1, 2]).unwrap();
    let mut check = |inputs: &[(&str, &Tensor)], expected: &str| {
        assert_eq!(graph.run(inputs).unwrap_err().to_string(), format!("graph decoder: {expected}"));
    };
    check(&[], "these inputs are not given: past, x");
    check(&[("x", &x)], "these inputs are not given: past");
    check(&[("x", &x), ("past", &x), ("y", &x)], "it has no input y");
    check(&[("x", &x), ("x", &x)], "input x is given twice");
    check(&[("x", &wide), ("past", &x)], "input x is given as f32[1, 3], it takes f32[new, 2]");
    check(&[("x", &whole), ("past", &x)], "input x is given as i64[1, 2], it takes f32[new, 2]");
}

#[test]
fn a_file_that_is_missing_or_no_graph_is_refused() {
    let error = open("none.onnx", &gqa_spec()).unwrap_err().to_string();
    assert!(error.contains("none.onnx; check the package"), "{error}");
    let error = open("gqa.py", &gqa_spec()).unwrap_err();
    assert!(error.to_string().contains("gqa.py; check the package"), "{error}");
    assert!(std::error::Error::source(&error).is_some(), "ONNX Runtime's own words are kept");
}

#[test]
fn a_provider_that_is_not_there_is_refused_in_the_words_of_the_runtime() {
    let runtime = testing::start();
    let open = |target: Target, key: Option<&str>| {
        let provider_options = key.map(|key| (key.to_owned(), "1".to_owned())).into_iter().collect();
        let options = SessionOptions { target, provider_options, ..SessionOptions::default() };
        let source = GraphSource::File(reference("external.onnx"));
        Graph::open("decoder", &source, &external_spec(), &options).unwrap_err()
    };
    for status in runtime.providers().into_iter().filter(|one| !one.built_in) {
        let OpenError::Refused { step, reason } = open(status.provider.into(), None) else { panic!() };
        assert_eq!(step, Step::Build, "{reason}");
        assert!(reason.contains(&format!("{} ", status.provider)) || reason.contains(": "), "{reason}");
        assert_eq!(Some(reason), status.note);
    }
    let OpenError::Refused { step, reason } = open("cpu:1".parse().unwrap(), None) else { panic!() };
    assert_eq!((step, reason.as_str()), (Step::Append, "there is no cpu:1; cpu has one device, cpu:0"));
    let OpenError::Failed(error) = open(Provider::Cuda.into(), Some("gpu_memory_limit")) else { panic!() };
    assert_eq!(error.to_string(), "cuda takes no option \"gpu_memory_limit\"; did you mean gpu_mem_limit?");
}

#[test]
fn a_run_that_is_cancelled_ends_soon_and_the_graph_runs_again() {
    let spec = spec(&[("steps", DType::I64, ""), ("x", DType::F32, "64 64")], &[("y", DType::F32, "64 64")]);
    let mut graph = open("slow.onnx", &spec).unwrap();
    let x = Tensor::zeros(DType::F32, &[64, 64]).unwrap();
    let steps = |count: i64| Tensor::from_i64(&[], [count]).unwrap();
    let canceler = graph.canceler();
    let worker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        canceler.cancel();
        Instant::now()
    });
    // An hour, were it not ended.
    let error = graph.run(&[("steps", &steps(100_000_000)), ("x", &x)]).unwrap_err();
    let ended = Instant::now();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(ended.duration_since(worker.join().unwrap()) < Duration::from_secs(5));
    graph.run(&[("steps", &steps(2)), ("x", &x)]).unwrap();

    graph.canceler().cancel();
    let error = graph.run(&[("steps", &steps(2)), ("x", &x)]).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "a cancel between runs ends the next one");
    graph.canceler().cancel();
    graph.canceler().reset();
    graph.run(&[("steps", &steps(2)), ("x", &x)]).unwrap();
}

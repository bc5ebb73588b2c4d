//! Providers other than the processor, as far as they can be had without their hardware.
//!
//! `scripts/fetch-providers.py` brings what they need and prints the variables that turn these tests on. The system
//! looks for a library's own libraries where `LD_LIBRARY_PATH` said at the start of the process, so each test runs
//! itself again in a process of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use llava_phi::compiled::{CompiledCache, Key};
use llava_phi::package::manifest::{DType, Dim, GraphSpec, TensorSpec};
use llava_phi::runtime::{
    Compiled, DeviceKind, Graph, GraphSource, LibraryOptions, OpenError, Provider, Runtime, SessionOptions,
    Step, Target, Tensor,
};

use crate::support;

const CHILD: &str = "LLAVA_PHI_TEST_CHILD";
const SHAPE: [usize; 3] = [1, 16, 32];

/// Where the script put something, or `None` with the reason on stderr.
fn fetched(variable: &str, flag: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map(PathBuf::from);
    if dir.is_none() {
        eprintln!(
            "skipped: {variable} is not set; run scripts/fetch-providers.py {flag} and set what it prints"
        );
    }
    dir
}

/// Runs a test of this file again with `libraries` searched first; `false` in that second run.
fn ran_again(test: &str, libraries: &[PathBuf]) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return false;
    }
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths: OsString =
        std::env::join_paths(libraries.iter().cloned().chain(std::env::split_paths(&before))).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("providers::{test}"), "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", paths)
        .output()
        .unwrap();
    let told =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{}\n{told}", output.status);
    assert!(told.contains("1 passed"), "the second run found no test: {told}");
    eprintln!("{told}");
    true
}

fn reference(name: &str) -> GraphSource {
    GraphSource::File(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name))
}

/// What block.onnx and mixed.onnx take and give.
fn spec() -> GraphSpec {
    let tensor = TensorSpec { dtype: DType::F16, shape: SHAPE.map(Dim::Fixed).to_vec() };
    let one = |name: &str| BTreeMap::from([(name.to_owned(), tensor.clone())]);
    GraphSpec { path: String::new(), data: Vec::new(), inputs: one("x"), outputs: one("y") }
}

fn open(file: &str, target: impl Into<Target>, options: &[(&str, &str)]) -> Result<Graph, OpenError> {
    let provider_options =
        options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let options = SessionOptions {
        target: target.into(),
        provider_options,
        placement: true,
        ..SessionOptions::default()
    };
    Graph::open("block", &reference(file), &spec(), &options)
}

fn refusal(file: &str, target: impl Into<Target>, options: &[(&str, &str)]) -> Option<(Step, String)> {
    match open(file, target, options) {
        Ok(_) => None,
        Err(OpenError::Refused { step, reason }) => {
            eprintln!("refused at {step}: {reason}");
            assert!(!reason.contains('\n'));
            Some((step, reason))
        }
        Err(OpenError::Failed(error)) => panic!("{error}"),
    }
}

/// The output for an input that is the same in every run.
fn run(graph: &mut Graph) -> Vec<f32> {
    let wave = |n: u16| half::f16::from_f32((f32::from(n) * 0.37).sin() / 2.0);
    let count = u16::try_from(SHAPE.iter().product::<usize>()).unwrap();
    let x = Tensor::from_f16(&SHAPE, (0..count).map(wave).collect::<Vec<_>>()).unwrap();
    let y = graph.run(&[("x", &x)]).unwrap().take("y").unwrap();
    y.f16s().unwrap().iter().map(|y| y.to_f32()).collect()
}

/// The processor serves as ever; returns what it computes.
fn processor(file: &str) -> Vec<f32> {
    let mut graph = open(file, Provider::Cpu, &[]).unwrap_or_else(|e| panic!("{e:?}"));
    let y = run(&mut graph);
    let placement = graph.placement().unwrap().unwrap();
    assert_eq!(placement.nodes.keys().collect::<Vec<_>>(), ["cpu"]);
    assert_eq!((placement.partitions, placement.left_to_cpu.len()), (0, 0));
    assert!(y.iter().all(|y| y.is_finite()));
    y
}

#[test]
fn qnn_runs_a_whole_graph_on_its_simulator_and_agrees_with_the_processor() {
    let Some(dir) = fetched("LLAVA_PHI_TEST_QNN", "--qnn") else { return };
    let test = "qnn_runs_a_whole_graph_on_its_simulator_and_agrees_with_the_processor";
    let places = ["onnxruntime_qnn", "onnxruntime_qnn.libs"].map(|name| dir.join(name));
    if ran_again(test, &places) {
        return;
    }
    let runtime = Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let before = processor("block.onnx");
    let plugin = places[0].join("libonnxruntime_providers_qnn.so");
    runtime.register_plugin(Provider::Qnn, &plugin).unwrap();
    runtime.register_plugin(Provider::Qnn, &plugin).unwrap();
    let error = runtime.register_plugin(Provider::OpenVino, &plugin).unwrap_err().to_string();
    assert!(error.contains("is the plugin of qnn already"), "{error}");
    let devices = runtime.devices();
    let qnn: Vec<_> = devices.iter().filter(|device| device.provider == Some(Provider::Qnn)).collect();
    let [device] = qnn[..] else { panic!("{devices:?}") };
    assert_eq!((device.index, device.kind, device.vendor.as_str()), (0, DeviceKind::Cpu, "Qualcomm"));
    let status = runtime.providers().into_iter().find(|one| one.provider == Provider::Qnn).unwrap();
    assert_eq!((status.built_in, status.devices, status.plugin.is_some()), (false, 1, true), "{status:?}");

    let mut graph = open("block.onnx", Provider::Qnn, &[("disable_cpu_fallback", "1")])
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(graph.placement().unwrap(), None, "it has not run");
    let y = run(&mut graph);
    let placement = graph.placement().unwrap().unwrap();
    assert_eq!(placement.nodes, BTreeMap::from([("qnn".to_owned(), 1)]));
    assert_eq!((placement.partitions, placement.left_to_cpu.len()), (1, 0));
    assert_eq!(y, run(&mut graph));
    assert_eq!(graph.placement().unwrap(), Some(placement));
    let worst = y.iter().zip(&before).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    eprintln!("the largest difference to the processor is {worst}");
    // Sums of 64 products near 1, each of 11 bits: half a unit of the last place of a 2 or so.
    assert!(worst < 4e-3, "{worst}");

    let mut graph = open("mixed.onnx", Provider::Qnn, &[]).unwrap_or_else(|e| panic!("{e:?}"));
    run(&mut graph);
    let placement = graph.placement().unwrap().unwrap();
    assert_eq!(placement.partitions, 2);
    assert_eq!(placement.left_to_cpu, BTreeMap::from([("Shrink".to_owned(), 1)]));
    compiled_in_pieces(&run(&mut graph));
    let (step, reason) =
        refusal("mixed.onnx", Provider::Qnn, &[("disable_cpu_fallback", "1")]).expect("it has no Shrink");
    assert_eq!(step, Step::Commit);
    assert!(reason.contains("CPU EP"), "{reason}");
    let (step, reason) =
        refusal("block.onnx", Target { provider: Provider::Qnn, device: Some(3) }, &[]).unwrap();
    assert_eq!(step, Step::Append);
    assert!(reason.starts_with("there is no qnn:3; ") && reason.ends_with("qnn:0"), "{reason}");
    assert_eq!(processor("block.onnx"), before, "a registered plugin takes nothing from the processor");
}

/// What QNN compiles of a graph that it does not take whole is kept and read again, pieces and all.
fn compiled_in_pieces(expected: &[f32]) {
    let dir = tempfile::tempdir().unwrap();
    let cache = CompiledCache::open(dir.path(), u64::MAX).unwrap();
    let options = |compiled| SessionOptions {
        target: Provider::Qnn.into(),
        placement: true,
        compiled,
        ..SessionOptions::default()
    };
    let source = reference("mixed.onnx");
    let work = |dir: &Path| {
        Graph::compile("block", &source, &spec(), &options(Compiled::Write(dir.to_owned())))
            .unwrap_or_else(|e| panic!("{e:?}"));
        Ok(())
    };
    let entry = cache.build(&Key::default(), &mut || {}, work).unwrap();
    assert!(entry.record.files.len() > 1 && entry.record.files.contains_key("graph.onnx"), "{entry:?}");
    // Where the source is, nothing is looked for any more.
    let nowhere = GraphSource::File(PathBuf::from("none.onnx"));
    let mut graph = Graph::open("block", &nowhere, &spec(), &options(Compiled::Read(Arc::new(entry))))
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(run(&mut graph), expected);
    let placement = graph.placement().unwrap().unwrap();
    assert_eq!(placement.partitions, 2);
    assert_eq!(placement.left_to_cpu, BTreeMap::from([("Shrink".to_owned(), 1)]));
    assert_eq!(cache.prune(0).unwrap().removed, [], "the session holds it");
    drop(graph);
    assert_eq!(cache.prune(0).unwrap().removed.len(), 1);
}

/// Starts the build for NVIDIA GPUs, in a second process.
fn start_cuda(dir: &Path) {
    let mut entries = dir.join("onnxruntime").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let library = entries
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("libonnxruntime.so"))
        .unwrap();
    Runtime::start(&LibraryOptions { environment: Some(library), ..LibraryOptions::default() }, &mut |_| {})
        .unwrap();
}

/// What CUDA refuses the block with, or `None` with the reason on stderr where a GPU serves it.
fn cuda_refusal() -> Option<(Step, String)> {
    let refusal = refusal("block.onnx", Provider::Cuda, &[]);
    if refusal.is_none() {
        eprintln!("skipped: CUDA works on this machine, so that nothing is missing");
    }
    refusal
}

#[test]
fn cuda_without_its_libraries_is_refused_when_it_is_appended_and_the_processor_serves() {
    let Some(dir) = fetched("LLAVA_PHI_TEST_CUDA", "--cuda") else { return };
    let test = "cuda_without_its_libraries_is_refused_when_it_is_appended_and_the_processor_serves";
    if ran_again(test, &[]) {
        return;
    }
    start_cuda(&dir);
    let Some((step, reason)) = cuda_refusal() else { return };
    assert_eq!(step, Step::Append);
    assert!(reason.contains("libonnxruntime_providers_cuda.so") && reason.contains(".so.13"), "{reason}");
    let status = Runtime::started().unwrap().providers();
    let cuda = status.iter().find(|one| one.provider == Provider::Cuda).unwrap();
    assert!(cuda.built_in && cuda.note.as_ref().is_some_and(|note| note.contains(".so.13")), "{cuda:?}");
    processor("block.onnx");
}

#[test]
fn cuda_without_a_driver_is_refused_when_it_is_appended_and_the_processor_serves() {
    let Some(dir) = fetched("LLAVA_PHI_TEST_CUDA", "--cuda") else { return };
    let test = "cuda_without_a_driver_is_refused_when_it_is_appended_and_the_processor_serves";
    if ran_again(test, &[dir.join("libs")]) {
        return;
    }
    start_cuda(&dir);
    let Some((step, reason)) = cuda_refusal() else { return };
    assert_eq!(step, Step::Append);
    assert!(reason.contains("libcuda.so.1: cannot open shared object file"), "{reason}");
    let (step, reason) = refusal("block.onnx", Provider::TensorRt, &[]).expect("TensorRT is not fetched");
    assert_eq!(step, Step::Append);
    assert!(reason.contains("libonnxruntime_providers_tensorrt.so"), "{reason}");
    processor("block.onnx");
}

#[test]
fn cuda_with_a_driver_that_does_not_serve_is_refused_when_the_session_is_made() {
    let Some(dir) = fetched("LLAVA_PHI_TEST_CUDA", "--cuda") else { return };
    let test = "cuda_with_a_driver_that_does_not_serve_is_refused_when_the_session_is_made";
    if ran_again(test, &[dir.join("driver"), dir.join("libs")]) {
        return;
    }
    start_cuda(&dir);
    let (step, reason) = refusal("block.onnx", Provider::Cuda, &[]).expect("the stub has no device");
    assert_eq!(step, Step::Commit);
    assert!(reason.contains("CUDA failure 35"), "{reason}");
    let other = Target { provider: Provider::Cuda, device: Some(7) };
    let (step, reason) = refusal("block.onnx", other, &[]).expect("the stub has no device");
    assert!(step >= Step::Append && reason.contains("CUDA"), "{step}: {reason}");
    processor("block.onnx");
}

#[test]
fn a_plugin_that_is_no_plugin_is_refused_before_it_is_loaded() {
    let runtime = Runtime::start(&support::library(), &mut |_| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let check = |provider: Provider, path: &Path, expected: &str| {
        let error = runtime.register_plugin(provider, path).unwrap_err();
        assert_eq!(error.kind(), llava_phi::ErrorKind::Provider);
        let error = error.to_string();
        assert!(error.starts_with(&format!("provider {provider}: ")) && error.contains(expected), "{error}");
        assert_eq!(runtime.plugin(provider), None);
    };
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    check(
        Provider::Qnn,
        &dir.path().join("none.so"),
        "none.so does not exist; name the plugin's own library",
    );
    check(Provider::Qnn, dir.path(), "is a directory");
    check(Provider::Qnn, &file("text.so", b"not a library"), "text.so is a text file");
    check(
        Provider::OpenVino,
        &file("a.whl", b"PK\x03\x04"),
        "a.whl is a zip archive, which must be unpacked first",
    );
    check(Provider::Cpu, &file("cpu.so", b"text"), "it is built in; leave its library out");
    if let Some(path) = &runtime.library().path {
        check(Provider::WebGpu, path, "could not be loaded: Failed to get symbol CreateEpFactories");
    }
    let places = ["/lib64", "/usr/lib", "/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu"];
    for libm in places.iter().map(|place| Path::new(place).join("libm.so.6")).filter(|path| path.exists()) {
        check(
            Provider::Qnn,
            &libm,
            "libm.so.6 is a library but not a provider's plugin (it has no CreateEpFactories)",
        );
    }
}

//! One ONNX graph with checked inputs and outputs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::SessionBuilder;
use ort::session::{IoBinding, RunOptions, Session, SessionInputValue, SessionOutputs};
use ort::value::{Outlet, ValueType};

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::package::manifest::{DType, Dim, GraphSpec, TensorSpec};

use super::Runtime;
use super::cache_memory::CacheMemory;
use super::compiled::{self, Compiled, Place};
use super::operators::{self, OwnNodes};
use super::placement::Profile;
use super::provider::{Placement, Provider, Step, Target};
use super::session::{self, refused};
use super::tensor::{Tensor, element_type};

/// Where a graph's bytes are.
#[derive(Clone, Debug)]
pub enum GraphSource {
    /// An `.onnx` file, with its external data beside it.
    File(PathBuf),
    /// A graph in memory, as in a program that carries its package.
    Memory {
        /// The `.onnx` file.
        graph: &'static [u8],
        /// The external data files, by the names that the graph gives them.
        data: Vec<(String, &'static [u8])>,
    },
}

/// How a graph is run.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Threads inside one operator; `None` is ONNX Runtime's own choice, one for each physical core.
    pub threads: Option<usize>,
    /// What runs the operators.
    pub target: Target,
    /// The provider's own options, checked by `runtime::options`.
    pub provider_options: BTreeMap<String, String>,
    /// For each dimension that varies, the least, the usual and the largest size, for providers that compile for them.
    pub sizes: BTreeMap<String, [usize; 3]>,
    /// What becomes of what the provider compiles, if it is one that [keeps it](Provider::keeps_compiled).
    pub compiled: Compiled,
    /// Have all threads bring weights into the kernels' layout while the processor's session is made. Loading takes
    /// less time, and at its peak the memory of all weights once more.
    pub parallel_packing: bool,
    /// Read where nodes run; see [`Graph::placement`].
    pub placement: bool,
    /// What multiplies few-bit weights and attends to the cache on the processor; ONNX Runtime's own kernels otherwise.
    pub kernels: Option<Kernels>,
}

/// What the loading of a graph ends with when it fails.
#[derive(Debug)]
pub enum OpenError {
    /// The provider does not serve; another may.
    Refused {
        /// How far it came.
        step: Step,
        /// Why, in ONNX Runtime's words.
        reason: String,
    },
    /// The graph itself, or the runtime, is at fault.
    Failed(Error),
}

impl From<Error> for OpenError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A graph in which this program's own operator stands for ONNX Runtime's.
struct OwnGraph {
    model: Vec<u8>,
    nodes: OwnNodes,
    kernels: Kernels,
    /// Where the weights are, unless in memory.
    folder: Option<String>,
}

/// What this program's own kernels would compute in `source`; nothing where it cannot be read.
pub fn own_nodes(source: &GraphSource, kernels: Kernels) -> OwnNodes {
    OwnGraph::new(source, kernels).map_or_else(OwnNodes::default, |own| own.nodes)
}

impl OwnGraph {
    /// `None` when the graph has no product for the kernels, or lies where ONNX Runtime could not be told to look for its
    /// weights; what cannot be read is left for ONNX Runtime to refuse.
    fn new(source: &GraphSource, kernels: Kernels) -> Option<Self> {
        let (changed, folder) = match source {
            GraphSource::File(path) => {
                let folder = path.parent()?.to_str()?;
                let folder = if folder.is_empty() { "." } else { folder };
                (operators::replace(&std::fs::read(path).ok()?), Some(folder.to_owned()))
            }
            GraphSource::Memory { graph, .. } => (operators::replace(graph), None),
        };
        let (model, nodes) = changed?;
        Some(Self { model, nodes, kernels, folder })
    }

    fn commit(self, builder: SessionBuilder) -> ort::Result<Session> {
        let mut builder = builder.with_operators(operators::domain(self.kernels)?)?;
        if let Some(folder) = &self.folder {
            builder = builder.with_config_entry(operators::WEIGHTS_FOLDER, folder)?;
        }
        builder.commit_from_memory(&self.model)
    }
}

/// An ONNX graph that is ready to run.
pub struct Graph {
    name: String,
    spec: GraphSpec,
    session: Session,
    profile: Profile,
    binding: IoBinding,
    output_memory: MemoryInfo<'static>,
    cache_memory: CacheMemory,
    canceler: Canceler,
    own_nodes: OwnNodes,
    // After the session, which may still write there when it ends.
    _place: Place,
}

impl Graph {
    /// Loads a graph and compares what it takes and gives with the manifest.
    ///
    /// `name` is the component's name, for errors.
    ///
    /// # Errors
    /// [`OpenError::Refused`] when another provider than the processor is not there, cannot be appended, or does not
    /// take the graph. Otherwise [`OpenError::Failed`] with [`Error::Library`] before [`Runtime::start`];
    /// [`Error::Request`] when the provider has no such option; [`Error::Graph`] when ONNX Runtime cannot load the
    /// graph or it is not what `spec` says.
    pub fn open(
        name: &str,
        source: &GraphSource,
        spec: &GraphSpec,
        options: &SessionOptions,
    ) -> std::result::Result<Self, OpenError> {
        let runtime = Runtime::started()?;
        let provider = options.target.provider;
        let profile = Profile::new(options.placement, provider);
        let place = Place::new(provider, &options.compiled)?;
        let source = place.source.as_ref().unwrap_or(source);
        let mut builder =
            session::builder(runtime, name, source, spec, options, &place, profile.prefix().as_deref())?;
        let own = options.kernels.filter(|_| provider == Provider::Cpu);
        let own = own.and_then(|kernels| OwnGraph::new(source, kernels));
        let own_nodes = own.as_ref().map_or_else(OwnNodes::default, |own| own.nodes);
        let (committed, why) = match (source, own) {
            (_, Some(own)) => (
                own.commit(builder),
                "ONNX Runtime could not load it with this program's kernels; leave them out with --kernels onnxruntime"
                    .to_owned(),
            ),
            (GraphSource::File(path), None) => (
                builder.commit_from_file(path),
                format!(
                    "ONNX Runtime could not load {}; check the package or export it again",
                    path.display()
                ),
            ),
            (GraphSource::Memory { graph, .. }, None) => (
                builder.commit_from_memory(graph),
                "ONNX Runtime could not load it from memory; build the program with a package that verifies"
                    .to_owned(),
            ),
        };
        let session = committed.map_err(|e| match provider {
            Provider::Cpu => OpenError::Failed(Error::graph(name, why).because(e)),
            // The processor may still load it; if not, it will say so.
            _ => refused(Step::Commit, e.message()),
        })?;
        compare("input", &declared(session.inputs()), &spec.inputs).map_err(|e| Error::graph(name, e))?;
        compare("output", &declared(session.outputs()), &spec.outputs).map_err(|e| Error::graph(name, e))?;
        let setup = || {
            let memory =
                MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)?;
            let caches = CacheMemory::new(&session, options)?;
            Ok((session.create_binding()?, memory, caches, Canceler::new()?))
        };
        let (binding, output_memory, cache_memory, canceler) = setup().map_err(|e: ort::Error| {
            Error::graph(name, "its session could not be set up; report this").because(e)
        })?;
        let (name, spec) = (name.to_owned(), spec.clone());
        Ok(Self {
            name,
            spec,
            session,
            profile,
            binding,
            output_memory,
            cache_memory,
            canceler,
            own_nodes,
            _place: place,
        })
    }

    /// Sees whether the provider could be appended to a session for this graph, without a look at the graph itself.
    ///
    /// # Errors
    /// As [`Graph::open`], before the graph is read.
    pub fn check(
        name: &str,
        source: &GraphSource,
        spec: &GraphSpec,
        options: &SessionOptions,
    ) -> std::result::Result<(), OpenError> {
        let runtime = Runtime::started()?;
        session::builder(runtime, name, source, spec, options, &Place::default(), None).map(drop)
    }

    /// Has the provider compile the graph as `options.compiled` says, and forgets the session. A provider that compiles
    /// only when it knows the sizes of its inputs runs once, with zeros of the usual sizes.
    ///
    /// # Errors
    /// As [`Graph::open`] and [`Graph::run`].
    pub fn compile(
        name: &str,
        source: &GraphSource,
        spec: &GraphSpec,
        options: &SessionOptions,
    ) -> std::result::Result<(), OpenError> {
        let mut graph = Self::open(name, source, spec, options)?;
        if compiled::compiles_when_run(options.target.provider, spec) {
            graph.rehearse(&options.sizes)?;
        }
        Ok(())
    }

    /// Runs the graph on zeros of the usual sizes.
    fn rehearse(&mut self, sizes: &BTreeMap<String, [usize; 3]>) -> Result<()> {
        let zeros = |(name, spec): (&String, &TensorSpec)| {
            let size = |dim: &Dim| match dim {
                Dim::Fixed(size) => Ok(*size),
                Dim::Named(dim) => sizes.get(dim).map(|sizes| sizes[1]).ok_or_else(|| {
                    Error::graph(&self.name, format!("the usual size of {dim} in input {name} is not known"))
                }),
            };
            let shape = spec.shape.iter().map(size).collect::<Result<Vec<_>>>()?;
            Ok((name.clone(), Tensor::zeros(spec.dtype, &shape)?))
        };
        let inputs = self.spec.inputs.iter().map(zeros).collect::<Result<Vec<_>>>()?;
        let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        self.run(&inputs).map(drop)
    }

    /// The component's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the graph takes and gives.
    pub fn spec(&self) -> &GraphSpec {
        &self.spec
    }

    /// The type of the numbers that `input` takes; `f32` when there is no such input, which running will tell.
    pub fn input_dtype(&self, input: &str) -> DType {
        self.spec.inputs.get(input).map_or(DType::F32, |spec| spec.dtype)
    }

    /// What this program's own kernels compute.
    pub fn own_nodes(&self) -> OwnNodes {
        self.own_nodes
    }

    /// Runs the graph. `inputs` names every input once, in any order.
    ///
    /// # Errors
    /// [`Error::Graph`] before running when an input is missing, unknown, or not of the manifest's type and shape,
    /// and when ONNX Runtime fails; [`Error::Cancelled`] after [`Canceler::cancel`].
    pub fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Outputs> {
        self.check_inputs(inputs.iter().map(|&(name, tensor)| (name, tensor)))?;
        let values: Vec<(&str, SessionInputValue<'_>)> =
            inputs.iter().map(|&(name, tensor)| (name, SessionInputValue::from(tensor.value()))).collect();
        let result = self.session.run_with_options(values, &self.canceler.options);
        let outputs = result.map_err(|e| self.canceler.explain(&self.name, e))?;
        self.profile.ran();
        Outputs::new(&self.name, outputs, &[])
    }

    /// Runs the graph with some outputs written over inputs: for each `(input, output, tensor)` the tensor is both.
    ///
    /// The outputs that are written in place are not in the result. After an error the places that the graph was to
    /// write hold anything; the others are as they were.
    ///
    /// # Errors
    /// As [`Graph::run`].
    pub fn run_in_place(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [(&str, &str, &mut Tensor)],
    ) -> Result<Outputs> {
        let both = in_place.iter().map(|(input, _, tensor)| (*input, &**tensor));
        self.check_inputs(inputs.iter().map(|&(name, tensor)| (name, tensor)).chain(both))?;
        for (_, output, tensor) in in_place.iter() {
            let Some(spec) = self.spec.outputs.get(*output) else {
                return Err(Error::graph(&self.name, format!("it has no output {output}")));
            };
            fits("output", output, tensor, spec).map_err(|e| Error::graph(&self.name, e))?;
        }
        let outputs = self.run_bound(inputs, in_place);
        // A binding keeps what it holds: without clearing, a finished conversation's cache would live on in it.
        self.binding.clear();
        outputs
    }

    /// Where the nodes ran, once the graph has run; `None` before, when [`SessionOptions::placement`] is off, and when
    /// the runtime's profile could not be read, which is logged.
    ///
    /// The first call after a run ends the profile, and with it the cost of taking it.
    ///
    /// # Errors
    /// None today; a profile that cannot be read is no fault of the graph.
    pub fn placement(&mut self) -> Result<Option<Placement>> {
        Ok(self.profile.read(&mut self.session))
    }

    /// Where tensors should be that [`Graph::run_in_place`] reads and writes.
    pub fn cache_memory(&self) -> &CacheMemory {
        &self.cache_memory
    }

    /// A handle that ends a run from another thread.
    pub fn canceler(&self) -> Canceler {
        self.canceler.clone()
    }

    fn run_bound(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [(&str, &str, &mut Tensor)],
    ) -> Result<Outputs> {
        self.bind(inputs, in_place).map_err(|e| self.canceler.explain(&self.name, e))?;
        let result = self.session.run_binding_with_options(&self.binding, &self.canceler.options);
        let outputs = result.map_err(|e| self.canceler.explain(&self.name, e))?;
        self.profile.ran();
        let written: Vec<&str> = in_place.iter().map(|(_, output, _)| *output).collect();
        Outputs::new(&self.name, outputs, &written)
    }

    fn bind(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [(&str, &str, &mut Tensor)],
    ) -> ort::Result<()> {
        self.binding.clear();
        for (name, tensor) in inputs {
            self.binding.bind_input(*name, tensor.value())?;
        }
        for (input, output, tensor) in in_place.iter_mut() {
            self.binding.bind_input(*input, tensor.value())?;
            self.binding.bind_output(*output, tensor.value_mut())?;
        }
        for name in self.spec.outputs.keys() {
            if !in_place.iter().any(|(_, output, _)| output == name) {
                self.binding.bind_output_to_device(name, &self.output_memory)?;
            }
        }
        Ok(())
    }

    fn check_inputs<'a>(&self, given: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
        let refused = |reason: String| Err(Error::graph(&self.name, reason));
        let mut missing: Vec<&str> = self.spec.inputs.keys().map(String::as_str).collect();
        for (name, tensor) in given {
            let Some(spec) = self.spec.inputs.get(name) else {
                return refused(format!("it has no input {name}"));
            };
            let Some(place) = missing.iter().position(|&left| left == name) else {
                return refused(format!("input {name} is given twice"));
            };
            missing.swap_remove(place);
            fits("input", name, tensor, spec).or_else(refused)?;
        }
        if missing.is_empty() {
            return Ok(());
        }
        missing.sort_unstable();
        refused(format!("these inputs are not given: {}", missing.join(", ")))
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What one run gave.
#[derive(Debug)]
pub struct Outputs {
    graph: String,
    values: Vec<(String, Tensor)>,
}

impl Outputs {
    /// Takes an output out, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] when there is none of this name, or it was taken before.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        match self.values.iter().position(|(output, _)| output == name) {
            Some(place) => Ok(self.values.swap_remove(place).1),
            None => Err(Error::graph(&self.graph, format!("no output {name} is left to take"))),
        }
    }

    fn new(graph: &str, outputs: SessionOutputs<'_>, skip: &[&str]) -> Result<Self> {
        let mut values = Vec::with_capacity(outputs.len());
        for (name, value) in outputs {
            if skip.contains(&name) {
                continue;
            }
            let kind = value.dtype().to_string();
            let tensor = Tensor::from_output(value).ok_or_else(|| {
                Error::graph(graph, format!("output {name} is {kind}, which is not read; export again"))
            })?;
            values.push((name.to_owned(), tensor));
        }
        Ok(Self { graph: graph.to_owned(), values })
    }
}

/// Ends a [`Graph`]'s run from another thread; ONNX Runtime looks between two operators.
#[derive(Clone)]
pub struct Canceler {
    options: Arc<RunOptions>,
    asked: Arc<AtomicBool>,
}

impl Canceler {
    fn new() -> ort::Result<Self> {
        Ok(Self { options: Arc::new(RunOptions::new()?), asked: Arc::new(AtomicBool::new(false)) })
    }

    /// Ends the run in progress, or the next one if none is, with [`Error::Cancelled`].
    ///
    /// Once a run has ended so, the graph can run again.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::SeqCst);
        // Setting a flag in a live object does not fail.
        let _ = self.options.terminate();
    }

    /// Forgets a [`Canceler::cancel`] that no run has seen.
    pub fn reset(&self) {
        self.asked.store(false, Ordering::SeqCst);
        let _ = self.options.unterminate();
    }

    fn explain(&self, graph: &str, error: ort::Error) -> Error {
        if self.asked.load(Ordering::SeqCst) {
            self.reset();
            return Error::Cancelled;
        }
        Error::graph(graph, "ONNX Runtime could not run it").because(error)
    }
}

impl fmt::Debug for Canceler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceler").field("asked", &self.asked).finish_non_exhaustive()
    }
}

/// An input or output as the graph itself declares it.
#[derive(Clone, Debug, PartialEq)]
struct Declared {
    name: String,
    dtype: String,
    /// `None` where the size varies.
    dims: Vec<(Option<usize>, String)>,
}

impl fmt::Display for Declared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims = self.dims.iter().map(|(size, symbol)| match size {
            Some(size) => size.to_string(),
            None if symbol.is_empty() => "?".to_owned(),
            None => symbol.clone(),
        });
        write!(f, "{}[{}]", self.dtype, dims.collect::<Vec<_>>().join(", "))
    }
}

fn declared(outlets: &[Outlet]) -> Vec<Declared> {
    let one = |outlet: &Outlet| {
        let name = outlet.name().to_owned();
        let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
            return Declared { name, dtype: outlet.dtype().to_string(), dims: Vec::new() };
        };
        let dims = shape.iter().enumerate().map(|(place, &size)| {
            (usize::try_from(size).ok(), dimension_symbols.get(place).cloned().unwrap_or_default())
        });
        Declared { name, dtype: ty.to_string(), dims: dims.collect() }
    };
    outlets.iter().map(one).collect()
}

/// The first difference between a graph and its manifest, as a sentence.
fn compare(
    kind: &str,
    graph: &[Declared],
    manifest: &BTreeMap<String, TensorSpec>,
) -> std::result::Result<(), String> {
    for one in graph {
        let Some(spec) = manifest.get(&one.name) else {
            return Err(format!("{kind} {} ({one}) is not in the manifest; export again", one.name));
        };
        let same_dims = one.dims.len() == spec.shape.len()
            && one.dims.iter().zip(&spec.shape).all(|((size, _), dim)| match dim {
                Dim::Fixed(wanted) => *size == Some(*wanted),
                Dim::Named(_) => size.is_none(),
            });
        if one.dtype != element_type(spec.dtype).to_string() || !same_dims {
            return Err(format!("{kind} {} is {one}, the manifest says {}; export again", one.name, spec));
        }
    }
    match manifest.keys().find(|&name| graph.iter().all(|one| one.name != **name)) {
        Some(name) => Err(format!("{kind} {name} is in the manifest but not in the graph; export again")),
        None => Ok(()),
    }
}

/// Whether a tensor is what the manifest says.
fn fits(kind: &str, name: &str, tensor: &Tensor, spec: &TensorSpec) -> std::result::Result<(), String> {
    let dims = tensor.shape().len() == spec.shape.len()
        && tensor.shape().iter().zip(&spec.shape).all(|(&size, dim)| match dim {
            Dim::Fixed(wanted) => size == *wanted,
            Dim::Named(_) => true,
        });
    if tensor.dtype() == spec.dtype && dims {
        return Ok(());
    }
    Err(format!("{kind} {name} is given as {}, it takes {}", tensor.describe(), spec))
}

#[cfg(test)]
mod tests {
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
    fn step(
        graph: &mut Graph,
        cache: &mut Cache,
        qkv: &[Vec<f32>; 3],
        new: usize,
        before: &[usize],
    ) -> Tensor {
        let batch = before.len();
        let [q, k, v] = qkv.each_ref().map(|x| Tensor::from_f32(&[batch, new, WIDTH], x).unwrap());
        let last: Vec<i32> = before.iter().map(|n| i32::try_from(n + new - 1).unwrap()).collect();
        let total = last.iter().max().unwrap() + 1;
        let seqlens_k = Tensor::from_i32(&[batch], last).unwrap();
        let total = Tensor::from_i32(&[], [total]).unwrap();
        let mut outputs = graph
            .run_in_place(
                &[
                    ("q", &q),
                    ("k", &k),
                    ("v", &v),
                    ("seqlens_k", &seqlens_k),
                    ("total_sequence_length", &total),
                ],
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
            let expected: Vec<usize> =
                (0..HEADS).flat_map(|h| (0..to).map(move |p| h * capacity + p)).collect();
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
        let next = qkv.each_ref().map(|x| {
            (0..2).flat_map(|row| positions(x, total, row, lengths[row]..lengths[row] + 1)).collect()
        });
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
        let OpenError::Failed(error) = open(Provider::Cuda.into(), Some("gpu_memory_limit")) else {
            panic!()
        };
        assert_eq!(
            error.to_string(),
            "cuda takes no option \"gpu_memory_limit\"; did you mean gpu_mem_limit?"
        );
    }

    #[test]
    fn a_run_that_is_cancelled_ends_soon_and_the_graph_runs_again() {
        let spec =
            spec(&[("steps", DType::I64, ""), ("x", DType::F32, "64 64")], &[("y", DType::F32, "64 64")]);
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
}

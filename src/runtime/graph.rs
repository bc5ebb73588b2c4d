//! One ONNX graph with checked inputs and outputs.

mod canceler;
mod declared;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::SessionBuilder;
use ort::session::{IoBinding, Session, SessionInputValue, SessionOutputs};

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
use super::tensor::Tensor;
use declared::{compare, declared, fits};

pub use canceler::Canceler;

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

#[cfg(test)]
mod tests;

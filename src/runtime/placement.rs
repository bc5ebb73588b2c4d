//! Where ONNX Runtime ran the nodes of a graph, read from the profile of its runs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::PathBuf;

use ort::session::Session;
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use tempfile::TempDir;

use super::provider::{Placement, Provider};

/// A session's profile: under way, or read.
#[derive(Debug)]
pub(super) struct Profile {
    provider: Provider,
    /// Where the session writes it, until it is read.
    dir: Option<TempDir>,
    has_run: bool,
    placement: Option<Placement>,
}

impl Profile {
    /// A profile that is to be written, or none. Without a place for it there is none either.
    pub(super) fn new(wanted: bool, provider: Provider) -> Self {
        let make = || tempfile::Builder::new().prefix("llava-phi-").tempdir();
        let dir = wanted.then(make).and_then(|made| {
            made.inspect_err(|e| tracing::warn!("no profile of where nodes run: no directory for it: {e}"))
                .ok()
        });
        Self { provider, dir, has_run: false, placement: None }
    }

    /// What the names of the session's files begin with.
    pub(super) fn prefix(&self) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.path().join("nodes"))
    }

    pub(super) fn ran(&mut self) {
        self.has_run = true;
    }

    /// Ends the profile once there was a run, reads it, and deletes it.
    pub(super) fn read(&mut self, session: &mut Session) -> Option<Placement> {
        if self.has_run
            && let Some(dir) = self.dir.take()
        {
            let mut read = || -> Result<Placement, Box<dyn std::error::Error>> {
                let file = session.end_profiling()?;
                Ok(placement(BufReader::new(File::open(file)?), self.provider)?)
            };
            match read() {
                Ok(placement) => self.placement = Some(placement),
                Err(e) => tracing::warn!("where nodes ran is not known: its profile cannot be read: {e}"),
            }
            drop(dir);
        }
        self.placement.clone()
    }
}

/// Counts the nodes of a profile, each once however often it ran.
///
/// # Errors
/// When it is not a list of events, or is cut off: a part would pass for the whole.
fn placement(profile: impl Read, chosen: Provider) -> serde_json::Result<Placement> {
    let mut reader = serde_json::Deserializer::from_reader(profile);
    let nodes = reader.deserialize_seq(Nodes)?;
    reader.end()?;
    let mut placement = Placement::default();
    for (ep, op) in nodes.into_values() {
        let provider = Provider::of_ep(&ep);
        if provider == Some(chosen) && chosen.compiles() {
            placement.partitions += 1;
        }
        if provider == Some(Provider::Cpu) && chosen != Provider::Cpu {
            *placement.left_to_cpu.entry(op).or_default() += 1;
        }
        let name = provider.map_or(ep, |provider| provider.to_string());
        *placement.nodes.entry(name).or_default() += 1;
    }
    Ok(placement)
}

/// A node by its name and number: the bodies of two loops number theirs from 0. With it, the provider and the operator.
type NodeMap = HashMap<(String, String), (String, String)>;

/// Reads events one by one: a long profile is hundreds of megabytes.
struct Nodes;

impl<'de> Visitor<'de> for Nodes {
    type Value = NodeMap;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut events: A) -> Result<NodeMap, A::Error> {
        let mut nodes = NodeMap::new();
        while let Some(event) = events.next_element::<Event>()? {
            let Some(name) = event.name.strip_suffix("_kernel_time") else { continue };
            let Arguments { op_name: Some(op), provider: Some(ep), node_index } = event.args else {
                continue;
            };
            nodes.insert((name.to_owned(), node_index.unwrap_or_default()), (ep, op));
        }
        Ok(nodes)
    }
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Arguments,
}

#[derive(Default, Deserialize)]
struct Arguments {
    op_name: Option<String>,
    provider: Option<String>,
    node_index: Option<String>,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::package::manifest::{DType, Dim, GraphSpec, TensorSpec};
    use crate::runtime::{Graph, GraphSource, SessionOptions, Tensor, testing};

    /// Two runs of tests/reference/mixed.onnx on the simulator of QNN 2.7.0 with ONNX Runtime 1.32.0; of the arguments
    /// only some are kept.
    const RECORDED: &str = r#"[
{"cat" : "Session","pid" :10598,"tid" :10598,"dur" :954,"ts" :3,"ph" : "X","name" :"model_loading_uri","args" : {}},
{"cat" : "Session","pid" :10598,"tid" :10598,"dur" :343928,"ts" :1206,"ph" : "X","name" :"session_initialization","args" : {}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :21138,"ts" :375948,"ph" : "X","name" :"QNNExecutionProvider_QNNExecutionProvider_11701186170349961994_2_0_kernel_time","args" : {"op_name" : "QNNExecutionProvider_11701186170349961994_2","parameter_size" : "4264","output_type_shape" : [{"float16":[1,16,64]}],"node_index" : "8","provider" : "QNNExecutionProvider","thread_scheduling_stats" : {"main_thread": {"thread_pool_name": "session-1-intra-op", "block_size": [], "core": -1}, "sub_threads": {"139969192523456": {"num_run": 0, "core": -1}}}}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :51,"ts" :397209,"ph" : "X","name" :"middle_kernel_time","args" : {"node_index" : "2","provider" : "CPUExecutionProvider","op_name" : "Shrink"}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :9518,"ts" :397290,"ph" : "X","name" :"QNNExecutionProvider_QNNExecutionProvider_11701186170349961994_3_1_kernel_time","args" : {"provider" : "QNNExecutionProvider","op_name" : "QNNExecutionProvider_11701186170349961994_3","node_index" : "9"}},
{"cat" : "Session","pid" :10598,"tid" :10598,"dur" :30953,"ts" :375893,"ph" : "X","name" :"SequentialExecutor::Execute","args" : {}},
{"cat" : "Session","pid" :10598,"tid" :10598,"dur" :31002,"ts" :375866,"ph" : "X","name" :"model_run","args" : {}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :11034,"ts" :406981,"ph" : "X","name" :"QNNExecutionProvider_QNNExecutionProvider_11701186170349961994_2_0_kernel_time","args" : {"op_name" : "QNNExecutionProvider_11701186170349961994_2","node_index" : "8","provider" : "QNNExecutionProvider"}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :22,"ts" :418059,"ph" : "X","name" :"middle_kernel_time","args" : {"node_index" : "2","provider" : "CPUExecutionProvider","op_name" : "Shrink"}},
{"cat" : "Node","pid" :10598,"tid" :10598,"dur" :8954,"ts" :418102,"ph" : "X","name" :"QNNExecutionProvider_QNNExecutionProvider_11701186170349961994_3_1_kernel_time","args" : {"provider" : "QNNExecutionProvider","op_name" : "QNNExecutionProvider_11701186170349961994_3","node_index" : "9"}}
]
"#;

    fn counted(counts: &[(&str, usize)]) -> std::collections::BTreeMap<String, usize> {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn each_node_counts_once_and_a_compiled_subgraph_is_a_partition() {
        let read = placement(RECORDED.as_bytes(), Provider::Qnn).unwrap();
        assert_eq!(read.nodes, counted(&[("qnn", 2), ("cpu", 1)]));
        assert_eq!(read.partitions, 2);
        assert_eq!(read.left_to_cpu, counted(&[("Shrink", 1)]));
        let read = placement(RECORDED.as_bytes(), Provider::Cpu).unwrap();
        assert_eq!((read.partitions, read.left_to_cpu.len()), (0, 0));
    }

    #[test]
    fn a_provider_that_runs_node_by_node_has_no_partitions_and_an_unknown_one_keeps_its_name() {
        let node = |name: &str, ep: &str| {
            format!(
                r#"{{"name":"{name}_kernel_time","args":{{"provider":"{ep}","op_name":"MatMul","node_index":"1"}}}}"#
            )
        };
        let nodes = [
            node("a", "CUDAExecutionProvider"),
            node("b", "CUDAExecutionProvider"),
            node("c", "NewProvider"),
        ];
        let read = placement(format!("[{}]", nodes.join(",")).as_bytes(), Provider::Cuda).unwrap();
        assert_eq!(read.nodes, counted(&[("cuda", 2), ("NewProvider", 1)]));
        assert_eq!((read.partitions, read.left_to_cpu.len()), (0, 0));
    }

    #[test]
    fn a_profile_that_is_cut_off_is_not_read_as_a_whole() {
        let whole = RECORDED.trim_end();
        for end in (0..whole.len()).filter(|&end| whole.is_char_boundary(end)).step_by(7) {
            assert!(placement(&whole.as_bytes()[..end], Provider::Qnn).is_err(), "{end}");
        }
        assert!(placement(&b"{}"[..], Provider::Qnn).is_err());
        assert!(placement(&b"[{\"name\":\"a_kernel_time\",\"args\":7}]"[..], Provider::Qnn).is_err());
    }

    #[test]
    fn a_graph_tells_where_its_nodes_ran_after_a_run_and_goes_on_running() {
        testing::start();
        let tensor = |dtype, shape: &str| TensorSpec {
            dtype,
            shape: shape
                .split_whitespace()
                .map(|dim| dim.parse().map_or_else(|_| Dim::Named(dim.to_owned()), Dim::Fixed))
                .collect(),
        };
        let all = |list: &[(&str, &str)]| {
            list.iter().map(|(name, shape)| ((*name).to_owned(), tensor(DType::F32, shape))).collect()
        };
        let spec = GraphSpec {
            path: String::new(),
            data: Vec::new(),
            inputs: all(&[("past", "past 2"), ("x", "new 2")]),
            outputs: all(&[("present", "total 2"), ("y", "total 256")]),
        };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/external.onnx");
        let open = |placement| {
            let options = SessionOptions { threads: Some(1), placement, ..SessionOptions::default() };
            Graph::open("decoder", &GraphSource::File(file.clone()), &spec, &options).unwrap()
        };
        let x = Tensor::zeros(DType::F32, &[1, 2]).unwrap();
        let mut graph = open(true);
        assert_eq!(graph.placement().unwrap(), None, "it has not run");
        graph.run(&[("past", &x), ("x", &x)]).unwrap();
        graph.run(&[("past", &x), ("x", &x)]).unwrap();
        let placement = graph.placement().unwrap().unwrap();
        assert_eq!(placement.nodes, counted(&[("cpu", 2)]), "a Concat and a MatMul");
        graph.run(&[("past", &x), ("x", &x)]).unwrap();
        assert_eq!(graph.placement().unwrap(), Some(placement));

        let mut graph = open(false);
        graph.run(&[("past", &x), ("x", &x)]).unwrap();
        assert_eq!(graph.placement().unwrap(), None, "it was not asked for");
    }
}

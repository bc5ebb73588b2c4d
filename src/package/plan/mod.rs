//! What a package will take of memory, before anything is loaded.
//!
//! Two kinds of memory are told apart. *Anonymous* memory stays until it is freed, and a limit that it exceeds ends the
//! process. *File-backed* memory is a mapping of the package's files: control groups count it too, but the kernel takes
//! such pages back before it kills, and reads them again when they are touched. So a plan is held against a limit with
//! its anonymous memory and only that part of the mappings that every token reads again; without it, reading the disk
//! would take the place of computing.
//!
//! What ONNX Runtime makes of weights was measured with version 1.32.0 on x86-64, 2 threads, as `RssAnon` and `RssFile`
//! of `/proc/self/status` around `InferenceSession(graph, providers=["CPUExecutionProvider"])` and around one run, over
//! random packages of `llava-phi-export synthesize`: `mid` (hidden 1024, 8 layers) and `wide` (the original's widths, 4
//! layers of the decoder, 6 of the encoder). In MB:
//!
//! | graph | its files | anonymous after loading | mapped | anonymous in a run, without the cache |
//! |---|---|---|---|---|
//! | mid f32, `concat` | 469 | 472 | 0 | 640 positions 119, 2048 positions 795 |
//! | wide f32, `concat` | 1784 | 1786 | 0 | 640 positions 259 |
//! | mid int4 block 16, 32, 128 | 97, 82, 71 | 132, 101, 77 | 30, 15, 4 | block 32: 640 positions 87, 2048 positions 249 |
//! | wide int4 block 32 | 345 | 418 | 56 | 640 positions 171, 2048 positions 578 |
//! | mid f16, `concat` | 234 | 547 | 0 | |
//! | mid, wide f32 encoder | 103, 257 | 105, 257 | 0 | 34, 67 |
//! | mid f16, int8 encoder | 52, 28 | 144, 31 | 0 | 50, 34 |
//!
//! So the CPU provider copies every weight into its kernels' layout and lets the mapping go; while it loads, the largest
//! matrix stands there twice, once of them mapped.

mod weights;

use std::fmt;

use serde::Serialize;

use super::manifest::{DType, DecoderGraphSpec, DecoderSpec, GraphSpec, KvForm, KvSpec, Manifest};
use super::{Component, ModelPackage};
use crate::error::{Error, Result, size};
use weights::Weights;

/// Anonymous bytes for 100 bytes of half-precision weights: they become single precision, and what was freed meanwhile
/// stays with the arena.
const HALF_PERCENT: u64 = 280;
/// Anonymous bytes for 100 bytes of block scales: a copy, and a sum for each block. The scales stay mapped beside it.
const SCALES_PERCENT: u64 = 230;
/// Anonymous bytes of a session for 100 bytes of its graph's file, when the weights are mapped.
const PARSED_PERCENT: u64 = 1200;
/// What a session takes without any weights: nodes, kernels, the arena's first region.
const SESSION: u64 = 4_000_000;
/// Numbers that the arena holds for each position and column while transformer layers run.
const LAYER_NUMBERS: u64 = 30;
/// The same for a projector.
const PROJECTOR_NUMBERS: u64 = 4;
/// Copies of the attention scores where they are a tensor of the graph: before and after the softmax.
const SCORES: u64 = 2;
/// Graph files above this are not read for a plan; their weights then count as single precision.
const LARGEST_GRAPH: u64 = 64 << 20;
/// The unit in which files are mapped.
const PAGE: u64 = 4096;
const F32: u64 = 4;

/// In whose memory a component runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// The processor runs it: the CPU provider, XNNPACK.
    Processor,
    /// The CPU provider runs it with packed weights that it maps from a file. What was measured: 1724 MB of int4 files
    /// (block 32) make 27 MB anonymous and 2280 MB mapped, 1164 MB of f32 files 21 and 1112.
    ProcessorMapped,
    /// The CPU provider runs it, and this program's own kernels read its few-bit weights where their file is mapped.
    ProcessorInPlace,
    /// A device that shares the processor's memory: Core ML, NNAPI, QNN, integrated GPUs. Its weights are taken to be
    /// copied once; that was not measured.
    Unified,
    /// A device with memory of its own, which is not planned. Its weights are mapped while they are sent there.
    Discrete,
}

/// One component as it is to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The component.
    pub component: Component,
    /// The variant that serves it.
    pub variant: &'a str,
    /// In whose memory it runs.
    pub host: Host,
}

/// Host memory that a package takes with a full context, in bytes, by what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// What each component takes.
    pub parts: Vec<PartMemory>,
    /// The embedding table and the rotary angles, mapped from their files.
    pub tables: u64,
    /// Key and value cache of one position.
    pub kv_per_position: u64,
    /// Key and value cache of a full context.
    pub kv_full: u64,
    /// The most that the cache takes: forms that hand over a new cache hold two at a time.
    pub kv_peak: u64,
    /// What the engine itself allocates to read a full context: pixels, features, embeddings, mask, logits, goldens.
    pub buffers: u64,
    /// All anonymous memory at its peak.
    pub anonymous: u64,
    /// All mappings of files at their peak.
    pub file_backed: u64,
    /// The part of the mappings that every token reads again.
    pub working_set: u64,
}

/// Host memory that one component takes, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartMemory {
    /// The component's name.
    pub component: &'static str,
    /// The variant that serves it.
    pub variant: String,
    /// In whose memory it runs.
    pub host: Host,
    /// Its graph and external data on disk.
    pub files: u64,
    /// Weights as the runtime keeps them, anonymous.
    pub weights: u64,
    /// Weights that stay mapped.
    pub mapped: u64,
    /// Intermediate results of the longest run; an estimate, since the runtime decides what it reuses.
    pub activations: u64,
}

impl MemoryPlan {
    /// The plan for the best choice of each component, or for `variant`, on the processor.
    ///
    /// # Errors
    /// As [`MemoryPlan::of`].
    pub fn new(package: &ModelPackage, variant: Option<&str>) -> Result<Self> {
        let mut parts = Vec::new();
        let variants = &package.manifest().variants;
        let mut needs_head = false;
        for component in Component::ALL {
            if component == Component::Head && !needs_head {
                continue;
            }
            // A component that the variant does not serve is another one's.
            let choices = package.choices(component);
            let own = choices.iter().find(|choice| variant.is_some_and(|wanted| wanted == choice.variant));
            let Some(choice) = own.or(choices.first()) else { continue };
            if component == Component::Decoder {
                let decoder = variants.get(&choice.variant).and_then(|variant| variant.decoder.as_ref());
                needs_head = decoder.is_some_and(DecoderGraphSpec::needs_head);
            }
            parts.push(Part { component, variant: &choice.variant, host: Host::Processor });
        }
        Self::of(package, &parts)
    }

    /// The plan for these parts, all loaded at once. With a subset of the components it tells what they take alone.
    ///
    /// # Errors
    /// [`Error::Request`] when a variant lacks the component; [`Error::Package`] when a graph cannot be read.
    pub fn of(package: &ModelPackage, parts: &[Part<'_>]) -> Result<Self> {
        let manifest = package.manifest();
        plan(manifest, parts, |graph| {
            // A graph that cannot be taken apart here is refused by ONNX Runtime later, with a better sentence.
            let small = bytes(manifest, &graph.path) <= LARGEST_GRAPH;
            let content = if small { package.read(&graph.path)? } else { (&[][..]).into() };
            Ok(Weights::read(&content).unwrap_or_default())
        })
    }

    /// What is held against a limit: anonymous memory, and the mappings that every token reads.
    pub fn held(&self) -> u64 {
        self.anonymous.saturating_add(self.working_set)
    }

    /// Holds the plan against `budget` bytes; `source` says where that number comes from, for the sentence.
    ///
    /// # Errors
    /// A [`Shortfall`] when more would be taken than is to be had.
    pub fn fits(&self, budget: u64, source: &str) -> Result<(), Shortfall> {
        if self.held() <= budget {
            return Ok(());
        }
        Err(Shortfall {
            held: self.held(),
            weights: sum(self.parts.iter().map(|part| part.weights)).saturating_add(self.working_set),
            cache: self.kv_peak,
            activations: sum(self.parts.iter().map(|part| part.activations)),
            buffers: self.buffers,
            budget,
            source: source.to_owned(),
        })
    }
}

/// How far a plan exceeds what is to be had; prints as one sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shortfall {
    /// What the plan takes, in bytes.
    pub held: u64,
    /// Of it, weights.
    pub weights: u64,
    /// Of it, the key and value cache.
    pub cache: u64,
    /// Of it, intermediate results.
    pub activations: u64,
    /// Of it, the engine's own buffers.
    pub buffers: u64,
    /// What is to be had.
    pub budget: u64,
    /// What decides that.
    pub source: String,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [held, weights, cache, activations, buffers, budget] =
            [self.held, self.weights, self.cache, self.activations, self.buffers, self.budget].map(size);
        write!(f, "the plan takes {held} (weights {weights}, cache {cache}, activations {activations}, ")?;
        write!(f, "buffers {buffers}) and {budget} are to be had ({})", self.source)
    }
}

impl std::error::Error for Shortfall {}

fn plan(
    manifest: &Manifest,
    parts: &[Part<'_>],
    mut weights: impl FnMut(&GraphSpec) -> Result<Weights>,
) -> Result<MemoryPlan> {
    let mut planned = Vec::new();
    let mut kv = None;
    let mut mask = DType::F32;
    for part in parts {
        let graph = manifest.variants.get(part.variant).and_then(|variant| part.component.graph(variant));
        let Some((graph, cache)) = graph else {
            let (variant, component) = (part.variant, part.component.name());
            return Err(Error::Request(format!("variant {variant} of {} has no {component}", manifest.name)));
        };
        if cache.is_some() {
            kv = cache;
            mask = graph.inputs.get("attention_mask").map_or(mask, |spec| spec.dtype);
        }
        let graph_file = bytes(manifest, &graph.path);
        let files = sum(graph.data.iter().map(|name| bytes(manifest, name))).saturating_add(graph_file);
        let (copied, mapped) = part.host.keeps(files, graph_file, || weights(graph))?;
        let activations = if part.host == Host::Discrete { 0 } else { activations(manifest, part, cache) };
        planned.push(PartMemory {
            component: part.component.name(),
            variant: part.variant.to_owned(),
            host: part.host,
            files,
            weights: copied,
            mapped,
            activations,
        });
    }
    let decoder = &manifest.decoder;
    let context = decoder.context as u64;
    let rotary = decoder.rotary.as_ref().map_or(0, |rotary| bytes(manifest, &rotary.file));
    let embedding = bytes(manifest, &manifest.embedding.file);
    let row = product(&[manifest.embedding.columns as u64, manifest.embedding.dtype.bytes() as u64]);
    let mut all = MemoryPlan {
        tables: embedding.saturating_add(rotary),
        kv_per_position: kv.map_or(0, |kv| kv_bytes_per_position(decoder, kv.dtype)),
        kv_full: 0,
        kv_peak: 0,
        buffers: buffers(manifest, kv, mask),
        anonymous: 0,
        file_backed: 0,
        working_set: embedding.min(product(&[context, row.saturating_add(PAGE)])).saturating_add(rotary),
        parts: planned,
    };
    all.kv_full = all.kv_per_position.saturating_mul(context);
    all.kv_peak = kv.map_or(0, |kv| all.kv_per_position.saturating_mul(kv_positions(&kv, context)));
    let by_processor = |part: &&PartMemory| {
        matches!(part.host, Host::Processor | Host::ProcessorMapped | Host::ProcessorInPlace)
    };
    let on_host = all.parts.iter().filter(by_processor).map(|part| part.mapped);
    all.working_set = all.working_set.saturating_add(sum(on_host));
    all.file_backed = sum(all.parts.iter().map(|part| part.mapped)).saturating_add(all.tables);
    let parts = all.parts.iter().map(|part| part.weights.saturating_add(part.activations));
    all.anonymous = sum(parts.chain([all.kv_peak, all.buffers]));
    Ok(all)
}

impl Host {
    /// Anonymous and mapped bytes of `files` bytes of graph and data, of which the graph itself has `graph_file`.
    fn keeps(
        self,
        files: u64,
        graph_file: u64,
        weights: impl FnOnce() -> Result<Weights>,
    ) -> Result<(u64, u64)> {
        match self {
            Self::Discrete => Ok((SESSION, files)),
            Self::Unified => Ok((files.saturating_add(SESSION), 0)),
            Self::ProcessorInPlace => {
                let (made, _) = Self::Processor.keeps(files, graph_file, weights)?;
                Ok((SESSION.saturating_add(percent(graph_file, PARSED_PERCENT)).min(made), files))
            }
            Self::ProcessorMapped => {
                let (made, mapped) = Self::Processor.keeps(files, graph_file, weights)?;
                // Of what else is made anew in memory the weights of the graph's own file are the most.
                let anonymous = SESSION.saturating_add(percent(graph_file, PARSED_PERCENT)).min(made);
                Ok((anonymous, made.saturating_sub(anonymous).saturating_add(mapped)))
            }
            Self::Processor => {
                let weights = weights()?;
                let rest = files.saturating_sub(weights.bytes());
                // Weights inside the graph file are held by its parsed form too.
                let terms = [
                    weights.plain,
                    percent(weights.half, HALF_PERCENT),
                    percent(weights.scales, SCALES_PERCENT),
                    rest,
                    graph_file,
                    SESSION,
                ];
                Ok((sum(terms), weights.scales))
            }
        }
    }
}

/// Intermediate results of the longest run of a component.
fn activations(manifest: &Manifest, part: &Part<'_>, kv: Option<KvSpec>) -> u64 {
    let (vision, decoder) = (&manifest.vision, &manifest.decoder);
    // The class token is a position of the encoder.
    let patches = vision.tokens_per_image as u64 + 1;
    let hidden = decoder.hidden as u64;
    match part.component {
        Component::VisionEncoder => product(&[patches, vision.hidden as u64, LAYER_NUMBERS, F32]),
        Component::Projector => product(&[patches, hidden, PROJECTOR_NUMBERS, F32]),
        Component::Decoder => {
            let context = decoder.context as u64;
            let new = kv.and_then(|kv| kv.chunk).map_or(context, |chunk| chunk as u64);
            let layers = product(&[new, hidden, LAYER_NUMBERS, F32]);
            // The fused attention of the shared form keeps no scores.
            let Some(kv) = kv.filter(|kv| kv.form != KvForm::Shared) else { return layers };
            // A query has as many columns as the residual stream, or as the keys where those are wider.
            let heads = (decoder.hidden / decoder.head_dim.max(1)).max(decoder.kv_heads) as u64;
            layers.saturating_add(product(&[SCORES, heads, new, columns(&kv, context), F32]))
        }
        Component::Head => product(&[decoder.logits_width as u64, F32]),
    }
}

/// Columns of the attention mask.
fn columns(kv: &KvSpec, context: u64) -> u64 {
    let capacity = kv.capacity.map_or(context, |capacity| capacity as u64);
    match kv.form {
        KvForm::Delta => capacity.saturating_add(kv.chunk.map_or(0, |chunk| chunk as u64)),
        KvForm::Scatter => capacity,
        KvForm::Shared | KvForm::Concat => context,
    }
}

/// Positions for which keys and values stand in memory at the peak.
fn kv_positions(kv: &KvSpec, context: u64) -> u64 {
    match kv.form {
        KvForm::Shared => context,
        // The past is read while the present is written.
        KvForm::Concat => context.saturating_mul(2),
        KvForm::Scatter | KvForm::Delta => columns(kv, context),
    }
}

/// What the engine allocates beside the cache.
fn buffers(manifest: &Manifest, kv: Option<KvSpec>, mask: DType) -> u64 {
    let (image, vision, decoder) = (&manifest.image, &manifest.vision, &manifest.decoder);
    let context = decoder.context as u64;
    let patches = vision.tokens_per_image as u64;
    let hidden = decoder.hidden as u64;
    let mask = kv.filter(|kv| kv.form != KvForm::Shared).map_or(0, |kv| {
        let rows = kv.chunk.map_or(context, |chunk| chunk as u64);
        product(&[rows, columns(&kv, context), mask.bytes() as u64])
    });
    sum([
        product(&[3, u64::from(image.size), u64::from(image.size), F32]),
        product(&[patches, (vision.hidden as u64).saturating_add(hidden), F32]),
        product(&[context, hidden, F32]),
        product(&[decoder.logits_width as u64, F32]),
        bytes(manifest, &manifest.goldens.file),
        mask,
    ])
}

/// Bytes of the key and value cache of one position.
fn kv_bytes_per_position(decoder: &DecoderSpec, dtype: DType) -> u64 {
    [decoder.layers, decoder.kv_heads, decoder.head_dim, 2 * dtype.bytes()]
        .into_iter()
        .fold(1, |bytes, factor| bytes.saturating_mul(factor as u64))
}

fn bytes(manifest: &Manifest, name: &str) -> u64 {
    manifest.files.get(name).map_or(0, |info| info.bytes)
}

fn sum(terms: impl IntoIterator<Item = u64>) -> u64 {
    terms.into_iter().fold(0, u64::saturating_add)
}

fn product(factors: &[u64]) -> u64 {
    factors.iter().copied().fold(1, u64::saturating_mul)
}

fn percent(bytes: u64, percent: u64) -> u64 {
    bytes.saturating_mul(percent) / 100
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    const MB: u64 = 1_000_000;

    /// The package `wide` of the measurements above, and its decoder in the other forms.
    fn wide() -> Manifest {
        let tensors = json!({});
        let graph = |name: &str| json!({"path": format!("{name}.onnx"), "data": [format!("{name}.data")], "inputs": tensors, "outputs": tensors});
        let tolerance = json!({"patch_features": 0.1, "image_embeds": 0.1, "logits": 0.1});
        let variant = |decoder: &str, kv: Value| json!({"decoder": {"graph": graph(decoder), "kv": kv}, "tolerance": tolerance});
        let mut variants = json!({
            "int4": variant("int4", json!({"form": "shared", "dtype": "f32"})),
            "int8 cache": variant("int4", json!({"form": "shared", "dtype": "i8"})),
            "f32": variant("f32", json!({"form": "concat", "dtype": "f32"})),
            "delta": variant("f32", json!({"form": "delta", "dtype": "f16", "capacity": 1024, "chunk": 16})),
            "scatter": variant("f32", json!({"form": "scatter", "dtype": "f16", "capacity": 1024, "chunk": 64})),
        });
        variants["int4"]["vision_encoder"] = graph("vision");
        variants["int4"]["projector"] = graph("projector");
        let info = |kb: u64| json!({"bytes": kb * 1000, "sha256": ""});
        let manifest = json!({
            "format": 3,
            "name": "wide",
            "source": {"checkpoint": "llava_phi", "sha256": "", "exporter": "0"},
            "image": {"size": 336, "fit": "center_crop", "filter": "bicubic", "pad_color": [0, 0, 0], "rescale": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
            "text": {"tokenizer": "t", "vocabulary": 1, "eos": [0], "template": {"system": "", "after_system": "", "before_user": "", "after_user": "", "before_answer": "", "answer_separator": "", "after_answer": 0, "after_image": ""}},
            "vision": {"tokens_per_image": 576, "hidden": 1024},
            "embedding": {"file": "e", "rows": 51200, "columns": 2560, "dtype": "f16"},
            "decoder": {"layers": 4, "kv_heads": 32, "head_dim": 80, "hidden": 2560, "context": 2048, "logits_width": 51200},
            "variants": variants,
            "serve": {"vision_encoder": [], "projector": [], "decoder": []},
            "goldens": {"file": "g", "image_rows": 1},
            "files": {"int4.data": info(345_000), "f32.data": info(1_783_600), "vision.data": info(256_700), "projector.data": info(36_700), "e": info(262_144)},
        });
        serde_json::from_value(manifest).unwrap()
    }

    fn of(parts: &[(Component, &str, Host)]) -> MemoryPlan {
        let parts: Vec<Part<'_>> =
            parts.iter().map(|&(component, variant, host)| Part { component, variant, host }).collect();
        plan(&wide(), &parts, |graph| {
            let scales = if graph.path == "int4.onnx" { 55_705_600 } else { 0 };
            Ok(Weights { scales, ..Weights::default() })
        })
        .unwrap()
    }

    fn near(planned: u64, measured: u64, percent: u64) {
        assert!(
            planned.abs_diff(measured) * 100 <= measured * percent,
            "{planned} planned, {measured} measured"
        );
    }

    #[test]
    fn the_plan_is_near_what_was_measured() {
        let host = Host::Processor;
        let int4 = of(&[(Component::Decoder, "int4", host)]);
        // 4 %: padding of the packed matrices differs by their shape.
        near(int4.parts[0].weights, 418 * MB, 4);
        assert_eq!(int4.parts[0].mapped, 55_705_600);
        assert_eq!((int4.kv_full, int4.kv_peak), (167_772_160, 167_772_160));
        let rounded = of(&[(Component::Decoder, "int8 cache", host)]);
        assert_eq!((rounded.kv_full, rounded.held()), (int4.kv_full / 4, int4.held() - int4.kv_full * 3 / 4));
        // 15 %: the arena grows in powers of two.
        near(int4.parts[0].activations, 578 * MB, 15);
        let f32 = of(&[(Component::Decoder, "f32", host), (Component::VisionEncoder, "int4", host)]);
        near(f32.parts[0].weights, 1786 * MB, 1);
        near(f32.parts[1].weights, 257 * MB, 2);
        near(f32.parts[1].activations, 67 * MB, 15);
        assert_eq!(f32.kv_peak, 2 * f32.kv_full);
    }

    #[test]
    fn each_form_of_cache_takes_its_positions() {
        let f32 = of(&[(Component::Decoder, "f32", Host::Processor)]);
        let per_position = 4 * 32 * 80 * 2 * 2;
        for (variant, positions, chunk) in [("delta", 1024 + 16, 16), ("scatter", 1024, 64)] {
            let plan = of(&[(Component::Decoder, variant, Host::Processor)]);
            assert_eq!((plan.kv_per_position, plan.kv_peak), (per_position, positions * per_position));
            assert_eq!(f32.buffers - plan.buffers, (2048 * 2048 - chunk * positions) * 4, "the mask");
            assert!(plan.parts[0].activations < f32.parts[0].activations / 20);
        }
    }

    #[test]
    fn a_device_with_its_own_memory_takes_none_of_the_hosts_for_weights() {
        let plan = of(&[(Component::Decoder, "f32", Host::Discrete)]);
        assert_eq!((plan.parts[0].weights, plan.parts[0].activations), (SESSION, 0));
        assert_eq!(plan.file_backed, 1_783_600_000 + plan.tables);
        assert!(plan.working_set < 20 * MB, "only rows of the embedding table are read again");
        let unified = of(&[(Component::Decoder, "f32", Host::Unified)]);
        assert_eq!(unified.parts[0].weights, 1_783_600_000 + SESSION);
    }

    #[test]
    fn packed_weights_that_are_mapped_are_not_anonymous_and_count_all_the_same() {
        let anew = of(&[(Component::Decoder, "int4", Host::Processor)]);
        let mapped = of(&[(Component::Decoder, "int4", Host::ProcessorMapped)]);
        assert_eq!(anew.held(), mapped.held());
        assert!(mapped.parts[0].weights < 5 * MB && mapped.parts[0].mapped > 400 * MB, "{mapped:?}");
        assert!(anew.anonymous > mapped.anonymous + 400 * MB);
    }

    #[test]
    fn a_shortfall_says_what_is_taken_and_what_is_to_be_had() {
        let plan = of(&[(Component::Decoder, "f32", Host::Processor)]);
        assert_eq!(plan.fits(plan.held(), ""), Ok(()));
        let short =
            plan.fits(2_000_000_000, "memory.max of cgroup /a is 2.1 GB, 0.1 GB of it used").unwrap_err();
        assert_eq!(
            short.to_string(),
            "the plan takes 3.8 GB (weights 1.8 GB, cache 335.5 MB, activations 1.7 GB, buffers 47.5 MB) and \
             2.0 GB are to be had (memory.max of cgroup /a is 2.1 GB, 0.1 GB of it used)"
        );
        let parts = short.weights + short.cache + short.activations + short.buffers;
        assert_eq!(parts, short.held);
    }

    #[test]
    fn a_variant_without_the_component_is_refused() {
        let part = Part { component: Component::Head, variant: "int4", host: Host::Processor };
        let error = plan(&wide(), &[part], |_| Ok(Weights::default())).unwrap_err();
        assert_eq!(error.to_string(), "variant int4 of wide has no head");
    }

    #[test]
    fn the_miniature_model_is_planned_by_its_best_choices_or_by_a_variant() {
        let package = ModelPackage::embedded().unwrap();
        let int4 = MemoryPlan::new(&package, None).unwrap();
        let f32 = MemoryPlan::new(&package, Some("portable-f32")).unwrap();
        let decoder = |plan: &MemoryPlan| {
            let mut parts = plan.parts.iter().filter(|part| part.component == Component::Decoder.name());
            parts.next().map(|part| (part.variant.clone(), part.weights, part.mapped)).unwrap()
        };
        let ((name, small, scales), (_, large, none)) = (decoder(&int4), decoder(&f32));
        assert_eq!(name, "cpu-int4");
        assert!(small < large && scales > 0 && none == 0, "{int4:?} {f32:?}");
        assert_eq!((f32.kv_peak, int4.kv_peak), (2 * f32.kv_full, int4.kv_full));
    }

    #[test]
    fn the_graphs_of_the_miniature_model_are_taken_apart() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/package");
        let read = |name: &str| Weights::read(&std::fs::read(tiny.join(name)).unwrap()).unwrap();
        let (int4, f32) = (read("cpu-int4/decoder.onnx"), read("portable-f32/decoder.onnx"));
        assert!(int4.scales > 0 && int4.plain > int4.scales && int4.half == 0, "{int4:?}");
        assert!(f32.scales == 0 && f32.plain > 2 * int4.bytes(), "{f32:?}");
    }
}

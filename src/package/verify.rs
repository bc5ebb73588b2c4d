//! Whether a manifest and its files are what they claim to be.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    path::{Component as PathPart, Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::Component;
use super::manifest::{
    CLS_ATTENTION, DType, DecoderGraphSpec, DecoderSpec, Dim, EmbeddingSpec, FORMAT, FileInfo, GraphSpec,
    HIDDEN_STATES, KvForm, KvSpec, Manifest, MeasuredTokens, TensorSpec, Tolerance,
};
use crate::error::{Error, Result};

/// Files of up to this many bytes are hashed whenever a package is opened.
pub(super) const HASHED_AT_OPEN: u64 = 64 << 20;

/// The largest side of an image that an encoder may take, in pixels.
const LARGEST_IMAGE: u32 = 8192;

/// Reads a manifest: the format number first, then every field, none unknown.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Head {
        format: serde_json::Value,
    }
    let head: Head = serde_json::from_slice(bytes)
        .map_err(|e| Error::package(path, format!("this is not a manifest ({e}); export again")))?;
    if head.format.as_u64() != Some(u64::from(FORMAT)) {
        return Err(Error::package(
            path,
            format!(
                "format {} is not known to this version, which reads format {FORMAT}; \
                 export again or update llava-phi",
                head.format
            ),
        ));
    }
    serde_json::from_slice(bytes).map_err(|e| Error::package(path, format!("{e}; export again")))
}

/// Checks everything that can be checked without opening a file.
pub(super) fn arithmetic(path: &Path, manifest: &Manifest) -> Result<()> {
    let mut faults = Faults::default();
    names(&mut faults, manifest);
    sizes(&mut faults, manifest);
    graphs(&mut faults, manifest);
    match faults.0.into_iter().next() {
        Some(fault) => Err(Error::package(path, format!("{fault}; export again"))),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.0.push(otherwise());
        }
    }
}

fn names(faults: &mut Faults, manifest: &Manifest) {
    for name in manifest.files.keys() {
        faults.check(is_plain(name), || format!("file {name:?} is not a relative path inside the package"));
    }
    for (name, info) in &manifest.files {
        let is_hash = info.sha256.len() == 64 && info.sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
        faults.check(is_hash, || format!("file {name:?} has {:?} for a SHA-256", info.sha256));
    }
    let listed = |name: &String| manifest.files.contains_key(name);
    let rotary = manifest.decoder.rotary.as_ref().map(|rotary| ("rotary table", &rotary.file));
    for (what, name) in [
        ("tokenizer", &manifest.text.tokenizer),
        ("embedding table", &manifest.embedding.file),
        ("file of goldens", &manifest.goldens.file),
    ]
    .into_iter()
    .chain(rotary)
    {
        faults.check(listed(name), || format!("the {what} {name:?} is not among the files"));
    }
    for (variant, graph) in variant_graphs(manifest) {
        for name in graph.files() {
            faults.check(listed(name), || format!("variant {variant}: {name:?} is not among the files"));
        }
        let directory = Path::new(&graph.path).parent();
        for name in &graph.data {
            faults.check(Path::new(name).parent() == directory, || {
                format!("variant {variant}: {name:?} does not lie beside {:?}", graph.path)
            });
        }
    }
    for component in Component::ALL {
        let (name, choices) = (component.name(), component.choices(&manifest.serve));
        let needed = component != Component::Head
            || manifest.serve.decoder.iter().any(|choice| {
                manifest
                    .variants
                    .get(&choice.variant)
                    .is_some_and(|variant| variant.decoder.as_ref().is_some_and(DecoderGraphSpec::needs_head))
            });
        faults.check(!needed || !choices.is_empty(), || format!("nothing serves the {name}"));
        for choice in choices {
            let variant = manifest.variants.get(&choice.variant);
            let has = variant.is_some_and(|variant| component.graph(variant).is_some());
            faults.check(has, || format!("variant {:?} has no {name} but is to serve it", choice.variant));
        }
    }
}

/// The files that belong to graphs, and so to some variants only.
pub(super) fn graph_files(manifest: &Manifest) -> BTreeSet<String> {
    variant_graphs(manifest).flat_map(|(_, graph)| graph.files().cloned()).collect()
}

fn variant_graphs(manifest: &Manifest) -> impl Iterator<Item = (&String, &GraphSpec)> {
    manifest.variants.iter().flat_map(|(name, variant)| {
        let graphs = Component::ALL.into_iter().filter_map(|component| component.graph(variant));
        graphs.map(move |(graph, _)| (name, graph))
    })
}

fn sizes(faults: &mut Faults, manifest: &Manifest) {
    let Manifest { image, text, vision, embedding, decoder, .. } = manifest;
    for (what, value) in [
        ("image.size", image.size as usize),
        ("text.vocabulary", text.vocabulary),
        ("vision.tokens_per_image", vision.tokens_per_image),
        ("vision.hidden", vision.hidden),
        ("embedding.rows", embedding.rows),
        ("decoder.layers", decoder.layers),
        ("decoder.kv_heads", decoder.kv_heads),
        ("decoder.head_dim", decoder.head_dim),
        ("decoder.hidden", decoder.hidden),
        ("decoder.context", decoder.context),
    ] {
        faults.check(value > 0, || format!("{what} is 0"));
        faults.check(u32::try_from(value).is_ok(), || format!("{what} is {value}, beyond any model"));
    }
    // Memory for one image grows with the square of its size.
    faults.check(image.size <= LARGEST_IMAGE, || {
        format!("image.size is {}, beyond the {LARGEST_IMAGE} that this version reads", image.size)
    });
    faults.check(image.rescale.is_finite() && image.rescale > 0.0, || {
        format!("image.rescale is {}", image.rescale)
    });
    for channel in 0..3 {
        let (mean, std) = (image.mean[channel], image.std[channel]);
        faults.check(mean.is_finite() && std.is_finite() && std > 0.0, || {
            format!("image.mean and image.std of channel {channel} are {mean} and {std}")
        });
    }
    faults.check(embedding.columns == decoder.hidden, || {
        format!("embedding.columns is {} and decoder.hidden is {}", embedding.columns, decoder.hidden)
    });
    faults.check(matches!(embedding.dtype, DType::F16 | DType::F32), || {
        format!("embedding.dtype is {:?}, which is neither f16 nor f32", embedding.dtype)
    });
    let EmbeddingSpec { rows, columns, .. } = *embedding;
    table(faults, manifest, &embedding.file, rows, columns, embedding.dtype);
    if let Some(rotary) = &decoder.rotary {
        faults.check(rotary.dim > 0 && rotary.dim % 2 == 0 && rotary.dim <= decoder.head_dim, || {
            format!("decoder.rotary.dim is {} and decoder.head_dim is {}", rotary.dim, decoder.head_dim)
        });
        table(faults, manifest, &rotary.file, decoder.context, rotary.dim, DType::F32);
    }
    faults.check(manifest.goldens.image_rows <= vision.tokens_per_image, || {
        let (rows, image) = (manifest.goldens.image_rows, vision.tokens_per_image);
        format!("goldens.image_rows is {rows}, but an image has {image}")
    });
    for (name, variant) in &manifest.variants {
        let Tolerance { patch_features, image_embeds, logits, cls_attention } = variant.tolerance;
        let given = [("patch_features", patch_features), ("image_embeds", image_embeds), ("logits", logits)];
        for (what, value) in given.into_iter().chain(cls_attention.map(|value| (CLS_ATTENTION, value))) {
            faults.check(value.is_finite() && value > 0.0, || {
                format!("variant {name}: tolerance.{what} is {value}")
            });
        }
        let gives = variant.vision_encoder.as_ref().is_some_and(GraphSpec::gives_attention);
        faults.check(!gives || cls_attention.is_some(), || {
            format!("variant {name}: tolerance.{CLS_ATTENTION} is missing, and its vision encoder gives it")
        });
    }
    for one in &vision.measured {
        let MeasuredTokens { tokens, questions, right, right_with_all, .. } = one;
        let holds = (1..=vision.tokens_per_image).contains(tokens)
            && *questions > 0
            && right <= questions
            && right_with_all <= questions;
        faults.check(holds, || {
            format!(
                "vision.measured says of {tokens} tokens that {one}, and an image has {}",
                vision.tokens_per_image
            )
        });
    }
    faults.check(text.vocabulary <= embedding.rows, || {
        format!("text.vocabulary is {} and embedding.rows is {}", text.vocabulary, embedding.rows)
    });
    faults.check(text.vocabulary <= decoder.logits_width, || {
        format!("text.vocabulary is {} and decoder.logits_width is {}", text.vocabulary, decoder.logits_width)
    });
    faults.check(!text.eos.is_empty(), || "text.eos is empty, so that no answer would end".to_owned());
    for id in text.eos.iter().chain([&text.template.after_answer]) {
        faults.check((*id as usize) < embedding.rows, || {
            format!("token {id} has no row in an embedding table of {}", embedding.rows)
        });
    }
}

/// Compares the size of a file of numbers, row by row, with the sizes.
fn table(faults: &mut Faults, manifest: &Manifest, file: &str, rows: usize, columns: usize, dtype: DType) {
    let numbers = rows.checked_mul(columns).and_then(|numbers| numbers.checked_mul(dtype.bytes()));
    let bytes = numbers.and_then(|bytes| u64::try_from(bytes).ok());
    let recorded = manifest.files.get(file).map_or(0, |info| info.bytes);
    faults.check(bytes == Some(recorded), || {
        format!(
            "{file} has {recorded} bytes, but {rows} rows of {columns} numbers take {}",
            bytes.map_or_else(|| "more than can be counted".to_owned(), |n| n.to_string())
        )
    });
}

/// Numbers that a graph may take and give in either precision: the engine converts.
const REAL: &[DType] = &[DType::F32, DType::F16];

fn named(name: &str) -> Dim {
    Dim::Named(name.to_owned())
}

fn graphs(faults: &mut Faults, manifest: &Manifest) {
    let fixed = Dim::Fixed;
    let batch = || named("batch");
    let Manifest { image, vision, decoder, .. } = manifest;
    let size = image.size as usize;
    for (name, variant) in &manifest.variants {
        if let Some(graph) = &variant.vision_encoder {
            let mut graph = Signature::new(faults, format!("{name} vision_encoder"), graph);
            graph.input("pixel_values", REAL, &[batch(), fixed(3), fixed(size), fixed(size)]);
            let features = [batch(), fixed(vision.tokens_per_image), fixed(vision.hidden)];
            graph.output("patch_features", REAL, &features);
            if graph.graph.gives_attention() {
                graph.output(CLS_ATTENTION, REAL, &features[..2]);
            }
            graph.finish();
        }
        if let Some(graph) = &variant.projector {
            let mut graph = Signature::new(faults, format!("{name} projector"), graph);
            let rows = |columns| [batch(), Dim::Fixed(vision.tokens_per_image), fixed(columns)];
            graph.input("patch_features", REAL, &rows(vision.hidden));
            graph.output("image_embeds", REAL, &rows(decoder.hidden));
            graph.finish();
        }
        if let Some(DecoderGraphSpec { graph, kv }) = &variant.decoder {
            cache_sizes(faults, name, kv, decoder.context);
            let mut graph = Signature::new(faults, format!("{name} decoder"), graph);
            decoder_graph(&mut graph, decoder, *kv);
            graph.finish();
        }
        if let Some(graph) = &variant.head {
            let mut graph = Signature::new(faults, format!("{name} head"), graph);
            graph.input(HIDDEN_STATES, REAL, &[batch(), fixed(decoder.hidden)]);
            graph.output("logits", REAL, &[batch(), fixed(decoder.logits_width)]);
            graph.finish();
        }
    }
}

/// Whether the manifest says of a cache what its form asks for.
fn cache_sizes(faults: &mut Faults, variant: &str, kv: &KvSpec, context: usize) {
    let is_fixed = matches!(kv.form, KvForm::Scatter | KvForm::Delta);
    let is_read = REAL.contains(&kv.dtype) || (kv.dtype, kv.form) == (DType::I8, KvForm::Shared);
    faults.check(is_read, || {
        format!(
            "variant {variant}: a cache of {} is not read; f32 and f16 are, and i8 in the form shared",
            kv.dtype
        )
    });
    faults.check(kv.capacity.is_some() == is_fixed && kv.chunk.is_some() == is_fixed, || {
        format!("variant {variant}: kv.capacity and kv.chunk belong to the forms scatter and delta, and only to them")
    });
    let (capacity, chunk) = (kv.capacity.unwrap_or(context), kv.chunk.unwrap_or(1));
    faults.check((1..=context).contains(&capacity) && (1..=capacity).contains(&chunk), || {
        format!("variant {variant}: kv.chunk {chunk}, kv.capacity {capacity} and decoder.context {context} do not nest")
    });
}

/// What a decoder graph takes and gives, by the form of its cache.
fn decoder_graph(graph: &mut Signature<'_>, decoder: &DecoderSpec, kv: KvSpec) {
    let fixed = Dim::Fixed;
    let batch = || named("batch");
    let capacity = kv.capacity.unwrap_or_default();
    let chunk = kv.chunk.unwrap_or_default();
    let new = || if kv.form == KvForm::Delta { fixed(chunk) } else { named("new") };
    graph.input("inputs_embeds", REAL, &[batch(), new(), fixed(decoder.hidden)]);
    if graph.graph.outputs.contains_key(HIDDEN_STATES) && kv.form == KvForm::Delta {
        graph.output(HIDDEN_STATES, REAL, &[batch(), new(), fixed(decoder.hidden)]);
    } else {
        graph.input("logits_index", &[DType::I64], &[batch()]);
        graph.output("logits", REAL, &[batch(), fixed(decoder.logits_width)]);
    }
    let (past, present, given) = match kv.form {
        KvForm::Shared => {
            graph.input("seqlens_k", &[DType::I32], &[batch()]);
            graph.input("total_sequence_length", &[DType::I32], &[]);
            (named("capacity"), named("capacity"), "present")
        }
        KvForm::Concat => {
            graph.input("position_ids", &[DType::I64], &[batch(), new()]);
            graph.input("attention_mask", REAL, &[batch(), fixed(1), new(), named("total")]);
            (named("past"), named("total"), "present")
        }
        KvForm::Scatter => {
            graph.input("position_ids", &[DType::I64], &[batch(), new()]);
            graph.input("write_indices", &[DType::I64], &[batch()]);
            graph.input("attention_mask", REAL, &[batch(), fixed(1), new(), fixed(capacity)]);
            (fixed(capacity), fixed(capacity), "present")
        }
        KvForm::Delta => {
            let half = decoder.rotary.as_ref().map_or(0, |rotary| rotary.dim / 2);
            for table in ["rope_cos", "rope_sin"] {
                graph.input(table, REAL, &[batch(), fixed(1), fixed(chunk), fixed(half)]);
            }
            let columns = fixed(capacity.saturating_add(chunk));
            graph.input("attention_mask", REAL, &[batch(), fixed(1), fixed(chunk), columns]);
            (fixed(capacity), fixed(chunk), "new_key_values")
        }
    };
    let rows = |length: &Dim| [batch(), fixed(decoder.kv_heads), length.clone(), fixed(decoder.head_dim)];
    // A tampered number could ask for billions of layers; the first that has no input is a fault already.
    for layer in 0..decoder.layers.min(graph.graph.inputs.len()) {
        for what in ["key", "value"] {
            graph.input(&format!("past_key_values.{layer}.{what}"), &[kv.dtype], &rows(&past));
            graph.output(&format!("{given}.{layer}.{what}"), &[kv.dtype], &rows(&present));
        }
    }
}

/// Compares what a graph is said to take and give with what the engine feeds and reads.
struct Signature<'a> {
    faults: &'a mut Faults,
    name: String,
    graph: &'a GraphSpec,
    inputs: BTreeSet<String>,
    outputs: BTreeSet<String>,
}

impl<'a> Signature<'a> {
    fn new(faults: &'a mut Faults, name: String, graph: &'a GraphSpec) -> Self {
        Self { faults, name, graph, inputs: BTreeSet::new(), outputs: BTreeSet::new() }
    }

    fn input(&mut self, tensor: &str, dtypes: &[DType], shape: &[Dim]) {
        self.inputs.insert(tensor.to_owned());
        self.tensor("input", self.graph.inputs.get(tensor), tensor, dtypes, shape);
    }

    fn output(&mut self, tensor: &str, dtypes: &[DType], shape: &[Dim]) {
        self.outputs.insert(tensor.to_owned());
        self.tensor("output", self.graph.outputs.get(tensor), tensor, dtypes, shape);
    }

    fn tensor(
        &mut self,
        kind: &str,
        found: Option<&TensorSpec>,
        tensor: &str,
        dtypes: &[DType],
        shape: &[Dim],
    ) {
        let Some(found) = found else {
            self.faults.0.push(format!("{} has no {kind} {tensor}", self.name));
            return;
        };
        // A graph may be for one row only, and a projector for the rows of any image.
        let fits = dtypes.contains(&found.dtype)
            && found.shape.len() == shape.len()
            && found.shape.iter().zip(shape).enumerate().all(|(place, dims)| match dims {
                (Dim::Fixed(found), Dim::Fixed(wanted)) => found == wanted,
                (Dim::Named(_), Dim::Named(_)) => true,
                (Dim::Fixed(1), Dim::Named(wanted)) => place == 0 && wanted == "batch",
                (Dim::Named(found), Dim::Fixed(_)) => found == "patches",
                (Dim::Fixed(_), Dim::Named(_)) => false,
            });
        let dtype = dtypes.first().copied().unwrap_or(DType::F32);
        let wanted = TensorSpec { dtype, shape: shape.to_vec() };
        self.faults.check(fits, || {
            format!("{}: {kind} {tensor} is {found}, and the sizes ask for {wanted}", self.name)
        });
    }

    fn finish(self) {
        let extra =
            self.graph.inputs.keys().filter(|name| !self.inputs.contains(*name)).map(|n| ("input", n));
        let extra = extra
            .chain(self.graph.outputs.keys().filter(|n| !self.outputs.contains(*n)).map(|n| ("output", n)));
        for (kind, tensor) in extra {
            self.faults
                .0
                .push(format!("{} has an {kind} {tensor} that this version does not know", self.name));
        }
    }
}

/// Whether `name` is a relative path of plain parts, written with `/`.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains('\\')
        && Path::new(name).components().all(|part| matches!(part, PathPart::Normal(_)))
}

/// The file `name` below `root`, which must not lead out of it by a symbolic link.
pub(super) fn confined(root: &Path, name: &str) -> Result<PathBuf> {
    let path = root.join(name);
    let real = fs::canonicalize(&path).map_err(|e| {
        Error::package(&path, "the file is missing or cannot be reached; copy the package again").because(e)
    })?;
    if !real.starts_with(root) {
        return Err(Error::package(
            &path,
            format!("the file leads out of the package, to {}; copy it into the package", real.display()),
        ));
    }
    Ok(real)
}

/// Checks the size of a file, and its hash when it has at most `hashed_up_to` bytes.
pub(super) fn file(path: &Path, info: &FileInfo, hashed_up_to: u64) -> Result<()> {
    let unreadable = |e: io::Error| Error::package(path, "the file cannot be read").because(e);
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Error::package(path, "this is not a file; copy the package again"));
    }
    size(path, metadata.len(), info)?;
    if info.bytes > hashed_up_to {
        return Ok(());
    }
    let mut hasher = Sha256::new();
    let mut source = File::open(path).map_err(unreadable)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read(&mut buffer).map_err(unreadable)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    hash(path, &hasher.finalize(), info)
}

/// Checks the size and hash of bytes in memory.
pub(super) fn content(path: &Path, bytes: &[u8], info: &FileInfo) -> Result<()> {
    size(path, bytes.len() as u64, info)?;
    hash(path, &Sha256::digest(bytes), info)
}

/// SHA-256 of `bytes`, hexadecimal.
pub(super) fn digest(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn size(path: &Path, found: u64, info: &FileInfo) -> Result<()> {
    if found == info.bytes {
        return Ok(());
    }
    Err(Error::package(
        path,
        format!("the file has {found} bytes, the manifest says {}; copy the package again", info.bytes),
    ))
}

fn hash(path: &Path, found: &[u8], info: &FileInfo) -> Result<()> {
    let found = hexadecimal(found);
    if found == info.sha256 {
        return Ok(());
    }
    Err(Error::package(
        path,
        format!(
            "the content is not what was exported (SHA-256 {found}, the manifest says {}); copy the package again",
            info.sha256
        ),
    ))
}

//! LLaVA-Phi: its components, what they share, and how a prompt is read.

pub mod cancel;
mod chain;
pub mod compile;
pub mod compiled;
mod concat_kv;
pub mod decision;
pub mod decoder;
mod delta_kv;
pub mod embed;
pub mod goldens;
mod head;
pub mod kv_cache;
pub mod measure;
mod memory;
pub mod prefix;
pub mod projector;
mod reading;
mod rotary;
mod scatter_kv;
pub mod selection;
mod shared_kv;
pub mod stamp;
mod together;
pub mod vision;
pub mod visual_tokens;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use ndarray::{Axis, concatenate, s};
use serde::Serialize;

use crate::compiled::CompiledCache;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::machine::{Processor, Roots};
use crate::package::manifest::{HIDDEN_STATES, SnapshotSpec};
use crate::package::{Component, ModelPackage};
use crate::runtime::options::check;
use crate::runtime::{Provider, Refusal, Runtime, Target};
use crate::text::{Prompt, Span, TokenId};
use cancel::Canceler;
use chain::{Chain, Loader, Opened, Serving};
use compiled::{NoticeSink, PackedWeights};
use decision::Decision;
use decoder::{Decoder, Logits};
use embed::TokenEmbedder;
use goldens::{ATTENTION_WEIGHTS, Agreement, Goldens, IMAGE_EMBEDDINGS, LOGITS, PATCH_FEATURES, distance};
use head::Head;
use kv_cache::{KvCache, PositionKey};
use prefix::{PrefixOptions, PrefixReport, Prefixes, Scope, Served};
use projector::{ImageEmbeds, Projector};
use rotary::RotaryTable;
use selection::{ProviderSelection, VariantSelection};
use stamp::SelfCheck;
use vision::{ImageInput, VisionEncoder};
use visual_tokens::VisualTokens;

pub use chain::{ComponentReport, OwnKernels};
#[cfg(feature = "cli")]
pub(crate) use memory::{host as memory_host, host_of as memory_host_of};
pub use reading::{Prefill, Reading};

/// What generation needs from a model: read a prompt, then read one more token at a time.
pub trait CausalModel: Send {
    /// What was read so far.
    type Cache: Send;
    /// A prompt of which a part was read.
    type Reading: Send;

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    fn empty_cache(&mut self) -> Result<Self::Cache>;

    /// How many sequences it has room for.
    fn room(&self) -> Room;

    /// What `cache` holds of a prompt.
    ///
    /// # Errors
    /// [`Error::Request`] when the prompt has another number of images than `images`.
    fn shared(&self, prompt: &Prompt, images: &[Arc<ImageInput>], cache: &Self::Cache) -> Result<Shared>;

    /// Begins to read `prompt`, with `images` in its places, into `cache`. What the cache already holds of the beginning
    /// is not read again, nor is what one of `others` holds, or what was kept of earlier prompts; what the cache holds
    /// beyond that is forgotten.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`].
    fn begin(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut Self::Cache,
        others: &[&Self::Cache],
    ) -> Result<Self::Reading>;

    /// Encodes one image of what was begun with `cache`, or reads at most `most` positions; the last piece gives what
    /// came of it.
    ///
    /// # Errors
    /// [`Error::Graph`] when a graph fails, [`Error::Unsound`] when it gives what is no number; [`Error::Cancelled`] when
    /// [`CausalModel::canceler`] was used. The cache then holds a prefix of the prompt.
    fn read_on(
        &mut self,
        reading: &mut Self::Reading,
        most: usize,
        cache: &mut Self::Cache,
    ) -> Result<Option<Prefill>>;

    /// Reads a whole prompt.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`].
    fn prefill(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut Self::Cache,
    ) -> Result<Prefill> {
        let mut reading = self.begin(prompt, images, cache, &[])?;
        loop {
            if let Some(prefill) = self.read_on(&mut reading, usize::MAX, cache)? {
                return Ok(prefill);
            }
        }
    }

    /// Reads one more token.
    ///
    /// # Errors
    /// As [`CausalModel::read_on`], and [`Error::TooLong`] at the context's end.
    fn decode(&mut self, token: TokenId, cache: &mut Self::Cache) -> Result<Logits>;

    /// Reads one more token of each of several sequences, and gives the logits behind each; as [`CausalModel::decode`]
    /// for each of them, in one run where the model has [`Room`] for that.
    ///
    /// # Errors
    /// For each those of [`CausalModel::decode`]; the others are not concerned.
    fn decode_each(&mut self, tokens: &[TokenId], caches: &mut [&mut Self::Cache]) -> Vec<Result<Logits>>;

    /// The most tokens that [`CausalModel::decode_all`] takes.
    ///
    /// # Errors
    /// [`Error::Request`] when what serves gives the logits of one position a run.
    fn most_at_once(&self) -> Result<usize>;

    /// Reads `tokens`, at least one, in one run, and gives the logits behind each of them.
    ///
    /// # Errors
    /// As [`CausalModel::decode`] and [`CausalModel::most_at_once`].
    fn decode_all(&mut self, tokens: &[TokenId], cache: &mut Self::Cache) -> Result<Vec<Logits>>;

    /// Forgets the last `count` positions of `cache`.
    ///
    /// # Errors
    /// When what is left cannot be kept; the cache is then of no use.
    fn forget(&mut self, count: usize, cache: &mut Self::Cache) -> Result<()>;

    /// A handle that stops what runs, from another thread.
    fn canceler(&self) -> Canceler;

    /// What serves each component, and what refused to.
    fn reports(&self) -> Vec<ComponentReport>;

    /// What is kept of prompts that were read.
    fn prefixes(&self) -> PrefixReport;

    /// Whether the decoder still computes what it was proved to compute before it served.
    ///
    /// # Errors
    /// As [`CausalModel::prefill`].
    fn recheck(&mut self) -> Result<bool>;

    /// Takes what runs `graph` out of service for `reason`, and puts the next candidate there. Every cache that was
    /// made before is then of no use.
    ///
    /// # Errors
    /// [`Error::Provider`] when there is no other that serves.
    fn demote(&mut self, graph: &str, reason: &str) -> Result<Demotion>;
}

/// Sequences that a model has room for at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Room {
    /// How many sequences; what more than one of them say next is read in one run.
    pub sequences: usize,
    /// Positions that all of them may hold together.
    pub positions: usize,
    /// What decided it, where that is less than was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<String>,
}

/// What a cache holds of a prompt, in positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Positions from the start that are those of the prompt.
    pub common: usize,
    /// All that it holds.
    pub held: usize,
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Which variants serve; the manifest's order otherwise.
    pub variants: VariantSelection,
    /// Which providers serve; the manifest's order otherwise.
    pub providers: ProviderSelection,
    /// Libraries of providers that ONNX Runtime comes without. They are loaded when the model is opened, and stay for
    /// the life of the process.
    pub plugins: Vec<(Provider, PathBuf)>,
    /// Options of providers, by their own names; `runtime::options` has those that there are.
    pub provider_options: BTreeMap<Provider, BTreeMap<String, String>>,
    /// The most pieces into which a graph may fall on a provider that compiles it.
    pub max_partitions: usize,
    /// Threads for one graph; ONNX Runtime's own choice otherwise.
    pub threads: Option<usize>,
    /// The most positions that one run of the decoder reads; all at once otherwise.
    pub prefill_chunk: Option<usize>,
    /// Positions that an image takes, the rows chosen as [`visual_tokens`] says; all that it has otherwise.
    pub visual_tokens: Option<usize>,
    /// Sequences that are to be answered at once; memory may allow fewer, see [`Room`].
    pub parallel: usize,
    /// Keep the vision encoder and the projector in memory only while an image is encoded.
    pub low_memory: bool,
    /// The most bytes of memory that the model may take; what the machine has left bounds it in any case.
    pub memory_limit: Option<u64>,
    /// What was measured to be fastest here, tried first for each component for which nothing else is asked.
    pub decision: Option<Arc<Decision>>,
    /// Where what providers compile is kept for later sessions; each session compiles anew otherwise.
    pub compiled: Option<Arc<CompiledCache>>,
    /// What multiplies few-bit weights and attends to the cache on the processor; ONNX Runtime's own kernels otherwise.
    pub kernels: Option<Kernels>,
    /// What becomes of weights in the layout of the processor's kernels.
    pub packed_weights: PackedWeights,
    /// When sessions have to compute the goldens before they serve.
    pub self_check: SelfCheck,
    /// What is kept of prompts that were read.
    pub prefixes: PrefixOptions,
    /// Who is told what takes long, and what is not kept.
    pub notices: Option<NoticeSink>,
}

/// Positions of one run of the decoder, unless something else is asked for: more at once save little time (3 % of 640 on
/// two cores) and take memory with each position.
const PREFILL_CHUNK: usize = 512;

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            variants: VariantSelection::default(),
            providers: ProviderSelection::default(),
            plugins: Vec::new(),
            provider_options: BTreeMap::new(),
            max_partitions: 4,
            threads: None,
            prefill_chunk: Some(PREFILL_CHUNK),
            visual_tokens: None,
            parallel: 1,
            low_memory: false,
            memory_limit: None,
            decision: None,
            compiled: None,
            kernels: Kernels::here(),
            packed_weights: PackedWeights::default(),
            self_check: SelfCheck::default(),
            prefixes: PrefixOptions::default(),
            notices: None,
        }
    }
}

/// A variant that was taken out of service, and what serves instead.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Demotion {
    /// The component.
    pub component: Component,
    /// What served, and why it no longer does.
    pub refusal: Refusal,
    /// The variant that serves now.
    pub variant: String,
    /// The provider that runs it.
    pub provider: Target,
}

/// A loaded LLaVA-Phi.
#[derive(Debug)]
pub struct LlavaPhi {
    loader: Loader,
    goldens: Goldens,
    vision: Stage<VisionEncoder>,
    projector: Stage<Projector>,
    decoder: Stage<Decoder>,
    head: Option<ComponentReport>,
    rotary: Option<Arc<RotaryTable>>,
    embedder: TokenEmbedder,
    visual_tokens: VisualTokens,
    prefixes: Prefixes,
    room: Room,
}

/// A component while it serves, and what may take over from it.
#[derive(Debug)]
struct Stage<T> {
    chain: Chain,
    /// `None` while it is not in memory.
    serving: Option<T>,
    report: ComponentReport,
}

impl LlavaPhi {
    /// Loads the graphs and the embedding table of `package`, each on the first provider that computes what the
    /// package's goldens say. [`crate::runtime::Runtime::start`] must have been called.
    ///
    /// # Errors
    /// [`Error::Package`] for a damaged file and a graph that is not what the manifest says, [`Error::Provider`] when
    /// nothing serves a component or a plugin cannot be loaded, [`Error::Request`] for a variant that the package does
    /// not have, an option that a provider does not take, and as [`VisualTokens::new`].
    pub fn open(package: &ModelPackage, options: &ModelOptions) -> Result<Self> {
        let visual_tokens = VisualTokens::new(package, options.visual_tokens)?;
        register(options)?;
        let loader = Loader::new(package, options);
        let goldens = Goldens::open(package)?;
        let embedder = TokenEmbedder::open(package)?;
        let chain = |component| Chain::new(&loader, component);
        let mut vision =
            Stage::open(chain(Component::VisionEncoder)?, &loader, |opened| check_vision(opened, &goldens))?;
        // What is proved is dropped before the next one is loaded: both would not fit.
        vision.rest(&loader);
        let mut projector =
            Stage::open(chain(Component::Projector)?, &loader, |opened| check_projector(opened, &goldens))?;
        projector.rest(&loader);
        let rotary = RotaryTable::open(package)?.map(Arc::new);
        let mut head = None;
        let mut decoder = Stage::open(chain(Component::Decoder)?, &loader, |opened| {
            check_decoder(opened, &loader, &goldens, &embedder, rotary.as_ref(), &mut head)
        })?;
        let room = make_room(&loader, &mut decoder)?;
        let reports = [&vision.report, &projector.report, &decoder.report];
        let prefixes = open_prefixes(&loader, reports, &decoder)?;
        Ok(Self {
            loader,
            goldens,
            vision,
            projector,
            decoder,
            head,
            rotary,
            embedder,
            visual_tokens,
            prefixes,
            room,
        })
    }

    /// What is read of each image.
    pub fn visual_tokens(&self) -> VisualTokens {
        self.visual_tokens
    }

    /// Positions that a cache can hold: the model's context, unless the decoder's graph has room for fewer.
    ///
    /// # Errors
    /// As [`LlavaPhi::decoder`].
    pub fn capacity(&mut self) -> Result<usize> {
        self.decoder().map(|decoder| decoder.capacity())
    }

    /// The vision encoder, for whoever walks the stages one by one.
    ///
    /// # Errors
    /// When it is not kept in memory and can no longer be loaded.
    pub fn vision(&mut self) -> Result<&mut VisionEncoder> {
        self.vision.awake(&self.loader, |opened| VisionEncoder::new(opened.graph))
    }

    /// Frees the vision encoder and the projector where memory is to be saved, as is done behind an image; for whoever
    /// walks the stages one by one.
    pub fn rest(&mut self) {
        self.vision.rest(&self.loader);
        self.projector.rest(&self.loader);
    }

    /// The projector, for whoever walks the stages one by one.
    ///
    /// # Errors
    /// As [`LlavaPhi::vision`].
    pub fn projector(&mut self) -> Result<&mut Projector> {
        self.projector.awake(&self.loader, |opened| Projector::new(opened.graph))
    }

    /// The token embeddings, for whoever walks the stages one by one.
    pub fn embedder(&self) -> &TokenEmbedder {
        &self.embedder
    }

    /// The decoder, for whoever walks the stages one by one.
    ///
    /// # Errors
    /// [`Error::Stopped`] when it was taken out of service and nothing could take over.
    pub fn decoder(&mut self) -> Result<&mut Decoder> {
        self.decoder.serving.as_mut().ok_or_else(no_decoder)
    }

    /// Reads `head`, with which every prompt begins, and adds to the package what the decoder then holds, so that no
    /// engine that is served by the same decoder reads it again.
    ///
    /// # Errors
    /// [`Error::Request`] for the package inside the program, an empty head, and a cache that the host cannot read;
    /// [`Error::Package`] when the package cannot be written; else as [`CausalModel::prefill`].
    pub fn ship(&mut self, head: &[TokenId]) -> Result<SnapshotSpec> {
        let keys: Vec<PositionKey> = head.iter().map(|id| PositionKey::Token(*id)).collect();
        let mut cache = self.empty_cache()?;
        if let Some(why) = cache.is_closed() {
            return Err(Error::Request(format!("{why}, so that no snapshot can be made of it")));
        }
        let embeds = self.embedder.embed(head)?;
        self.decoder()?.forward(&embeds.view(), &keys, &mut cache)?;
        self.prefixes.ship(&self.loader.package, &cache)
    }

    fn encode(&mut self, image: &ImageInput) -> Result<ImageEmbeds> {
        let features = self.vision()?.encode(&image.pixels().view())?;
        self.vision.rest(&self.loader);
        let features = features.chosen(self.visual_tokens)?;
        let embeds = self.projector()?.project(&features.view());
        self.projector.rest(&self.loader);
        embeds
    }
}

impl<T: Serving> Stage<T> {
    fn open(
        mut chain: Chain,
        loader: &Loader,
        check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
    ) -> Result<Self> {
        let (serving, report) = chain.serve(loader, check)?;
        Ok(Self { chain, serving: Some(serving), report })
    }

    /// What serves, loaded again if it was put to rest.
    fn awake(&mut self, loader: &Loader, build: impl FnOnce(Opened) -> T) -> Result<&mut T> {
        let serving = match self.serving.take() {
            Some(serving) => serving,
            None => build(loader.reopen(&self.report)?),
        };
        Ok(self.serving.insert(serving))
    }

    /// Frees the graph, if memory is to be saved.
    fn rest(&mut self, loader: &Loader) {
        if loader.options.low_memory {
            self.serving = None;
            loader.memory.frees(self.report.component);
        }
    }

    /// Goes on to the next candidate. When none serves, what served before goes on serving.
    fn replace(
        &mut self,
        loader: &Loader,
        reason: &str,
        mut check: impl FnMut(Opened) -> Result<(T, Vec<Agreement>)>,
    ) -> Result<Demotion> {
        loader.forget(self.report.stamp.take().as_ref());
        if self.chain.is_exhausted() && self.report.kernels.is_none() {
            let graph = self.report.component.name().to_owned();
            return Err(Error::Unsound { graph, reason: reason.to_owned() });
        }
        // Freed first: two of them may not fit.
        self.serving = None;
        loader.memory.frees(self.report.component);
        let refusal = self.chain.demote(&self.report, reason);
        match self.chain.serve(loader, &mut check) {
            Ok((serving, report)) => (self.serving, self.report) = (Some(serving), report),
            Err(error) => {
                let (serving, _) = check(loader.reopen(&self.report)?)?;
                self.serving = Some(serving);
                return Err(error);
            }
        }
        let ComponentReport { component, variant, provider, .. } = self.report.clone();
        Ok(Demotion { component, refusal, variant, provider })
    }
}

fn no_decoder() -> Error {
    Error::Stopped("no decoder serves any more".to_owned())
}

/// Loads the plugins of `options`, and refuses what no provider takes, whether or not that provider will be tried.
fn register(options: &ModelOptions) -> Result<()> {
    for (provider, given) in &options.provider_options {
        given.iter().try_for_each(|(key, value)| check(*provider, key, value))?;
    }
    let runtime = Runtime::started()?;
    options.plugins.iter().try_for_each(|(provider, path)| runtime.register_plugin(*provider, path))
}

fn check_vision(opened: Opened, goldens: &Goldens) -> Result<(VisionEncoder, Vec<Agreement>)> {
    let tolerance = opened.tolerance.patch_features;
    let mut vision = VisionEncoder::new(opened.graph);
    if let Some(proved) = opened.proved {
        return Ok((vision, proved));
    }
    let features = vision.encode(&goldens.pixel_values.view())?;
    let distance = goldens::distance(features.view().iter(), goldens.patch_features.iter());
    let mut agreements = vec![Agreement { what: PATCH_FEATURES, distance, tolerance }];
    let wanted = goldens.cls_attention.as_ref().zip(opened.tolerance.cls_attention);
    if let (Some(attention), Some((golden, tolerance))) = (features.attention(), wanted) {
        let distance = goldens::distance(attention.iter(), golden.iter());
        agreements.push(Agreement { what: ATTENTION_WEIGHTS, distance, tolerance });
    }
    Ok((vision, agreements))
}

fn check_projector(opened: Opened, goldens: &Goldens) -> Result<(Projector, Vec<Agreement>)> {
    let tolerance = opened.tolerance.image_embeds;
    let mut projector = Projector::new(opened.graph);
    if let Some(proved) = opened.proved {
        return Ok((projector, proved));
    }
    let embeds = projector.project(&goldens.patch_features.view())?;
    let distance = distance(embeds.rows().iter(), goldens.image_embeds.iter());
    Ok((projector, vec![Agreement { what: IMAGE_EMBEDDINGS, distance, tolerance }]))
}

/// Opens the decoder's head if it needs one, and checks both together.
fn check_decoder(
    opened: Opened,
    loader: &Loader,
    goldens: &Goldens,
    embedder: &TokenEmbedder,
    rotary: Option<&Arc<RotaryTable>>,
    head_report: &mut Option<ComponentReport>,
) -> Result<(Decoder, Vec<Agreement>)> {
    let Opened { graph, kv, tolerance, proved, .. } = opened;
    *head_report = None;
    let kv = kv.ok_or_else(|| Error::graph("decoder", "the manifest does not say how its cache is kept"))?;
    let head = if graph.spec().outputs.contains_key(HIDDEN_STATES) {
        // It is proved by the logits, together with the decoder.
        let unproved = |opened: Opened| Ok((Head::new(opened.graph), Vec::new()));
        let (head, report) = Chain::new(loader, Component::Head)?.serve(loader, unproved)?;
        *head_report = Some(report);
        Some(head)
    } else {
        None
    };
    let spec = loader.package.manifest().decoder.clone();
    let run = loader.options.prefill_chunk.unwrap_or(usize::MAX);
    let mut decoder = Decoder::new(graph, head, spec, kv, rotary.cloned(), run);
    if let Some(proved) = proved {
        return Ok((decoder, proved));
    }
    let distance = golden_distance(&mut decoder, goldens, embedder)?;
    if let (Some(head), Some(report)) = (decoder.head(), head_report) {
        report.placement = head.graph().placement()?;
    }
    Ok((decoder, vec![Agreement { what: LOGITS, distance, tolerance: tolerance.logits }]))
}

/// Reads the golden prompt, then each of the next tokens, and gives the largest distance of their logits.
fn golden_distance(decoder: &mut Decoder, goldens: &Goldens, embedder: &TokenEmbedder) -> Result<f64> {
    let mut cache = decoder.empty_cache()?;
    let before = embedder.embed(&goldens.tokens_before)?;
    let image = goldens.image_embeds.slice(s![0, ..goldens.image_rows, ..]);
    let after = embedder.embed(&goldens.tokens_after)?;
    let prompt = concatenate(Axis(0), &[before.view(), image, after.view()])
        .map_err(|e| Error::Request(format!("the golden prompt cannot be joined: {e}")))?;
    // What stands there is not looked up: the cache is dropped at the end.
    let keys = vec![PositionKey::Token(0); prompt.nrows()];
    let mut logits = decoder.forward(&prompt.view(), &keys, &mut cache)?;
    let mut worst = distance(logits.values().iter(), goldens.logits_after(0).iter());
    for (read, token) in goldens.next_tokens.iter().enumerate() {
        let row = embedder.embed(&[*token])?;
        logits = decoder.forward(&row.view(), &[PositionKey::Token(*token)], &mut cache)?;
        worst = worst.max(distance(logits.values().iter(), goldens.logits_after(read + 1).iter()));
    }
    Ok(worst)
}

/// What stands at each position of `prompt`.
///
/// # Errors
/// [`Error::Request`] when the prompt has another number of images than `images`.
pub fn position_keys(
    prompt: &Prompt,
    images: &[Arc<ImageInput>],
    visual_tokens: VisualTokens,
) -> Result<Vec<PositionKey>> {
    let mut keys = Vec::with_capacity(prompt.positions(visual_tokens.count()));
    for span in prompt.spans() {
        match span {
            Span::Text(ids) => keys.extend(ids.iter().map(|&id| PositionKey::Token(id))),
            Span::Image(index) => {
                let hash = visual_tokens.key(image_at(images, *index)?.hash());
                keys.extend((0..visual_tokens.count()).map(|row| PositionKey::Image { hash, row }));
            }
        }
    }
    Ok(keys)
}

fn image_at(images: &[Arc<ImageInput>], index: usize) -> Result<&Arc<ImageInput>> {
    images.get(index).ok_or_else(|| {
        Error::Request(format!("the prompt asks for image {} and {} were given", index + 1, images.len()))
    })
}

impl CausalModel for LlavaPhi {
    type Cache = KvCache;
    type Reading = Reading;

    fn empty_cache(&mut self) -> Result<KvCache> {
        self.decoder()?.empty_cache()
    }

    fn room(&self) -> Room {
        self.room.clone()
    }

    fn shared(&self, prompt: &Prompt, images: &[Arc<ImageInput>], cache: &KvCache) -> Result<Shared> {
        let common = cache.common_prefix(&position_keys(prompt, images, self.visual_tokens)?);
        Ok(Shared { common, held: cache.len() })
    }

    fn begin(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut KvCache,
        others: &[&KvCache],
    ) -> Result<Reading> {
        self.begin_reading(prompt, images, cache, others)
    }

    fn read_on(
        &mut self,
        reading: &mut Reading,
        most: usize,
        cache: &mut KvCache,
    ) -> Result<Option<Prefill>> {
        self.read_piece(reading, most, cache)
    }

    fn decode(&mut self, token: TokenId, cache: &mut KvCache) -> Result<Logits> {
        let embeds = self.embedder.embed(&[token])?;
        self.decoder()?.forward(&embeds.view(), &[PositionKey::Token(token)], cache)
    }

    fn decode_each(&mut self, tokens: &[TokenId], caches: &mut [&mut KvCache]) -> Vec<Result<Logits>> {
        let failed = |error: Error| {
            // Each is told; the cause stays with the first.
            let text = error.to_string();
            let rest = (1..tokens.len()).map(|_| Err(Error::Stopped(text.clone()))).collect::<Vec<_>>();
            [Err(error)].into_iter().chain(rest).collect()
        };
        let embeds = match self.embedder.embed(tokens) {
            Ok(embeds) => embeds,
            Err(error) => return failed(error),
        };
        let keys: Vec<PositionKey> = tokens.iter().map(|&token| PositionKey::Token(token)).collect();
        match self.decoder() {
            Ok(decoder) => decoder.forward_each(&embeds.view(), &keys, caches),
            Err(error) => failed(error),
        }
    }

    fn most_at_once(&self) -> Result<usize> {
        let served = &self.decoder.report;
        let decoder = self.decoder.serving.as_ref().ok_or_else(no_decoder)?;
        decoder.most_at_once().ok_or_else(|| {
            Error::Request(format!(
                "the decoder {} gives the logits of one position a run, and to look ahead takes those of several; \
                 leave lookup out, choose another variant, or export the package again",
                served.variant
            ))
        })
    }

    fn decode_all(&mut self, tokens: &[TokenId], cache: &mut KvCache) -> Result<Vec<Logits>> {
        self.most_at_once()?;
        let embeds = self.embedder.embed(tokens)?;
        let keys: Vec<PositionKey> = tokens.iter().map(|&token| PositionKey::Token(token)).collect();
        self.decoder()?.forward_all(&embeds.view(), &keys, cache)
    }

    fn forget(&mut self, count: usize, cache: &mut KvCache) -> Result<()> {
        cache.truncate(cache.len().saturating_sub(count))
    }

    fn canceler(&self) -> Canceler {
        self.loader.canceler.clone()
    }

    fn reports(&self) -> Vec<ComponentReport> {
        let stages = [&self.vision.report, &self.projector.report, &self.decoder.report];
        stages.into_iter().chain(self.head.as_ref()).cloned().collect()
    }

    fn prefixes(&self) -> PrefixReport {
        self.prefixes.report()
    }

    fn recheck(&mut self) -> Result<bool> {
        let Some(decoder) = &mut self.decoder.serving else { return Ok(false) };
        let distance = golden_distance(decoder, &self.goldens, &self.embedder)?;
        Ok(self.decoder.report.self_check.iter().all(|check| distance <= check.tolerance))
    }

    fn demote(&mut self, graph: &str, reason: &str) -> Result<Demotion> {
        let Self {
            loader, goldens, vision, projector, decoder, embedder, rotary, head, prefixes, room, ..
        } = self;
        let demotion = match Component::ALL.into_iter().find(|component| component.name() == graph) {
            Some(Component::VisionEncoder) => {
                vision.replace(loader, reason, |opened| check_vision(opened, goldens))
            }
            Some(Component::Projector) => {
                projector.replace(loader, reason, |opened| check_projector(opened, goldens))
            }
            _ => decoder.replace(loader, reason, |opened| {
                check_decoder(opened, loader, goldens, embedder, rotary.as_ref(), head)
            }),
        }?;
        prefixes.replace(scope(loader, [&vision.report, &projector.report, &decoder.report], decoder)?);
        prefixes.open_shipped(&loader.package);
        if demotion.component == Component::Decoder {
            *room = make_room(loader, decoder)?;
        }
        Ok(demotion)
    }
}

/// Room for the sequences that are to be answered at once: at most half of what memory is left is taken for them.
fn make_room(loader: &Loader, decoder: &mut Stage<Decoder>) -> Result<Room> {
    let ModelOptions { parallel, memory_limit, .. } = loader.options;
    let serving = decoder.serving.as_mut().ok_or_else(no_decoder)?;
    let context = serving.capacity();
    let one = |why| Room { sequences: 1, positions: context, limited_by: why };
    if parallel <= 1 {
        return Ok(one(None));
    }
    let position = serving.layout().position_bytes() as u64;
    let wanted = position.saturating_mul((parallel * context) as u64);
    let (bytes, why) = loader.memory.spare(loader, wanted, 2, memory_limit)?;
    let positions = usize::try_from(bytes / position.max(1)).unwrap_or(usize::MAX).max(context);
    if let Err(why) = serving.keep_together(parallel)? {
        return Ok(one(Some(why)));
    }
    let limited_by = (positions < parallel * context).then_some(why);
    Ok(Room { sequences: parallel, positions, limited_by })
}

/// What is kept of prompts, for the model that `reports` tell of.
fn open_prefixes(
    loader: &Loader,
    reports: [&ComponentReport; 3],
    decoder: &Stage<Decoder>,
) -> Result<Prefixes> {
    let ModelOptions { prefixes, memory_limit, low_memory, notices, parallel, .. } = &loader.options;
    let scope = scope(loader, reports, decoder)?;
    let memory = match prefixes.memory {
        Some(limit) => (limit, "the limit that was given".to_owned()),
        None if *low_memory => (0, "low memory was asked for".to_owned()),
        None => {
            let context = loader.package.manifest().decoder.context;
            let full = (context as u64).saturating_mul(scope.layout.position_bytes() as u64);
            loader.memory.spare(loader, full, 8, *memory_limit)?
        }
    };
    let name = &loader.package.manifest().name;
    let directory = prefixes.directory.clone();
    let mut prefixes = Prefixes::new(name, scope, memory, directory, notices.clone());
    if *parallel > 1 {
        prefixes.never_wait();
    }
    prefixes.open_shipped(&loader.package);
    Ok(prefixes)
}

/// What decides the rows that the decoder's cache holds.
fn scope(loader: &Loader, reports: [&ComponentReport; 3], decoder: &Stage<Decoder>) -> Result<Scope> {
    let layout = decoder.serving.as_ref().map(Decoder::layout);
    let layout = layout.ok_or_else(|| Error::Stopped("no decoder serves any more".to_owned()))?;
    let served = |report: &ComponentReport| Served {
        component: report.component.name().to_owned(),
        variant: report.variant.clone(),
        provider: report.provider.to_string(),
        kernels: report.kernels.as_ref().map(|own| own.identity.clone()),
        options: loader.options.provider_options.get(&report.provider.provider).cloned().unwrap_or_default(),
    };
    let processor = Processor::probe(&Roots::default());
    Ok(Scope {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        package: loader.package.content_digest(),
        components: reports.map(served).into(),
        runtime: Runtime::started()?.version().to_owned(),
        processor: format!(
            "{} {} {}",
            std::env::consts::ARCH,
            processor.name,
            processor.instructions.join(" ")
        ),
        layout,
    })
}

//! LLaVA-Phi: its components, what they share, and how a prompt is read.

pub mod cancel;
mod concat_kv;
pub mod decoder;
pub mod embed;
pub mod kv_cache;
pub mod projector;
mod shared_kv;
pub mod vision;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ndarray::s;

use crate::error::{Error, Result};
use crate::package::manifest::{GraphSpec, KvSpec};
use crate::package::{Component, FileSource, ModelPackage};
use crate::runtime::{Graph, GraphSource, Provider, ProviderReport, Refusal, SessionOptions};
use crate::text::{Prompt, Span, TokenId};
use cancel::Canceler;
use decoder::{Decoder, Logits};
use embed::{Run, TokenEmbedder};
use kv_cache::{KvCache, PositionKey};
use projector::{ImageEmbeds, Projector};
use vision::{ImageInput, VisionEncoder};

/// What generation needs from a model: read a prompt, then read one more token at a time.
pub trait CausalModel: Send {
    /// What was read so far.
    type Cache: Send;

    /// A cache with nothing in it.
    ///
    /// # Errors
    /// When its first buffers cannot be allocated.
    fn empty_cache(&mut self) -> Result<Self::Cache>;

    /// Reads `prompt`, with `images` in its places, into `cache`. What the cache already holds of the beginning is not
    /// read again; what it holds beyond that is forgotten.
    ///
    /// # Errors
    /// [`Error::Graph`] when a graph fails; [`Error::Cancelled`] when [`CausalModel::canceler`] was used. The cache then
    /// holds a prefix of the prompt.
    fn prefill(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut Self::Cache,
    ) -> Result<Prefill>;

    /// Reads one more token.
    ///
    /// # Errors
    /// As [`CausalModel::prefill`], and [`Error::TooLong`] at the context's end.
    fn decode(&mut self, token: TokenId, cache: &mut Self::Cache) -> Result<Logits>;

    /// A handle that stops what runs, from another thread.
    fn canceler(&self) -> Canceler;
}

/// What reading a prompt gave.
#[derive(Clone, Debug)]
pub struct Prefill {
    /// The logits of the last position.
    pub logits: Logits,
    /// Positions that the cache already held.
    pub cached: usize,
    /// Images that were encoded; an image whose positions were all cached is not.
    pub images_encoded: usize,
    /// Time for encoding and projecting images.
    pub vision: Duration,
    /// Time for the decoder.
    pub decoder: Duration,
}

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// Serve every component from this variant; the manifest's order otherwise.
    pub variant: Option<String>,
    /// Threads for one graph; ONNX Runtime's own choice otherwise.
    pub threads: Option<usize>,
    /// The most positions that one run of the decoder reads; all at once otherwise.
    pub prefill_chunk: Option<usize>,
}

/// Which variant and provider serve one component, and which did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentReport {
    /// The component.
    pub component: Component,
    /// The variant that serves it.
    pub variant: String,
    /// The provider that runs it, and those that refused.
    pub provider: ProviderReport,
}

/// A loaded LLaVA-Phi.
#[derive(Debug)]
pub struct LlavaPhi {
    vision: VisionEncoder,
    projector: Projector,
    embedder: TokenEmbedder,
    decoder: Decoder,
    reports: Vec<ComponentReport>,
    tokens_per_image: usize,
    prefill_chunk: usize,
    canceler: Canceler,
}

impl LlavaPhi {
    /// Loads the three graphs and the embedding table of `package`. [`crate::runtime::Runtime::start`]
    /// must have been called.
    ///
    /// # Errors
    /// [`Error::Package`] for a damaged file and a graph that is not what the manifest says, [`Error::Provider`] when
    /// nothing serves a component.
    pub fn open(package: &ModelPackage, options: &ModelOptions) -> Result<Self> {
        let mut reports = Vec::new();
        let mut canceler = Canceler::default();
        let mut open = |component| {
            let opened = open_component(package, component, options)?;
            reports.push(opened.report);
            canceler.add(opened.graph.canceler());
            Ok::<_, Error>((opened.graph, opened.kv))
        };
        let (vision, _) = open(Component::VisionEncoder)?;
        let (projector, _) = open(Component::Projector)?;
        let (decoder, kv) = open(Component::Decoder)?;
        let kv =
            kv.ok_or_else(|| Error::graph("decoder", "the manifest does not say how its cache is kept"))?;
        Ok(Self {
            vision: VisionEncoder::new(vision),
            projector: Projector::new(projector),
            embedder: TokenEmbedder::open(package)?,
            decoder: Decoder::new(decoder, package.manifest().decoder.clone(), kv),
            reports,
            tokens_per_image: package.manifest().vision.tokens_per_image,
            prefill_chunk: options.prefill_chunk.unwrap_or(usize::MAX).max(1),
            canceler,
        })
    }

    /// What serves each component, and what refused to.
    pub fn reports(&self) -> &[ComponentReport] {
        &self.reports
    }

    /// The vision encoder, for whoever walks the stages one by one.
    pub fn vision(&mut self) -> &mut VisionEncoder {
        &mut self.vision
    }

    /// The projector, for whoever walks the stages one by one.
    pub fn projector(&mut self) -> &mut Projector {
        &mut self.projector
    }

    /// The token embeddings, for whoever walks the stages one by one.
    pub fn embedder(&self) -> &TokenEmbedder {
        &self.embedder
    }

    /// The decoder, for whoever walks the stages one by one.
    pub fn decoder(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    fn encode(&mut self, image: &ImageInput) -> Result<ImageEmbeds> {
        let features = self.vision.encode(image.pixels())?;
        self.projector.project(&features)
    }
}

/// What stands at each position of `prompt`.
///
/// # Errors
/// [`Error::Request`] when the prompt has another number of images than `images`.
pub fn position_keys(
    prompt: &Prompt,
    images: &[Arc<ImageInput>],
    tokens_per_image: usize,
) -> Result<Vec<PositionKey>> {
    let mut keys = Vec::with_capacity(prompt.positions(tokens_per_image));
    for span in prompt.spans() {
        match span {
            Span::Text(ids) => keys.extend(ids.iter().map(|&id| PositionKey::Token(id))),
            Span::Image(index) => {
                let hash = *image_at(images, *index)?.hash();
                keys.extend((0..tokens_per_image).map(|row| PositionKey::Image { hash, row }));
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

    fn empty_cache(&mut self) -> Result<KvCache> {
        self.decoder.empty_cache()
    }

    fn prefill(
        &mut self,
        prompt: &Prompt,
        images: &[Arc<ImageInput>],
        cache: &mut KvCache,
    ) -> Result<Prefill> {
        let tokens_per_image = self.tokens_per_image;
        let keys = position_keys(prompt, images, tokens_per_image)?;
        // The last position is read again even when it is cached: its logits are what is wanted.
        let cached = cache.common_prefix(&keys).min(keys.len().saturating_sub(1));
        cache.truncate(cached)?;

        let begin = Instant::now();
        let mut encoded: HashMap<[u8; 32], ImageEmbeds> = HashMap::new();
        for (index, start) in image_starts(prompt, tokens_per_image) {
            let image = image_at(images, index)?;
            if start + tokens_per_image > cached && !encoded.contains_key(image.hash()) {
                let embeds = self.encode(image)?;
                encoded.insert(*image.hash(), embeds);
            }
        }
        let vision = begin.elapsed();

        let begin = Instant::now();
        cache.reserve(keys.len())?;
        let runs = runs_after(prompt, images, &encoded, tokens_per_image, cached)?;
        let embeds = self.embedder.splice(&runs)?;
        let mut logits = None;
        let mut at = cached;
        while at < keys.len() {
            let end = at.saturating_add(self.prefill_chunk).min(keys.len());
            let rows = embeds.slice(s![at - cached..end - cached, ..]);
            logits = Some(self.decoder.forward(&rows, &keys[at..end], cache)?);
            at = end;
        }
        let logits = logits.ok_or_else(|| Error::Request("the prompt is empty; ask something".to_owned()))?;
        Ok(Prefill { logits, cached, images_encoded: encoded.len(), vision, decoder: begin.elapsed() })
    }

    fn decode(&mut self, token: TokenId, cache: &mut KvCache) -> Result<Logits> {
        let embeds = self.embedder.embed(&[token])?;
        self.decoder.forward(&embeds.view(), &[PositionKey::Token(token)], cache)
    }

    fn canceler(&self) -> Canceler {
        self.canceler.clone()
    }
}

/// Each image of `prompt` and the position where it begins.
fn image_starts(prompt: &Prompt, tokens_per_image: usize) -> Vec<(usize, usize)> {
    let mut starts = Vec::new();
    let mut at = 0;
    for span in prompt.spans() {
        match span {
            Span::Text(ids) => at += ids.len(),
            Span::Image(index) => {
                starts.push((*index, at));
                at += tokens_per_image;
            }
        }
    }
    starts
}

/// The positions of `prompt` from `cached` on.
fn runs_after<'a>(
    prompt: &'a Prompt,
    images: &[Arc<ImageInput>],
    encoded: &'a HashMap<[u8; 32], ImageEmbeds>,
    tokens_per_image: usize,
    cached: usize,
) -> Result<Vec<Run<'a>>> {
    let mut runs = Vec::new();
    let mut at = 0;
    for span in prompt.spans() {
        let length = match span {
            Span::Text(ids) => ids.len(),
            Span::Image(_) => tokens_per_image,
        };
        let skip = cached.saturating_sub(at).min(length);
        at += length;
        if skip == length {
            continue;
        }
        runs.push(match span {
            Span::Text(ids) => Run::Tokens(&ids[skip..]),
            Span::Image(index) => {
                let embeds = encoded
                    .get(image_at(images, *index)?.hash())
                    .ok_or_else(|| Error::Request(format!("image {} was not encoded", index + 1)))?;
                Run::Image { embeds, rows: skip..length }
            }
        });
    }
    Ok(runs)
}

struct OpenedComponent {
    graph: Graph,
    kv: Option<KvSpec>,
    report: ComponentReport,
}

/// Opens the first choice that a provider serves, keeping why the others did not.
fn open_component(
    package: &ModelPackage,
    component: Component,
    options: &ModelOptions,
) -> Result<OpenedComponent> {
    let mut refused = Vec::new();
    for choice in package.choices(component, options.variant.as_deref())? {
        let Some((spec, kv)) = package.graph(component, &choice.variant) else { continue };
        let opened = choice.provider.parse().and_then(|provider: Provider| {
            let session = SessionOptions { threads: options.threads, provider };
            let graph = Graph::open(component.name(), &graph_source(package, spec)?, spec, &session)
                .map_err(|error| of_package(package, spec, error))?;
            Ok((provider, graph))
        });
        match opened {
            Ok((chosen, graph)) => {
                let provider = ProviderReport { chosen, refused };
                let report = ComponentReport { component, variant: choice.variant.clone(), provider };
                return Ok(OpenedComponent { graph, kv, report });
            }
            Err(Error::Provider { name, reason }) => refused.push(Refusal { provider: name, reason }),
            Err(error) => return Err(error),
        }
    }
    let reasons: Vec<String> =
        refused.iter().map(|refusal| format!("{}: {}", refusal.provider, refusal.reason)).collect();
    Err(Error::Provider {
        name: refused.first().map_or_else(|| "none".to_owned(), |refusal| refusal.provider.clone()),
        reason: format!("nothing serves the {} ({})", component.name(), reasons.join("; ")),
    })
}

/// A graph that does not open is a fault of the package, and the file is what must be mended.
fn of_package(package: &ModelPackage, spec: &GraphSpec, error: Error) -> Error {
    match error {
        Error::Graph { graph, reason, source } => {
            let path = package.display_path(&spec.path);
            Error::Package { path, reason: format!("as the {graph}: {reason}"), source }
        }
        error => error,
    }
}

fn graph_source(package: &ModelPackage, spec: &GraphSpec) -> Result<GraphSource> {
    match package.file(&spec.path)? {
        FileSource::Path(path) => Ok(GraphSource::File(path)),
        FileSource::Memory(graph) => {
            let data = spec.data.iter().map(|name| {
                let file = name.rsplit('/').next().unwrap_or(name).to_owned();
                match package.file(name)? {
                    FileSource::Memory(bytes) => Ok((file, bytes)),
                    FileSource::Path(path) => {
                        Err(Error::package(path, "the file lies on disk and its graph in the program"))
                    }
                }
            });
            Ok(GraphSource::Memory { graph, data: data.collect::<Result<_>>()? })
        }
    }
}

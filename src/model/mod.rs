//! LLaVA-Phi: its components, what they share, and how a prompt is read.

pub mod cancel;
mod causal;
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
mod options;
pub mod prefix;
pub mod projector;
mod proof;
mod reading;
mod rotary;
mod scatter_kv;
pub mod selection;
mod shared_kv;
mod stage;
pub mod stamp;
mod together;
pub mod vision;
pub mod visual_tokens;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::machine::{Processor, Roots};
use crate::package::manifest::SnapshotSpec;
use crate::package::{Component, ModelPackage};
use crate::runtime::Runtime;
use crate::runtime::options::check;
use crate::text::{Prompt, Span, TokenId};
use cancel::Canceler;
use chain::{Chain, Loader};
use decoder::{Decoder, Logits};
use embed::TokenEmbedder;
use goldens::Goldens;
use kv_cache::{KvCache, PositionKey};
use prefix::{PrefixReport, Prefixes, Scope, Served};
use projector::{ImageEmbeds, Projector};
use proof::{check_decoder, check_projector, check_vision, golden_distance};
use rotary::RotaryTable;
use stage::Stage;
use vision::{ImageInput, VisionEncoder};
use visual_tokens::VisualTokens;

pub use causal::{CausalModel, Demotion, Room, Shared};
pub use chain::{ComponentReport, OwnKernels};
#[cfg(feature = "cli")]
pub(crate) use memory::{host as memory_host, host_of as memory_host_of};
pub use options::ModelOptions;
pub use reading::{Prefill, Reading};

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
        let reports = [vision.report(), projector.report(), decoder.report()];
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
        self.decoder.serving_mut()
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

/// Loads the plugins of `options`, and refuses what no provider takes, whether or not that provider will be tried.
fn register(options: &ModelOptions) -> Result<()> {
    for (provider, given) in &options.provider_options {
        given.iter().try_for_each(|(key, value)| check(*provider, key, value))?;
    }
    let runtime = Runtime::started()?;
    options.plugins.iter().try_for_each(|(provider, path)| runtime.register_plugin(*provider, path))
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
        let served = self.decoder.report();
        let decoder = self.decoder.serving()?;
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
        let stages = [self.vision.report(), self.projector.report(), self.decoder.report()];
        stages.into_iter().chain(self.head.as_ref()).cloned().collect()
    }

    fn prefixes(&self) -> PrefixReport {
        self.prefixes.report()
    }

    fn recheck(&mut self) -> Result<bool> {
        let Ok(decoder) = self.decoder.serving_mut() else { return Ok(false) };
        let distance = golden_distance(decoder, &self.goldens, &self.embedder)?;
        Ok(self.decoder.report().self_check.iter().all(|check| distance <= check.tolerance))
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
        prefixes.replace(scope(loader, [vision.report(), projector.report(), decoder.report()], decoder)?);
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
    let serving = decoder.serving_mut()?;
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
    let layout = decoder.serving()?.layout();
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

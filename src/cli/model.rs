//! Arguments that say which model answers, how it is loaded, and how it sees images.

use std::{
    ffi::OsString,
    io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use clap::ValueEnum;

use super::context::Context;
use super::session::{SessionArguments, parse_size};
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::image::{Limits, read_file, read_stream};
use crate::machine::{Machine, Roots};
use crate::model::ModelOptions;
use crate::model::decision::{self, Decision, DecisionKey, Found};
use crate::model::prefix::PrefixOptions;
use crate::model::selection::{ProviderSelection, VariantSelection};
use crate::model::stamp::SelfCheck;
use crate::model::vision::ImageInput;
use crate::model::visual_tokens::{VisualTokens, VisualTokensReport};
use crate::package::ModelPackage;
use crate::package::manifest::Fit;
use crate::runtime::Runtime;

/// Which model answers, and how images are read.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArguments {
    /// The package's directory; the miniature model inside this program otherwise
    #[arg(long, value_name = "DIR", env = "LLAVA_PHI_MODEL")]
    model: Option<PathBuf>,

    /// Run every component that it has from this variant, or each from its own: vision=cpu-int8,decoder=cpu-int4
    #[arg(long, value_name = "LIST")]
    variant: Option<VariantSelection>,

    /// Providers in order of preference, for all components or for each: cuda,cpu or vision=coreml,decoder=only:cpu
    #[arg(long, value_name = "LIST", env = "LLAVA_PHI_PROVIDER")]
    provider: Option<ProviderSelection>,

    /// Keep the vision encoder in memory only while an image is encoded
    #[arg(long)]
    low_memory: bool,

    /// Positions that an image takes: fewer are read sooner and say less; all that the model was trained with otherwise
    #[arg(long, value_name = "N")]
    visual_tokens: Option<usize>,

    #[command(flatten)]
    session: SessionArguments,

    /// When each session computes the package's goldens before it serves: once for the same files, settings, library and
    /// machine, or at each start
    #[arg(long, value_enum, default_value_t = Check::Stamped)]
    self_check: Check,

    /// Do not use what `llava-phi tune` decided
    #[arg(long)]
    no_tuned: bool,

    /// Threads of one graph; what was tuned, or ONNX Runtime's own choice otherwise
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<NonZeroUsize>,

    /// Read the prompt in runs of at most this many positions; 512 otherwise
    #[arg(long, value_name = "POSITIONS")]
    prefill_chunk: Option<NonZeroUsize>,

    /// The most memory for what other conversations read, such as 500MB; 0 keeps none, the engine chooses otherwise
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    prefix_cache: Option<u64>,

    /// How a picture that is not square is made so; `auto` is what the model was trained with
    #[arg(long, value_enum, default_value_t = ImageMode::Auto)]
    image_mode: ImageMode,

    /// The most bytes that an image file may have
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_bytes)]
    max_image_bytes: u64,

    /// The most pixels that an image may have
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_pixels)]
    max_image_pixels: u64,
}

/// Reads a number of threads that the machine can use: far more of them stand in each other's way for ever.
pub(super) fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    let most = thread::available_parallelism().map_or(1, NonZeroUsize::get).saturating_mul(4);
    match text.parse::<NonZeroUsize>() {
        Ok(threads) if threads.get() <= most => Ok(threads),
        _ => Err(format!("give 1 to {most} threads, four for each processor at most")),
    }
}

/// When goldens are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Check {
    /// Once, and its result is kept in the cache
    Stamped,
    /// At each start
    Always,
}

/// How a picture that is not square is made so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ImageMode {
    /// As the manifest says
    Auto,
    /// The middle is kept
    Crop,
    /// The shorter side is padded
    Pad,
}

impl ModelArguments {
    pub(super) fn package(&self) -> Result<ModelPackage> {
        open_package(self.model.as_deref())
    }

    /// Opens the package and the engine over it.
    pub(super) fn open_engine(&self, context: &Context) -> Result<Engine> {
        self.open_engine_for(context, ModelOptions::default().parallel, None)
    }

    /// The same, for `parallel` requests at once and at most `queue` that wait beyond them.
    pub(super) fn open_engine_for(
        &self,
        context: &Context,
        parallel: usize,
        queue: Option<usize>,
    ) -> Result<Engine> {
        self.open_engine_of(&self.package()?, context, parallel, queue)
    }

    /// The same, over a package that was opened.
    pub(super) fn open_engine_of(
        &self,
        package: &ModelPackage,
        context: &Context,
        parallel: usize,
        queue: Option<usize>,
    ) -> Result<Engine> {
        let runtime = context.start_runtime()?;
        let model = ModelOptions { parallel, ..self.model_options(context, runtime, package)? };
        let options = EngineOptions { library: context.library(), model, limits: self.limits(), queue };
        let engine = Engine::open(package, &options)?;
        context.tell_visual_tokens(engine.facts());
        Ok(engine)
    }

    /// What `llava-phi tune` decided for `package` here; a notice says when there is something that does not count.
    fn decision(
        &self,
        context: &Context,
        runtime: &Runtime,
        package: &ModelPackage,
    ) -> Option<Arc<Decision>> {
        let cache = context.cache_dir().filter(|_| !self.no_tuned)?;
        // To know the machine takes longer than to see that nothing was ever tuned.
        if !decision::directory(&cache).is_dir() {
            return None;
        }
        let key = DecisionKey::new(&Machine::probe(&Roots::default()), runtime.version(), package);
        match Decision::find(&cache, &key, package) {
            Found::Decision(decision) => Some(decision.into()),
            Found::Absent => None,
            Found::Ignored(reason) => {
                context.format().say(format_args!(
                    "notice: {reason}; llava-phi tune decides anew, --no-tuned says nothing of it"
                ));
                None
            }
        }
    }

    /// How the model of `package` is loaded, with what was decided for it here.
    pub(super) fn model_options(
        &self,
        context: &Context,
        runtime: &Runtime,
        package: &ModelPackage,
    ) -> Result<ModelOptions> {
        let session = self.session.options(context)?;
        Ok(ModelOptions {
            variants: self.variant.clone().unwrap_or_default(),
            providers: self.provider.clone().unwrap_or_default(),
            threads: self.threads.map(NonZeroUsize::get),
            prefill_chunk: self.prefill_chunk.map_or(session.prefill_chunk, |chunk| Some(chunk.get())),
            low_memory: self.low_memory,
            self_check: match self.self_check {
                Check::Stamped => SelfCheck::Stamped,
                Check::Always => SelfCheck::Always,
            },
            visual_tokens: self.visual_tokens,
            decision: self.decision(context, runtime, package),
            prefixes: PrefixOptions {
                memory: self.prefix_cache,
                directory: context.snapshots().filter(|snapshots| snapshots.limit() > 0).map(Arc::new),
            },
            notices: Some(context.notices()),
            ..session
        })
    }

    /// What is known of reading so much of each image; `None` when all is read.
    pub(super) fn visual_tokens(&self, package: &ModelPackage) -> Result<Option<VisualTokensReport>> {
        let tokens = VisualTokens::new(package, self.visual_tokens)?;
        Ok(VisualTokensReport::new(package, tokens))
    }

    /// The package's directory, where one was named.
    #[cfg(feature = "server")]
    pub(super) fn directory(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// The most bytes that models may take.
    #[cfg(feature = "server")]
    pub(super) fn memory_limit(&self) -> Option<u64> {
        self.session.memory_limit()
    }

    pub(super) fn limits(&self) -> Limits {
        Limits { max_bytes: self.max_image_bytes, max_pixels: self.max_image_pixels }
    }

    pub(super) fn fit(&self) -> Option<Fit> {
        match self.image_mode {
            ImageMode::Auto => None,
            ImageMode::Crop => Some(Fit::CenterCrop),
            ImageMode::Pad => Some(Fit::Pad),
        }
    }

    /// Reads the images at `paths`, of which one may be `-` for standard input.
    pub(super) fn images(&self, engine: &Engine, paths: &[OsString]) -> Result<Vec<Arc<ImageInput>>> {
        if paths.iter().filter(|path| *path == STDIN).count() > 1 {
            return Err(Error::Request("standard input holds one image; give `-` only once".to_owned()));
        }
        paths.iter().map(|path| self.image(engine, path)).collect()
    }

    fn image(&self, engine: &Engine, path: &OsString) -> Result<Arc<ImageInput>> {
        let (name, bytes) = self.read_image(path)?;
        engine.prepare_image(&name, &bytes, self.fit())
    }

    /// Reads the image file at `path`, or from standard input for `-`; gives what errors call it, and its bytes.
    pub(super) fn read_image(&self, path: &OsString) -> Result<(String, Vec<u8>)> {
        if path == STDIN {
            let name = "stdin".to_owned();
            return read_stream(&name, io::stdin().lock(), &self.limits()).map(|bytes| (name, bytes));
        }
        let path = Path::new(path);
        read_file(path, &self.limits()).map(|bytes| (path.display().to_string(), bytes))
    }
}

/// The path that stands for standard input.
pub(super) const STDIN: &str = "-";

/// The package in `directory`, or the one inside this program.
pub(super) fn open_package(directory: Option<&Path>) -> Result<ModelPackage> {
    directory.map_or_else(ModelPackage::embedded, ModelPackage::open)
}

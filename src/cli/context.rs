//! Arguments that commands share, and what they stand for.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread,
};

use clap::ValueEnum;

use super::form::FormArguments;
use super::say::LogFormat;
use super::session::{SessionArguments, parse_size};

use crate::chat::conversation::{Message, Part};
use crate::chat::template;
use crate::compiled::CompiledCache;
use crate::engine::{Engine, EngineOptions, Request};
use crate::error::{Error, Result};
use crate::generate::params::{GenerateParams, Sampling};
use crate::image::{Limits, read_file, read_stream};
use crate::machine::{Machine, Roots};
use crate::model::ModelOptions;
use crate::model::compiled::NoticeSink;
use crate::model::decision::{self, Decision, DecisionKey, Found};
use crate::model::prefix::{PrefixDirectory, PrefixOptions};
use crate::model::selection::{ProviderSelection, VariantSelection};
use crate::model::stamp::SelfCheck;
use crate::model::vision::ImageInput;
use crate::model::visual_tokens::{VisualTokens, VisualTokensReport};
use crate::package::ModelPackage;
use crate::package::manifest::Fit;
use crate::runtime::{LibraryOptions, Runtime};
use crate::text::TokenId;

/// What every command takes.
#[derive(Debug, Default, clap::Args)]
pub(super) struct Context {
    /// Never touch the network
    #[arg(long, global = true, env = "LLAVA_PHI_OFFLINE", value_parser = clap::builder::FalseyValueParser::new())]
    offline: bool,

    /// A TOML file of options that need not be given each time, as `provider = "cuda"`; their names are those of options
    #[arg(long, global = true, value_name = "FILE", env = super::config::VARIABLE)]
    config: Option<PathBuf>,

    /// The ONNX Runtime library to use, instead of searching for one
    #[arg(long, global = true, value_name = "FILE")]
    runtime_library: Option<PathBuf>,

    /// Where this program keeps what it fetched, measured and compiled, instead of the user's cache directory; only such
    /// a directory also gets snapshots of prompts with images, so that another process need not read them again
    #[arg(long, global = true, value_name = "DIR", env = "LLAVA_PHI_CACHE")]
    cache_dir: Option<PathBuf>,

    /// The most that compiled graphs may take there, such as 20GB; what was used longest ago goes first
    #[arg(long, visible_alias = "limit", global = true, value_name = "SIZE", env = "LLAVA_PHI_CACHE_LIMIT")]
    #[arg(value_parser = parse_size, default_value = "20GB")]
    cache_limit: u64,

    /// The most that snapshots of prompts may take in --cache-dir; what was used longest ago goes first, 0 keeps none
    #[arg(long, global = true, value_name = "SIZE", env = "LLAVA_PHI_SNAPSHOT_LIMIT")]
    #[arg(value_parser = parse_size, default_value = "4GB")]
    snapshot_limit: u64,

    /// What is said on standard error looks like this.
    #[arg(skip)]
    format: LogFormat,

    /// Whether nothing can be written to the cache, once that was looked at.
    #[arg(skip)]
    closed: OnceLock<bool>,
}

impl Context {
    /// Says on standard error what there is to say as `format` has it.
    pub(super) fn speak(&mut self, format: LogFormat) {
        self.format = format;
    }

    /// How things are said on standard error.
    pub(super) fn format(&self) -> LogFormat {
        self.format
    }

    /// Tells on standard error what takes long.
    pub(super) fn notices(&self) -> NoticeSink {
        let format = self.format;
        NoticeSink::new(move |notice| format.say(notice))
    }

    /// Says once where nothing can be kept between runs; such a place is then used only for what is there already.
    pub(super) fn check_cache(&self) {
        self.closed.get_or_init(|| {
            let written = self.cache_dir().map_or(Ok(()), |dir| crate::disk::check_writable(&dir));
            if let Err(error) = &written {
                self.format
                    .say(format_args!("notice: nothing is kept for later runs: {error} (--cache-dir)"));
            }
            written.is_err()
        });
    }

    /// Whether `dir`, which lies in the cache, is of use: it can be written, or there is something to be found.
    fn is_of_use(&self, dir: &Path) -> bool {
        !self.closed.get().copied().unwrap_or_default() || dir.is_dir()
    }

    /// Where ONNX Runtime is looked for.
    pub(super) fn library(&self) -> LibraryOptions {
        let defaults = LibraryOptions::default();
        LibraryOptions {
            cache: self.cache_dir.clone().or(defaults.cache),
            explicit: self.runtime_library.clone(),
            environment: path_variable("ORT_DYLIB_PATH"),
            executable_dir: env::current_exe().ok().and_then(|file| file.parent().map(Path::to_owned)),
            python_environment: path_variable("VIRTUAL_ENV"),
            offline: self.offline,
            ..defaults
        }
    }

    /// Where this program keeps things between runs; `None` where the system names no place.
    pub(super) fn cache_dir(&self) -> Option<PathBuf> {
        self.library().cache
    }

    /// Where compiled graphs are kept.
    pub(super) fn compiled_dir(&self) -> Option<PathBuf> {
        self.cache_dir().map(|dir| dir.join("compiled"))
    }

    /// What keeps compiled graphs, where there is a place for it.
    pub(super) fn compiled_cache(&self) -> Option<Arc<CompiledCache>> {
        let dir = self.compiled_dir().filter(|dir| self.is_of_use(dir))?;
        Some(CompiledCache::at(&dir, self.cache_limit).into())
    }

    /// Snapshots of prompts, where a directory was given for them.
    pub(super) fn snapshots(&self) -> Option<PrefixDirectory> {
        let dir = Some(self.cache_dir.as_ref()?.join("prefixes")).filter(|dir| self.is_of_use(dir))?;
        Some(PrefixDirectory::at(&dir, self.snapshot_limit))
    }

    /// The most bytes that compiled graphs may take.
    pub(super) fn cache_limit(&self) -> u64 {
        self.cache_limit
    }

    /// Starts ONNX Runtime, with a notice when it has to be fetched.
    pub(super) fn start_runtime(&self) -> Result<&'static Runtime> {
        Runtime::start(&self.library(), &mut super::runtime::progress(self.format))
    }

    /// Which ONNX Runtime would be used, without fetching one.
    pub(super) fn runtime_version(&self) -> String {
        let options = LibraryOptions { offline: true, ..self.library() };
        match Runtime::start(&options, &mut |_| {}) {
            Ok(runtime) => format!("ONNX Runtime {}", runtime.version()),
            Err(_) => "ONNX Runtime is not installed; it is fetched when it is first needed".to_owned(),
        }
    }
}

fn path_variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

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
        if let Some(report) = &engine.facts().visual_tokens {
            context.format.say(format_args!("notice: {report}"));
        }
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
                context.format.say(format_args!(
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

/// Refuses a question of nothing but white space.
pub(super) fn check_question(question: &str) -> Result<()> {
    if question.trim().is_empty() {
        return Err(Error::Request("the question is empty; ask something".to_owned()));
    }
    Ok(())
}

/// The path that stands for standard input.
pub(super) const STDIN: &str = "-";

/// The package in `directory`, or the one inside this program.
pub(super) fn open_package(directory: Option<&Path>) -> Result<ModelPackage> {
    directory.map_or_else(ModelPackage::embedded, ModelPackage::open)
}

/// How an answer is made.
#[derive(Debug, clap::Args)]
pub(super) struct GenerationArguments {
    /// The system text, instead of the one that the model was trained with
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,

    /// The most tokens of an answer; what the context leaves otherwise
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,

    /// Sample at this temperature; 0 or nothing takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,

    /// Sample among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,

    /// Sample among this many of the likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Sample among tokens that are at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,

    /// Divide the score of tokens that occurred by this
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,

    /// Subtract this from the score of a token for each time that the answer holds it, from -2 to 2
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,

    /// Subtract this once from the score of a token that the answer holds, from -2 to 2
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,

    /// Add VALUE, from -100 to 100, to the score of token ID; may be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_bias)]
    logit_bias: Vec<(TokenId, f32)>,

    /// Seed of the sampling; the same seed gives the same answer on every platform
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// Guess up to N tokens ahead from what was read and written, and read them in one run: the same answer, sooner
    /// where it repeats; 7 when no number is given
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "7")]
    lookup: Option<NonZeroUsize>,

    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[command(flatten)]
    pub(super) form: FormArguments,
}

impl GenerationArguments {
    /// A single question about `images`, which stand before it, and its parameters.
    pub(super) fn request(
        &self,
        engine: &Engine,
        images: Vec<Arc<ImageInput>>,
        question: &str,
        params: GenerateParams,
    ) -> Result<Request> {
        let parts = (0..images.len()).map(Part::Image).chain([Part::Text(question.to_owned())]);
        let message = Message::user(parts);
        let pieces = template::render(&engine.facts().template, self.system.as_deref(), &[message])?;
        Ok(Request::new(engine.prompt(&pieces)?, images, params))
    }

    /// The parameters, checked against each other, with the `logprobs` likeliest tokens of each place.
    pub(super) fn params(&self, logprobs: Option<usize>) -> Result<GenerateParams> {
        let sampling = Sampling::from_options(self.temperature, self.top_p, self.top_k, self.min_p)?;
        let seed = sampling.seed(self.seed)?;
        let params = GenerateParams {
            max_new_tokens: self.max_new_tokens,
            sampling,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: biases(&self.logit_bias)?,
            logprobs,
            stop: self.stop.clone(),
            seed,
            lookup: self.lookup,
            constraint: None,
        };
        params.validate()?;
        Ok(params)
    }
}

/// A token and what is added to its logit, from the command line.
fn parse_bias(text: &str) -> std::result::Result<(TokenId, f32), String> {
    let pair = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    pair.ok_or_else(|| "a bias is a token's id and a number, such as 262=-1.5".to_owned())
}

fn biases(given: &[(TokenId, f32)]) -> Result<BTreeMap<TokenId, f32>> {
    let mut biases = BTreeMap::new();
    for (id, bias) in given {
        if biases.insert(*id, *bias).is_some() {
            return Err(Error::Request(format!("--logit-bias names token {id} twice; name it once")));
        }
    }
    Ok(biases)
}

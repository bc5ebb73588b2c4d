//! Arguments that all commands share, and what they stand for.

use std::{
    env,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use super::say::LogFormat;
use super::session::parse_size;
use crate::compiled::CompiledCache;
use crate::engine::ModelFacts;
use crate::error::Result;
use crate::model::compiled::NoticeSink;
use crate::model::prefix::PrefixDirectory;
use crate::runtime::{LibraryOptions, Runtime};

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

    /// Tells on standard error what is known of a model that reads less than all of an image.
    pub(super) fn tell_visual_tokens(&self, facts: &ModelFacts) {
        if let Some(report) = &facts.visual_tokens {
            self.format.say(format_args!("notice: {report}"));
        }
    }

    /// Says once where nothing can be kept between runs; such a place is then used only for what is there already.
    #[cfg(feature = "server")]
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

//! Many answers: the handle that everybody holds.

mod ahead;
pub mod bench;
pub mod cancel;
mod choices;
mod entry;
pub mod event;
mod load;
mod scheduler;
pub mod stream;
mod worker;

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use crate::error::{Error, Result};
use crate::generate::params::GenerateParams;
use crate::image::{Limits, Preprocessor, decode};
use crate::model::vision::ImageInput;
use crate::model::visual_tokens::{VisualTokens, VisualTokensReport};
use crate::model::{CausalModel, ComponentReport, LlavaPhi, ModelOptions};
use crate::package::ModelPackage;
use crate::package::manifest::{Fit, Manifest, Template};
use crate::runtime::{LibraryOptions, Runtime};
use crate::text::{Piece, Prompt, Span, TokenId, Tokenizer};
use cancel::CancelToken;
use entry::Job;
use event::Sink;
use load::LoadReport;
use stream::GenerationStream;
use worker::Worker;

pub use load::EngineLoad;
pub use scheduler::Priority;

/// How an engine is opened.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Where ONNX Runtime is looked for.
    pub library: LibraryOptions,
    /// How the model is loaded.
    pub model: ModelOptions,
    /// What an image may take.
    pub limits: Limits,
    /// Requests that may wait beyond those that are worked on; any number otherwise.
    pub queue: Option<usize>,
}

/// What the engine and its callers need to know about a model.
#[derive(Debug)]
pub struct ModelFacts {
    /// The package's name.
    pub name: String,
    /// Positions that the context holds, or the decoder's cache where it holds fewer.
    pub context: usize,
    /// Positions that one image takes.
    pub tokens_per_image: usize,
    /// What is known of that, when an image has more.
    pub visual_tokens: Option<VisualTokensReport>,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// How a conversation is laid out.
    pub template: Template,
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
}

impl ModelFacts {
    /// What `package` says about its model.
    ///
    /// # Errors
    /// [`Error::Package`] when the tokenizer cannot be read or has another number of entries than the manifest says.
    pub fn new(package: &ModelPackage) -> Result<Self> {
        let Manifest { name, text, vision, decoder, .. } = package.manifest();
        let path = package.display_path(&text.tokenizer);
        let tokenizer = Tokenizer::from_bytes(&path, &package.read(&text.tokenizer)?)?;
        tokenizer.check(&path, text)?;
        Ok(Self {
            name: name.clone(),
            context: decoder.context,
            tokens_per_image: vision.tokens_per_image,
            visual_tokens: None,
            eos: text.eos.clone(),
            template: text.template.clone(),
            tokenizer: Arc::new(tokenizer),
        })
    }

    /// Images take as many positions as `tokens` says.
    pub(crate) fn read_of_images(&mut self, package: &ModelPackage, tokens: VisualTokens) {
        self.tokens_per_image = tokens.count();
        self.visual_tokens = VisualTokensReport::new(package, tokens);
    }
}

/// One question to the model.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is read before the answer; see [`Engine::prompt`].
    pub prompt: Prompt,
    /// The images that the prompt names, by index.
    pub images: Vec<Arc<ImageInput>>,
    /// Limits and sampling.
    pub params: GenerateParams,
    /// Gives up on the request.
    pub cancel: CancelToken,
    /// Who goes first where several wait.
    pub priority: Priority,
    /// When the answer is of no more use: the request then ends with [`Error::Deadline`].
    pub deadline: Option<Instant>,
}

impl Request {
    /// A request of normal priority that nobody has given up on.
    pub fn new(prompt: Prompt, images: Vec<Arc<ImageInput>>, params: GenerateParams) -> Self {
        let (cancel, priority) = (CancelToken::new(), Priority::default());
        Self { prompt, images, params, cancel, priority, deadline: None }
    }
}

/// A loaded model that answers requests, several at once where it has room for them, on a thread of its own.
///
/// Clones share the model. Dropping the last one waits until the requests that it took are answered and the model is
/// gone: a session that ends while its process does crashes some providers.
#[derive(Clone, Debug)]
pub struct Engine {
    worker: Arc<Worker>,
    facts: Arc<ModelFacts>,
    preprocessor: Arc<Preprocessor>,
    limits: Limits,
    reports: Reports,
    queue: Option<usize>,
    load: LoadReport,
    load_time: Duration,
}

/// What serves each component, as the worker last said.
#[derive(Clone, Debug, Default)]
struct Reports(Arc<RwLock<Arc<[ComponentReport]>>>);

impl Reports {
    fn get(&self) -> Arc<[ComponentReport]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set(&self, reports: Vec<ComponentReport>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = reports.into();
    }
}

impl Engine {
    /// Finds ONNX Runtime, loads the model of `package` and starts the engine.
    ///
    /// # Errors
    /// [`Error::Library`] without ONNX Runtime, [`Error::Package`] for a damaged package, [`Error::Provider`] when nothing
    /// serves a component.
    pub fn open(package: &ModelPackage, options: &EngineOptions) -> Result<Self> {
        let begin = Instant::now();
        Runtime::start(&options.library, &mut |_| {})?;
        let mut facts = ModelFacts::new(package)?;
        let mut model = LlavaPhi::open(package, &options.model)?;
        facts.context = facts.context.min(model.capacity()?);
        facts.read_of_images(package, model.visual_tokens());
        let preprocessor = Preprocessor::new(&package.manifest().image);
        let engine = Self::with_model(model, facts, preprocessor, options.limits)?;
        Ok(Self { load_time: begin.elapsed(), queue: options.queue, ..engine })
    }

    /// An engine over any model; what [`Engine::open`] does after loading, and tests with a scripted one.
    pub(crate) fn with_model<M: CausalModel + 'static>(
        model: M,
        facts: ModelFacts,
        preprocessor: Preprocessor,
        limits: Limits,
    ) -> Result<Self> {
        let facts = Arc::new(facts);
        let reports = Reports::default();
        reports.set(model.reports());
        let load = LoadReport::default();
        let worker = Arc::new(worker::start(model, Arc::clone(&facts), reports.clone(), load.clone())?);
        let preprocessor = Arc::new(preprocessor);
        let (queue, load_time) = (None, Duration::ZERO);
        Ok(Self { worker, facts, preprocessor, limits, reports, queue, load, load_time })
    }

    /// Decodes, resizes and normalises an image on this thread. `name` is what errors call it; `fit` replaces the
    /// manifest's own choice.
    ///
    /// # Errors
    /// [`Error::Image`] for anything that is not a whole image within the limits.
    pub fn prepare_image(&self, name: &str, bytes: &[u8], fit: Option<Fit>) -> Result<Arc<ImageInput>> {
        let rgb = decode(name, bytes, &self.limits)?;
        Ok(Arc::new(ImageInput::new(self.preprocessor.run(&rgb, fit))))
    }

    /// As [`Engine::prepare_image`], from a file.
    ///
    /// # Errors
    /// As [`Engine::prepare_image`], and when the file cannot be read.
    pub fn open_image(&self, path: impl AsRef<Path>, fit: Option<Fit>) -> Result<Arc<ImageInput>> {
        let path = path.as_ref();
        let bytes = crate::image::read_file(path, &self.limits)?;
        self.prepare_image(&path.display().to_string(), &bytes, fit)
    }

    /// Turns pieces of text and images into what the model reads.
    ///
    /// # Errors
    /// [`Error::Request`] when text cannot be tokenised.
    pub fn prompt(&self, pieces: &[Piece]) -> Result<Prompt> {
        self.facts.tokenizer.prompt(pieces)
    }

    /// Queues `request` and sends its events to `sink` from the engine's thread. Everything that can be refused without
    /// running a graph is refused here.
    ///
    /// # Errors
    /// [`Error::Request`] for contradictory parameters or a wrong number of images, [`Error::TooLong`] for a prompt that
    /// leaves no room for an answer, [`Error::NoRoom`] for one that leaves less than was asked for, [`Error::Busy`] when too many wait already, [`Error::Stopped`] when the engine's thread has ended.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<()> {
        let limit = self.limit(&request)?;
        self.load.enter(self.queue).map_err(|waiting| {
            let limit = self.queue.unwrap_or(usize::MAX);
            Error::Busy { waiting, limit }
        })?;
        let job = Job { request, limit, sink, submitted: Instant::now() };
        self.worker.send(job)
    }

    /// The most requests that are taken at once, those that wait among them; [`usize::MAX`] where nothing bounds them.
    pub fn most_requests(&self) -> usize {
        self.load.most(self.queue)
    }

    /// As [`Engine::submit`], with the events as an iterator.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn generate(&self, request: Request) -> Result<GenerationStream> {
        let (sink, mut stream) = GenerationStream::new(request.cancel.clone());
        if let Err(error) = self.submit(request, sink) {
            stream.refused();
            return Err(error);
        }
        Ok(stream)
    }

    /// How many tokens the answer to `request` may have.
    fn limit(&self, request: &Request) -> Result<usize> {
        request.params.validate_for(self.facts.tokenizer.vocabulary())?;
        images_match(&request.prompt, request.images.len())?;
        let capacity = self.facts.context;
        let positions = request.prompt.positions(self.facts.tokens_per_image);
        if positions == 0 {
            return Err(Error::Request("the prompt is empty; ask something".to_owned()));
        }
        let room = capacity.saturating_sub(positions);
        if room == 0 {
            return Err(Error::TooLong { needed: positions.saturating_add(1), capacity });
        }
        match request.params.max_new_tokens {
            Some(wanted) if wanted > room => Err(Error::NoRoom { wanted, positions, capacity }),
            Some(wanted) => Ok(wanted),
            None => Ok(room),
        }
    }

    /// What is known about the model.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Which variant and provider serve each component now.
    pub fn reports(&self) -> Arc<[ComponentReport]> {
        self.reports.get()
    }

    /// How long [`Engine::open`] took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// What it has to do now, and what it has done.
    pub fn load(&self) -> EngineLoad {
        self.load.get()
    }
}

/// Refuses a prompt that names another image than those given, or leaves one out. It may name one twice.
fn images_match(prompt: &Prompt, given: usize) -> Result<()> {
    let named: BTreeSet<usize> = prompt
        .spans()
        .iter()
        .filter_map(|span| match span {
            Span::Text(_) => None,
            Span::Image(index) => Some(*index),
        })
        .collect();
    if let Some(index) = named.last().filter(|index| **index >= given) {
        return Err(Error::Request(format!(
            "the prompt names image {} and {given} were given; give as many images as the prompt names",
            index.saturating_add(1)
        )));
    }
    if let Some(index) = (0..given).find(|index| !named.contains(index)) {
        return Err(Error::Request(format!(
            "image {} of {given} has no place in the prompt; name every image that is given",
            index + 1
        )));
    }
    Ok(())
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

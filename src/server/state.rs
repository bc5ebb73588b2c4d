//! What every handler shares.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ServerOptions;
use super::error::{Answer, ApiError};
use super::generation::Leash;
use super::metrics::Metrics;
use super::models::Models;
use super::otel::Traces;
use super::remote_image::RemoteImages;
use crate::error::Result;

/// What every handler shares. Clones are the same state.
#[derive(Clone, Debug)]
pub(super) struct AppState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: ServerOptions,
    models: Arc<OnceLock<Models>>,
    metrics: Metrics,
    remote: RemoteImages,
    traces: Traces,
    started: Instant,
    draining: AtomicBool,
    requests: Arc<Semaphore>,
    preparing: Arc<Semaphore>,
    buffered: Arc<Semaphore>,
    running: Mutex<HashMap<u64, Weak<Leash>>>,
    number: AtomicU64,
    random: RandomState,
}

/// Bytes of a body that one permit of the buffer stands for: a semaphore counts no further than `u32`.
pub(super) const BUFFER_UNIT: usize = 1 << 12;

impl AppState {
    /// # Errors
    /// [`Error::Request`](crate::Error::Request) when images are to be fetched and cannot be.
    pub(super) fn new(options: ServerOptions) -> Result<Self> {
        let limits = options.limits;
        // Images are decoded and prompts encoded on as many threads as the machine has: more take memory and no less time.
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let models = Arc::<OnceLock<Models>>::default();
        let remote = RemoteImages::new(options.image_hosts.clone(), limits.body_bytes as u64)?;
        let traces = Traces::start(options.otlp.as_ref())?;
        let served = Arc::clone(&models);
        Ok(Self(Arc::new(Shared {
            requests: Arc::new(Semaphore::new(limits.requests.clamp(1, Semaphore::MAX_PERMITS))),
            preparing: Arc::new(Semaphore::new(threads)),
            buffered: Arc::new(Semaphore::new(limits.buffered_bytes.div_ceil(BUFFER_UNIT).max(1))),
            options,
            metrics: Metrics::new(move || served.get().map(Models::seen).unwrap_or_default()),
            models,
            remote,
            traces,
            started: Instant::now(),
            draining: AtomicBool::new(false),
            running: Mutex::default(),
            number: AtomicU64::new(0),
            random: RandomState::new(),
        })))
    }

    pub(super) fn options(&self) -> &ServerOptions {
        &self.0.options
    }

    /// What is counted.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// What fetches images.
    pub(super) fn remote(&self) -> &RemoteImages {
        &self.0.remote
    }

    /// What takes spans.
    pub(super) fn traces(&self) -> &Traces {
        &self.0.traces
    }

    /// Since the server was started.
    pub(super) fn uptime(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// The models are there; the server is ready.
    pub(super) fn loaded(&self, models: Models) {
        // Models are loaded once.
        let _ = self.0.models.set(models);
    }

    /// The models, unless they are being loaded or the server is ending.
    pub(super) fn models(&self) -> Answer<&Models> {
        if self.is_draining() {
            return Err(ApiError::going());
        }
        self.loaded_models().ok_or_else(|| ApiError::away("the model is being loaded; ask again in a while"))
    }

    /// The models, once they were loaded.
    pub(super) fn loaded_models(&self) -> Option<&Models> {
        self.0.models.get()
    }

    pub(super) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    /// No further request is taken.
    pub(super) fn drain(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
    }

    /// Waits until every request has ended.
    pub(super) async fn idle(&self) {
        let all = u32::try_from(self.options().limits.requests.max(1)).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        let _ = self.0.requests.acquire_many(all).await;
    }

    /// Room for one more request to the model.
    pub(super) fn admit(&self) -> Answer<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.0.requests).try_acquire_owned();
        // Asked for after the place was taken: whoever drains then waits for it. Whoever drains also takes every place.
        if self.is_draining() {
            return Err(ApiError::going());
        }
        permit.map_err(|_| {
            let limit = self.options().limits.requests;
            ApiError::busy(format!("{limit} requests are being answered; ask again in a while"))
        })
    }

    /// Room for the work before the engine's, on a thread that may block.
    pub(super) async fn turn(&self) -> Answer<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        Arc::clone(&self.0.preparing).acquire_owned().await.map_err(|_| ApiError::internal())
    }

    /// Room for the bytes of bodies.
    pub(super) fn buffered(&self) -> &Arc<Semaphore> {
        &self.0.buffered
    }

    /// Remembers a request, so that it can be given up on when the server ends.
    pub(super) fn watch(&self, leash: &Arc<Leash>) -> u64 {
        let number = self.0.number.fetch_add(1, Ordering::Relaxed);
        self.running().insert(number, Arc::downgrade(leash));
        number
    }

    /// Forgets a request that has ended.
    pub(super) fn forget(&self, number: u64) {
        self.running().remove(&number);
    }

    /// Gives up on every request.
    pub(super) fn cancel_all(&self) {
        let leashes: Vec<_> = self.running().values().filter_map(Weak::upgrade).collect();
        for leash in leashes {
            leash.pull();
        }
        if let Some(models) = self.loaded_models() {
            models.close();
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Weak<Leash>>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An identifier that no other answer has: `prefix` and 32 digits.
    pub(super) fn id(&self, prefix: &str) -> String {
        let number = self.0.number.fetch_add(1, Ordering::Relaxed);
        let half = |salt: u8| self.0.random.hash_one((salt, number));
        format!("{prefix}{:016x}{:016x}", half(0), half(1))
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

//! The engine behind HTTP: what clients of OpenAI's API already speak.
//!
//! ```text
//! connection ─> log ─> panics ─> key ─> body ─> images and text, on a thread that may block ─> engine
//! client <─ JSON, or server-sent events while the answer is made <─ channel <─ sink <──────────┘
//! ```
//!
//! A client that leaves drops the future or the stream that answers it, and with it the `generation` that gives up on
//! its requests. Nothing here prints, reads the environment or ends the program.

mod auth;
mod chat_completions;
mod choosing;
mod common;
mod completions;
mod connection;
mod error;
mod generation;
mod headers;
mod health;
mod image_url;
mod json;
mod limits;
mod log;
mod logprobs;
mod messages;
mod metrics;
mod model_list;
mod models;
mod openapi;
mod otel;
mod page;
mod pictures;
mod remote_image;
mod reply;
mod response_format;
mod responses;
mod router;
mod shutdown;
mod sse;
mod state;
mod status;
mod texts;
mod tls;
mod usage;

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use axum_server::Handle;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

pub use auth::Keys;
pub use headers::AllowedOrigin;
pub use limits::ServerLimits;
pub use models::{Model, Models, ModelsDirectory};
pub use otel::OtlpEndpoint;
pub use remote_image::ImageHost;
pub use shutdown::Shutdown;
pub use tls::TlsFiles;

use crate::error::{Error, Result};
use connection::Bounded;
use state::AppState;
use tls::Tls;

/// How a server is started.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens; port 0 is any that is free.
    pub address: SocketAddr,
    /// Who may ask; none at all means everybody.
    pub keys: Keys,
    /// Everybody may ask even where other machines reach the address.
    pub open_to_everybody: bool,
    /// What requests may take.
    pub limits: ServerLimits,
    /// What connections are encrypted with; without it they are not.
    pub tls: Option<TlsFiles>,
    /// Where images may be fetched from; none at all means nowhere.
    pub image_hosts: Vec<ImageHost>,
    /// Pages of which other origins may ask; none at all means of none.
    pub origins: Vec<AllowedOrigin>,
    /// Where spans of requests are sent; without it nowhere.
    pub otlp: Option<OtlpEndpoint>,
    /// How long requests may go on after the server was told to end.
    pub shutdown_grace: Duration,
    /// Whether the system's signals tell the server to end.
    pub signals: bool,
}

impl ServerOptions {
    /// A server at `address` that everything else is as ever for.
    pub fn at(address: SocketAddr) -> Self {
        Self {
            address,
            keys: Keys::default(),
            open_to_everybody: false,
            limits: ServerLimits::default(),
            tls: None,
            image_hosts: Vec::new(),
            origins: Vec::new(),
            otlp: None,
            shutdown_grace: Duration::from_secs(30),
            signals: false,
        }
    }

    /// Refuses what would let strangers in.
    ///
    /// # Errors
    /// [`Error::Request`] when other machines reach the address and no key is asked for.
    pub fn validate(&self) -> Result<()> {
        if self.keys.is_empty() && !self.address.ip().is_loopback() && !self.open_to_everybody {
            return Err(Error::Request(format!(
                "{} is open to other machines and no key is asked for; give --api-key-file, or --insecure-no-key if \
                 everybody who reaches it may ask",
                self.address.ip()
            )));
        }
        Ok(())
    }

    /// Whether only this machine is answered, and whoever asks from it.
    fn is_private(&self) -> bool {
        self.keys.is_empty() && self.address.ip().is_loopback()
    }
}

/// Opens the models, on a thread that may block.
pub type Open = Box<dyn FnOnce() -> Result<Models> + Send>;

/// What a server tells whoever started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It listens here; the models are still being opened.
    Listening {
        /// Where.
        address: SocketAddr,
        /// Whether connections are encrypted.
        tls: bool,
    },
    /// The models answer.
    Ready,
    /// It was told to end, and finishes what it began.
    Draining,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listening { address, tls: false } => write!(f, "listening on http://{address}"),
            Self::Listening { address, tls: true } => write!(f, "listening on https://{address}"),
            Self::Ready => f.write_str("ready"),
            Self::Draining => f.write_str("ending when the requests that were taken are answered"),
        }
    }
}

/// Serves until `shutdown` is asked for, on threads of its own; blocks meanwhile. It listens before `open` is called, so
/// that probes are answered while the models load.
///
/// # Errors
/// [`Error::Request`] for an address that cannot be listened on or that would let strangers in, and those of `open`.
pub fn run(
    options: ServerOptions,
    open: Open,
    shutdown: &Shutdown,
    tell: &mut (dyn FnMut(Notice) + Send),
) -> Result<()> {
    options.validate()?;
    let address = options.address;
    let failed = |e: std::io::Error| {
        Error::Request(format!("{address} cannot be listened on ({e}); give another address or port"))
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("llava-phi-http")
        .build()
        .map_err(|e| Error::Stopped(format!("the server's threads cannot be started: {e}")))?;
    runtime.block_on(serve(listener, options, open, shutdown, tell))
}

/// As [`run`], on a listener and within a runtime that are there already.
///
/// # Errors
/// As [`run`].
pub async fn serve(
    listener: TcpListener,
    options: ServerOptions,
    open: Open,
    shutdown: &Shutdown,
    tell: &mut (dyn FnMut(Notice) + Send),
) -> Result<()> {
    let lost = |e: std::io::Error| Error::Stopped(format!("the listener failed: {e}"));
    let (limits, grace) = (options.limits, options.shutdown_grace);
    let tls = options.tls.clone().map(Tls::open).transpose()?;
    let signals = options.signals;
    let state = AppState::new(options)?;
    tell(Notice::Listening { address: listener.local_addr().map_err(lost)?, tls: tls.is_some() });
    if signals {
        tokio::spawn(shutdown.clone().on_signals());
        if let Some(tls) = &tls {
            tls.reload_on_hangup()
                .map_err(|e| Error::Stopped(format!("the system's signals cannot be listened to: {e}")))?;
        }
    }
    let handle = Handle::new();
    let mut server = axum_server::from_tcp(listener)
        .map_err(lost)?
        .first_request_timeout(limits.header_time)
        .handle(handle.clone());
    let builder = server.http_builder();
    builder.http1().header_read_timeout(limits.header_time);
    builder.http2().keep_alive_interval(limits.header_time).keep_alive_timeout(limits.stall_time);
    let bounded = Bounded::new(limits.connections, limits.stall_time);
    let service = router::router(state.clone()).into_make_service();
    let mut served = match tls {
        Some(tls) => tokio::spawn(server.acceptor(tls.acceptor(bounded, limits.header_time)).serve(service)),
        None => tokio::spawn(server.acceptor(bounded).serve(service)),
    };

    let mut opening = spawn_blocking(open);
    let opened = tokio::select! {
        opened = &mut opening => Some(opened),
        () = shutdown.asked(1) => None,
        result = &mut served => return ended(result),
    };
    if let Some(opened) = opened {
        state.loaded(opened.map_err(|_| Error::Stopped("opening the model failed".to_owned()))??);
        tell(Notice::Ready);
        tokio::select! {
            () = shutdown.asked(1) => {}
            result = &mut served => return ended(result),
        }
    }
    tell(Notice::Draining);
    state.drain();
    let finished = timeout(grace, state.idle());
    tokio::select! {
        _ = finished => {}
        () = shutdown.asked(2) => {}
    }
    state.cancel_all();
    // What was given up on still tells its client so.
    let _ = timeout(FAREWELL, state.idle()).await;
    handle.graceful_shutdown(Some(FAREWELL));
    let ended = ended(served.await);
    state.traces().flush().await;
    ended
}

/// How long clients have to read the end of an answer that was given up on.
const FAREWELL: Duration = Duration::from_secs(2);

fn ended(result: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<()> {
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::Stopped(format!("the listener failed: {error}"))),
        Err(_) => Err(Error::Stopped("the listener failed".to_owned())),
    }
}

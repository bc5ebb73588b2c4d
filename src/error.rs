//! What can go wrong, and what the caller can do about it.

use std::{fmt, path::PathBuf};

/// The cause below an [`Error`], kept as a value so that a caller can walk the chain.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate. The text names the thing, what it is, and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A package, or a file in it, is missing, damaged or not what its manifest says.
    #[error("package {}: {reason}", .path.display())]
    Package {
        /// The package directory, or the file in it that is at fault.
        path: PathBuf,
        /// What is wrong and what to do next.
        reason: String,
        /// The failure below, if there is one.
        source: Option<Source>,
    },
    /// An image could not be read.
    #[error("image {name}: {reason}")]
    Image {
        /// What the caller calls the image: a path, `stdin`, `image 2`.
        name: String,
        /// What is wrong and what to do next.
        reason: String,
        /// The decoder's own failure, if there is one.
        source: Option<Source>,
    },
    /// The request contradicts itself or asks for what this model cannot do.
    #[error("{0}")]
    Request(String),
    /// The prompt and the answer do not fit into the context. Positions include image positions.
    #[error(
        "the prompt takes {needed} positions and the context holds {capacity}; \
         shorten the question, use fewer images, or start a new conversation"
    )]
    TooLong {
        /// Positions that the prompt takes, and one for the first token of the answer.
        needed: usize,
        /// Positions that the context holds.
        capacity: usize,
    },
    /// The answer may be longer than the prompt leaves room for.
    #[error(
        "{wanted} new tokens do not fit: the prompt takes {positions} of {capacity} positions; \
         ask for at most {}", .capacity.saturating_sub(*.positions)
    )]
    NoRoom {
        /// Tokens that were asked for.
        wanted: usize,
        /// Positions that the prompt takes.
        positions: usize,
        /// Positions that the context holds.
        capacity: usize,
    },
    /// ONNX Runtime itself could not be found, fetched or started.
    #[error("ONNX Runtime: {reason}")]
    Library {
        /// What is wrong and what to do next.
        reason: String,
        /// The failure below, if there is one.
        source: Option<Source>,
    },
    /// No execution provider serves a component.
    #[error("provider {name}: {reason}")]
    Provider {
        /// The provider that was asked for.
        name: String,
        /// Why it does not serve.
        reason: String,
    },
    /// A graph failed while it ran. One that is not what the manifest describes is a fault of the package.
    #[error("graph {graph}: {reason}")]
    Graph {
        /// The component: `vision_encoder`, `projector` or `decoder`.
        graph: String,
        /// What is wrong and what to do next.
        reason: String,
        /// ONNX Runtime's own failure, if there is one.
        source: Option<Source>,
    },
    /// What is kept between runs cannot be kept or read.
    #[error("cache {}: {reason}", .path.display())]
    Cache {
        /// The cache's directory, or the file in it that is at fault.
        path: PathBuf,
        /// What is wrong and what to do next.
        reason: String,
        /// The failure below, if there is one.
        source: Option<Source>,
    },
    /// A graph ran and gave what no answer can be made of. Another variant or provider may do better.
    #[error("graph {graph}: {reason}; try another variant or provider")]
    Unsound {
        /// The component: `vision_encoder`, `projector` or `decoder`.
        graph: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More requests wait than may. Nothing was begun.
    #[error("{waiting} requests wait already, and no more than {limit} may; ask again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// The time that the request had is over.
    #[error("the time for the answer is over; ask for less, or allow more time")]
    Deadline,
    /// The work was given up because the caller asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The engine's worker has ended; no further request can be answered.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

/// What a face does about an [`Error`]: one table for exit codes, HTTP statuses and exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller can mend the request. Exit code 2.
    Request,
    /// The package must be mended or replaced. Exit code 3.
    Package,
    /// The machine lacks what is needed to run. Exit code 3.
    Provider,
    /// There is too much to do now; the same request may be answered later. Exit code 1.
    Busy,
    /// The request was not answered in the time that it had. Exit code 1.
    Deadline,
    /// Something failed that should not have. Exit code 1.
    Runtime,
    /// The caller gave up. Exit code 130.
    Cancelled,
}

impl Error {
    /// What a caller can do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { .. } | Self::Request(_) | Self::TooLong { .. } | Self::NoRoom { .. } => {
                ErrorKind::Request
            }
            Self::Package { .. } => ErrorKind::Package,
            Self::Library { .. } | Self::Provider { .. } | Self::Cache { .. } => ErrorKind::Provider,
            Self::Graph { .. } | Self::Unsound { .. } | Self::Stopped(_) => ErrorKind::Runtime,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::Deadline => ErrorKind::Deadline,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    pub(crate) fn package(path: impl Into<PathBuf>, reason: impl fmt::Display) -> Self {
        Self::Package { path: path.into(), reason: reason.to_string(), source: None }
    }

    pub(crate) fn image(name: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::Image { name: name.into(), reason: reason.to_string(), source: None }
    }

    pub(crate) fn library(reason: impl fmt::Display) -> Self {
        Self::Library { reason: reason.to_string(), source: None }
    }

    pub(crate) fn cache(path: impl Into<PathBuf>, reason: impl fmt::Display) -> Self {
        Self::Cache { path: path.into(), reason: reason.to_string(), source: None }
    }

    pub(crate) fn graph(graph: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::Graph { graph: graph.into(), reason: reason.to_string(), source: None }
    }

    /// Attaches the failure below. Variants without a `source` are returned unchanged.
    pub(crate) fn because(mut self, cause: impl Into<Source>) -> Self {
        match &mut self {
            Self::Package { source, .. }
            | Self::Image { source, .. }
            | Self::Library { source, .. }
            | Self::Cache { source, .. }
            | Self::Graph { source, .. } => *source = Some(cause.into()),
            _ => {}
        }
        self
    }
}

/// Bytes for a person: decimal, with tenths, `11.2 GB`.
pub(crate) fn size(bytes: u64) -> String {
    let (unit, size) = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000)]
        .into_iter()
        .find(|(_, size)| bytes >= *size)
        .unwrap_or(("B", 1));
    if size == 1 {
        return format!("{bytes} B");
    }
    // Tenths by integer arithmetic: a size is not worth a lossy cast.
    let tenths = bytes / (size / 10);
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

//! What one client, and all of them together, may take.

use std::time::Duration;

/// Bounds that hold for every request, whoever sends it. Those of an image's bytes and pixels are the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of bodies that are being read, of all clients together.
    pub buffered_bytes: usize,
    /// Images of one request.
    pub images: usize,
    /// Characters of all text in one request.
    pub prompt_chars: usize,
    /// Answers to one request: `n` times the number of prompts.
    pub answers: usize,
    /// Strings that end an answer.
    pub stop_strings: usize,
    /// Connections at once; more are closed as they come.
    pub connections: usize,
    /// Requests to the model at once, whether they wait or run; more are told to come again.
    pub requests: usize,
    /// From a request's arrival to the end of its answer.
    pub request_time: Duration,
    /// For the headers of a request, and how long a connection may be idle.
    pub header_time: Duration,
    /// How long a client may pause within a body that it sends, or within an answer that it reads.
    pub stall_time: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            body_bytes: 32 << 20,
            buffered_bytes: 512 << 20,
            images: 16,
            prompt_chars: 200_000,
            answers: 16,
            stop_strings: 16,
            connections: 1024,
            requests: 256,
            request_time: Duration::from_mins(10),
            header_time: Duration::from_secs(30),
            stall_time: Duration::from_secs(30),
        }
    }
}

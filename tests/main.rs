//! The integration tests, one module a subject.

// `allow-unwrap-in-tests` of clippy.toml does not reach the helpers of tests.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod architecture;
mod bench;
mod cache;
mod cli;
mod compile;
mod detokenizer;
mod engine;
mod fidelity;
mod generate;
mod library;
mod lookup;
mod package;
mod preprocess;
mod prompt;
mod providers;
mod sampler;
#[cfg(feature = "server")]
mod server;
mod serving;
mod splice;
mod support;
mod together;
mod tokenizer;
mod tune;
mod variants;
mod visual_tokens;

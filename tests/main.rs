//! The integration tests, one module a subject.

// `allow-unwrap-in-tests` of clippy.toml does not reach the helpers of tests.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod architecture;
mod cli;
mod detokenizer;
mod engine;
mod fidelity;
mod library;
mod package;
mod preprocess;
mod prompt;
mod sampler;
mod splice;
mod support;
mod tokenizer;

#![doc = include_str!("../README.md")]
//!
//! # The floors
//!
//! A module may name only modules above it in this list.

#[cfg(all(target_os = "ios", feature = "load-dynamic"))]
compile_error!(
    "ONNX Runtime comes to iOS as a static framework: build with --no-default-features and ORT_IOS_XCFWK_PATH"
);

pub mod error;

mod disk;

pub mod compiled;
pub mod kernels;
pub mod machine;
pub mod package;

pub mod image;
pub mod text;

pub mod runtime;

pub mod model;

pub mod generate;

pub mod engine;

pub mod chat;

#[cfg(feature = "server")]
pub mod server;

#[cfg(feature = "cli")]
pub mod cli;

pub use error::{Error, ErrorKind, Result};

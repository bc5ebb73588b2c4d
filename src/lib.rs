#![doc = include_str!("../README.md")]
//!
//! # The floors
//!
//! A module may name only modules above it in this list.

pub mod error;

pub mod package;

pub mod image;
pub mod text;

pub mod runtime;

pub mod model;

pub mod generate;

pub mod engine;

pub mod chat;

#[cfg(feature = "cli")]
pub mod cli;

pub use error::{Error, ErrorKind, Result};

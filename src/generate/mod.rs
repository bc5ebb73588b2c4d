//! One answer.

pub mod constraint;
pub mod logprobs;
pub mod lookup;
pub mod params;
pub mod sampler;
pub mod sequence;
mod terminals;
mod vocabulary;
pub mod watchdog;

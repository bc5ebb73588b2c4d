//! One answer.

pub mod lookup;
pub mod params;
pub mod sampler;
pub mod sequence;
pub mod watchdog;

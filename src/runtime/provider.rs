//! Which execution provider runs a graph, and which were refused.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What runs a graph's operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
}

impl Provider {
    /// Every provider that this version knows.
    pub const ALL: &[Self] = &[Self::Cpu];

    /// The name in manifests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Provider {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|provider| provider.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|provider| provider.name()).collect();
            Error::Provider {
                name: name.to_owned(),
                reason: format!("this version does not know it; it knows {}", known.join(", ")),
            }
        })
    }
}

/// Which provider serves a component, and why others do not. The engine fills it as it tries one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProviderReport {
    /// The provider that serves.
    pub chosen: Provider,
    /// Those that were tried before, in order.
    pub refused: Vec<Refusal>,
}

/// A provider that was tried and does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The provider's name.
    pub provider: String,
    /// Its own words for why.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_is_read_by_the_name_that_it_prints() {
        for &provider in Provider::ALL {
            assert_eq!(provider.to_string().parse::<Provider>().unwrap(), provider);
            assert_eq!(serde_json::to_string(&provider).unwrap(), format!("\"{provider}\""));
        }
    }

    #[test]
    fn an_unknown_provider_is_refused_with_those_that_are_known() {
        let error = "tpu".parse::<Provider>().unwrap_err();
        assert_eq!(error.to_string(), "provider tpu: this version does not know it; it knows cpu");
    }
}

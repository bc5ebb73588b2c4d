//! A provider's own options: which there are, how they are written, what is refused.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::error::{Error, Result};

use super::keys;
use super::provider::{Provider, nearest};

/// A key that a provider takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionKey {
    /// The key.
    pub key: &'static str,
    /// What it does.
    pub about: &'static str,
}

/// The keys that a provider takes: its own, then those that this program handles for every provider.
pub fn keys(provider: Provider) -> impl Iterator<Item = OptionKey> {
    // The processor falls back to nobody.
    let common = keys::COMMON
        .iter()
        .filter(move |(key, _)| provider != Provider::Cpu || *key != keys::DISABLE_CPU_FALLBACK);
    let cache = if keys::keeps_caches(provider) { keys::CACHE } else { &[] };
    let all = keys::of(provider).iter().chain(cache).chain(common);
    all.map(|&(key, about)| OptionKey { key, about })
}

/// One option, written `tensorrt.trt_fp16_enable=1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderOption {
    /// Whose it is.
    pub provider: Provider,
    /// One of [`keys()`].
    pub key: String,
    /// The value; what is allowed is the provider's affair.
    pub value: String,
}

impl fmt::Display for ProviderOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}={}", self.provider, self.key, self.value)
    }
}

impl FromStr for ProviderOption {
    type Err = Error;

    /// # Errors
    /// [`Error::Request`] when the form is another, the provider or the key is unknown, or the value cannot be passed on.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('=').and_then(|(name, value)| Some((name.split_once('.')?, value)));
        let Some(((provider, key), value)) = parts else {
            return Err(Error::Request(format!(
                "{text:?} is no provider option; write it as tensorrt.trt_fp16_enable=1"
            )));
        };
        let provider = provider.parse()?;
        check(provider, key, value)?;
        Ok(Self { provider, key: key.to_owned(), value: value.to_owned() })
    }
}

/// Refuses an option that the provider does not take.
///
/// # Errors
/// [`Error::Request`] when the key is not one of [`keys()`], or the value cannot be passed on.
pub fn check(provider: Provider, key: &str, value: &str) -> Result<()> {
    let refused = |why: String| Err(Error::Request(why));
    if value.contains('\0') {
        return refused(format!("the value of {provider}.{key} holds a zero byte; write it without"));
    }
    if keys(provider).any(|known| known.key == key) {
        return match ours(provider, key) {
            Some(allowed) if !allowed.contains(&value) => {
                refused(format!("{provider}.{key} is {value:?}; it takes {}", allowed.join(", ")))
            }
            _ => Ok(()),
        };
    }
    if key.eq_ignore_ascii_case("device_id") || key == "deviceId" {
        return refused(format!(
            "{provider} takes no option {key:?}; name the device in the provider, as {provider}:0"
        ));
    }
    let known: Vec<&str> = keys(provider).map(|known| known.key).collect();
    let hint = match nearest(key, &known) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("it takes {}", known.join(", ")),
    };
    refused(format!("{provider} takes no option {key:?}; {hint}"))
}

/// Checks all options of one provider.
pub(super) fn check_all(provider: Provider, options: &BTreeMap<String, String>) -> Result<()> {
    options.iter().try_for_each(|(key, value)| check(provider, key, value))
}

/// The values of keys that never reach ONNX Runtime as they are, so that it cannot refuse a wrong one.
fn ours(provider: Provider, key: &str) -> Option<&'static [&'static str]> {
    match (provider, key) {
        (_, keys::DISABLE_CPU_FALLBACK | keys::CACHE_ON_HOST)
        | (Provider::Nnapi, "use_fp16" | "use_nchw" | "cpu_disabled" | "cpu_only") => Some(&["0", "1"]),
        (Provider::DirectMl, "device_filter") => Some(&["any", "gpu", "npu"]),
        (Provider::DirectMl, "performance_preference") => {
            Some(&["default", "high_performance", "minimum_power"])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<ProviderOption>().unwrap_err().to_string()
    }

    #[test]
    fn an_option_is_read_as_it_is_printed() {
        let check = |text: &str, provider, key: &str, value: &str| {
            let option: ProviderOption = text.parse().unwrap();
            assert_eq!((option.provider, option.key.as_str(), option.value.as_str()), (provider, key, value));
            assert_eq!(option.to_string(), text);
        };
        check("tensorrt.trt_fp16_enable=1", Provider::TensorRt, "trt_fp16_enable", "1");
        check(
            "openvino.load_config={\"CPU\":{\"a.b\":\"=\"}}",
            Provider::OpenVino,
            "load_config",
            "{\"CPU\":{\"a.b\":\"=\"}}",
        );
        check("cpu.disabled_optimizers=A;B", Provider::Cpu, "disabled_optimizers", "A;B");
        check("tensorrt-rtx.nv_dump_subgraphs=", Provider::TensorRtRtx, "nv_dump_subgraphs", "");
    }

    #[test]
    fn what_no_provider_takes_is_refused_with_what_was_meant() {
        let check = |text: &str, expected: &str| assert_eq!(refusal(text), expected);
        check(
            "trt_fp16_enable",
            "\"trt_fp16_enable\" is no provider option; write it as tensorrt.trt_fp16_enable=1",
        );
        check("cuda=1", "\"cuda=1\" is no provider option; write it as tensorrt.trt_fp16_enable=1");
        check(
            "tensorrt.trt_fp16_enabled=1",
            "tensorrt takes no option \"trt_fp16_enabled\"; did you mean trt_fp16_enable?",
        );
        check(
            "cuda.device_id=1",
            "cuda takes no option \"device_id\"; name the device in the provider, as cuda:0",
        );
        check("nnapi.use_fp16=yes", "nnapi.use_fp16 is \"yes\"; it takes 0, 1");
        check("cuda.use_tf32=\0", "the value of cuda.use_tf32 holds a zero byte; write it without");
        check("cpu.gpu_mem_limit=1", "cpu takes no option \"gpu_mem_limit\"; it takes disabled_optimizers");
        check(
            "cpu.disable_cpu_fallback=1",
            "cpu takes no option \"disable_cpu_fallback\"; it takes disabled_optimizers",
        );
        assert!(refusal("coda.use_tf32=1").starts_with("there is no provider \"coda\"; did you mean cuda? "));
    }

    #[test]
    fn no_key_stands_twice_and_none_takes_an_address() {
        for &provider in Provider::ALL {
            let keys: Vec<OptionKey> = keys(provider).collect();
            for (n, one) in keys.iter().enumerate() {
                assert!(keys[n + 1..].iter().all(|other| other.key != one.key), "{provider}.{}", one.key);
                assert!(!one.about.is_empty(), "{provider}.{}", one.key);
                let address =
                    ["compute_stream", "bytestream", "external_alloc", "external_free", "ProcTable"];
                assert!(address.iter().all(|part| !one.key.contains(part)), "{provider}.{}", one.key);
            }
        }
    }
}

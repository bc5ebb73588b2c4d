//! What each provider is told: this program's defaults, and over them what the user says.

use std::collections::BTreeMap;
use std::path::Path;

use crate::package::manifest::{Dim, GraphSpec};

use super::graph::SessionOptions;
use super::keys;
use super::provider::Provider;

/// Every setting of a session by its key, those of [`keys::COMMON`] among them. `plugin` is the library that brings
/// the provider, if one does; `files` is where it keeps files of its own.
pub(super) fn settings(
    spec: &GraphSpec,
    options: &SessionOptions,
    plugin: Option<&Path>,
    files: Option<&Path>,
) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    let mut set = |key: &str, value: &str| drop(settings.insert(key.to_owned(), value.to_owned()));
    // ONNX Runtime takes paths as UTF-8; a directory with another name is left unused.
    let files = files.and_then(Path::to_str);
    match options.target.provider {
        Provider::Cuda => cuda(&mut set),
        Provider::TensorRt => {
            if let Some(dir) = files {
                for (enable, path) in [
                    ("trt_engine_cache_enable", "trt_engine_cache_path"),
                    ("trt_timing_cache_enable", "trt_timing_cache_path"),
                ] {
                    set(enable, "1");
                    set(path, dir);
                }
            }
            profiles("trt", spec, options, &mut set);
        }
        Provider::CoreMl => {
            set("ModelFormat", "MLProgram");
            if is_static(spec) {
                set("RequireStaticInputShapes", "1");
            }
            if let Some(dir) = files {
                set("ModelCacheDirectory", dir);
            }
        }
        Provider::Nnapi => {
            set("use_fp16", "1");
            // They put together again what was taken apart because NNAPI has neither operator.
            set(keys::DISABLED_OPTIMIZERS, "LayerNormFusionL1;GeluFusionL1");
        }
        Provider::Qnn if !options.provider_options.contains_key("backend_type") => {
            let name = if cfg!(windows) { "QnnHtp.dll" } else { "libQnnHtp.so" };
            let beside = plugin.and_then(Path::parent).map(|dir| dir.join(name));
            set("backend_path", beside.as_deref().and_then(Path::to_str).unwrap_or(name));
        }
        Provider::Xnnpack => {
            let all = || std::thread::available_parallelism().map_or(1, usize::from);
            set("intra_op_num_threads", &options.threads.unwrap_or_else(all).to_string());
        }
        Provider::TensorRtRtx => profiles("nv", spec, options, &mut set),
        Provider::Cpu | Provider::Qnn | Provider::OpenVino | Provider::WebGpu | Provider::DirectMl => {}
    }
    settings.extend(options.provider_options.clone());
    settings
}

/// What CUDA is told where it runs what TensorRT leaves.
pub(super) fn cuda_behind_tensorrt() -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    cuda(&mut |key, value| drop(settings.insert(key.to_owned(), value.to_owned())));
    settings
}

fn cuda(set: &mut impl FnMut(&str, &str)) {
    // Doubling the arena would take twice the weights.
    set("arena_extend_strategy", "kSameAsRequested");
    // An exhaustive search takes seconds for the one convolution of the vision encoder.
    set("cudnn_conv_algo_search", "HEURISTIC");
}

/// The smallest, usual and largest shape of every input that varies, so that an engine is built once and not for each
/// new size. Nothing is set where a size is unknown: an incomplete profile is an error.
fn profiles(prefix: &str, spec: &GraphSpec, options: &SessionOptions, set: &mut impl FnMut(&str, &str)) {
    for (place, name) in ["min", "opt", "max"].into_iter().enumerate() {
        match shapes(spec, &options.sizes, place) {
            Some(shapes) if !shapes.is_empty() => set(&format!("{prefix}_profile_{name}_shapes"), &shapes),
            _ => return,
        }
    }
}

/// `inputs_embeds:1x16x2560,position_ids:1x16` for the inputs that vary; `None` when a size is not known.
fn shapes(spec: &GraphSpec, sizes: &BTreeMap<String, [usize; 3]>, place: usize) -> Option<String> {
    let mut shapes = Vec::new();
    for (name, tensor) in &spec.inputs {
        if tensor.shape.iter().all(|dim| matches!(dim, Dim::Fixed(_))) {
            continue;
        }
        let size = |dim: &Dim| match dim {
            Dim::Fixed(size) => Some(size.to_string()),
            Dim::Named(name) => sizes.get(name).map(|sizes| sizes[place].to_string()),
        };
        let dims = tensor.shape.iter().map(size).collect::<Option<Vec<_>>>()?;
        shapes.push(format!("{name}:{}", dims.join("x")));
    }
    Some(shapes.join(","))
}

/// Whether no input varies.
pub(super) fn is_static(spec: &GraphSpec) -> bool {
    spec.inputs.values().all(|tensor| tensor.shape.iter().all(|dim| matches!(dim, Dim::Fixed(_))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::manifest::{DType, TensorSpec};

    fn spec(inputs: &[(&str, &str)]) -> GraphSpec {
        let dim = |dim: &str| dim.parse().map_or_else(|_| Dim::Named(dim.to_owned()), Dim::Fixed);
        let tensor = |shape: &str| TensorSpec {
            dtype: DType::F16,
            shape: shape.split_whitespace().map(dim).collect(),
        };
        let inputs = inputs.iter().map(|(name, shape)| ((*name).to_owned(), tensor(shape))).collect();
        GraphSpec { path: String::new(), data: Vec::new(), inputs, outputs: BTreeMap::new() }
    }

    fn told(provider: Provider, spec: &GraphSpec, change: impl FnOnce(&mut SessionOptions)) -> Vec<String> {
        told_with(provider, spec, None, change)
    }

    fn told_with(
        provider: Provider,
        spec: &GraphSpec,
        files: Option<&str>,
        change: impl FnOnce(&mut SessionOptions),
    ) -> Vec<String> {
        let mut options = SessionOptions { target: provider.into(), ..SessionOptions::default() };
        change(&mut options);
        let plugin = Path::new("plugins").join("libplugin.so");
        settings(spec, &options, Some(&plugin), files.map(Path::new))
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    }

    #[test]
    fn tensorrt_gets_a_profile_of_every_input_that_varies_and_keeps_its_engines() {
        let spec = spec(&[("embeds", "1 new 64"), ("mask", "1 1 new total"), ("past", "1 2 32 8")]);
        let told = told_with(Provider::TensorRt, &spec, Some("engines"), |options| {
            options.sizes =
                BTreeMap::from([("new".to_owned(), [1, 2, 16]), ("total".to_owned(), [3, 4, 32])]);
            options.provider_options.insert("trt_timing_cache_enable".to_owned(), "0".to_owned());
        });
        assert_eq!(
            told,
            [
                "trt_engine_cache_enable=1",
                "trt_engine_cache_path=engines",
                "trt_profile_max_shapes=embeds:1x16x64,mask:1x1x16x32",
                "trt_profile_min_shapes=embeds:1x1x64,mask:1x1x1x3",
                "trt_profile_opt_shapes=embeds:1x2x64,mask:1x1x2x4",
                "trt_timing_cache_enable=0",
                "trt_timing_cache_path=engines",
            ]
        );
    }

    #[test]
    fn a_profile_that_would_lack_a_size_is_not_set() {
        let spec = spec(&[("embeds", "1 new 64"), ("mask", "1 1 new total")]);
        let sizes = BTreeMap::from([("new".to_owned(), [1, 1, 16])]);
        assert!(told(Provider::TensorRt, &spec, |options| options.sizes = sizes).is_empty());
    }

    #[test]
    fn a_graph_without_profiles_to_set_has_none() {
        let spec = spec(&[("pixels", "1 3 8 8")]);
        assert!(told(Provider::TensorRtRtx, &spec, |_| {}).is_empty());
    }

    #[test]
    fn coreml_is_told_that_shapes_are_fixed_only_where_they_are() {
        let fixed = told_with(Provider::CoreMl, &spec(&[("pixels", "1 3 8 8")]), Some("cache"), |_| {});
        assert_eq!(
            fixed,
            ["ModelCacheDirectory=cache", "ModelFormat=MLProgram", "RequireStaticInputShapes=1"]
        );
        assert_eq!(told(Provider::CoreMl, &spec(&[("x", "batch 8")]), |_| {}), ["ModelFormat=MLProgram"]);
    }

    #[test]
    fn what_the_user_says_stands_over_what_the_program_says() {
        let spec = spec(&[]);
        let user = |key: &'static str, value: &'static str| {
            move |options: &mut SessionOptions| {
                options.provider_options.insert(key.to_owned(), value.to_owned());
            }
        };
        assert_eq!(told(Provider::Nnapi, &spec, user("use_fp16", "0"))[1], "use_fp16=0");
        assert_eq!(told(Provider::Qnn, &spec, user("backend_type", "htp")), ["backend_type=htp"]);
        let beside = Path::new("plugins").join(if cfg!(windows) { "QnnHtp.dll" } else { "libQnnHtp.so" });
        assert_eq!(told(Provider::Qnn, &spec, |_| {}), [format!("backend_path={}", beside.display())]);
        assert_eq!(
            told(Provider::Xnnpack, &spec, |options| options.threads = Some(3)),
            ["intra_op_num_threads=3"]
        );
        assert_eq!(
            told(Provider::Cuda, &spec, user("arena_extend_strategy", "kNextPowerOfTwo")),
            ["arena_extend_strategy=kNextPowerOfTwo", "cudnn_conv_algo_search=HEURISTIC"]
        );
    }
}

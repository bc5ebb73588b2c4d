//! The option keys that each provider takes.
//!
//! Taken from the providers' sources and from what the libraries of ONNX Runtime 1.31 and 1.32 and of the plugins
//! hold. Keys that take an address in memory (streams, allocators, models as bytes) are left out: no text can name
//! one. So is the device: [`Target`](super::provider::Target) chooses it.

use super::provider::Provider;

/// A key, and what it does.
pub(super) type Key = (&'static str, &'static str);

/// What this program itself does about a session, whichever provider serves it.
pub(super) const COMMON: &[Key] = &[
    (DISABLED_OPTIMIZERS, "ONNX Runtime's graph optimizers to leave out, separated by ;"),
    (DISABLE_CPU_FALLBACK, "1: refuse a graph of which the processor would run a part"),
];

/// What this program itself does about the caches of the providers that compute on NVIDIA GPUs.
pub(super) const CACHE: &[Key] =
    &[(CACHE_ON_HOST, "1: keep the decoder's cache on the host, slow, where the GPU has no memory for it")];

pub(super) const CACHE_ON_HOST: &str = "cache_on_host";

pub(super) const DISABLED_OPTIMIZERS: &str = "disabled_optimizers";
pub(super) const DISABLE_CPU_FALLBACK: &str = "disable_cpu_fallback";

/// Whether a provider has memory of its own for the decoder's cache that this program can take.
pub(super) fn keeps_caches(provider: Provider) -> bool {
    matches!(provider, Provider::Cuda | Provider::TensorRt)
}

/// The keys of the provider itself.
pub(super) fn of(provider: Provider) -> &'static [Key] {
    match provider {
        Provider::Cpu => &[],
        Provider::Cuda => CUDA,
        Provider::TensorRt => TENSORRT,
        Provider::CoreMl => COREML,
        Provider::Nnapi => NNAPI,
        Provider::Xnnpack => XNNPACK,
        Provider::Qnn => QNN,
        Provider::OpenVino => OPENVINO,
        Provider::WebGpu => WEBGPU,
        Provider::DirectMl => DIRECTML,
        Provider::TensorRtRtx => TENSORRT_RTX,
    }
}

const CUDA: &[Key] = &[
    ("arena_extend_strategy", "how its memory grows: kSameAsRequested (ours), kNextPowerOfTwo"),
    ("cudnn_conv1d_pad_to_nc1d", "1: pad one-dimensional convolutions to [N, C, 1, D]"),
    ("cudnn_conv_algo_search", "how convolutions are chosen: HEURISTIC (ours), EXHAUSTIVE, DEFAULT"),
    ("cudnn_conv_use_max_workspace", "1: let cuDNN take as much memory as it likes"),
    ("do_copy_in_default_stream", "1: copy in the default stream"),
    ("enable_cuda_graph", "1: record the kernels of a run and replay them; needs fixed shapes"),
    ("enable_cudnn", "1: use cuDNN where it is installed"),
    ("enable_skip_layer_norm_strict_mode", "1: sum layer norms in f32"),
    ("fuse_conv_bias", "1: add the bias of a convolution in its kernel"),
    ("gpu_mem_limit", "bytes of its memory arena at most"),
    ("prefer_nhwc", "1: keep images with channels last"),
    ("sdpa_kernel", "bits of the attention kernels that may be used; 0 lets it choose"),
    ("tunable_op_enable", "1: use operators that tune themselves"),
    ("tunable_op_max_tuning_duration_ms", "milliseconds that tuning one operator may take"),
    ("tunable_op_tuning_enable", "1: tune them"),
    ("use_ep_level_unified_stream", "1: one stream for all of it"),
    ("use_tf32", "1: multiply f32 with 10-bit mantissas; 0 for exact f32"),
];

const TENSORRT: &[Key] = &[
    ("trt_auxiliary_streams", "streams beside the main one; -1 lets it choose, 0 takes least memory"),
    ("trt_bf16_enable", "1: allow bf16 kernels"),
    ("trt_build_heuristics_enable", "1: build faster by heuristics"),
    ("trt_builder_optimization_level", "0 builds fastest, 5 runs fastest; 3 if not set"),
    ("trt_context_memory_sharing_enable", "1: partitions share their scratch memory"),
    ("trt_cuda_graph_enable", "1: record the kernels of a run and replay them; needs fixed shapes"),
    ("trt_detailed_build_log", "1: log each step of a build with its time"),
    ("trt_dla_core", "number of the deep learning accelerator"),
    ("trt_dla_enable", "1: use the deep learning accelerator"),
    ("trt_dump_ep_context_model", "1: write an ONNX file that holds the engine"),
    ("trt_dump_subgraphs", "1: write each partition as an ONNX file"),
    ("trt_engine_cache_enable", "1: keep built engines; on where there is a directory for them"),
    ("trt_engine_cache_path", "directory of the engines"),
    ("trt_engine_cache_prefix", "first part of the engines' file names"),
    ("trt_engine_decryption_enable", "1: decrypt engines"),
    ("trt_engine_decryption_lib_path", "library that decrypts them"),
    ("trt_engine_hw_compatible", "1: build engines for every GPU since Ampere"),
    ("trt_ep_context_embed_mode", "0: the ONNX file names the engine's file, 1: it holds it"),
    ("trt_ep_context_file_path", "where the ONNX file that holds the engine is written"),
    ("trt_extra_plugin_lib_paths", "libraries of TensorRT plugins, separated by ;"),
    ("trt_force_sequential_engine_build", "1: build one engine after another where there are several GPUs"),
    ("trt_force_timing_cache", "1: use a timing cache of another GPU of the same model"),
    ("trt_fp16_enable", "1: allow f16 kernels; TensorRT 11 follows the graph's types alone"),
    ("trt_int8_calibration_table_name", "file of the int8 ranges"),
    ("trt_int8_enable", "1: allow int8 kernels"),
    ("trt_int8_use_native_calibration_table", "1: the ranges' file is TensorRT's own"),
    ("trt_layer_norm_fp32_fallback", "1: keep layer norms in f32 beside f16 or bf16 kernels"),
    ("trt_load_user_initializer", "1: take weights that were given to the session"),
    ("trt_max_partition_iterations", "attempts at least at taking the graph in pieces"),
    ("trt_max_workspace_size", "bytes of scratch memory at most"),
    ("trt_min_subgraph_size", "nodes that a partition has at least"),
    ("trt_onnx_model_folder_path", "directory of the ONNX file of a stripped engine"),
    ("trt_op_types_to_exclude", "operators to leave to others, separated by ,"),
    ("trt_preview_features", "preview features of TensorRT, separated by ,"),
    ("trt_profile_max_shapes", "largest shape of each input: name:1x2x3,..."),
    ("trt_profile_min_shapes", "smallest shape of each input"),
    ("trt_profile_opt_shapes", "shape of each input that it is built for"),
    ("trt_sparsity_enable", "1: use 2:4 sparse weights"),
    ("trt_tactic_sources", "where kernels may come from: +CUDNN,-CUBLAS,..."),
    ("trt_timing_cache_enable", "1: keep what kernels took; on where there is a directory for it"),
    ("trt_timing_cache_path", "directory of the timings"),
    ("trt_weight_stripped_engine_enable", "1: build engines without weights"),
];

const COREML: &[Key] = &[
    ("AllowLowPrecisionAccumulationOnGPU", "1: add up in f16 on the GPU"),
    ("EnableOnSubgraphs", "1: take the bodies of loops and branches too"),
    ("MLComputeUnits", "ALL, CPUAndNeuralEngine, CPUAndGPU, CPUOnly"),
    ("ModelCacheDirectory", "directory of compiled models; else each load compiles anew"),
    ("ModelFormat", "MLProgram (ours), NeuralNetwork"),
    ("ProfileComputePlan", "1: log which unit each operator goes to"),
    ("RequireStaticInputShapes", "1: take only operators of fixed shapes; on where no input varies"),
    ("SpecializationStrategy", "Default, FastPrediction"),
];

/// NNAPI takes flags; these names are ours.
const NNAPI: &[Key] = &[
    ("cpu_disabled", "1: not NNAPI's own processor kernels, which are slow; Android 10 or newer"),
    ("cpu_only", "1: only NNAPI's processor kernels, as a reference; Android 10 or newer"),
    ("use_fp16", "1 (ours): f32 may be computed as f16"),
    ("use_nchw", "1: keep images with channels first; Android 10 or newer"),
];

const XNNPACK: &[Key] =
    &[("intra_op_num_threads", "threads of its own; as many as the session's if not set")];

const QNN: &[Key] = &[
    ("backend_path", "library of the processor: libQnnHtp.so beside the plugin if not set"),
    ("backend_type", "cpu, gpu, htp, saver, ir; in place of backend_path"),
    ("disable_file_mapped_weights", "1: read weights instead of mapping their file"),
    ("dump_json_qnn_graph", "1: write each partition as JSON"),
    ("dump_qnn_ir_dlc", "1: write each partition as DLC"),
    ("dump_qnn_ir_dlc_dir", "directory of the DLC files"),
    ("enable_htp_fp16_precision", "1: compute f32 as f16"),
    ("enable_htp_prepare_only", "1: compile and do not load"),
    ("enable_htp_shared_memory_allocator", "1: memory that the neural processor shares"),
    ("enable_htp_spill_fill_buffer", "1: one buffer for what does not fit on the chip"),
    ("enable_htp_weight_sharing", "1: graphs compiled together share their weights"),
    ("enable_vtcm_backup_buffer_sharing", "1: sessions share the backup of on-chip memory"),
    ("extended_udma", "1: extended direct memory access"),
    ("htp_arch", "version of the neural processor: 68, 69, 73, 75, 79, 81"),
    ("htp_bf16_enable", "1: compute f32 as bf16"),
    ("htp_graph_finalization_optimization_mode", "0 compiles fastest, 3 runs fastest"),
    (
        "htp_performance_mode",
        "burst, balanced, default, high_performance, sustained_high_performance, power_saver, low_power_saver, \
         high_power_saver, low_balanced, extreme_power_saver",
    ),
    ("json_qnn_graph_dir", "directory of the JSON files"),
    ("offload_graph_io_quantization", "1 (its default): the processor quantizes inputs and outputs"),
    ("op_packages", "libraries of further operators"),
    ("profiling_file_path", "file of its own profile"),
    ("profiling_level", "off, basic, detailed, optrace"),
    ("qnn_context_priority", "low, normal, normal_high, high"),
    ("qnn_ir_backend_path", "library that writes graphs"),
    ("qnn_saver_path", "library that records calls for replay"),
    ("rpc_control_latency", "microseconds that a call may wait"),
    ("skip_backend_op_validation", "1: do not ask whether an operator is supported"),
    ("skip_qnn_version_check", "1: accept a library of another version"),
    ("soc_model", "number of the chip; 0 if unknown"),
    ("vtcm_mb", "megabytes of on-chip memory"),
];

const OPENVINO: &[Key] = &[
    ("cache_dir", "directory of compiled graphs; else each load compiles anew"),
    ("device_luid", "Windows identifiers of the devices, separated by ,"),
    ("device_type", "CPU, GPU, NPU, GPU.1, AUTO:GPU,CPU, HETERO:..., MULTI:..."),
    ("disable_dynamic_shapes", "true: compile anew for each shape"),
    ("enable_causallm", "true: treat the graph as a language model with a state of its own"),
    ("enable_opencl_throttling", "true: less load on the processor beside a GPU"),
    ("enable_qdq_optimizer", "true: drop needless quantization on a neural processor"),
    ("load_config", "JSON of OpenVINO's own properties for each device"),
    ("model_priority", "LOW, MEDIUM, HIGH, DEFAULT"),
    ("num_of_threads", "threads on the processor"),
    ("num_streams", "runs at the same time"),
    ("precision", "FP32, FP16, ACCURACY"),
    ("reshape_input", "shapes or ranges of inputs: name[1,3,1..10],..."),
];

/// ONNX Runtime puts `ep.webgpuexecutionprovider.` before these.
const WEBGPU: &[Key] = &[
    ("dawnBackendType", "Vulkan, D3D12"),
    ("defaultBufferCacheMode", "disabled, lazyRelease, simple, bucket"),
    ("enableGraphCapture", "1: record the kernels of a run and replay them; needs fixed shapes"),
    ("enableInt64", "1: keep 64-bit integers on the GPU"),
    ("enablePIXCapture", "1: capture for Microsoft PIX"),
    ("enableRobustness", "1: check bounds in shaders"),
    ("forceCpuNodeNames", "nodes to leave to the processor, one a line"),
    ("kvCacheQuantizationBits", "bits of the attention cache: 0, 4, 8"),
    ("maxNumPendingDispatches", "kernels that wait at most"),
    ("maxStorageBufferBindingSize", "bytes of a buffer at most"),
    ("multiRotaryCacheConcatOffset", "row at which a second table of angles begins"),
    ("powerPreference", "high-performance, low-power"),
    ("preferredLayout", "NHWC, NCHW"),
    ("preserveDevice", "1: keep the device after the last session"),
    ("queryResolveBufferCacheMode", "as defaultBufferCacheMode"),
    ("sessionBufferPoolGenerations", "generations of buffers that are kept"),
    ("storageBufferCacheMode", "as defaultBufferCacheMode"),
    ("uniformBufferCacheMode", "as defaultBufferCacheMode"),
    ("validationMode", "disabled, wgpuOnly, basic, full"),
];

/// `DirectML` is asked through a structure; these names are ours.
const DIRECTML: &[Key] = &[
    ("device_filter", "any, gpu, npu; where no device is named"),
    ("performance_preference", "default, high_performance, minimum_power; where no device is named"),
];

const TENSORRT_RTX: &[Key] = &[
    ("enable_cuda_graph", "1: record the kernels of a run and replay them"),
    ("nv_detailed_build_log", "1: log each step of a build"),
    ("nv_dump_subgraphs", "1: write each partition as an ONNX file"),
    ("nv_enable_profiling", "1: profile layers"),
    ("nv_length_aux_stream_array", "streams beside the main one"),
    ("nv_max_shared_mem_size", "bytes of shared memory that a kernel takes at most"),
    ("nv_max_workspace_size", "bytes of scratch memory at most"),
    ("nv_multi_profile_enable", "1: several ranges of shapes"),
    ("nv_multi_rotary_cache_concat_offset", "row at which a second table of angles begins"),
    ("nv_op_types_to_exclude", "operators to leave to others, separated by ,"),
    ("nv_profile_max_shapes", "largest shape of each input: name:1x2x3,..."),
    ("nv_profile_min_shapes", "smallest shape of each input"),
    ("nv_profile_opt_shapes", "shape of each input that it is built for"),
    ("nv_profiling_output_file", "file of the profile"),
    ("nv_runtime_cache_path", "directory of compiled kernels"),
    ("nv_use_sync_gpu_allocator", "1: allocate without a stream"),
    ("nv_weight_streaming_budget", "bytes of weights on the GPU at most; the rest is streamed"),
];

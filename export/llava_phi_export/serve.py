"""Which variant serves which provider, best first, for each component."""

from __future__ import annotations

_TENSORRT = [("tensorrt-fp16", "tensorrt"), ("tensorrt-delta-fp16", "tensorrt")]
_CUDA_F16 = [("cuda-fp16", "cuda"), ("cuda-int4", "cuda")]
# TensorRT's graphs are made of standard operators, for which CUDA has kernels.
_CUDA_INSTEAD = [("tensorrt-fp16", "cuda"), ("tensorrt-delta-fp16", "cuda")]
_PHONE_F16 = [("coreml-fp16", "coreml"), ("qnn-fp16", "qnn")]
# The cache of f32 is for who asks: ONNX Runtime reads prompts faster so, and every token after them slower.
_CPU = [("cpu-int4", "cpu"), ("cpu-int4-kv-f32", "cpu"), ("portable-f32", "cpu")]

# Whatever follows the CPU is reached on request or by a measurement, because the CPU takes every package.
_VISION = [
    # A quarter of the memory, and faster where the engine has kernels of its own.
    *_TENSORRT, *_CUDA_F16, *_CUDA_INSTEAD, *_PHONE_F16, ("cpu-int8", "cpu"), *_CPU,
    ("cuda-fp16", "tensorrt-rtx"), ("cuda-int4", "tensorrt-rtx"), ("cuda-fp16", "webgpu"), ("cuda-int4", "webgpu"),
    ("cpu-int4", "xnnpack"), ("portable-f32", "xnnpack"),
    ("portable-f32", "openvino"), ("cpu-int4", "openvino"), ("portable-f32", "directml"), ("cpu-int4", "directml"),
    # Deprecated since Android 15, and usually slower than the CPU.
    ("nnapi-u8", "nnapi"), ("nnapi-fp32", "nnapi"),
]  # fmt: skip
# CoreML's f16 decoder of 5.6 GB fits into few phones, so that it too is for who asks; four bits on the CPU fit.
_DECODER = [
    *_TENSORRT, ("cuda-int4", "cuda"), ("cuda-fp16", "cuda"), *_CUDA_INSTEAD,
    ("cuda-int4", "tensorrt-rtx"), ("cuda-fp16", "tensorrt-rtx"), *_CPU,
    ("cpu-int4", "xnnpack"), ("cuda-int4", "webgpu"), ("cuda-fp16", "webgpu"), *_PHONE_F16, ("nnapi-fp32", "nnapi"),
    ("portable-f32", "openvino"), ("portable-f32", "directml"),
]  # fmt: skip
_ORDERS = {"vision_encoder": _VISION, "projector": _VISION, "decoder": _DECODER, "head": []}


def orders(variants: dict[str, dict]) -> dict[str, list[dict]]:
    """For each component its choices among the exported `variants`; each graph once a provider, and all on the CPU."""
    found = {}
    for component, order in _ORDERS.items():
        seen, choices = set(), []
        for variant, provider in [*order, *((variant, "cpu") for variant in variants)]:
            graph = variants.get(variant, {}).get(component)
            if graph is None:
                continue
            what = (graph.get("graph", graph)["path"], provider)
            if what not in seen:
                seen.add(what)
                choices.append({"variant": variant, "provider": provider})
        if choices or component != "head":
            found[component] = choices
    return found

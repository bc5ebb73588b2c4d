"""How far from the goldens each variant may be: what its arithmetic costs, and what its stored weights were seen to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from .goldens import Goldens
from .rounding import Rounding, distance
from .vision_encoder import ATTENTION

# Relative L2 distances that arithmetic alone may cost, about ten times what ONNX Runtime's CPU kernels gave.
F32, F16 = 1e-3, 2e-2
# Activations rounded to int8 a block of 32 at a time, the weights' own rounding apart.
INT8 = 3e-2
# Keys and values rounded to int8.
KV8 = 1e-2
# Of an encoder whose weights have 8 bits too.
INT8_ENCODER = 5e-2

# How much further the class token's attention may be than the features: a softmax turns what is added to a score into
# what is multiplied to a weight. Two to seven times as far was measured.
ATTENTION_FACTOR = 4

# What is allowed before the decoder, and in it.
_CLASSES = {
    "cpu-int4": (F32, INT8 + KV8),
    "cpu-int4-kv-f32": (F32, INT8),
    "cpu-int8": (INT8_ENCODER, F32),
    "cuda-fp16": (F16, F16),
    "cuda-int4": (F16, F16),
    "tensorrt-fp16": (F16, F16),
    "tensorrt-delta-fp16": (F16, F16),
    "coreml-fp16": (F16, F16),
    "qnn-fp16": (F16, F16),
    # The provider's flag lets NNAPI compute in f16.
    "nnapi-fp32": (F16, F16),
    "nnapi-u8": (F16, F16),
    "portable-f32": (F32, F32),
}


def tolerance(variant: str, parts: dict, root: Path, goldens: Goldens, rounding: Rounding) -> dict[str, float]:
    """The largest relative L2 distance of each result of a component that reads the golden input.

    Rounding to a few bits moves the logits of one model by a hundredth and those of another by a tenth, so it is
    measured for the weights that were written and only the arithmetic's share is a constant.
    """
    before, logits = _CLASSES[variant]
    if "decoder" in parts:
        logits += rounding.distance(root / parts["decoder"]["graph"]["path"])
    if "head" in parts:
        # The head rounds activations, wherever the decoder runs.
        logits += INT8 + rounding.distance(root / parts["head"]["path"])
    attention = ATTENTION_FACTOR * before
    if variant == "nnapi-u8":
        distances = _encoder(root / parts["vision_encoder"]["path"], goldens)
        before += 1.5 * distances["patch_features"]
        attention += 1.5 * distances.get(ATTENTION, 0.0)
    limits = {"patch_features": before, "image_embeds": before, "logits": logits}
    if ATTENTION in goldens.tensors:
        limits[ATTENTION] = attention
    return {name: _round(limit) for name, limit in limits.items()}


def _encoder(path: Path, goldens: Goldens) -> dict[str, float]:
    """The distance of each of a vision encoder's outputs on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"pixel_values": goldens.tensors["pixel_values"]})
    return {name: distance(values, goldens.tensors[name]) for name, values in zip(names, found, strict=True)}


def _round(value: float) -> float:
    """Two digits upwards, so that the last bits of a measurement change no manifest."""
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{np.ceil(round(value / step, 6)) * step:.3g}")

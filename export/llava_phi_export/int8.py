"""The dialect of `cpu-int8`: matrices of 8 bits with one scale for 128 numbers, multiplied by rounded activations."""

from __future__ import annotations

from .contrib import Contrib
from .quantize import QuantizeOptions


class Int8(Contrib):
    """ONNX Runtime's own operators on the CPU for what comes before the decoder; everything but matrices stays f32."""

    def __init__(self, graph, checkpoint, *_):
        # The options that the user may give are those of the decoder.
        super().__init__(graph, checkpoint, QuantizeOptions(block_size=128, accuracy_level=4))

"""Dialects of runtimes that compile a graph once: batch 1, caches of fixed size, standard operators."""

from __future__ import annotations

from .attention import DeltaAttention, ScatterAttention
from .dialect import Half, Standard


class Fixed(Standard):
    """Every size is known; a decoder reads a chunk beside its cache and gives hidden states; f32."""

    batch = 1
    kv_form = "delta"
    chunk = 16
    ends_in_hidden = True

    def cached_attention(self, config):
        return DeltaAttention(self, config)


class FixedHalf(Fixed, Half):
    """As `Fixed`, f16: for CoreML, QNN and, but for the decoder, TensorRT.

    The residual stream is f16, because an accelerator's f16 engine would hand an f32 one to another processor at every
    layer; Phi-2's is some thousands at most.
    """


class TensorRtDelta(FixedHalf):
    """The decoder for every TensorRT: attention decomposed, logits in the graph.

    The stream between the layers is f32; TensorRT fuses the casts into what is beside them.
    """

    wide_stream = True
    chunk = 128
    ends_in_hidden = False


class TensorRtScatter(Half):
    """The decoder for TensorRT 10.15 and later: rows are scattered into a cache that is written in place.

    Only the positions of one run vary. TensorScatter is of opset 24. The stream is f32 as in `TensorRtDelta`.
    """

    opset = 24
    wide_stream = True
    batch = 1
    kv_form = "scatter"
    chunk = 256

    def cached_attention(self, config):
        return ScatterAttention(self, config)

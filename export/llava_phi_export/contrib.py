"""ONNX Runtime's own operators: few-bit weights, and fused attention with one cache buffer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .attention import SharedAttention
from .dialect import Standard, joint
from .errors import ExportError
from .graph import F16, F32, I8
from .quantize import quantize


class Fused(Standard):
    """Fused attention, norm and activation; the matrices as in the standard dialect.

    Attention keeps scores and softmax in f32 whatever the type: GroupQueryAttention's kernels accumulate the products
    and normalise them in f32.
    """

    contrib = True
    kv_form = "shared"

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.ms = self.graph.contrib

    def add_norm(self, x, branches, norm, eps):
        branch = branches[0]
        for other in branches[1:]:
            branch = self.op.Add(branch, other)
        branch = self.exact(branch) if self.wide_stream else branch
        normed, _, _, total = self.ms.SkipLayerNormalization(branch, x, *self._norm(norm), epsilon=eps, _outputs=4)
        # Their schema is ONNX Runtime's own: the builder cannot know the types of these operators' results.
        normed.dtype = total.dtype = F32 if self.wide_stream else self.dtype
        return total, self.rounded(normed) if self.wide_stream else normed

    def activation(self, x, kind):
        if kind != "gelu_tanh":
            return super().activation(x, kind)
        # The same function as Gelu's tanh form, 2.6 times as fast over a prompt (640 x 10240: 3.9 ms, 10.0 ms).
        y = self.ms.FastGelu(x)
        y.dtype = self.dtype
        return y

    def cached_attention(self, config):
        return SharedAttention(self, config)


class FusedHalf(Fused):
    """As `Fused`, weights and activations f16: for CUDA, whose fused attention takes no f32.

    The stream between the layers is f32, because CUDA's norm of an f16 one sums squares in f16.
    """

    dtype = F16
    wide_stream = True


class Contrib(Fused):
    """As `Fused`, with matrices of a few bits: for the CPU."""

    # Whether activations may be rounded to int8 where they are multiplied, as the options say.
    rounds_activations = True

    def linear(self, x, *layers):
        shapes = [self.checkpoint.shape(f"{layer}.weight") for layer in layers]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        bits, block = self.options.bits(layers[-1]), self.options.block_size
        blocks = -(-columns // block)
        name = joint(layers, f"weight_q{bits}")
        # The scales are kept until the packed weights are on disk: an eighth of them at block 32.
        scales, zeros = [], []

        def packed() -> Iterator[np.ndarray]:
            for layer in layers:
                for part in self._parts(f"{layer}.weight"):
                    try:
                        quantized = quantize(part, bits, self.options)
                    except ExportError as error:
                        raise ExportError(f"{layer}.weight cannot be quantised: {error}") from error
                    scales.append(self.stored(f"the scales of {layer}.weight", quantized.scales))
                    if quantized.zero_points is not None:
                        zeros.append(quantized.zero_points)
                    yield quantized.packed

        weight = self.graph.weight_in_parts(name, np.uint8, (rows, blocks, block * bits // 8), packed())
        scale = self.graph.weight(f"{name}.scales", np.concatenate(scales))
        zero = self.graph.weight(f"{name}.zero_points", np.concatenate(zeros)) if zeros else None
        bias = self._bias(layers)
        inputs = [x, weight, scale, zero, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        level = self.options.accuracy_level if self.rounds_activations else 0
        y = self.ms.MatMulNBits(*inputs, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=level)
        y.dtype = self.dtype
        return y


class ContribInt8Kv(Contrib):
    """As `Contrib`, with a cache of int8: a quarter of the memory, and of what attention reads of it."""

    kv_dtype = I8


class ContribHalf(Contrib):
    """As `Contrib`, scales and activations f16, nothing rounded to int8: for CUDA and WebGPU."""

    dtype = F16
    wide_stream = True
    rounds_activations = False

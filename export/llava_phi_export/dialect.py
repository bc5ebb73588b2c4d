"""The operators that a variant may use: one model definition speaks each dialect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .attention import ConcatAttention, SharedAttention
from .config import DecoderConfig
from .errors import ExportError
from .graph import F32, Graph
from .quantize import QuantizeOptions, quantize


@dataclass(frozen=True)
class HeadShape:
    """Heads of the queries, heads of keys and values (each serves a group of the former), numbers in a head."""

    heads: int
    kv_heads: int
    head_dim: int


# Numbers of a matrix that are f32 in memory at once while it is quantised.
_PART = 1 << 24


class Standard:
    """Operators of the standard ONNX domain only; weights f32; the cache grows by concatenation.

    `graph` takes the nodes; `checkpoint` gives the tensors, by their canonical names.
    """

    opset = 21
    contrib = False
    kv_form = "concat"

    def __init__(self, graph: Graph, checkpoint):
        self.graph = graph
        self.op = graph.op
        self.checkpoint = checkpoint

    def has(self, tensor: str) -> bool:
        """Whether the checkpoint has the tensor."""
        return self.checkpoint.has(tensor)

    def tensor(self, tensor: str) -> ir.Value:
        """A tensor of the checkpoint as it is, f32."""
        return self.graph.weight(tensor, self.checkpoint.f32(tensor))

    def layer_norm(self, x: ir.Value, norm: str, eps: float) -> ir.Value:
        """Normalises the last axis of `x` with the weights of `norm`."""
        weight, bias = self._norm(norm)
        return self.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)

    def add_norm(self, x: ir.Value, branches: Sequence[ir.Value], norm: str, eps: float) -> tuple[ir.Value, ir.Value]:
        """Adds `branches` to `x`; returns the sum and the sum normalised."""
        total = x
        for branch in branches:
            total = self.op.Add(total, branch)
        return total, self.layer_norm(total, norm, eps)

    def activation(self, x: ir.Value, kind: str) -> ir.Value:
        """`gelu` by the error function, `gelu_tanh` by its tanh form, `quick_gelu` by x * sigmoid(1.702 x)."""
        match kind:
            case "gelu":
                return self.op.Gelu(x)
            case "gelu_tanh":
                return self.op.Gelu(x, approximate="tanh")
            case "quick_gelu":
                return self.op.Mul(x, self.op.Sigmoid(self.op.Mul(x, 1.702)))
        raise ExportError(f"activation {kind} is unknown; known are gelu, gelu_tanh and quick_gelu")

    def linear(self, x: ir.Value, *layers: str) -> ir.Value:
        """The layers applied to `x` [..., in], their outputs side by side; biases where the checkpoint has them."""
        # ONNX's MatMul takes [in, out], the checkpoint has [out, in].
        weight = np.concatenate([self.checkpoint.f32(f"{layer}.weight").T for layer in layers], axis=1)
        y = self.op.MatMul(x, self.graph.weight(_joint(layers, "weight"), weight))
        bias = self._bias(layers)
        return y if bias is None else self.op.Add(y, bias)

    def heads(self, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
        """[batch, positions, heads * head_dim] to [batch, heads, positions, head_dim]."""
        return self.op.Transpose(self.op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, shape: HeadShape, mask: ir.Value | None = None) -> ir.Value:
        """Attention over [batch, heads, positions, head_dim]; returns [batch, positions, heads * head_dim].

        Scores and softmax are f32. `mask` [batch, 1, new, total] is added to the scores.
        """
        op = self.op
        group = shape.heads // shape.kv_heads
        if group > 1:
            q = op.Reshape(q, [0, shape.kv_heads, group, -1, shape.head_dim])
            k, v = op.Unsqueeze(k, [2]), op.Unsqueeze(v, [2])
            mask = None if mask is None else op.Unsqueeze(mask, [1])
        last_swapped = [0, 1, 2, 4, 3] if group > 1 else [0, 1, 3, 2]
        scores = op.MatMul(op.Mul(q, shape.head_dim**-0.5), op.Transpose(k, perm=last_swapped))
        if mask is not None:
            scores = op.Add(scores, mask)
        mixed = op.MatMul(op.Softmax(scores, axis=-1), v)
        if group > 1:
            mixed = op.Reshape(mixed, [0, shape.heads, -1, shape.head_dim])
        return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, shape.heads * shape.head_dim])

    def cached_attention(self, config: DecoderConfig) -> ConcatAttention:
        """The decoder's attention with the cache of this dialect."""
        return ConcatAttention(self, config)

    def _norm(self, norm: str) -> tuple[ir.Value, ir.Value]:
        return self.tensor(f"{norm}.weight"), self.tensor(f"{norm}.bias")

    def _bias(self, layers: Sequence[str]) -> ir.Value | None:
        present = [self.has(f"{layer}.bias") for layer in layers]
        if not any(present):
            return None
        if not all(present):
            raise ExportError(f"of the layers {', '.join(layers)} some have a bias and some have none")
        bias = np.concatenate([self.checkpoint.f32(f"{layer}.bias") for layer in layers])
        return self.graph.weight(_joint(layers, "bias"), bias)


class Contrib(Standard):
    """ONNX Runtime's own operators on the CPU: few-bit weights, fused attention with one cache buffer."""

    contrib = True
    kv_form = "shared"

    def __init__(self, graph: Graph, checkpoint, options: QuantizeOptions):
        super().__init__(graph, checkpoint)
        self.ms = graph.contrib
        self.options = options

    def add_norm(self, x, branches, norm, eps):
        branch = branches[0]
        for other in branches[1:]:
            branch = self.op.Add(branch, other)
        weight, bias = self._norm(norm)
        normed, _, _, total = self.ms.SkipLayerNormalization(branch, x, weight, bias, epsilon=eps, _outputs=4)
        normed.dtype = total.dtype = F32
        return total, normed

    def activation(self, x, kind):
        if kind != "gelu_tanh":
            return super().activation(x, kind)
        # The same function as Gelu's tanh form, 2.6 times as fast over a prompt (640 x 10240: 3.9 ms, 10.0 ms).
        y = self.ms.FastGelu(x)
        y.dtype = F32
        return y

    def linear(self, x, *layers):
        shapes = [self.checkpoint.shape(f"{layer}.weight") for layer in layers]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        bits, block = self.options.bits(layers[-1]), self.options.block_size
        blocks = -(-columns // block)
        name = _joint(layers, f"weight_q{bits}")
        # The scales are kept until the packed weights are on disk: an eighth of them at block 32.
        scales, zeros = [], []

        def packed() -> Iterator[np.ndarray]:
            for layer in layers:
                for part in self._parts(f"{layer}.weight"):
                    try:
                        quantized = quantize(part, bits, self.options)
                    except ExportError as error:
                        raise ExportError(f"{layer}.weight cannot be quantised: {error}") from error
                    scales.append(quantized.scales)
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
        y = self.ms.MatMulNBits(
            *inputs, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=self.options.accuracy_level
        )
        # Their schema is ONNX Runtime's own: the builder cannot know the types of these operators' results.
        y.dtype = F32
        return y

    def cached_attention(self, config):
        return SharedAttention(self, config)

    def _parts(self, tensor: str) -> Iterator[np.ndarray]:
        """A matrix by groups of rows, each f32."""
        rows, columns = self.checkpoint.shape(tensor)
        step = max(1, _PART // columns)
        for start in range(0, rows, step):
            yield self.checkpoint.rows(tensor, start, start + step).astype(np.float32)


def _joint(layers: Sequence[str], suffix: str) -> str:
    """The name of several layers' joint weight: `decoder.layers.0.q_proj+k_proj+v_proj.weight`."""
    first, *others = layers
    return "+".join([first, *(layer.rsplit(".", 1)[-1] for layer in others)]) + f".{suffix}"

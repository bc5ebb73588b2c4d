"""The operators that a variant may use: one model definition speaks each dialect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .attention import ConcatAttention, KvScales
from .config import DecoderConfig
from .errors import ExportError
from .graph import F16, F32, Graph
from .quantize import QuantizeOptions


@dataclass(frozen=True)
class HeadShape:
    """Heads of the queries, heads of keys and values (each serves a group of the former), numbers in a head."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Window:
    """Positions that a cache of fixed size holds, and positions of one run (the most, or exactly so many)."""

    capacity: int
    chunk: int


# Numbers of a matrix that are f32 in memory at once while it is converted.
_PART = 1 << 24
# Largest number of f16.
_F16_MAX = 65504


class Standard:
    """Operators of the standard ONNX domain only; weights f32; the cache grows by concatenation.

    `graph` takes the nodes; `checkpoint` gives the tensors, by their canonical names. What a subclass changes:
    `dtype` of weights and activations, `wide_stream` (of f16 decoders, what layers carry and the norms over it stay
    f32), `batch` (a name where it varies), `kv_form`, `kv_dtype` (of the cache, unless it is that of the activations),
    `chunk` (positions of one run of a decoder whose cache has a fixed size, unless the user asks for others) and
    `ends_in_hidden` (the decoder stops after its last norm and a head follows). `kv_scales` are those of a cache of
    int8.
    """

    # 20 has Gelu, and is the last that DirectML reads.
    opset = 20
    contrib = False
    dtype = F32
    wide_stream = False
    batch: str | int = "batch"
    kv_form = "concat"
    kv_dtype: ir.DataType | None = None
    chunk: int | None = None
    ends_in_hidden = False

    def __init__(self, graph: Graph, checkpoint, quantize: QuantizeOptions | None = None, window: Window | None = None):
        self.graph = graph
        self.op = graph.op
        self.checkpoint = checkpoint
        self.options = quantize or QuantizeOptions()
        self.window = window
        self.kv_scales: KvScales | None = None

    def has(self, tensor: str) -> bool:
        """Whether the checkpoint has the tensor."""
        return self.checkpoint.has(tensor)

    def tensor(self, tensor: str, shape: Sequence[int] | None = None) -> ir.Value:
        """A tensor of the checkpoint as it is, in another shape if one is given."""
        values = self.checkpoint.f32(tensor)
        return self.graph.weight(tensor, self.stored(tensor, values if shape is None else values.reshape(shape)))

    def stored(self, name: str, values: np.ndarray) -> np.ndarray:
        """Numbers f32 in the type that the graph holds them in; what f16 cannot hold is refused."""
        if self.dtype == F32:
            return values
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            largest = np.abs(values).max()
            raise ExportError(
                f"{name} holds {largest:.3g}, f16 ends at {_F16_MAX}; leave out the f16 variants, or mend the checkpoint"
            )
        return half

    def enter(self, x: ir.Value, width: int) -> ir.Value:
        """Activations [batch, positions, width] as the layers carry them from one to the next."""
        return self.exact(x) if self.wide_stream else x

    def leave(self, x: ir.Value, positions: int | str, width: int) -> ir.Value:
        """What layers carry, as [batch, positions, width]."""
        return x

    def exact(self, x: ir.Value) -> ir.Value:
        """`x` in f32, for what must not be computed in less."""
        return x if self.dtype == F32 else self.op.Cast(x, to=F32)

    def rounded(self, x: ir.Value) -> ir.Value:
        """An f32 `x` in the type of the activations."""
        return x if self.dtype == F32 else self.op.Cast(x, to=self.dtype)

    def layer_norm(self, x: ir.Value, norm: str, eps: float) -> ir.Value:
        """Normalises the last axis of `x`, as layers carry it, with the weights of `norm`."""
        normed = self.op.LayerNormalization(x, *self._norm(norm), axis=-1, epsilon=eps)
        return self.rounded(normed) if self.wide_stream else normed

    def add_norm(self, x: ir.Value, branches: Sequence[ir.Value], norm: str, eps: float) -> tuple[ir.Value, ir.Value]:
        """Adds `branches` to `x`, as layers carry it; returns the sum and the sum normalised."""
        total = x
        for branch in branches:
            total = self.op.Add(total, self.exact(branch) if self.wide_stream else branch)
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
        shapes = [self.checkpoint.shape(f"{layer}.weight") for layer in layers]
        weight = np.empty((shapes[0][1], sum(shape[0] for shape in shapes)), self.dtype.numpy())
        start = 0
        for layer in layers:
            for part in self._parts(f"{layer}.weight"):
                weight[:, start : start + len(part)] = self.stored(f"{layer}.weight", part).T
                start += len(part)
        y = self.op.MatMul(x, self.graph.weight(joint(layers, "weight"), weight))
        bias = self._bias(layers)
        return y if bias is None else self.op.Add(y, bias)

    def heads(self, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
        """What layers carry, heads * head_dim wide, to [batch, heads, positions, head_dim]."""
        return self.op.Transpose(self.op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])

    def merge(self, x: ir.Value, width: int) -> ir.Value:
        """[batch, heads, positions, head_dim] to what layers carry, `width` = heads * head_dim wide."""
        return self.op.Reshape(self.op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])

    def split(self, x: ir.Value, widths: Sequence[int]) -> Sequence[ir.Value]:
        """The last axis of `x` [batch, heads, positions, head_dim] in parts."""
        return self.op.Split(x, list(widths), axis=-1, _outputs=len(widths))

    def mask(self, mask: ir.Value, shape: HeadShape) -> ir.Value:
        """An additive mask [batch, 1, new, total] as `attend` takes it: f32, its rows once for each head of a group."""
        if self.dtype != F32:
            # The host's -1e4, which f16 can hold, becomes -1e9: Phi-2 has scores that are larger than 1e4.
            mask = self.op.Mul(self.exact(mask), 1e5)
        group = shape.heads // shape.kv_heads
        return self.op.Concat(*[mask] * group, axis=2) if group > 1 else mask

    def attend(self, q: ir.Value, k: ir.Value, v: ir.Value, shape: HeadShape, mask: ir.Value | None = None) -> ir.Value:
        """Attention over [batch, heads, positions, head_dim]; returns what layers carry, heads * head_dim wide.

        Scores and softmax are f32 whatever the type: those of Phi-2 are beyond f16. `mask` is what `mask` gives. No
        tensor has more than four axes, for the runtimes that end there: heads that share a key are rows of one matrix.
        """
        op = self.op
        group = shape.heads // shape.kv_heads
        if group > 1:
            q = op.Reshape(q, [0, shape.kv_heads, -1, shape.head_dim])
        mixed = op.MatMul(self.rounded(self.weights(q, k, shape, mask)), v)
        if group > 1:
            mixed = op.Reshape(mixed, [0, shape.heads, -1, shape.head_dim])
        return self.merge(mixed, shape.heads * shape.head_dim)

    def weights(self, q: ir.Value, k: ir.Value, shape: HeadShape, mask: ir.Value | None = None) -> ir.Value:
        """How much each query attends to each key, f32 [batch, heads, queries, keys]; as many heads on both sides."""
        op = self.op
        q = op.Mul(self.exact(q), [shape.head_dim**-0.5])
        scores = op.MatMul(q, self.exact(op.Transpose(k, perm=[0, 1, 3, 2])))
        return op.Softmax(scores if mask is None else op.Add(scores, mask), axis=-1)

    def mean(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The mean over `axes` of `x`, which are then gone."""
        return self.op.ReduceMean(x, list(axes), keepdims=0)

    def pick(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        """Of `x` [batch, positions, width], positions `rows` [rows], counted over the whole batch: [rows, width]."""
        if self.batch == 1:
            return self.op.Squeeze(self.op.Gather(x, rows, axis=1), [0])
        return self.op.Gather(self.op.Flatten(x, axis=2), rows, axis=0)

    def cached_attention(self, config: DecoderConfig) -> ConcatAttention:
        """The decoder's attention with the cache of this dialect."""
        return ConcatAttention(self, config)

    def _norm(self, norm: str) -> tuple[ir.Value, ...]:
        """Weight and bias of a norm, in the type of what it reads."""
        names = [f"{norm}.{part}" for part in ("weight", "bias")]
        if self.wide_stream:
            return tuple(self.graph.weight(name, self.checkpoint.f32(name)) for name in names)
        return tuple(map(self.tensor, names))

    def _bias(self, layers: Sequence[str]) -> ir.Value | None:
        present = [self.has(f"{layer}.bias") for layer in layers]
        if not any(present):
            return None
        if not all(present):
            raise ExportError(f"of the layers {', '.join(layers)} some have a bias and some have none")
        bias = np.concatenate([self.checkpoint.f32(f"{layer}.bias") for layer in layers])
        return self.graph.weight(joint(layers, "bias"), self.stored(f"{layers[0]}.bias", bias))

    def _parts(self, tensor: str) -> Iterator[np.ndarray]:
        """A matrix by groups of rows, each f32."""
        rows, columns = self.checkpoint.shape(tensor)
        step = max(1, _PART // columns)
        for start in range(0, rows, step):
            yield self.checkpoint.rows(tensor, start, start + step).astype(np.float32)


class Half(Standard):
    """As `Standard`, weights and activations f16."""

    dtype = F16


def joint(layers: Sequence[str], suffix: str) -> str:
    """The name of several layers' joint weight: `decoder.layers.0.q_proj+k_proj+v_proj.weight`."""
    first, *others = layers
    return "+".join([first, *(layer.rsplit(".", 1)[-1] for layer in others)]) + f".{suffix}"

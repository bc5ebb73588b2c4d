"""The decoder's attention in each form of the cache: what the graph takes, what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .config import DecoderConfig
from .errors import ExportError
from .graph import I8, I32, I64


@dataclass(frozen=True)
class KvScales:
    """What one step of a cache of int8 stands for, f32 [layers, kv_heads, head_dim] each."""

    key: np.ndarray
    value: np.ndarray


class _Attention:
    """What the forms share: the projections, the rotation, and the names of the caches.

    The layers of one graph are called in their order, between `inputs` and `outputs`.
    """

    def __init__(self, dialect, config: DecoderConfig):
        self._dialect, self._config = dialect, config
        self._given: list[tuple[str, ir.Value, list]] = []
        self._dtype = dialect.kv_dtype or dialect.dtype
        self._mask = self._cos = self._sin = None

    def outputs(self) -> None:
        """Declares what each layer gives back of its cache."""
        for name, value, shape in self._given:
            self._dialect.graph.output(value, name, self._dtype, shape)

    def _projected(self, x: ir.Value, prefix: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values [batch, heads, new, head_dim]; the former two are rotated."""
        dialect, config = self._dialect, self._config
        q = dialect.heads(dialect.linear(x, f"{prefix}.q_proj"), config.heads, config.head_dim)
        k = dialect.heads(dialect.linear(x, f"{prefix}.k_proj"), config.kv_heads, config.head_dim)
        v = dialect.heads(dialect.linear(x, f"{prefix}.v_proj"), config.kv_heads, config.head_dim)
        q, k = (rotate(dialect, part, self._cos, self._sin, config) for part in (q, k))
        return q, k, v

    def _past(self, layer: int, kind: str, positions: str | int) -> ir.Value:
        graph = self._dialect.graph
        return graph.input(f"past_key_values.{layer}.{kind}", self._dtype, self._shape(positions))

    def _give(self, name: str, value: ir.Value, positions: str | int) -> None:
        self._given.append((name, value, self._shape(positions)))

    def _shape(self, positions: str | int) -> list:
        return [self._dialect.batch, self._config.kv_heads, positions, self._config.head_dim]

    def _tables(self) -> list[ir.Value]:
        """Cosines and sines of every position, as weights."""
        names, tables = ("rotary.cos", "rotary.sin"), rotary_tables(self._config)
        return [
            self._dialect.graph.weight(name, self._dialect.stored(name, table)) for name, table in zip(names, tables)
        ]

    def _turn_by(self, positions: ir.Value) -> None:
        """Takes the angles of `positions` [batch, new] from the tables."""
        op = self._dialect.op
        self._cos, self._sin = (op.Unsqueeze(op.Gather(table, positions), [1]) for table in self._tables())


class ConcatAttention(_Attention):
    """The present is the past with the new rows appended; the host makes the mask."""

    def inputs(self) -> None:
        """Declares what tells positions."""
        dialect = self._dialect
        positions = dialect.graph.input("position_ids", I64, [dialect.batch, "new"])
        mask = dialect.graph.input("attention_mask", dialect.dtype, [dialect.batch, 1, "new", "total"])
        self._mask = dialect.mask(mask, self._config)
        self._turn_by(positions)

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over `x` [batch, new, hidden]; returns [batch, new, heads * head_dim]."""
        q, k, v = self._projected(x, prefix)
        k, v = self._extend(layer, "key", k), self._extend(layer, "value", v)
        return self._dialect.attend(q, k, v, self._config, self._mask)

    def _extend(self, layer: int, kind: str, new: ir.Value) -> ir.Value:
        present = self._dialect.op.Concat(self._past(layer, kind, "past"), new, axis=2)
        self._give(f"present.{layer}.{kind}", present, "total")
        return present


class DeltaAttention(_Attention):
    """The past has a fixed size and is read only; the new rows leave, and the host copies them in.

    The host gives the angles of the positions and a mask over the past's columns, then the chunk's.
    """

    def inputs(self) -> None:
        """Declares what tells positions."""
        dialect, window = self._dialect, self._dialect.window
        shape = [1, 1, window.chunk, self._config.rotary_dim // 2]
        self._cos = dialect.graph.input("rope_cos", dialect.dtype, shape)
        self._sin = dialect.graph.input("rope_sin", dialect.dtype, shape)
        shape = [1, 1, window.chunk, window.capacity + window.chunk]
        self._mask = dialect.mask(dialect.graph.input("attention_mask", dialect.dtype, shape), self._config)

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over what the dialect's layers carry."""
        op, window = self._dialect.op, self._dialect.window
        q, k, v = self._projected(x, prefix)
        whole = []
        for kind, new in (("key", k), ("value", v)):
            whole.append(op.Concat(self._past(layer, kind, window.capacity), new, axis=2))
            self._give(f"new_key_values.{layer}.{kind}", new, window.chunk)
        return self._dialect.attend(q, *whole, self._config, self._mask)


class ScatterAttention(_Attention):
    """The new rows are scattered into a cache of fixed size, which is past and present in one; the host masks.

    Not by the operator Attention: it has a softmax of f32, but the type of its scores is that of the queries, and ONNX
    Runtime's own kernel gave NaN for scores of 1e5 that the decomposed form computes.
    """

    def inputs(self) -> None:
        """Declares what tells positions."""
        graph, dialect, window = self._dialect.graph, self._dialect, self._dialect.window
        positions = graph.input("position_ids", I64, [1, "new"])
        self._start = graph.input("write_indices", I64, [1])
        mask = graph.input("attention_mask", dialect.dtype, [1, 1, "new", window.capacity])
        self._mask = dialect.mask(mask, self._config)
        self._turn_by(positions)

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over `x` [1, new, hidden]; returns [1, new, heads * head_dim]."""
        op, capacity = self._dialect.op, self._dialect.window.capacity
        q, k, v = self._projected(x, prefix)
        presents = []
        for kind, new in (("key", k), ("value", v)):
            # TensorRT takes this axis only.
            present = op.TensorScatter(self._past(layer, kind, capacity), new, self._start, axis=-2)
            self._give(f"present.{layer}.{kind}", present, capacity)
            presents.append(present)
        return self._dialect.attend(q, *presents, self._config, self._mask)


class SharedAttention(_Attention):
    """GroupQueryAttention: past and present are one buffer, the mask is inside.

    Rotary embedding is fused where the operator can do it, else made of standard operators before it.
    """

    def __init__(self, dialect, config: DecoderConfig):
        super().__init__(dialect, config)
        if config.head_dim % 8:
            raise ExportError(
                f"the decoder has head_dim {config.head_dim}, GroupQueryAttention takes multiples of 8 only; "
                "export the variant portable-f32 instead"
            )
        # Limits of the operator's own rotary embedding; outside them it fails when it runs, not when it loads.
        self._fused = config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0
        self._lengths = self._total = None

    def inputs(self) -> None:
        """Declares what tells positions."""
        graph = self._dialect.graph
        self._lengths = graph.input("seqlens_k", I32, ["batch"])
        self._total = graph.input("total_sequence_length", I32, [])
        self._cos, self._sin = self._tables()

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over `x` [batch, new, hidden]; returns [batch, new, heads * head_dim]."""
        dialect, config = self._dialect, self._config
        qkv = dialect.linear(x, *(f"{prefix}.{part}" for part in ("q_proj", "k_proj", "v_proj")))
        past = [self._past(layer, kind, "capacity") for kind in ("key", "value")]
        if self._fused:
            q, k, v, tables = qkv, None, None, [self._cos, self._sin]
        else:
            q, k, v = self._rotated(qkv, x)
            tables = [None, None]
        inputs, rounding = [q, k, v, *past, self._lengths, self._total, *tables], {}
        if self._dtype == I8:
            # Between the tables and the scales: position_ids, attention_bias, head_sink.
            inputs += [None, None, None, *self._scales(layer)]
            rounding = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        while inputs[-1] is None:
            inputs.pop()
        mixed, *presents = dialect.ms.GroupQueryAttention(
            *inputs, num_heads=config.heads, kv_num_heads=config.kv_heads, scale=config.head_dim**-0.5,
            do_rotary=int(self._fused), rotary_interleaved=0, **rounding, _outputs=3,
        )  # fmt: skip
        for kind, present in zip(("key", "value"), presents, strict=True):
            self._give(f"present.{layer}.{kind}", present, "capacity")
        mixed.dtype = dialect.dtype
        return mixed

    def _scales(self, layer: int) -> list[ir.Value]:
        """What one step of the layer's int8 keys stands for, then of its values: [1, kv_heads, 1, head_dim] each."""
        graph, scales = self._dialect.graph, self._dialect.kv_scales
        kinds = (("key", scales.key), ("value", scales.value))
        return [graph.table(f"decoder.layers.{layer}.{kind}_scale", all[layer][None, :, None]) for kind, all in kinds]

    def _rotated(self, qkv: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        op, config = self._dialect.op, self._config
        widths = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
        q, k, v = op.Split(qkv, widths, axis=-1, _outputs=3)
        # A row that is shorter than its padded prompt begins at 0, as inside the operator.
        new = op.Shape(x, start=1, end=2)
        first = op.Max(op.Sub(op.Add(op.Cast(self._lengths, to=I64), [1]), new), [0])
        steps = op.Range(0, op.Squeeze(new, [0]), 1)
        positions = op.Add(op.Unsqueeze(first, [1]), steps)
        cos, sin = (op.Unsqueeze(op.Gather(table, positions), [2]) for table in (self._cos, self._sin))

        def turn(part: ir.Value, heads: int) -> ir.Value:
            split = op.Reshape(part, [0, 0, heads, config.head_dim])
            return op.Reshape(rotate(self._dialect, split, cos, sin, config), [0, 0, heads * config.head_dim])

        return turn(q, config.heads), turn(k, config.kv_heads), v


def rotate(dialect, x: ir.Value, cos: ir.Value, sin: ir.Value, config: DecoderConfig) -> ir.Value:
    """Rotates the first `rotary_dim` numbers of each head, in halves; the others pass."""
    op = dialect.op
    half, rest = config.rotary_dim // 2, config.head_dim - config.rotary_dim
    a, b, *others = dialect.split(x, [half, half, rest] if rest else [half, half])
    first = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
    second = op.Add(op.Mul(b, cos), op.Mul(a, sin))
    return op.Concat(first, second, *others, axis=-1)


def rotary_tables(config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines f32 [context, rotary_dim / 2].

    Angles are rounded to f32 where PyTorch's reference rounds them: at position 2000 that is 1e-4 of the angle.
    """
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    power = np.power(np.float64(config.rope_theta), exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1.0) / power
    angle = np.arange(config.context, dtype=np.float32)[:, None] * frequency
    return np.cos(angle.astype(np.float64)).astype(np.float32), np.sin(angle.astype(np.float64)).astype(np.float32)

"""The decoder's attention in each form of the cache: what the graph takes, what it gives back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .config import DecoderConfig
from .errors import ExportError
from .graph import F32, I32, I64


class ConcatAttention:
    """The present is the past with the new rows appended; the host makes the mask."""

    def __init__(self, dialect, config: DecoderConfig):
        self._dialect, self._config = dialect, config
        self._presents: list[tuple[str, ir.Value, list]] = []
        self._mask = self._cos = self._sin = None

    def inputs(self) -> None:
        """Declares what tells positions."""
        graph, op = self._dialect.graph, self._dialect.op
        positions = graph.input("position_ids", I64, ["batch", "new"])
        self._mask = graph.input("attention_mask", F32, ["batch", 1, "new", "total"])
        cos, sin = rotary_tables(self._config)
        self._cos = op.Unsqueeze(op.Gather(graph.weight("rotary.cos", cos), positions), [1])
        self._sin = op.Unsqueeze(op.Gather(graph.weight("rotary.sin", sin), positions), [1])

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over `x` [batch, new, hidden]; returns [batch, new, heads * head_dim]."""
        dialect, config = self._dialect, self._config
        q = dialect.heads(dialect.linear(x, f"{prefix}.q_proj"), config.heads, config.head_dim)
        k = dialect.heads(dialect.linear(x, f"{prefix}.k_proj"), config.kv_heads, config.head_dim)
        v = dialect.heads(dialect.linear(x, f"{prefix}.v_proj"), config.kv_heads, config.head_dim)
        q, k = (rotate(dialect.op, part, self._cos, self._sin, config) for part in (q, k))
        k, v = self._extend(layer, "key", k), self._extend(layer, "value", v)
        return dialect.attend(q, k, v, config, self._mask)

    def outputs(self) -> None:
        """Declares the present of each layer."""
        for name, value, shape in self._presents:
            self._dialect.graph.output(value, name, F32, shape)

    def _extend(self, layer: int, kind: str, new: ir.Value) -> ir.Value:
        shape = ["batch", self._config.kv_heads, "past", self._config.head_dim]
        past = self._dialect.graph.input(f"past_key_values.{layer}.{kind}", F32, shape)
        present = self._dialect.op.Concat(past, new, axis=2)
        shape = [*shape[:2], "total", shape[3]]
        self._presents.append((f"present.{layer}.{kind}", present, shape))
        return present


class SharedAttention:
    """GroupQueryAttention: past and present are one buffer, the mask is inside.

    Rotary embedding is fused where the operator can do it, else made of standard operators before it.
    """

    def __init__(self, dialect, config: DecoderConfig):
        if config.head_dim % 8:
            raise ExportError(
                f"the decoder has head_dim {config.head_dim}, GroupQueryAttention takes multiples of 8 only; "
                "export the variant portable-f32 instead"
            )
        self._dialect, self._config = dialect, config
        # Limits of the operator's own rotary embedding; outside them it fails when it runs, not when it loads.
        self._fused = config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0
        self._presents: list[tuple[str, ir.Value]] = []
        self._lengths = self._total = self._cos = self._sin = None

    def inputs(self) -> None:
        """Declares what tells positions."""
        graph = self._dialect.graph
        self._lengths = graph.input("seqlens_k", I32, ["batch"])
        self._total = graph.input("total_sequence_length", I32, [])
        cos, sin = rotary_tables(self._config)
        self._cos, self._sin = graph.weight("rotary.cos", cos), graph.weight("rotary.sin", sin)

    def __call__(self, x: ir.Value, prefix: str, layer: int) -> ir.Value:
        """Attention of one layer over `x` [batch, new, hidden]; returns [batch, new, heads * head_dim]."""
        dialect, config = self._dialect, self._config
        qkv = dialect.linear(x, *(f"{prefix}.{part}" for part in ("q_proj", "k_proj", "v_proj")))
        shape = ["batch", config.kv_heads, "capacity", config.head_dim]
        past = [dialect.graph.input(f"past_key_values.{layer}.{kind}", F32, shape) for kind in ("key", "value")]
        if self._fused:
            q, k, v, tables = qkv, None, None, [self._cos, self._sin]
        else:
            q, k, v = self._rotated(qkv, x)
            tables = []
        mixed, *presents = dialect.ms.GroupQueryAttention(
            q, k, v, *past, self._lengths, self._total, *tables,
            num_heads=config.heads, kv_num_heads=config.kv_heads, scale=config.head_dim**-0.5,
            do_rotary=int(self._fused), rotary_interleaved=0, _outputs=3,
        )  # fmt: skip
        for kind, present in zip(("key", "value"), presents, strict=True):
            self._presents.append((f"present.{layer}.{kind}", present))
        mixed.dtype = F32
        return mixed

    def outputs(self) -> None:
        """Declares the present of each layer."""
        shape = ["batch", self._config.kv_heads, "capacity", self._config.head_dim]
        for name, value in self._presents:
            self._dialect.graph.output(value, name, F32, shape)

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
            return op.Reshape(rotate(op, split, cos, sin, config), [0, 0, heads * config.head_dim])

        return turn(q, config.heads), turn(k, config.kv_heads), v


def rotate(op, x: ir.Value, cos: ir.Value, sin: ir.Value, config: DecoderConfig) -> ir.Value:
    """Rotates the first `rotary_dim` numbers of each head, in halves; the others pass."""
    half, rest = config.rotary_dim // 2, config.head_dim - config.rotary_dim
    widths = [half, half, rest] if rest else [half, half]
    a, b, *others = op.Split(x, widths, axis=-1, _outputs=len(widths))
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

"""The vision encoder's graph: pixel values to the patch features of the selected layer."""

from __future__ import annotations

import onnx_ir as ir

from .config import VisionConfig
from .dialect import HeadShape
from .graph import Graph
from .progress import Progress


def build(graph: Graph, dialect, config: VisionConfig, progress: Progress) -> None:
    """Builds the encoder into `graph`; the selected layer's output leaves without a last norm."""
    layers = config.used_layers
    pixels = graph.input("pixel_values", dialect.dtype, [dialect.batch, 3, config.image_size, config.image_size])
    x = embed(pixels, dialect, config)
    normed = first_norm(dialect, config, x, 0) if layers else None
    for layer in progress.steps(range(layers)):
        with graph.scope(f"layers.{layer}"):
            x, normed = block(dialect, config, x, normed, layer, last=layer + 1 == layers)
    shape = [dialect.batch, config.tokens_per_image, config.hidden]
    graph.output(selected(dialect, config, x), "patch_features", dialect.dtype, shape)


def first_norm(dialect, config: VisionConfig, x: ir.Value, layer: int) -> ir.Value:
    """What `layer` reads of `x` when no layer before it is in the same graph."""
    return dialect.layer_norm(x, f"vision.layers.{layer}.layer_norm1", config.norm_eps)


def block(
    dialect, config: VisionConfig, x: ir.Value, normed: ir.Value, layer: int, *, last: bool
) -> tuple[ir.Value, ir.Value | None]:
    """One layer over `x` and its norm; returns its output and, unless it is the `last`, the next layer's norm of it."""
    prefix, eps = f"vision.layers.{layer}", config.norm_eps
    mixed = _attention(normed, dialect, prefix, config)
    x, normed = dialect.add_norm(x, [mixed], f"{prefix}.layer_norm2", eps)
    wide = dialect.activation(dialect.linear(normed, f"{prefix}.fc1"), config.activation)
    narrow = dialect.linear(wide, f"{prefix}.fc2")
    if last:
        return dialect.op.Add(x, narrow), None
    return dialect.add_norm(x, [narrow], f"vision.layers.{layer + 1}.layer_norm1", eps)


def selected(dialect, config: VisionConfig, x: ir.Value) -> ir.Value:
    """The rows of the last hidden state that are patch features."""
    x = dialect.leave(x, config.patches + 1, config.hidden)
    return dialect.op.Slice(x, [1], [config.patches + 1], [1]) if config.select_feature == "patch" else x


def embed(pixels: ir.Value, dialect, config: VisionConfig) -> ir.Value:
    """Patches, the class token before them, their positions, and the norm over all."""
    op, patch = dialect.op, config.patch_size
    weight = dialect.tensor("vision.patch_embedding.weight")
    grid = op.Conv(pixels, weight, kernel_shape=[patch, patch], strides=[patch, patch])
    patches = op.Transpose(op.Reshape(grid, [0, config.hidden, -1]), perm=[0, 2, 1])
    row = dialect.tensor("vision.class_embedding", [1, 1, config.hidden])
    if dialect.batch != 1:
        row = op.Expand(row, op.Concat(op.Shape(pixels, start=0, end=1), [1, 1], axis=0))
    x = op.Add(op.Concat(row, patches, axis=1), dialect.tensor("vision.position_embedding.weight"))
    return dialect.layer_norm(dialect.enter(x, config.hidden), "vision.pre_layernorm", config.norm_eps)


def _attention(x: ir.Value, dialect, prefix: str, config: VisionConfig) -> ir.Value:
    shape = HeadShape(config.heads, config.heads, config.hidden // config.heads)
    q, k, v = (
        dialect.heads(dialect.linear(x, f"{prefix}.{part}"), shape.heads, shape.head_dim)
        for part in ("q_proj", "k_proj", "v_proj")
    )
    return dialect.linear(dialect.attend(q, k, v, shape), f"{prefix}.out_proj")

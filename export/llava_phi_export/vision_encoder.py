"""The vision encoder's graph: pixel values to the patch features of the selected layer, and who was looked at."""

from __future__ import annotations

import onnx_ir as ir

from .config import VisionConfig
from .dialect import HeadShape
from .graph import Graph
from .progress import Progress

# The output by which visual tokens are chosen.
ATTENTION = "cls_attention"


def build(graph: Graph, dialect, config: VisionConfig, progress: Progress) -> None:
    """Builds the encoder into `graph`; the selected layer's output leaves without a last norm.

    The class token's attention in that layer leaves beside it, unless no layer is used.
    """
    layers = config.used_layers
    pixels = graph.input("pixel_values", dialect.dtype, [dialect.batch, 3, config.image_size, config.image_size])
    x = embed(pixels, dialect, config)
    normed, attention = first_norm(dialect, config, x, 0) if layers else None, None
    for layer in progress.steps(range(layers)):
        with graph.scope(f"layers.{layer}"):
            x, normed, attention = block(dialect, config, x, normed, layer, last=layer + 1 == layers)
    shape = [dialect.batch, config.tokens_per_image, config.hidden]
    graph.output(selected(dialect, config, x), "patch_features", dialect.dtype, shape)
    if attention is not None:
        graph.output(attention, ATTENTION, dialect.dtype, shape[:2])


def first_norm(dialect, config: VisionConfig, x: ir.Value, layer: int) -> ir.Value:
    """What `layer` reads of `x` when no layer before it is in the same graph."""
    return dialect.layer_norm(x, f"vision.layers.{layer}.layer_norm1", config.norm_eps)


def block(
    dialect, config: VisionConfig, x: ir.Value, normed: ir.Value, layer: int, *, last: bool
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """One layer over `x` and its norm; returns its output and the next layer's norm of it.

    Of the `last` layer there is no next norm, but the class token's attention.
    """
    prefix, eps = f"vision.layers.{layer}", config.norm_eps
    mixed, attention = _attention(normed, dialect, prefix, config, watched=last)
    x, normed = dialect.add_norm(x, [mixed], f"{prefix}.layer_norm2", eps)
    wide = dialect.activation(dialect.linear(normed, f"{prefix}.fc1"), config.activation)
    narrow = dialect.linear(wide, f"{prefix}.fc2")
    if last:
        return dialect.op.Add(x, narrow), None, attention
    return *dialect.add_norm(x, [narrow], f"vision.layers.{layer + 1}.layer_norm1", eps), None


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


def _attention(
    x: ir.Value, dialect, prefix: str, config: VisionConfig, *, watched: bool
) -> tuple[ir.Value, ir.Value | None]:
    shape = HeadShape(config.heads, config.heads, config.hidden // config.heads)
    q, k, v = (
        dialect.heads(dialect.linear(x, f"{prefix}.{part}"), shape.heads, shape.head_dim)
        for part in ("q_proj", "k_proj", "v_proj")
    )
    mixed = dialect.linear(dialect.attend(q, k, v, shape), f"{prefix}.out_proj")
    return mixed, _class_attention(dialect, config, q, k, shape) if watched else None


def _class_attention(dialect, config: VisionConfig, q: ir.Value, k: ir.Value, shape: HeadShape) -> ir.Value:
    """How much the class token looks at each row of the patch features, the mean over the heads: [batch, rows]."""
    # Its one query again, so that what computes the attention of all of them may be fused.
    query = dialect.op.Slice(q, [0], [1], [2])
    weights = dialect.weights(query, k, shape)
    if config.select_feature == "patch":
        weights = dialect.op.Slice(weights, [1], [config.patches + 1], [3])
    return dialect.rounded(dialect.mean(weights, [1, 2]))

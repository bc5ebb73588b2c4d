"""The vision encoder's graph: pixel values to the patch features of the selected layer."""

from __future__ import annotations

import onnx_ir as ir

from .config import VisionConfig
from .dialect import HeadShape
from .graph import F32, Graph
from .progress import Progress


def build(graph: Graph, dialect, config: VisionConfig, progress: Progress) -> None:
    """Builds the encoder into `graph`; the selected layer's output leaves without a last norm."""
    op, layers = graph.op, config.used_layers
    pixels = graph.input("pixel_values", F32, ["batch", 3, config.image_size, config.image_size])
    x = _embed(pixels, dialect, config)
    normed = None
    for layer in progress.steps(range(layers)):
        prefix = f"vision.layers.{layer}"
        with graph.scope(f"layers.{layer}"):
            if normed is None:
                normed = dialect.layer_norm(x, f"{prefix}.layer_norm1", config.norm_eps)
            mixed = _attention(normed, dialect, prefix, config)
            x, normed = dialect.add_norm(x, [mixed], f"{prefix}.layer_norm2", config.norm_eps)
            wide = dialect.activation(dialect.linear(normed, f"{prefix}.fc1"), config.activation)
            narrow = dialect.linear(wide, f"{prefix}.fc2")
            if layer + 1 < layers:
                x, normed = dialect.add_norm(x, [narrow], f"vision.layers.{layer + 1}.layer_norm1", config.norm_eps)
            else:
                x = op.Add(x, narrow)
    if config.select_feature == "patch":
        x = op.Slice(x, [1], [2**31 - 1], [1])
    graph.output(x, "patch_features", F32, ["batch", config.tokens_per_image, config.hidden])


def _embed(pixels: ir.Value, dialect, config: VisionConfig) -> ir.Value:
    op, patch = dialect.op, config.patch_size
    weight = dialect.tensor("vision.patch_embedding.weight")
    grid = op.Conv(pixels, weight, kernel_shape=[patch, patch], strides=[patch, patch])
    patches = op.Transpose(op.Reshape(grid, [0, config.hidden, -1]), perm=[0, 2, 1])
    row = op.Reshape(dialect.tensor("vision.class_embedding"), [1, 1, config.hidden])
    rows = op.Expand(row, op.Concat(op.Shape(pixels, start=0, end=1), [1, 1], axis=0))
    x = op.Add(op.Concat(rows, patches, axis=1), dialect.tensor("vision.position_embedding.weight"))
    return dialect.layer_norm(x, "vision.pre_layernorm", config.norm_eps)


def _attention(x: ir.Value, dialect, prefix: str, config: VisionConfig) -> ir.Value:
    shape = HeadShape(config.heads, config.heads, config.hidden // config.heads)
    q, k, v = (
        dialect.heads(dialect.linear(x, f"{prefix}.{part}"), shape.heads, shape.head_dim)
        for part in ("q_proj", "k_proj", "v_proj")
    )
    return dialect.linear(dialect.attend(q, k, v, shape), f"{prefix}.out_proj")

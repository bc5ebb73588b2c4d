"""The f32 model in standard operators, stage by stage, with one layer's weights in memory at a time.

Every stage raises `ExportError` where a number is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import decoder, projector, vision_encoder
from .dialect import Standard
from .errors import ExportError
from .graph import F32
from .piece import run
from .progress import Progress

_FORBIDDEN = np.float32(-1e9)


def patch_features(checkpoint, pixels: np.ndarray, progress: Progress) -> tuple[np.ndarray, np.ndarray | None]:
    """[1, 3, size, size] to [1, tokens_per_image, vision.hidden] and the class token's attention, if a layer is used."""
    config = checkpoint.config.vision

    def embed(dialect) -> None:
        size = config.image_size
        x = vision_encoder.embed(dialect.graph.input("pixel_values", F32, [1, 3, size, size]), dialect, config)
        dialect.graph.output(x, "y", F32, [1, "rows", config.hidden])

    def layer(dialect, number: int) -> None:
        x = dialect.graph.input("x", F32, [1, "rows", config.hidden])
        normed = vision_encoder.first_norm(dialect, config, x, number)
        y, _, attention = vision_encoder.block(dialect, config, x, normed, number, last=True)
        dialect.graph.output(y, "y", F32, [1, "rows", config.hidden])
        dialect.graph.output(attention, "attention", F32, [1, config.tokens_per_image])

    def select(dialect) -> None:
        x = dialect.graph.input("x", F32, [1, "rows", config.hidden])
        y = dialect.op.Identity(vision_encoder.selected(dialect, config, x))
        dialect.graph.output(y, "y", F32, [1, config.tokens_per_image, config.hidden])

    (x,) = run(checkpoint, embed, {"pixel_values": pixels})
    attention = None
    progress.step()
    for number in progress.steps(range(config.used_layers)):
        x, attention = run(checkpoint, lambda dialect, number=number: layer(dialect, number), {"x": x})
        _finite(x, f"vision encoder, layer {number}")
    (features,) = run(checkpoint, select, {"x": x})
    return _finite(features, "vision encoder"), attention


def image_embeds(checkpoint, features: np.ndarray) -> np.ndarray:
    """[1, patches, vision.hidden] to [1, patches, hidden]."""
    config = checkpoint.config.projector
    (images,) = run(
        checkpoint,
        lambda dialect: projector.build(dialect.graph, dialect, config, Progress(None)),
        {"patch_features": features},
    )
    return _finite(images, "projector")


def hidden_states(
    checkpoint,
    embeds: np.ndarray,
    rows: np.ndarray,
    progress: Progress,
    seen: Callable[[np.ndarray, np.ndarray], None] | None = None,
    dialect: type[Standard] = Standard,
) -> np.ndarray:
    """[1, positions, hidden] to what the head reads of `rows` of them, [rows, hidden]; each sees what is before it.

    `seen` is told the keys and the values of each layer in turn, [1, kv_heads, positions, head_dim] as a cache holds
    them. `dialect` keeps to standard operators.
    """
    config = checkpoint.config.decoder
    positions = np.arange(embeds.shape[1], dtype=np.int64)
    mask = np.where(positions[None] > positions[:, None], _FORBIDDEN, np.float32(0))[None, None]
    empty = np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32)

    def layer(dialect, number: int) -> None:
        x = dialect.graph.input("x", F32, ["batch", "new", config.hidden])
        attention = dialect.cached_attention(config)
        attention.inputs()
        normed = decoder.first_norm(dialect, config, x, number)
        y, normed = decoder.block(dialect, config, attention, x, normed, number)
        # The last layer leaves through the last norm.
        y = normed if number + 1 == config.layers else y
        dialect.graph.output(y, "y", F32, ["batch", "new", config.hidden])
        if seen is not None:
            attention.outputs()

    x = embeds
    for number in progress.steps(range(config.layers)):
        inputs = {"x": x, "position_ids": positions[None], "attention_mask": mask}
        inputs |= {f"past_key_values.{number}.{part}": empty for part in ("key", "value")}
        x, *cache = run(checkpoint, lambda dialect, number=number: layer(dialect, number), inputs, dialect)
        _finite(x, f"decoder, layer {number}")
        if seen is not None:
            seen(*cache)
    return np.ascontiguousarray(x[0, rows])


def logits(checkpoint, hidden: np.ndarray, dialect: type[Standard] = Standard) -> np.ndarray:
    """[rows, hidden] to [rows, logits_width]."""
    config = checkpoint.config.decoder

    def head(dialect) -> None:
        x = dialect.graph.input("x", F32, ["rows", config.hidden])
        dialect.graph.output(dialect.linear(x, decoder.HEAD), "y", F32, ["rows", config.logits_width])

    (found,) = run(checkpoint, head, {"x": hidden}, dialect)
    return _finite(found, "decoder, lm_head")


def _finite(values: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ExportError(
            f"{where}: a result is not a finite number; the checkpoint's weights are damaged, copy or train it again"
        )
    return values

"""The projector's graph: patch features to image embeddings."""

from __future__ import annotations

from .config import ProjectorConfig
from .graph import Graph
from .progress import Progress


def build(graph: Graph, dialect, config: ProjectorConfig, progress: Progress, patches: int | str = "patches") -> None:
    """Builds the linear layers with an activation between them into `graph`; `patches` are the rows of one image."""
    x = graph.input("patch_features", dialect.dtype, [dialect.batch, patches, config.input])
    x = dialect.enter(x, config.input)
    for layer in progress.steps(range(config.layers)):
        if layer:
            x = dialect.activation(x, config.activation)
        x = dialect.linear(x, f"projector.{layer}")
    x = dialect.leave(x, patches, config.output)
    graph.output(x, "image_embeds", dialect.dtype, [dialect.batch, patches, config.output])

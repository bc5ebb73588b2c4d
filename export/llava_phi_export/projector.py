"""The projector's graph: patch features to image embeddings."""

from __future__ import annotations

from .config import ProjectorConfig
from .graph import F32, Graph
from .progress import Progress


def build(graph: Graph, dialect, config: ProjectorConfig, progress: Progress) -> None:
    """Builds the linear layers with an activation between them into `graph`."""
    x = graph.input("patch_features", F32, ["batch", "patches", config.input])
    for layer in progress.steps(range(config.layers)):
        if layer:
            x = dialect.activation(x, config.activation)
        x = dialect.linear(x, f"projector.{layer}")
    graph.output(x, "image_embeds", F32, ["batch", "patches", config.output])

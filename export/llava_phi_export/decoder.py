"""The decoder's graph: embeddings and cache to the logits of one position a row."""

from __future__ import annotations

from .config import DecoderConfig
from .graph import F32, I64, Graph
from .progress import Progress


def build(graph: Graph, dialect, config: DecoderConfig, progress: Progress) -> None:
    """Builds Phi into `graph`: attention and MLP of a layer read one norm and are added together.

    After the last layer's attention only the positions of `logits_index` are carried on.
    """
    op, layers, eps = graph.op, config.layers, config.norm_eps
    x = graph.input("inputs_embeds", F32, ["batch", "new", config.hidden])
    attention = dialect.cached_attention(config)
    attention.inputs()
    index = graph.input("logits_index", I64, ["batch"])
    normed = dialect.layer_norm(x, _norm(0, layers), eps)
    for layer in progress.steps(range(layers)):
        prefix = f"decoder.layers.{layer}"
        with graph.scope(f"layers.{layer}"):
            mixed = attention(normed, prefix, layer)
            if layer + 1 == layers:
                rows = op.Unsqueeze(index, [1])
                x, normed, mixed = (op.GatherND(value, rows, batch_dims=1) for value in (x, normed, mixed))
            attended = dialect.linear(mixed, f"{prefix}.dense")
            wide = dialect.activation(dialect.linear(normed, f"{prefix}.fc1"), config.activation)
            narrow = dialect.linear(wide, f"{prefix}.fc2")
            x, normed = dialect.add_norm(x, [attended, narrow], _norm(layer + 1, layers), eps)
    logits = dialect.linear(normed, "decoder.lm_head")
    progress.step()
    graph.output(logits, "logits", F32, ["batch", config.logits_width])
    attention.outputs()


def _norm(layer: int, layers: int) -> str:
    """The norm before a layer, or the last one."""
    return f"decoder.layers.{layer}.input_layernorm" if layer < layers else "decoder.final_layernorm"

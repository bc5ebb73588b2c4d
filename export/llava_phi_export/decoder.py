"""The decoder's graph, embeddings and cache to logits, whole or with its head apart."""

from __future__ import annotations

import onnx_ir as ir

from .config import DecoderConfig
from .graph import F32, I64, Graph
from .progress import Progress

# The matrix from the last norm to the logits.
HEAD = "decoder.lm_head"


def build(graph: Graph, dialect, config: DecoderConfig, progress: Progress) -> None:
    """Builds Phi into `graph`: attention and MLP of a layer read one norm and are added together.

    After the last layer's attention only the positions of `logits_index` are carried on, and give logits f32: as many
    as are asked for, counted over all rows of the batch, unless a run is of fixed size. Where the dialect ends in hidden states, all positions give theirs after the last norm, and `build_head` has the rest.
    """
    layers, batch = config.layers, dialect.batch
    positions = dialect.window.chunk if dialect.kv_form == "delta" else "new"
    x = graph.input("inputs_embeds", dialect.dtype, [batch, positions, config.hidden])
    attention = dialect.cached_attention(config)
    attention.inputs()
    rows = "rows" if isinstance(batch, str) else batch
    index = None if dialect.ends_in_hidden else graph.input("logits_index", I64, [rows])
    x = dialect.enter(x, config.hidden)
    normed = first_norm(dialect, config, x, 0)
    for layer in progress.steps(range(layers)):
        with graph.scope(f"layers.{layer}"):
            x, normed = block(dialect, config, attention, x, normed, layer, index if layer + 1 == layers else None)
    if dialect.ends_in_hidden:
        hidden = dialect.leave(normed, positions, config.hidden)
        graph.output(hidden, "hidden_states", dialect.dtype, [batch, positions, config.hidden])
    else:
        graph.output(dialect.exact(dialect.linear(normed, HEAD)), "logits", F32, [rows, config.logits_width])
    progress.step()
    attention.outputs()


def build_head(graph: Graph, dialect, config: DecoderConfig, progress: Progress) -> None:
    """Builds the head alone into `graph`: hidden states after the last norm to logits, a row each."""
    x = graph.input("hidden_states", dialect.dtype, [dialect.batch, config.hidden])
    graph.output(dialect.exact(dialect.linear(x, HEAD)), "logits", F32, [dialect.batch, config.logits_width])
    progress.step()


def first_norm(dialect, config: DecoderConfig, x: ir.Value, layer: int) -> ir.Value:
    """What `layer` reads of `x` when no layer before it is in the same graph."""
    return dialect.layer_norm(x, _norm(layer, config.layers), config.norm_eps)


def block(
    dialect, config: DecoderConfig, attention, x: ir.Value, normed: ir.Value, layer: int, rows: ir.Value | None = None
) -> tuple[ir.Value, ir.Value]:
    """One layer over `x` and its norm; returns its output and the norm of that. After attention only `rows` go on."""
    prefix = f"decoder.layers.{layer}"
    mixed = attention(normed, prefix, layer)
    if rows is not None:
        x, normed, mixed = (dialect.pick(value, rows) for value in (x, normed, mixed))
    attended = dialect.linear(mixed, f"{prefix}.dense")
    wide = dialect.activation(dialect.linear(normed, f"{prefix}.fc1"), config.activation)
    narrow = dialect.linear(wide, f"{prefix}.fc2")
    return dialect.add_norm(x, [attended, narrow], _norm(layer + 1, config.layers), config.norm_eps)


def _norm(layer: int, layers: int) -> str:
    """The norm before a layer, or the last one."""
    return f"decoder.layers.{layer}.input_layernorm" if layer < layers else "decoder.final_layernorm"

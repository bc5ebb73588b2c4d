"""Runs a part of the model in standard operators: built as for a package, but its weights are fed, not stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from .dialect import Standard
from .graph import Graph


class _FedGraph:
    """A graph whose weights are inputs: they stay the only copy, where a session would store and repack them."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self.weights: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str):
        return getattr(self._graph, name)

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        array = np.ascontiguousarray(array)
        self.weights[name] = array
        return self._graph.input(name, ir.DataType.from_numpy(array.dtype), array.shape)

    def weight_in_parts(
        self, name: str, dtype: np.dtype, shape: Sequence[int], parts: Iterable[np.ndarray]
    ) -> ir.Value:
        return self.weight(name, np.concatenate(list(parts)).astype(dtype, copy=False).reshape(shape))


def run(
    checkpoint, build: Callable[[Standard], None], inputs: dict[str, np.ndarray], dialect: type[Standard] = Standard
) -> list[np.ndarray]:
    """Outputs of what `build` makes with the dialect that it is given, on the CPU; weights are freed when it is done.

    `build` declares inputs and outputs; `inputs` are their values by name; `dialect` keeps to standard operators.
    """
    with tempfile.TemporaryDirectory(prefix="llava-phi-export-") as folder:
        path = Path(folder) / "piece.onnx"
        graph = Graph("piece", path, opset=Standard.opset, contrib=False, inline_limit=1 << 20)
        fed = _FedGraph(graph)
        build(dialect(fed, checkpoint))
        graph.save()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # An arena keeps the largest piece's memory until the last one is done.
        options.enable_cpu_mem_arena = False
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {**inputs, **fed.weights})

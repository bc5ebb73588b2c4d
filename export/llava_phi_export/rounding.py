"""How far from the golden logits the few bits of a graph's weights alone lead, its arithmetic apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .decoder import HEAD
from .dequantize import Packed, packed
from .goldens import Goldens
from .progress import Progress


class _Rounded:
    """A checkpoint some of whose matrices are those that a graph multiplies by."""

    def __init__(self, checkpoint, matrices: dict[str, Packed]):
        self._checkpoint, self._matrices = checkpoint, matrices

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        matrix = self._matrices.get(name)
        return self._checkpoint.rows(name, start, stop) if matrix is None else matrix.values(start, stop)

    def f32(self, name: str) -> np.ndarray:
        matrix = self._matrices.get(name)
        return self._checkpoint.f32(name) if matrix is None else matrix.values()


class Rounding:
    """Measures graphs against one set of goldens, one layer in memory at a time; weights of the same bits once."""

    def __init__(self, checkpoint, goldens: Goldens, progress: Progress):
        self._checkpoint, self._goldens, self._progress = checkpoint, goldens, progress
        self._measured: dict[tuple, float] = {}

    def distance(self, path: Path) -> float:
        """The largest distance, over the positions, of the logits with the weights that the graph at `path` holds."""
        matrices = packed(path, self._checkpoint)
        if not matrices:
            return 0.0
        key = tuple((name, matrix.bits) for name, matrix in matrices.items())
        if key not in self._measured:
            self._progress.start(
                f"{path.parent.name}/{path.stem} against the goldens", self._checkpoint.config.decoder.layers
            )
            source = _Rounded(self._checkpoint, matrices)
            only_head = set(matrices) == {f"{HEAD}.weight"}
            logits = self._goldens.head(source) if only_head else self._goldens.logits(source, self._progress)
            self._measured[key] = max(map(distance, logits, self._goldens.tensors["logits"]))
            self._progress.finish()
        return self._measured[key]


def distance(found: np.ndarray, golden: np.ndarray) -> float:
    """The L2 norm of the difference, by the L2 norm of the golden."""
    golden = golden.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - golden) / max(np.linalg.norm(golden), 1e-30))

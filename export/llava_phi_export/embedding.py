"""The token embedding table as a file: rows of f16, or of f32 where f16 would lose something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TENSOR = "decoder.embed_tokens.weight"
_ROWS = 4096


def write(path: Path, checkpoint) -> np.dtype:
    """Writes the table [rows, columns] raw, little endian, row by row; returns the type it chose."""
    dtype = np.dtype("<f2") if all(_fits_f16(part) for part in _parts(checkpoint)) else np.dtype("<f4")
    with open(path, "wb") as file:
        for part in _parts(checkpoint):
            file.write(np.ascontiguousarray(part, dtype=dtype).data)
        file.flush()
        os.fsync(file.fileno())
    return dtype


def read(path: Path, dtype: np.dtype, checkpoint) -> np.ndarray:
    """The table that `write` wrote, mapped."""
    return np.memmap(path, dtype, "r", shape=checkpoint.shape(TENSOR))


def _parts(checkpoint) -> Iterator[np.ndarray]:
    for start in range(0, checkpoint.shape(TENSOR)[0], _ROWS):
        yield checkpoint.rows(TENSOR, start, start + _ROWS)


def _fits_f16(part: np.ndarray) -> bool:
    if part.dtype == np.float16:
        return True
    exact = part.astype(np.float32)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    return bool(np.array_equal(half.astype(np.float32), exact))

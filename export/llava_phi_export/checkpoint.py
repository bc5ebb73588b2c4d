"""Opens a LLaVA-Phi checkpoint of any form and gives its tensors one by one under one set of names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .assemble import Opener
from .config import CheckpointError, ModelConfig
from .weights import Reader, Stored

__all__ = ["Checkpoint", "CheckpointError"]


class Checkpoint:
    """The configuration and the tensors of one model; holds file descriptors, no weights.

    `notes` are sentences about what was assumed because the checkpoint does not say it.
    """

    def __init__(self, config: ModelConfig, stored: dict[str, Stored], files: list[Path], notes: list[str], scratch):
        self.config, self.notes = config, notes
        self._stored, self._files, self._reader, self._scratch = stored, files, Reader(), scratch

    @classmethod
    def open(cls, path, *, vision_tower=None, projector=None) -> Checkpoint:
        """Opens a directory; `vision_tower` and `projector` name directories (or a projector file) of their own.

        Raises `CheckpointError` for everything that keeps the model from being exported, before any weight is read.
        """
        opener = Opener(Path(path), vision_tower and Path(vision_tower), projector and Path(projector))
        config, scratch = opener.open()
        return cls(config, opener.stored, opener.files, opener.notes, scratch)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and removes a converted tokenizer."""
        self._reader.close()
        self._scratch.cleanup()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; weights of linear layers are [out, in]."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Type of the numbers as stored: f16, f32 or bfloat16."""
        return self._find(name).dtype

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._stored)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in its stored type, read into an array of its own."""
        stored = self._find(name)
        return self._reader.read(stored, name).reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start..stop` of a tensor in its stored type."""
        stored = self._find(name)
        start, stop, _ = slice(start, stop).indices(stored.shape[0])
        width = int(np.prod(stored.shape[1:], dtype=np.int64))
        values = self._reader.read(stored, name, start * width, max(stop - start, 0) * width)
        return values.reshape(-1, *stored.shape[1:])

    def f32(self, name: str) -> np.ndarray:
        """A tensor as f32, in an array of its own."""
        return self._reader.read_f32(self._find(name), name)

    def sha256(self) -> str:
        """SHA-256 over configuration and weights, as `sha256sum FILES | sha256sum` gives it.

        The lines are `HASH  NAME`, sorted by name: config.json, preprocessor_config.json and the weight files.
        """
        lines = []
        for path in sorted(self._files, key=lambda path: (path.name, str(path))):
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"the checkpoint {self.config.name} has no tensor {name}")
        return self._stored[name]

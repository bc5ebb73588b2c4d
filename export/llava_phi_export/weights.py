"""Reads single tensors out of safetensors and PyTorch files by offset, so that the memory stays that of one tensor."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .config import CheckpointError

SAFETENSORS_TYPES = {"F16": np.dtype("f2"), "F32": np.dtype("f4"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_HEADER_LIMIT = 100 << 20
_CONVERT_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """Where the bytes of one tensor lie; row-major, little endian. `loaded` holds those of old `.bin` files."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    loaded: np.ndarray | None = None


class Reader:
    """Reads stored tensors; keeps a descriptor for each file and no bytes."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, stored: Stored, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """`count` numbers from `start` on, as a fresh one-dimensional array of the stored type."""
        count = math.prod(stored.shape) - start if count is None else count
        if stored.loaded is not None:
            return stored.loaded.reshape(-1)[start : start + count].copy()
        if stored.path not in self._files:
            self._files[stored.path] = os.open(stored.path, os.O_RDONLY)
        values = np.empty(count, stored.dtype)
        view = memoryview(values.view(np.uint8))
        at = stored.offset + start * stored.dtype.itemsize
        done = 0
        while done < len(view):
            got = os.preadv(self._files[stored.path], [view[done : done + (1 << 30)]], at + done)
            if got == 0:
                raise CheckpointError(f"{stored.path.name} ends inside tensor {name}; copy the file again")
            done += got
        return values

    def read_f32(self, stored: Stored, name: str) -> np.ndarray:
        """All numbers as f32, converted in pieces."""
        count = math.prod(stored.shape)
        if stored.dtype == np.float32:
            return self.read(stored, name).reshape(stored.shape)
        values = np.empty(count, np.float32)
        step = _CONVERT_BYTES // stored.dtype.itemsize
        for start in range(0, count, step):
            stop = min(start + step, count)
            values[start:stop] = self.read(stored, name, start, stop - start)
        return values.reshape(stored.shape)


def index_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path.name} is no whole safetensors file ({size} bytes); copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path.name} has a header that is no JSON ({error}); copy the file again") from error
    found = {}
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has a header that is no JSON object; copy the file again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path.name}: tensor {name} is not described as safetensors asks") from error
        if dtype not in SAFETENSORS_TYPES:
            # Buffers such as position ids are whole numbers; no stage reads them.
            continue
        if end - begin != math.prod(shape) * SAFETENSORS_TYPES[dtype].itemsize or 8 + length + end > size:
            raise CheckpointError(f"{path.name} is too short for tensor {name} ({size} bytes); copy the file again")
        found[name] = Stored(path, 8 + length + begin, SAFETENSORS_TYPES[dtype], shape)
    return found


def index_pytorch(path: Path) -> dict[str, Stored]:
    """The tensors of one PyTorch file, without its bytes where the file is of the zip kind (PyTorch 1.6 and later)."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} is a PyTorch file and torch is not installed; pip install 'llava-phi-export[torch]' "
            "or use the safetensors form"
        ) from error
    types = {torch.float16: np.dtype("f2"), torch.float32: np.dtype("f4"), torch.bfloat16: SAFETENSORS_TYPES["BF16"]}
    zipped = path.open("rb").read(4) == b"PK\x03\x04"
    try:
        if zipped:
            with FakeTensorMode():
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here
        # Its own text advises to read the file with code execution allowed, which is not passed on.
        raise CheckpointError(
            f"{path.name} cannot be read as PyTorch weights ({type(error).__name__}); it is damaged, or it holds more "
            "than tensors and is not opened"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, a dictionary of tensors is needed")
    if isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    found, whole = {}, None
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in types:
            continue
        shape, dtype = tuple(tensor.shape), types[tensor.dtype]
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if zipped else None
        if offset is not None and tensor.is_contiguous():
            found[name] = Stored(path, offset + tensor.storage_offset() * dtype.itemsize, dtype, shape)
            continue
        if zipped and whole is None:
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            whole = whole["state_dict"] if isinstance(whole.get("state_dict"), dict) else whole
        real = (whole[name] if zipped else tensor).detach().contiguous()
        bits = real.view(torch.int16).numpy().view(dtype) if dtype.itemsize == 2 else real.numpy()
        found[name] = Stored(path, 0, dtype, shape, bits.reshape(shape))
    return found


def index_file(path: Path) -> dict[str, Stored]:
    """The tensors of one weight file of either kind."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole checkpoint")
    return index_safetensors(path) if path.suffix == ".safetensors" else index_pytorch(path)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights: safetensors before PyTorch, an index before single files."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} has no weight_map; copy the file again") from error
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise CheckpointError(f"{index} names {name!r}, a file beside it is needed")
            return [directory / name for name in sorted(names)]
        if (directory / f"{stem}.{suffix}").is_file():
            return [directory / f"{stem}.{suffix}"]
        if several := sorted(directory.glob(f"{stem}-*-of-*.{suffix}")):
            return several
    return []

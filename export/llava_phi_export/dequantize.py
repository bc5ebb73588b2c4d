"""Reads the f32 matrices that a graph's MatMulNBits nodes multiply by, under the checkpoint's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from .checkpoint import Checkpoint
from .config import CheckpointError


@dataclass(frozen=True)
class Packed:
    """One matrix of the checkpoint as a graph holds it in few bits; `first` is its row of the `together`."""

    folder: Path
    tensors: tuple[onnx.TensorProto | None, ...]
    together: int
    first: int
    rows: int
    columns: int
    bits: int
    block: int

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start..stop` of the [out, in] matrix that the graph multiplies by, f32."""
        start, stop, _ = slice(start, stop).indices(self.rows)
        first, count = self.first + start, stop - start
        packed, scales, zeros = (
            None if tensor is None else _rows(tensor, self.folder, self.together, first, count)
            for tensor in self.tensors
        )
        return _values(packed, scales, zeros, count, self.columns, self.bits, self.block)


def packed(path: Path, checkpoint: Checkpoint) -> dict[str, Packed]:
    """Every matrix that the graph at `path` holds in few bits, by canonical name, in the order of its use.

    The packed initializer is named after its layers, `decoder.layers.0.q_proj+k_proj+v_proj.weight_q4`; the
    checkpoint says how many rows each of them has.
    """
    model = onnx.load(str(path), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        names = list(node.input) + [""] * 6
        tensors = tuple(stored[name] if name else None for name in names[1:4])
        first = 0
        for layer in _layers(names[1]):
            rows = checkpoint.shape(f"{layer}.weight")[0]
            found[f"{layer}.weight"] = Packed(
                path.parent, tensors, attributes["N"], first, rows, attributes["K"], attributes["bits"],
                attributes["block_size"],
            )  # fmt: skip
            first += rows
        if first != attributes["N"]:
            raise CheckpointError(f"{path.name}: {names[1]} has {attributes['N']} rows, its layers have {first}")
    return found


def dequantized(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Canonical name and [out, in] values of every matrix that the graph at `path` holds in few bits, one at a time."""
    for name, matrix in packed(path, checkpoint).items():
        yield name, matrix.values()


def has_quantized(path: Path) -> bool:
    """Whether the graph has a matrix in few bits."""
    model = onnx.load(str(path), load_external_data=False)
    return any(node.op_type == "MatMulNBits" for node in model.graph.node)


def _layers(name: str) -> list[str]:
    match = re.fullmatch(r"(.+)\.weight_q\d+", name)
    if match is None:
        raise CheckpointError(f"the few-bit weight {name} is not named after the layers that it holds; export again")
    prefix, _, parts = match[1].rpartition(".")
    return [f"{prefix}.{part}" for part in parts.split("+")]


def _rows(tensor: onnx.TensorProto, folder: Path, rows: int, first: int, count: int) -> np.ndarray:
    """`count` of the `rows` of an initializer, one after another, from the graph or from its data file by offset."""
    width = int(np.prod(tensor.dims)) // rows
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).reshape(-1)[first * width : (first + count) * width]
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with (folder / where["location"]).open("rb") as file:
        return np.fromfile(
            file, dtype, count * width, offset=int(where.get("offset", 0)) + first * width * dtype.itemsize
        )


def _values(packed, scales, zeros, rows: int, columns: int, bits: int, block: int) -> np.ndarray:
    """f32 [rows, columns] of packed blocks: (q - zero) * scale, low half of a byte first."""
    blocks = -(-columns // block)
    values = _unpack(packed.reshape(rows, blocks, -1), bits)[..., :block].astype(np.float32)
    if zeros is None:
        values -= np.float32(1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        values -= _unpack(zeros.reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
    else:
        values -= zeros.reshape(rows, blocks, 1).astype(np.float32)
    values *= scales.reshape(rows, blocks, 1).astype(np.float32)
    return values.reshape(rows, -1)[:, :columns]


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    if bits != 4:
        raise CheckpointError(f"MatMulNBits with {bits} bits is not read here; 4 and 8 are")
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)

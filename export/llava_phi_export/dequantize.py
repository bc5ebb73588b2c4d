"""Reads the f32 matrices that a graph's MatMulNBits nodes multiply by, under the checkpoint's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from .checkpoint import Checkpoint
from .config import CheckpointError


def dequantized(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Canonical name and [out, in] values of every matrix that the graph at `path` holds in few bits, one at a time.

    The packed initializer is named after its layers, `decoder.layers.0.q_proj+k_proj+v_proj.weight_q4`; the
    checkpoint says how many rows each of them has.
    """
    model = onnx.load(str(path), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        names = list(node.input) + [""] * 6
        arrays = [_array(stored[name], path.parent) if name else None for name in names[1:4]]
        values = _values(*arrays, attributes["N"], attributes["K"], attributes["bits"], attributes["block_size"])
        start = 0
        for layer in _layers(names[1]):
            rows = checkpoint.shape(f"{layer}.weight")[0]
            yield f"{layer}.weight", values[start : start + rows]
            start += rows
        if start != attributes["N"]:
            raise CheckpointError(f"{path.name}: {names[1]} has {attributes['N']} rows, its layers have {start}")


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


def _array(tensor: onnx.TensorProto, directory: Path) -> np.ndarray:
    """One initializer, from the graph or from its data file by offset."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with (directory / where["location"]).open("rb") as file:
        values = np.fromfile(file, dtype, int(np.prod(tensor.dims)), offset=int(where.get("offset", 0)))
    return values.reshape(tensor.dims)


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

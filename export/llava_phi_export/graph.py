"""One ONNX graph while it is built: inputs and outputs by name, weights that go to disk as they come."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder

from . import __version__

CONTRIB = "com.microsoft"
F16 = ir.DataType.FLOAT16
F32 = ir.DataType.FLOAT
I8 = ir.DataType.INT8
I32 = ir.DataType.INT32
I64 = ir.DataType.INT64

# IR version of each opset that a dialect may ask for (ONNX's table of versions).
_IR_VERSION = {15: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 23: 11, 24: 12}


class Graph:
    """A graph in the making.

    Its weights are written to `PATH.data` one after another, so that no more than one is in memory. `save` moves
    them into the graph's own file when together they are smaller than `inline_limit` bytes.
    """

    def __init__(self, name: str, path: Path, *, opset: int, contrib: bool, inline_limit: int):
        imports = {"": opset, CONTRIB: 1} if contrib else {"": opset}
        self.path = path
        self._inline_limit = inline_limit
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports=imports)
        self._builder = GraphBuilder(self._graph)
        self._ir_version = _IR_VERSION[opset]
        self._data = _DataFile(path.with_name(path.name + ".data"))
        self.op = self._builder.op
        self.contrib = self._builder.opset(CONTRIB, 1) if contrib else None

    @contextmanager
    def scope(self, name: str):
        """Names what is built inside `name/...`."""
        self._builder.push_module(name)
        try:
            yield
        finally:
            self._builder.pop_module()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input; a string in `shape` names a size that varies."""
        return self._builder.input(name, dtype, shape)

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Makes `value` a graph output called `name`."""
        value.dtype, value.shape = dtype, ir.Shape(shape)
        self._builder.add_output(value, name)

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight that is in memory as a whole."""
        return self.weight_in_parts(name, array.dtype, array.shape, [array])

    def weight_in_parts(
        self, name: str, dtype: np.dtype, shape: Sequence[int], parts: Iterable[np.ndarray]
    ) -> ir.Value:
        """A weight whose rows come in parts; together they must make `shape`."""
        tensor = self._data.append(name, np.dtype(dtype), tuple(shape), parts)
        return self._builder.initializer(tensor, name, qualify=False)

    def table(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant that stays in the graph's own file."""
        return self._builder.initializer(ir.tensor(np.ascontiguousarray(array), name=name), name, qualify=False)

    def save(self) -> list[Path]:
        """Writes the graph and returns its files: the graph itself and, if there is one, its data file."""
        self._data.close()
        data = self._data.path
        model = ir.Model(
            self._graph,
            ir_version=self._ir_version,
            producer_name="llava-phi-export",
            producer_version=__version__,
        )
        for node in self._graph:
            node.metadata_props.clear()
        proto = ir.to_proto(model)
        # CoreML's provider keeps compiled models by this, or else by the file's path, whatever lies there by then.
        self._data.sha256.update(proto.SerializeToString())
        onnx.helper.set_model_props(proto, {"COREML_CACHE_KEY": self._data.sha256.hexdigest()})
        inline = self._data.size < self._inline_limit
        if inline:
            onnx.external_data_helper.load_external_data_for_model(proto, str(self.path.parent))
            data.unlink()
        with open(self.path, "wb") as file:
            file.write(proto.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        return [self.path] if inline else [self.path, data]


def share_data(files: list[Path]) -> list[Path]:
    """Has a graph read the data file of another graph beside it where both hold the same bytes; returns its files.

    `files` is the graph and its data file, if it has one, which is removed then.
    """
    for other in sorted(files[0].parent.glob("*.data")) if files[1:] else []:
        if other == files[1] or not filecmp.cmp(other, files[1], shallow=False):
            continue
        model = onnx.load(files[0], load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = other.name
        with open(files[0], "wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        files[1].unlink()
        return [files[0], other]
    return files


class _DataFile:
    """External data of one graph: tensors one after another, large ones on page borders so that they map well."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._file = open(path, "wb")

    def append(self, name, dtype, shape, parts) -> ir.ExternalTensor:
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        border = 4096 if length >= 65536 else 64
        padding = -self.size % border
        self._file.write(b"\0" * padding)
        offset = self.size + padding
        written = 0
        for part in parts:
            part = np.ascontiguousarray(part, dtype=dtype)
            # `data` of an empty array cannot be cast to bytes.
            if part.size:
                content = part.reshape(-1).view(np.uint8).data
                self._file.write(content)
                self.sha256.update(content)
            written += part.nbytes
        if written != length:
            raise ValueError(f"weight {name}: {written} bytes came, its shape {list(shape)} takes {length}")
        self.size = offset + length
        return ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

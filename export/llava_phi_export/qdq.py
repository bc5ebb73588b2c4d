"""An f32 graph to one whose matrices are u8 between quantise and dequantise operators, as NNAPI takes it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from .errors import ExportError

# Multiplications of two activations stay f32: NNAPI takes u8 matrices with a constant side only.
_QUANTIZED = ("Conv", "Gemm", "MatMul")


class _Feed(CalibrationDataReader):
    def __init__(self, name: str, batches: Iterable[np.ndarray]):
        self._name, self._batches = name, iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize(source: Path, target: Path, batches: Iterable[np.ndarray], inline_limit: int) -> list[Path]:
    """Writes the u8 graph of `source` (one input, f32) to `target`; returns its files.

    Activations and weights have one scale and zero point a tensor, u8; the ranges of activations are the extremes that
    `batches` give. Input, output, and everything that is no product with a constant stay f32. The memory is
    seven times the weights of `source` at the most, which the library holds in several copies.
    """
    model = onnx.load(source, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [
        node.name
        for node in model.graph.node
        if node.op_type in _QUANTIZED and not weights.intersection(node.input[:2])
    ]
    wanted = [node.name for node in model.graph.node if node.op_type in _QUANTIZED and node.name not in kept]
    if not wanted or not all(wanted):
        raise ExportError(f"{source.name} has no named product with a constant matrix; it cannot be made u8")
    size = sum(file.stat().st_size for file in (source, source.with_name(source.name + ".data")) if file.exists())
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _quiet():
        made = Path(folder) / "graph.onnx"
        quantize_static(
            str(source), str(made), _Feed(model.graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8,
            per_channel=False, op_types_to_quantize=list(_QUANTIZED), nodes_to_exclude=kept,
            use_external_data_format=size >= inline_limit, calibrate_method=CalibrationMethod.MinMax,
        )  # fmt: skip
        model = onnx.load(made)
    return _save(model, target, inline_limit)


def _save(model: onnx.ModelProto, path: Path, inline_limit: int) -> list[Path]:
    """The graph's files: weights inside or in `PATH.data`, as every graph of a package has them."""
    files = [path]
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < inline_limit:
        onnx.save_model(model, path)
    else:
        files.append(path.with_name(path.name + ".data"))
        # Shapes must stay in the graph: ONNX Runtime reads them before it opens the data.
        onnx.save_model(model, path, save_as_external_data=True, location=files[1].name, size_threshold=1024)
    for file in files:
        # The library makes its data file for the owner alone.
        shutil.copymode(path, file)
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises through the root logger what does not apply here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

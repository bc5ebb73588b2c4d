"""The manifest: what a package holds and how its graphs are driven, as the engine's format 3 spells it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from . import __version__
from .config import ModelConfig
from .errors import ExportError
from .serve import orders

FORMAT = 3
NAME = "manifest.json"

_DTYPES = {
    onnx.TensorProto.FLOAT: "f32",
    onnx.TensorProto.FLOAT16: "f16",
    onnx.TensorProto.INT8: "i8",
    onnx.TensorProto.INT32: "i32",
    onnx.TensorProto.INT64: "i64",
}
_TABLE_DTYPES = {2: "f16", 4: "f32"}


def graph_spec(root: Path, files: list[Path]) -> dict:
    """Describes one graph from its own declaration; `files` is the graph and its data, if any."""
    graph = onnx.load(files[0], load_external_data=False).graph
    spec = {"path": _relative(root, files[0])}
    if files[1:]:
        spec["data"] = [_relative(root, file) for file in files[1:]]
    # An initializer may stand among the inputs in old files; the engine must not be asked for it.
    weights = {initializer.name for initializer in graph.initializer}
    spec["inputs"] = {value.name: _tensor_spec(value) for value in graph.input if value.name not in weights}
    spec["outputs"] = {value.name: _tensor_spec(value) for value in graph.output}
    return spec


def manifest(
    config: ModelConfig,
    *,
    name: str,
    sha256: str,
    embedding: dict,
    variants: dict[str, dict],
    rotary: dict | None,
    goldens: dict,
    files: dict[str, dict],
) -> dict:
    """The whole manifest; `rotary` describes the tables of `rotary.bin` where a graph reads their rows."""
    image, text, decoder = config.image, config.text, config.decoder
    return {
        "format": FORMAT,
        "name": name,
        "source": {"checkpoint": config.form, "sha256": sha256, "exporter": __version__},
        "image": {
            "size": image.size,
            "fit": image.fit,
            "filter": "bicubic",
            "pad_color": list(image.pad_color),
            "rescale": image.rescale,
            "mean": list(image.mean),
            "std": list(image.std),
        },
        "text": {
            "tokenizer": "tokenizer.json",
            "vocabulary": text.vocabulary,
            "eos": list(text.eos),
            "template": dict(text.template),
        },
        "vision": {"tokens_per_image": config.vision.tokens_per_image, "hidden": config.vision.hidden},
        "embedding": embedding,
        "decoder": {
            "layers": decoder.layers,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "hidden": decoder.hidden,
            "context": decoder.context,
            "logits_width": decoder.logits_width,
            **({"rotary": rotary} if rotary else {}),
        },
        "variants": variants,
        "serve": orders(variants),
        "goldens": goldens,
        "files": files,
    }


def embedding_spec(file: str, shape: tuple[int, ...], dtype: np.dtype) -> dict:
    """Describes the token embedding table."""
    return {"file": file, "rows": shape[0], "columns": shape[1], "dtype": _TABLE_DTYPES[dtype.itemsize]}


def file_table(root: Path, files: Iterable[Path]) -> dict[str, dict]:
    """Size and hash of each file, by relative path."""
    table = {}
    for file in sorted(files):
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        table[_relative(root, file)] = {"bytes": file.stat().st_size, "sha256": digest}
    return table


def write(root: Path, content: dict) -> None:
    """Writes `manifest.json`, whole or not at all; a package without it does not open, so it comes last."""
    partial = root / f"{NAME}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / NAME)


def _tensor_spec(value: onnx.ValueInfoProto) -> dict:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(f"graph value {value.name} has type {kind}, which no manifest can say")
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"dtype": _DTYPES[tensor.elem_type], "shape": dims}


def _relative(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()

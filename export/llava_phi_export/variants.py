"""Which dialect each component of a variant is built in, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from . import decoder, projector, vision_encoder
from .attention import rotary_tables
from .config import DecoderConfig, ModelConfig
from .contrib import Contrib, ContribHalf, ContribInt8Kv, FusedHalf
from .dialect import Half, Standard, Window
from .errors import ExportError
from .fixed import FixedHalf, TensorRtDelta, TensorRtScatter
from .graph import F16, F32, I8
from .nnapi import Nnapi


@dataclass(frozen=True)
class Recipe:
    """The dialect of the vision encoder and the projector, and that of the decoder."""

    encoder: type[Standard]
    decoder: type[Standard]


# Best first.
VARIANTS = {
    "cpu-int4": Recipe(Standard, ContribInt8Kv),
    "cpu-int4-kv-f32": Recipe(Standard, Contrib),
    "cuda-int4": Recipe(Half, ContribHalf),
    "cuda-fp16": Recipe(Half, FusedHalf),
    "tensorrt-fp16": Recipe(FixedHalf, TensorRtScatter),
    "tensorrt-delta-fp16": Recipe(FixedHalf, TensorRtDelta),
    "coreml-fp16": Recipe(FixedHalf, FixedHalf),
    "qnn-fp16": Recipe(FixedHalf, FixedHalf),
    "nnapi-fp32": Recipe(Nnapi, Nnapi),
    "portable-f32": Recipe(Standard, Standard),
}
SHARED = "shared"
# A decoder whose weights are those of another variant lies beside that one's, so that one data file serves both.
_BESIDE = {"cpu-int4-kv-f32": Path("cpu-int4", "decoder_kv_f32")}
_DTYPES = {F32: "f32", F16: "f16", I8: "i8"}
# What graphs of one dialect add to their file's name where several variants share them.
_LABELS = {Standard: "", Half: "_f16", FixedHalf: "_f16_fixed"}


def build(name: str, writer, config: ModelConfig, capacity: int | None, chunk: int | None) -> dict[str, dict]:
    """The components of the variant `name`, by the manifest's names; what another variant shares is built once."""
    recipe = VARIANTS[name]
    window = window_of(recipe.decoder, config.decoder, capacity, chunk)
    patches = config.vision.tokens_per_image if recipe.encoder.batch == 1 else "patches"

    def graph(component: str, dialect: type[Standard], make, part, window: Window | None = None) -> dict:
        path = _place(name, component, dialect)
        return writer.graph(path.parent, component, dialect, make, part, window=window, file=path.name)

    components = {
        "vision_encoder": graph("vision_encoder", recipe.encoder, vision_encoder.build, config.vision),
        "projector": graph("projector", recipe.encoder, partial(projector.build, patches=patches), config.projector),
        "decoder": {
            "graph": graph("decoder", recipe.decoder, decoder.build, config.decoder, window),
            "kv": kv_spec(recipe.decoder, window),
        },
    }
    if recipe.decoder.ends_in_hidden:
        # On the CPU, whatever runs the decoder: 51200 columns are more than phones' accelerators take.
        components["head"] = writer.graph(SHARED, "head", Contrib, decoder.build_head, config.decoder)
    return components


def window_of(dialect: type[Standard], config: DecoderConfig, capacity: int | None, chunk: int | None) -> Window | None:
    """Positions of the cache and of one run, of the dialects whose cache has a fixed size."""
    if dialect.chunk is None:
        return None
    if capacity is not None and not 1 <= capacity <= config.context:
        raise ExportError(f"--capacity is {capacity}, it must be from 1 to the decoder's context of {config.context}")
    if chunk is not None and chunk < 1:
        raise ExportError(f"--chunk is {chunk}, it must be at least 1")
    capacity = capacity or config.context
    return Window(capacity, min(chunk or dialect.chunk, capacity))


def kv_spec(dialect: type[Standard], window: Window | None) -> dict:
    """How the cache of a decoder is kept, as the manifest says it."""
    spec = {"form": dialect.kv_form, "dtype": _DTYPES[dialect.kv_dtype or dialect.dtype]}
    return spec if window is None else {**spec, "capacity": window.capacity, "chunk": window.chunk}


def reads_rotary(components: dict[str, dict]) -> bool:
    """Whether the variant's decoder is given the angles of its positions."""
    return "rope_cos" in components.get("decoder", {}).get("graph", {}).get("inputs", {})


def write_rotary(path: Path, config: DecoderConfig) -> dict:
    """Writes the cosines, then the sines of every position, f32; returns the manifest's entry."""
    with open(path, "wb") as file:
        for table in rotary_tables(config):
            file.write(np.ascontiguousarray(table, "<f4").data)
    return {"file": path.name, "dim": config.rotary_dim}


def _place(name: str, component: str, dialect: type[Standard]) -> Path:
    """The graph's file, below the package and without its extension."""
    if component == "decoder" and name in _BESIDE:
        return _BESIDE[name]
    users = [
        recipe
        for recipe in VARIANTS.values()
        if (recipe.decoder if component == "decoder" else recipe.encoder) is dialect
    ]
    return Path(SHARED, component + _LABELS[dialect]) if len(users) > 1 else Path(name, component)

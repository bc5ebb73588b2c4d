"""Variants of what comes before the decoder alone: fewer bits for a processor, u8 for NNAPI."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from . import projector, qdq, vision_encoder
from .calibration import Calibration
from .config import ModelConfig
from .int8 import Int8
from .nnapi import Nnapi

INT8, U8 = "cpu-int8", "nnapi-u8"
VISION_VARIANTS = (INT8, U8)


def build(name: str, writer, config: ModelConfig, calibration: Path | None) -> dict[str, dict]:
    """The components of the variant `name`, by the manifest's names; `calibration` is a directory of pictures."""
    if name == INT8:
        project = partial(projector.build, patches="patches")
        return {
            "vision_encoder": writer.graph(INT8, "vision_encoder", Int8, vision_encoder.build, config.vision),
            "projector": writer.graph(INT8, "projector", Int8, project, config.projector),
        }
    pictures = Calibration(calibration, config.image)
    writer.progress.note(pictures.note(U8))
    target = writer.root / U8 / "vision_encoder.onnx"

    def make() -> list[Path]:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            source = Path(folder) / target.name
            writer.build(source, "vision_encoder", Nnapi, vision_encoder.build, config.vision)
            return qdq.quantize(source, target, pictures, writer.options.inline_limit)

    return {"vision_encoder": writer.made(target, make)}

"""How a checkpoint wants its images: the recipe of preprocessor_config.json, checked against the encoder."""

from __future__ import annotations

from pathlib import Path

from .config import CheckpointError, ImageConfig
from .fields import Fields
from .presets import CLIP_MEAN, CLIP_STD
from .tokenizer_files import read_json

_BICUBIC = 3


def image_recipe(root: Fields, homes: list[Path], size: int, files: list[Path]) -> ImageConfig:
    """The recipe that lies in the first of `homes` that has one; the file that was read is added to `files`.

    Without one CLIP's own is taken, which is where the original code reads it from, and a note says so.
    """
    values, where = None, "preprocessor_config.json"
    for home in homes:
        if (home / "preprocessor_config.json").is_file():
            values = read_json(home / "preprocessor_config.json")
            files.append(home / "preprocessor_config.json")
        elif (home / "processor_config.json").is_file():
            where = "processor_config.json"
            values = read_json(home / where).get("image_processor")
            files.append(home / where)
        if isinstance(values, dict):
            break
    if not isinstance(values, dict):
        values = {}
        root.notes.append(f"{homes[0]} has no preprocessor_config.json: CLIP's own mean and deviation are taken")
    fields = Fields(values, where, root.notes)
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if fields.get(key) is False:
            raise CheckpointError(f"{where}: {key} is false; only the whole CLIP recipe is supported")
    if fields.get("resample") not in (None, _BICUBIC):
        raise CheckpointError(f"{where}: resample is {fields.get('resample')!r}, only 3 (bicubic) is supported")
    for key in ("size", "crop_size"):
        found = _edge(fields.get(key), square=key == "crop_size")
        if fields.get(key) is not None and found != size:
            raise CheckpointError(f"{where}: {key} is {fields.get(key)!r}, the encoder takes {size} pixels")
    mean = _three(fields, "image_mean", CLIP_MEAN)
    return ImageConfig(
        size=size,
        fit=_fit(root, fields),
        mean=mean,
        std=_three(fields, "image_std", CLIP_STD),
        rescale=fields.number("rescale_factor", 1 / 255) if values else 1 / 255,
        # The reference truncates; rounding would give another colour.
        pad_color=tuple(int(value * 255) for value in mean),
    )


def _fit(root: Fields, fields: Fields) -> str:
    ratio = root.get("image_aspect_ratio")
    if ratio not in (None, "square", "pad"):
        raise CheckpointError(f"config.json: image_aspect_ratio {ratio!r} is not supported; square and pad are")
    return "pad" if ratio == "pad" or (ratio is None and fields.get("do_pad") is True) else "center_crop"


def _edge(value, square: bool):
    """The edge of a `size` or `crop_size` in any of its spellings; `None` when it is not one number."""
    if not isinstance(value, dict):
        return value
    if "shortest_edge" in value:
        return value["shortest_edge"]
    # A size with height and width would squash the picture; as a crop it is the normal spelling.
    return value.get("height") if square and value.get("height") == value.get("width") else None


def _three(fields: Fields, key: str, default: tuple) -> tuple:
    value = fields.get(key)
    if value is None:
        if fields.values:
            fields.notes.append(f"{fields.where} has no {key}: CLIP's own {default}")
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise CheckpointError(f"{fields.where}: {key} is {value!r}, three numbers are needed")
    return tuple(float(v) for v in value)

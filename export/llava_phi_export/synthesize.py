"""Writes a checkpoint of any shape with random weights whose activations stay sane, tensor by tensor."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from . import names
from .assemble import config_without_weights
from .config import CheckpointError, ModelConfig
from .presets import PRESETS, image_config
from .synthetic_config import write_configs, write_json
from .synthetic_tokenizer import write_tokenizer

DTYPES = {
    "float16": ("F16", np.dtype("f2")),
    "float32": ("F32", np.dtype("f4")),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
LAYOUTS = {("llava_phi", "old"): "llava_phi", ("llava_phi", "new"): "llava_phi",
           ("hf", "old"): "llava_old", ("hf", "new"): "llava_new"}  # fmt: skip
_CHUNK = 1 << 22


def synthesize(
    config: ModelConfig,
    directory: Path,
    form: str = "llava_phi",
    seed: int = 0,
    dtype: str = "float16",
    shards: int = 1,
    naming: str = "old",
) -> Path:
    """Writes configuration, tokenizer and weights into `directory`, which must not hold a checkpoint.

    A value depends on seed, canonical name and place alone, so every form, naming and sharding holds the same model.
    """
    if form == "hf" and config.projector.kind != "mlp2x_gelu":
        raise CheckpointError(f"projector {config.projector.kind} has no place in the hf form; use --form llava_phi")
    if (directory / "config.json").exists():
        raise CheckpointError(f"{directory} already holds a checkpoint; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    eos = write_tokenizer(directory, config.text.vocabulary)
    write_configs(config, directory, form, naming, eos, dtype)
    shapes = names.expected_shapes(config, all_layers=True)
    # Real checkpoints carry it and no stage reads it.
    shapes["vision.post_layernorm.weight"] = shapes["vision.post_layernorm.bias"] = (config.vision.hidden,)
    layout, total = LAYOUTS[form, naming], 0
    weight_map = {}
    parts = _split(shapes, shards)
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        total += _write_weights(directory / name, config, {key: shapes[key] for key in part}, layout, seed, dtype)
        weight_map |= {names.on_disk(key, layout): name for key in part}
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    return directory


def random_tensor(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int):
    """The f32 values of a tensor in pieces, in row-major order."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    centre, spread = _distribution(config, name, shape)
    count = math.prod(shape)
    for start in range(0, count, _CHUNK):
        values = generator.standard_normal(min(_CHUNK, count - start), dtype=np.float32)
        values *= np.float32(spread)
        values += np.float32(centre)
        yield values


def _distribution(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation: linear layers keep the deviation of what they read, and the residual branches are damped
    by the number of layers so that the stream ends at about twice the variance it began with."""
    leaf = name.rsplit(".", 1)[1]
    if "norm" in name:
        return (1.0, 0.1) if leaf == "weight" else (0.0, 0.1)
    if name in ("vision.class_embedding", "decoder.embed_tokens.weight"):
        return 0.0, 1.0
    if name == "vision.position_embedding.weight":
        return 0.0, 0.5
    if leaf == "bias":
        # Large enough that a bias that gets lost is seen.
        return 0.0, 0.5 if "lm_head" in name else 0.1
    spread = 1 / math.sqrt(math.prod(shape[1:]))
    layers = config.vision.layers if name.startswith("vision.") else config.decoder.layers
    part = name.rsplit(".", 2)[1]
    if part in ("out_proj", "dense"):
        spread *= 1 / math.sqrt(layers)
    elif part == "fc2":
        # A GELU lets through about 0.6 of the deviation.
        spread *= 1.6 / math.sqrt(2 * layers)
    elif part == "lm_head":
        spread *= 2
    elif name.startswith("projector.") and not name.startswith("projector.0."):
        spread *= 1.6
    return 0.0, spread


def _split(shapes: dict, shards: int) -> list[list[str]]:
    """Names in order, cut into at most `shards` runs of about equal size."""
    if shards < 1:
        raise CheckpointError(f"--shards {shards}: a number of at least 1 is needed")
    total, sizes = 0, {}
    for name, shape in shapes.items():
        sizes[name] = total
        total += math.prod(shape)
    parts: list[list[str]] = [[] for _ in range(shards)]
    for name, before in sizes.items():
        parts[min(before * shards // total, shards - 1)].append(name)
    return [part for part in parts if part]


def _write_weights(path: Path, config: ModelConfig, shapes: dict, layout: str, seed: int, dtype: str) -> int:
    """One safetensors file: the header first, then the values as they are drawn."""
    code, kind = DTYPES[dtype]
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[names.on_disk(name, layout)] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for values in random_tensor(config, name, shape, seed):
                file.write(values.astype(kind, copy=False).view(np.uint8).data)
    return at


def read_shape(source: str, vocabulary: int | None = None) -> ModelConfig:
    """A shape from a preset's name, a config.json of either form, or a JSON file with this package's own fields."""
    if source in PRESETS:
        config = PRESETS[source]
    else:
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"{source} is neither a file nor one of the shapes {', '.join(PRESETS)}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{source} is no JSON: {error}") from error
        config = _from_fields(values, source) if "decoder" in values else config_without_weights(path)
    if vocabulary is not None:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=vocabulary))
    return config


def _from_fields(values: dict, source: str) -> ModelConfig:
    """A shape from `vision`, `projector`, `decoder`, and what `image`, `text` and `name` add to `small`'s."""
    base = PRESETS["small"]
    try:
        vision = dataclasses.replace(base.vision, **values.get("vision", {}))
        decoder = dataclasses.replace(base.decoder, **values["decoder"])
        widths = {"input": vision.hidden, "output": decoder.hidden}
        projector = dataclasses.replace(base.projector, **widths, **values.get("projector", {}))
        image = dataclasses.replace(image_config(vision.image_size, "center_crop"), **values.get("image", {}))
        vocabulary = values.get("text", {}).get("vocabulary", decoder.logits_width)
        text = dataclasses.replace(base.text, vocabulary=vocabulary)
    except TypeError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return ModelConfig(values.get("name", Path(source).stem), "llava_phi", vision, projector, decoder, image, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `synthesize`."""
    parser.add_argument("config", help=f"a JSON file with the sizes, or one of: {', '.join(PRESETS)}")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--form", choices=("llava_phi", "hf"), default="llava_phi")
    parser.add_argument("--naming", choices=("old", "new"), default="old", help="generation of the hf form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    parser.add_argument("--shards", type=int, default=1, help="number of weight files")
    parser.add_argument("--vocabulary", type=int, help="entries of the tokenizer; the shape's own when left out")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; 0 when the checkpoint is written."""
    config = read_shape(arguments.config, arguments.vocabulary)
    synthesize(config, arguments.directory, arguments.form, arguments.seed, arguments.dtype, arguments.shards,
               arguments.naming)  # fmt: skip
    print(f"wrote {arguments.directory}: {config.name}, seed {arguments.seed}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """`llava-phi-export synthesize`, with its own arguments."""
    parser = argparse.ArgumentParser(prog="llava-phi-export synthesize", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

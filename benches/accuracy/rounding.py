#!/usr/bin/env python3
"""Measures each rounding of the decoder alone, on any checkpoint: weights, activations, cache.

    python benches/accuracy/rounding.py CHECKPOINT --layers 4 --try rtn,32,8 --try search,128,8,int8,kv8 --json FILE

A try is METHOD,BLOCK,HEAD_BITS and what else is rounded: `int8` the activations before each product, a block at a time
as MatMulNBits does with accuracy level 4, `kv8` the cache. All else is computed in f32 by the exporter's standard graphs,
a layer at a time; the roundings are made before, so that no kernel's own way matters. `--layers` takes the first ones
only. The positions are a talk about made pictures that is not the one from which the cache's scales are taken.
"""

import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np
from llava_phi_export import embedding, kv_scales, stages
from llava_phi_export.attention import ConcatAttention
from llava_phi_export.calibration import Calibration
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.dialect import Standard
from llava_phi_export.pattern import pattern, pixel_values
from llava_phi_export.progress import Progress
from llava_phi_export.quantize import QuantizeOptions, dequantize, quantize
from measures import Kept, versions
from tokenizers import Tokenizer

MATRIX = re.compile(r"decoder\.(layers\.\d+\.(q_proj|k_proj|v_proj|dense|fc1|fc2)|lm_head)\.weight")
QUESTIONS = (
    "Is there a triangle to the left of the blue square?",
    "Name three things that one could buy here for less than 20 euros.",
    "Who painted this, and when? I think it was around 1890, in Arles.",
)
SEEN = 200  # rows of an image that the talk holds


class Rounded:
    """A checkpoint whose decoder's matrices are as their few bits say; of `layers` layers."""

    def __init__(self, checkpoint, layers: int, options: QuantizeOptions | None = None):
        self._checkpoint, self._options = checkpoint, options
        decoder = dataclasses.replace(checkpoint.config.decoder, layers=layers)
        self.config = dataclasses.replace(checkpoint.config, decoder=decoder)

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, rounded where it is a matrix of the decoder."""
        values = self._checkpoint.rows(name, start, stop)
        if self._options is None or not MATRIX.fullmatch(name):
            return values
        bits = self._options.bits(name.removesuffix(".weight"))
        return dequantize(quantize(values.astype(np.float32), bits, self._options), bits, values.shape[1])

    def f32(self, name: str) -> np.ndarray:
        """The whole tensor, as `rows`."""
        if self._options is None or not MATRIX.fullmatch(name):
            return self._checkpoint.f32(name)
        return self.rows(name, 0, self._checkpoint.shape(name)[0]).astype(np.float32)


def rounding(block: int | None, scales) -> type[Standard]:
    """Standard operators with activations rounded a `block` at a time, and keys and values by `scales`."""

    class Attention(ConcatAttention):
        def _extend(self, layer, kind, new):
            if scales is not None:
                step = getattr(scales, kind)[layer][None, :, None]
                step = self._dialect.graph.table(f"{kind}_step", step)
                new = rounded(self._dialect.op, new, step)
            return super()._extend(layer, kind, new)

    class Rounding(Standard):
        def linear(self, x, *layers):
            if block and layers[0].startswith("decoder."):
                columns = self.checkpoint.shape(f"{layers[0]}.weight")[1]
                op = self.op
                if columns % block == 0:
                    blocks = op.Reshape(x, [0, 0, -1, block] if "lm_head" not in layers[0] else [0, -1, block])
                    step = op.Div(op.ReduceMax(op.Abs(blocks), [-1], keepdims=1), 127.0)
                    x = op.Reshape(rounded(op, blocks, op.Max(step, 1e-12)), op.Shape(x))
                else:
                    step = op.Div(op.ReduceMax(op.Abs(x), [-1], keepdims=1), 127.0)
                    x = rounded(op, x, op.Max(step, 1e-12))
            return super().linear(x, *layers)

        def cached_attention(self, config):
            return Attention(self, config)

    return Rounding


def rounded(op, x, step):
    """To the nearest of 255 multiples of `step`."""
    return op.Mul(op.Clip(op.Round(op.Div(x, step)), -127.0, 127.0), step)


def talk(checkpoint, table: np.ndarray, positions: int) -> np.ndarray:
    """[1, positions, hidden]: questions about a made picture, in the model's template."""
    config = checkpoint.config
    tokenizer, template = Tokenizer.from_file(str(config.text.tokenizer)), config.text.template
    pixels = pixel_values(pattern(config.image.size, 5), config.image)
    image = stages.image_embeds(checkpoint, stages.patch_features(checkpoint, pixels, Progress(None))[0])[0]
    rows, number = [], 0
    while sum(map(len, rows)) < positions:
        before = (template["system"] + template["after_system"] if not rows else "") + template["before_user"]
        after = QUESTIONS[number % len(QUESTIONS)] + template["after_user"] + template["before_answer"]
        rows += [table[tokenizer.encode(before, add_special_tokens=False).ids]]
        rows += [image[:SEEN]] if number == 0 else []
        rows += [table[tokenizer.encode(template["after_image"] + after, add_special_tokens=False).ids]]
        number += 1
    return np.concatenate(rows).astype(np.float32)[None, :positions]


def walk(checkpoint, embeds: np.ndarray, dialect: type[Standard], head_bits: list) -> list[np.ndarray]:
    """Logits [positions, width] with each of the heads, over one walk through the layers."""
    rows = np.arange(embeds.shape[1])
    hidden = stages.hidden_states(checkpoint, embeds, rows, Progress(None), dialect=dialect)
    return [stages.logits(head, hidden, dialect) for head in head_bits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--try", action="append", dest="tries", required=True, metavar="TRY")
    parser.add_argument("--layers", type=int, help="the first ones only")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--headroom", type=float, help="of the cache's scales, instead of the exporter's own")
    parser.add_argument("--json", type=Path, help="a file of results, which are added to")
    args = parser.parse_args()
    if args.headroom:
        kv_scales.HEADROOM = args.headroom
    with Checkpoint.open(args.checkpoint) as checkpoint:
        layers = args.layers or checkpoint.config.decoder.layers
        exact = Rounded(checkpoint, layers)
        table = checkpoint.tensor(embedding.TENSOR)
        embeds = talk(exact, table, args.positions)
        scales = None
        if any("kv8" in tried for tried in args.tries):
            pictures = Calibration(None, checkpoint.config.image)
            scales = kv_scales.measure(exact, table, pictures, Progress(None))
        (wanted,) = walk(exact, embeds, Standard, [exact])
        about = {"checkpoint": checkpoint.config.name, "layers": layers, "positions": args.positions}
        kept = Kept(args.json, {"versions": versions(), **about})
        for tried in args.tries:
            method, block, *rest = tried.split(",")
            block, heads = int(block), [int(bits) for bits in rest if bits in ("4", "8")]
            made = Rounded(checkpoint, layers, QuantizeOptions(block, 4, method)) if method != "none" else exact
            dialect = rounding(block if "int8" in rest else None, scales if "kv8" in rest else None)
            variants = [Rounded(checkpoint, layers, QuantizeOptions(block, 4, method, bits)) for bits in heads]
            for bits, found in zip(heads or ["f32"], walk(made, embeds, dialect, variants or [exact]), strict=True):
                what = {
                    "weights": method,
                    "block": block,
                    "lm_head": bits,
                    "also": " ".join(r for r in rest if not r.isdigit()),
                }
                kept.add({**what, **kept.distances(found, wanted)})


if __name__ == "__main__":
    main()

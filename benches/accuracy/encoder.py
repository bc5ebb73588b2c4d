#!/usr/bin/env python3
"""Measures what 8 bits cost the vision encoder of any checkpoint: the cosine of each patch, by the block size.

    python benches/accuracy/encoder.py CHECKPOINT --block 128 --image models/tiny/images/red-triangle.png --json FILE

The f32 features are the exporter's, a layer at a time; those of `cpu-int8` come from its graph with ONNX Runtime's
kernels. A made picture is added to the images that are named.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from llava_phi_export import stages, vision_encoder
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.graph import Graph
from llava_phi_export.int8 import Int8
from llava_phi_export.pillow_image import PillowImage
from llava_phi_export.progress import Progress
from llava_phi_export.quantize import QuantizeOptions
from llava_phi_export.samples import open_image, picture
from measures import Kept, cosines, versions


def session(checkpoint, folder: Path, block: int) -> onnxruntime.InferenceSession:
    """The encoder of `cpu-int8` with blocks of another size."""
    graph = Graph("vision_encoder", folder / "encoder.onnx", opset=Int8.opset, contrib=True, inline_limit=0)
    dialect = Int8(graph, checkpoint)
    dialect.options = QuantizeOptions(block_size=block)
    vision_encoder.build(graph, dialect, checkpoint.config.vision, Progress(None))
    path, *_ = graph.save()
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--block", type=int, action="append", required=True)
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path, help="a file of results, which are added to")
    args = parser.parse_args()
    with Checkpoint.open(args.checkpoint) as checkpoint:
        recipe = PillowImage(checkpoint.config.image)
        pictures = [open_image(path) for path in args.image] + [picture(8)]
        pixels = [recipe.pixel_values(image) for image in pictures]
        wanted = np.concatenate([stages.patch_features(checkpoint, values, Progress(None))[0] for values in pixels])
        kept = Kept(args.json, {"versions": versions(), "checkpoint": checkpoint.config.name, "images": len(pixels)})
        for block in args.block:
            with tempfile.TemporaryDirectory() as folder:
                graph = session(checkpoint, Path(folder), block)
                found = [graph.run(None, {"pixel_values": values})[0] for values in pixels]
            kept.add({"encoder": "cpu-int8", "block": block, **cosines(np.concatenate(found), wanted)})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Tells how far a variant's graphs are from the package's goldens, as JSON, in little memory.

Weights stay mapped: graphs are not optimised and kernels do not copy weights into layouts of their own. The engine does
both, so that its last bits may differ. Components are opened one after another, each reads the golden input.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from llava_phi_export.runner import Package, Runner
from safetensors.numpy import load_file


class Mapped(Runner):
    """A runner whose sessions leave the weights where they are."""

    _told = False

    def session(self, component):
        if not self._told:
            self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._options.add_session_config_entry("session.disable_prepacking", "1")
            # The other order turns all f16 weights into f32 before it multiplies by the first, and an arena keeps them.
            self._options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            self._options.enable_mem_pattern = self._options.enable_cpu_mem_arena = False
            self._told = True
        return super().session(component)


def distance(found, golden):
    """The L2 norm of the difference, by the L2 norm of the golden."""
    golden = golden.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - golden) / np.linalg.norm(golden))


def main():
    package, variant = Package(Path(sys.argv[1])), sys.argv[2]
    spec = package.manifest["goldens"]
    goldens = load_file(package.directory / spec["file"])
    runner, found = Mapped(package, variant), {}
    if package.holds(variant, "decoder"):
        found["logits"] = decoder(package, runner, goldens, spec["image_rows"])
    runner.close("decoder")
    if package.holds(variant, "vision_encoder"):
        found["patch_features"] = distance(runner.patch_features(goldens["pixel_values"]), goldens["patch_features"])
    runner.close("vision_encoder")
    if package.holds(variant, "projector"):
        found["image_embeds"] = distance(runner.image_embeds(goldens["patch_features"]), goldens["image_embeds"])
    allowed = package.manifest["variants"][variant]["tolerance"]
    print(json.dumps({what: {"distance": value, "tolerance": allowed[what]} for what, value in found.items()}))
    return any(not value <= allowed[what] for what, value in found.items())


def decoder(package, runner, goldens, image_rows):
    """The largest distance of the logits after the prompt and after each of the next tokens."""
    image = goldens["image_embeds"][0, :image_rows]
    embeds = runner.embeds([goldens["tokens_before"], goldens["tokens_after"]], [image])
    tokens = goldens["next_tokens"]
    cache = runner.cache(embeds.shape[1] + len(tokens))
    logits = [cache.step(embeds)[0], *(cache.step(package.embed([token])[None])[0] for token in tokens)]
    return max(map(distance, logits, goldens["logits"]))


if __name__ == "__main__":
    sys.exit(main())

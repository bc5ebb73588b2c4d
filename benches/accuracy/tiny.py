#!/usr/bin/env python3
"""Measures what each variant of the exported miniature loses: answers, distributions, patch features.

    python benches/accuracy/tiny.py PACKAGE --decoder cpu-int4 --encoder cpu-int8 --json FILE

PACKAGE holds `portable-f32`, which the others are held against; `--decoder` and `--encoder` may be given several
times. ONNX Runtime runs the graphs from Python, so that a variant needs no build of the engine. Python needs
`llava-phi-export[torch]` and `easy-vqa`.

- right: of easy-VQA's 9,673 test questions, by free greedy generation, exact.
- KL and top-1: over every token of question and answer of some of them, fed to both (natural logarithm).
- cosine: of each patch of all test images.
"""

import argparse
import json
import time
from pathlib import Path

import easy_vqa
import numpy as np
from llava_phi_export.check import _image_config
from llava_phi_export.reference import PillowImage, prompt_ids
from llava_phi_export.runner import Package
from measures import Kept, cosines, versions
from PIL import Image
from tokenizers import Tokenizer

OFFICIAL = Path(easy_vqa.__file__).parent / "data" / "test"
REFERENCE = "portable-f32"
LONGEST = 16
ROOM = 192


class Test:
    """The official questions by image, as token ids of the package's template, and the images' pixels."""

    def __init__(self, package: Package, limit: int | None):
        text = package.manifest["text"]
        self.tokenizer = Tokenizer.from_file(str(package.directory / text["tokenizer"]))
        self.eos = set(text["eos"])
        recipe = PillowImage(_image_config(package.manifest["image"]))
        asked = json.loads((OFFICIAL / "questions.json").read_text())[:limit]
        self.questions: dict[int, list] = {}
        for question, answer, image in asked:
            ids = prompt_ids(self.tokenizer, text["template"], question, 1)
            self.questions.setdefault(image, []).append((ids, answer))
        self.count = len(asked)
        files = {number: OFFICIAL / "images" / f"{number}.png" for number in self.questions}
        self.pixels = {number: recipe.pixel_values(Image.open(path).convert("RGB")) for number, path in files.items()}


def features(runner, test: Test) -> dict[int, np.ndarray]:
    """Patch features of each image, [1, tokens_per_image, hidden]."""
    return {number: runner.patch_features(pixels) for number, pixels in test.pixels.items()}


def answers(package: Package, runner, test: Test, images: dict[int, np.ndarray]) -> int:
    """How many questions are answered right; the questions of an image share what was read of it."""
    right = 0
    for number, questions in test.questions.items():
        cache = runner.cache(ROOM)
        (before, _), _ = questions[0]
        cache.step(np.concatenate([package.embed(before), images[number][0]])[None])
        start = cache.length
        for (_, after), answer in questions:
            cache.truncate(start)
            logits, ids = cache.step(package.embed(after)[None]), []
            while len(ids) < LONGEST and (id := int(logits[0].argmax())) not in test.eos:
                ids.append(id)
                logits = cache.step(package.embed([id])[None])
            right += test.tokenizer.decode(ids).strip() == answer
    return right


def forced(package: Package, runner, test: Test, images: dict[int, np.ndarray], most: int) -> np.ndarray:
    """Logits [positions, width] after each token of question and answer, one question an image."""
    found = []
    for number, questions in list(test.questions.items())[:most]:
        (before, after), answer = questions[number % len(questions)]
        cache = runner.cache(ROOM)
        cache.step(np.concatenate([package.embed(before), images[number][0]])[None])
        for id in after + test.tokenizer.encode(" " + answer).ids:
            found.append(cache.step(package.embed([id])[None])[0])
    return np.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--decoder", action="append", default=[], help="a variant, beside the reference's encoder")
    parser.add_argument("--encoder", action="append", default=[], help="a variant, before the reference's decoder")
    parser.add_argument("--label", default="", help="what the package's options were, for the results")
    parser.add_argument("--limit", type=int, help="only the first test questions")
    parser.add_argument("--forced", type=int, default=200, help="questions whose distributions are compared")
    parser.add_argument("--json", type=Path, help="a file of results, which are added to")
    args = parser.parse_args()
    package = Package(args.package)
    test = Test(package, args.limit)
    base = package.load(REFERENCE, 1)
    patches = features(base, test)
    images = {number: base.image_embeds(values) for number, values in patches.items()}
    wanted = forced(package, base, test, images, args.forced)
    kept = Kept(args.json, {"versions": versions(), "questions": test.count, "positions": len(wanted)})
    for variant in args.decoder:
        started, runner = time.monotonic(), package.load(variant, 1)
        figures = kept.distances(forced(package, runner, test, images, args.forced), wanted)
        figures |= {"right": answers(package, runner, test, images), "seconds": round(time.monotonic() - started)}
        kept.add({"label": args.label, "decoder": variant, **figures})
    for variant in args.encoder:
        runner = package.load(variant, 1)
        found = features(runner, test)
        own = {number: runner.image_embeds(values) for number, values in found.items()}
        figures = cosines(np.concatenate(list(found.values())), np.concatenate(list(patches.values())))
        figures |= kept.distances(forced(package, base, test, own, args.forced), wanted)
        kept.add({"label": args.label, "encoder": variant, **figures, "right": answers(package, base, test, own)})


if __name__ == "__main__":
    main()

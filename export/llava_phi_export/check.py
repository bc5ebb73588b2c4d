"""Runs a package and the PyTorch reference side by side and prints how far each stage is apart."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint
from .config import CheckpointError, ImageConfig
from .dequantize import dequantized, has_quantized
from .report import Answers, Difference, Report, as_json, as_text
from .runner import Package, Runner
from .samples import Sample, samples
from .vision_encoder import ATTENTION

# Sums of f32 in another order.
F32_TOLERANCE = 1e-4
# Weights and activations f16, a dozen layers; 1e-3 was measured in shapes of a few layers.
F16_TOLERANCE = 1e-2
# MatMulNBits of accuracy level 4 rounds activations to int8, a block at a time: 1 % of the logits in small models.
INT8_TOLERANCE = 3e-2
PIXEL_TOLERANCE = 1e-6


def check(
    package: Package,
    checkpoint: Checkpoint,
    variants: list[str],
    cases: list[Sample],
    tokens: int,
    threads: int = 0,
    tolerance: float = F32_TOLERANCE,
    int8_tolerance: float = INT8_TOLERANCE,
    f16_tolerance: float = F16_TOLERANCE,
) -> list[Report]:
    """One report a variant. Each stage of the package reads what the stage before it gave, as in the engine."""
    from .reference import Reference, set_threads

    set_threads(threads)
    reference = Reference(checkpoint)
    expected = [_expected(reference, case, tokens) for case in cases]
    answers = [reference.greedy(stages["embeds"], tokens) for stages in expected]
    reports = []
    quantized = []
    for variant in variants:
        runner = package.load(variant, threads)
        report = Report(variant)
        few_bits = [component for component in ("decoder", "head") if package.holds(variant, component)]
        few_bits = [package.path(variant, component) for component in few_bits]
        few_bits = [path for path in few_bits if has_quantized(path)]
        given = _stages(runner, package, cases, expected, report, tolerance, f16_tolerance)
        limit = f16_tolerance if runner.is_half("decoder") else tolerance
        logits = Difference("logits", None if few_bits else limit)
        steps = Difference("logits, each step", None if few_bits else limit)
        # Rounding may decide between two tokens that are nearly as likely.
        greedy = Answers("the checkpoint", not few_bits and limit == tolerance)
        for case, embeds, answer in zip(cases, given, answers, strict=True):
            _follow(runner, case, embeds, answer, logits, steps, greedy)
        report.differences += [logits, steps]
        report.answers.append(greedy)
        reports.append(report)
        if few_bits:
            # A decoder in f16 keeps its activations so; heads and decoders in f32 round theirs to int8.
            keeps = runner.is_half("decoder") and not package.holds(variant, "head")
            quantized.append((runner, report, given, few_bits, f16_tolerance if keeps else int8_tolerance))
    # Last, because the reference then no longer holds the checkpoint's own values.
    others: set[str] = set()
    for runner, report, given, graphs, limit in quantized:
        reference.replace((name, checkpoint.f32(name)) for name in others)
        for graph in graphs:
            for name, values in dequantized(graph, checkpoint):
                reference.replace([(name, values)])
                others.add(name)
        _against_dequantized(reference, runner, report, cases, expected, given, tokens, limit)
    return reports


def _against_dequantized(reference, runner: Runner, report: Report, cases, expected, given, tokens, tolerance) -> None:
    """What the arithmetic of the graph costs, apart from what the rounding of the weights costs."""
    logits = Difference("logits, same weights", tolerance)
    steps = Difference("logits, same weights, each step", tolerance)
    greedy = Answers("the dequantised weights", False)
    for case, stages, embeds in zip(cases, expected, given, strict=True):
        answer = reference.greedy(stages["embeds"], tokens)
        _follow(runner, case, embeds, answer, logits, steps, greedy)
    report.differences += [logits, steps]
    report.answers.append(greedy)


def _follow(
    runner: Runner, case: Sample, embeds, answer, logits: Difference, steps: Difference, greedy: Answers
) -> None:
    """Feeds the reference's own tokens to the package and adds what differs on the way."""
    found = runner.forced(embeds, answer.ids)
    logits.add(found[0], answer.logits[0])
    steps.add(found, answer.logits)
    greedy.add(case.name, found.argmax(-1), answer.ids, answer.logits)


def _expected(reference, case: Sample, tokens: int) -> dict:
    """The reference's stages of one sample."""
    pixels = features = images = None
    if case.images:
        pixels = np.concatenate([reference.image.pixel_values(image) for image in case.images])
        features = reference.patch_features(pixels)
        images = reference.image_embeds(features)
    ids = reference.token_ids(case.prompt, len(case.images))
    embeds = reference.embeds(ids, images)
    context = reference.config.decoder.context
    if embeds.shape[1] + tokens > context:
        raise CheckpointError(
            f"sample {case.name} takes {embeds.shape[1]} positions and {tokens} tokens are asked for, the context has "
            f"{context}; lower --tokens or shorten the prompt"
        )
    stages = {"ids": ids, "pixels": pixels, "features": features, "images": images, "embeds": embeds}
    if case.images and reference.config.vision.used_layers:
        stages["attention"] = reference.cls_attention(pixels)
    return stages


def _stages(
    runner: Runner, package: Package, cases, expected, report: Report, tolerance: float, f16_tolerance: float
) -> list[np.ndarray]:
    """Compares everything before the decoder; gives the embeddings that the package makes."""
    from .reference import PillowImage, prompt_ids

    image = PillowImage(_image_config(package.manifest["image"]))
    limit = f16_tolerance if runner.is_half("vision_encoder") else tolerance
    stages = {
        name: Difference(name, limit)
        for name, limit in (
            ("pixel_values", PIXEL_TOLERANCE),
            ("patch_features", limit),
            (ATTENTION, limit),
            ("image_embeds", limit),
            ("embeds", limit),
        )
        if name != ATTENTION or ATTENTION in package.graphs(runner.variant, "vision_encoder")["outputs"]
    }
    tokenizer = _tokenizer(package)
    given = []
    for case, wanted in zip(cases, expected, strict=True):
        images = None
        if case.images:
            pixels = np.concatenate([image.pixel_values(picture) for picture in case.images])
            features = runner.patch_features(pixels)
            images = runner.image_embeds(features)
            if ATTENTION in stages:
                stages[ATTENTION].add(runner.cls_attention(pixels), wanted["attention"])
            stages["pixel_values"].add(pixels, wanted["pixels"])
            stages["patch_features"].add(features, wanted["features"])
            stages["image_embeds"].add(images, wanted["images"])
        ids = prompt_ids(tokenizer, package.manifest["text"]["template"], case.prompt, len(case.images))
        embeds = runner.embeds(ids, images)
        stages["embeds"].add(embeds, wanted["embeds"])
        given.append(embeds)
    report.differences += stages.values()
    return given


def _tokenizer(package: Package):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(package.directory / package.manifest["text"]["tokenizer"]))


def _image_config(image: dict) -> ImageConfig:
    return ImageConfig(
        image["size"], image["fit"], tuple(image["mean"]), tuple(image["std"]), image["rescale"],
        tuple(image["pad_color"]),
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-phi-export check", description=__doc__)
    add = parser.add_argument
    add("package", metavar="PACKAGE", type=Path)
    add("--against", metavar="CHECKPOINT", type=Path, required=True, help="the checkpoint that was exported")
    add("--vision-tower", metavar="DIR", help="the vision tower, when the checkpoint does not hold it")
    add("--projector", metavar="PATH", help="the projector, when the checkpoint does not hold it")
    add("--variant", action="append", dest="variants", help="may be given several times (default: all)")
    add("--image", action="append", type=Path, default=[], dest="image", help="may be given several times")
    add("--images", metavar="DIR", type=Path, help="a directory of images")
    add("--prompts", metavar="FILE", type=Path, help="a question a line")
    add("--samples", type=int, default=8, help="samples to make when no image is given (default: %(default)s)")
    add("--tokens", type=int, default=64, help="tokens of each greedy answer (default: %(default)s)")
    add("--threads", type=int, default=0, help="threads of each side; 0 lets it choose")
    add("--tolerance", type=float, default=F32_TOLERANCE, help="for f32 stages (default: %(default)s)")
    add("--f16-tolerance", type=float, default=F16_TOLERANCE, help="for f16 stages (default: %(default)s)")
    add(
        "--int8-tolerance", type=float, default=INT8_TOLERANCE,
        help="for few-bit decoders beside the same dequantised weights (default: %(default)s)",
    )  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """`llava-phi-export check`: 0 when every stated tolerance holds, 1 when one is exceeded, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    if arguments.tokens < 1 or arguments.samples < 1:
        print("error: --tokens and --samples are numbers of at least 1", file=sys.stderr)
        return 2
    try:
        cases = samples(arguments.samples, arguments.image, arguments.images, arguments.prompts)
        package = Package(arguments.package)
        with Checkpoint.open(
            arguments.against, vision_tower=arguments.vision_tower, projector=arguments.projector
        ) as checkpoint:
            reports = check(
                package, checkpoint, arguments.variants or package.variants(), cases, arguments.tokens,
                arguments.threads, arguments.tolerance, arguments.int8_tolerance, arguments.f16_tolerance,
            )  # fmt: skip
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(reports), indent=2))
    else:
        print(as_text(reports, len(cases), arguments.tokens))
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())

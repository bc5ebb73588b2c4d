"""Records in a package how many questions it answers right when it reads fewer visual tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import manifest
from .config import CheckpointError

# What a file of results says; more may stand there.
_FIELDS = {"benchmark": str, "variant": str, "visual_tokens": int, "questions": int, "right": int}


def record(package: Path, results: list[dict]) -> list[dict]:
    """Puts `results` into the manifest of `package`, in the place of what was measured in the same way before.

    Each has `benchmark`, `variant`, `visual_tokens`, `questions` and `right`. Of each benchmark and variant one must be
    with all visual tokens, unless the manifest knows that already: a loss is told beside what it is a loss from.
    Raises `CheckpointError` for what does not fit the package, which is then as it was. Returns what it now holds.
    """
    path = package / manifest.NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{package} is no package: its {manifest.NAME} cannot be read ({error})") from error
    if content.get("format") != manifest.FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}, this version writes {manifest.FORMAT}")
    vision = content["vision"]
    every = vision["tokens_per_image"]
    known = {
        (one["benchmark"], one["variant"], one["questions"]): one["right_with_all"]
        for one in vision.get("measured", [])
    }
    for one in results:
        _check(one, content["variants"], every)
        if one["visual_tokens"] == every:
            known[one["benchmark"], one["variant"], one["questions"]] = one["right"]
    held = {_key(one): one for one in vision.get("measured", [])}
    for one in results:
        whole = known.get((one["benchmark"], one["variant"], one["questions"]))
        if whole is None:
            raise CheckpointError(
                f"{one['benchmark']} with {one['variant']} was never measured over {one['questions']} questions with all "
                f"{every} visual tokens; measure that too and give both files"
            )
        entry = {
            "tokens": one["visual_tokens"],
            **{field: one[field] for field in ("benchmark", "variant", "questions", "right")},
        }
        held[_key(entry)] = {**entry, "right_with_all": whole}
    # A new figure for all tokens is the new measure of every loss.
    for entry in held.values():
        entry["right_with_all"] = known[entry["benchmark"], entry["variant"], entry["questions"]]
    vision["measured"] = [held[key] for key in sorted(held)]
    manifest.write(package, content)
    return vision["measured"]


def _key(entry: dict) -> tuple:
    return entry["benchmark"], entry["variant"], -entry["tokens"]


def _check(one: dict, variants: dict, every: int) -> None:
    """Refuses a result that says too little or what cannot be."""
    for field, kind in _FIELDS.items():
        if not isinstance(one.get(field), kind) or isinstance(one[field], bool):
            raise CheckpointError(f"a result has {field} {one.get(field)!r}, it must be {kind.__name__}")
    if one["variant"] not in variants:
        raise CheckpointError(f"a result is of variant {one['variant']}, the package has {', '.join(variants)}")
    if not 1 <= one["visual_tokens"] <= every:
        raise CheckpointError(f"a result is of {one['visual_tokens']} visual tokens, an image has {every}")
    if not 0 <= one["right"] <= one["questions"] or one["questions"] == 0:
        raise CheckpointError(f"a result has {one['right']} right answers to {one['questions']} questions")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-phi-export measured", description=__doc__)
    parser.add_argument("package", metavar="PACKAGE", type=Path)
    parser.add_argument(
        "results", metavar="RESULTS", type=Path, nargs="+",
        help="JSON files, each an object with benchmark, variant, visual_tokens, questions and right",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """`llava-phi-export measured`: 0 when the manifest holds the results."""
    arguments = _parser().parse_args(argv)
    results = []
    for path in arguments.results:
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{path} is no JSON ({error})") from error
        if not isinstance(results[-1], dict):
            raise CheckpointError(f"{path} holds no JSON object")
    for entry in record(arguments.package, results):
        print(
            f"{entry['tokens']:>5} visual tokens: {entry['right']} of {entry['questions']} right in {entry['benchmark']} "
            f"with {entry['variant']}, {entry['right_with_all']} with all"
        )
    return 0

#!/usr/bin/env python3
"""Asks two programs the same questions and compares the tokens of their answers."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def ask(command: list[str], root: str, image: str, question: str, limit: int) -> dict:
    """One answer as `ask --json` gives it, with the seconds it took, or `error`."""
    images = [f"{root}/{image}" if root else image] if image else []
    begin = time.monotonic()
    # Without an end of options a question may begin with a dash.
    run = [*command, "--json", "--max-new-tokens", str(limit), "--", *images, question]
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=1800, check=False)
        seconds = round(time.monotonic() - begin, 3)
        if done.returncode != 0:
            return {"error": f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}", "seconds": seconds}
        return json.loads(done.stdout.strip().splitlines()[-1]) | {"seconds": seconds}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as e:
        return {"error": f"{type(e).__name__}: {e}", "seconds": round(time.monotonic() - begin, 3)}


def first_difference(one: list[int], other: list[int]) -> int | None:
    """The first place where two answers differ, or `None`."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def compare(reference: dict, candidate: dict) -> dict:
    """What both answered, and whether the tokens are the same."""
    row = {"reference": reference, "candidate": candidate, "same": False}
    if "error" not in reference and "error" not in candidate:
        row["first_difference"] = first_difference(reference["token_ids"], candidate["token_ids"])
        row["same"] = row["first_difference"] is None
    return row


def show(image: str, question: str, row: dict) -> None:
    """A line for a person."""
    state = "same" if row["same"] else "DIFFERS"
    texts = [side.get("text", side.get("error", "")) for side in (row["reference"], row["candidate"])]
    if any("error" in side for side in (row["reference"], row["candidate"])):
        state = "FAILED"
    seconds = " / ".join(f"{row[side]['seconds']:.1f} s" for side in ("reference", "candidate"))
    answers = repr(texts[0]) if row["same"] else " | ".join(map(repr, texts))
    print(f"{state:8} {seconds:18} {Path(image).name or 'no image'}: {question} -> {answers}", flush=True)


def main() -> int:
    """0: every answer is the same; 1: some differ; 2: a program failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True, help="the words of one `llava-phi ask`, with its options")
    parser.add_argument("--candidate", required=True, help="the words of the other")
    parser.add_argument(
        "--questions", type=Path, default=HERE / "questions.tsv", help="image TAB question, a line each"
    )
    parser.add_argument("--root", default="", help="the directory that the images' paths are relative to")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="where to write the comparison in JSON")
    arguments = parser.parse_args()

    commands = [shlex.split(words) for words in (arguments.reference, arguments.candidate)]
    rows = []
    for line in arguments.questions.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        image, _, question = line.rpartition("\t")
        answers = [ask(words, arguments.root, image, question, arguments.max_new_tokens) for words in commands]
        rows.append({"image": image, "question": question} | compare(*answers))
        show(image, question, rows[-1])
    same = sum(row["same"] for row in rows)
    failed = sum("error" in row["reference"] or "error" in row["candidate"] for row in rows)
    print(
        f"{same} of {len(rows)} answers have the same tokens" + (f", {failed} could not be compared" if failed else "")
    )
    if arguments.output:
        outcome = {"commands": commands, "questions": len(rows), "same": same, "failed": failed, "rows": rows}
        arguments.output.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    return 2 if failed else int(same < len(rows))


if __name__ == "__main__":
    sys.exit(main())

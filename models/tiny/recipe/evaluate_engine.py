"""Measures the exported model through the engine: `llava-phi batch` over the official easy-VQA test questions."""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import shapes
from evaluate import SEED
from PIL import Image

CONDITIONS = ("original", "jpeg", "blank")


def write_images(condition: str, numbers: list[int], folder: Path) -> dict[int, str]:
    """Writes the test images under a condition; gives each one's file. `jpeg` are those of `evaluate.py`."""
    rng, files = np.random.default_rng(SEED), {}
    for number in numbers:
        image = shapes.official_image("test", number)
        if condition == "jpeg":
            side = round(shapes.log_uniform(rng, 40, 300))
            file = folder / f"{number}.jpg"
            larger = image.resize((side, side), Image.Resampling.BICUBIC)
            larger.save(file, quality=int(rng.integers(60, 96)))
        else:
            file = folder / f"{number}.png"
            (Image.new("RGB", image.size, (128, 128, 128)) if condition == "blank" else image).save(file)
        files[number] = str(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", default="target/release/llava-phi", help="the program")
    parser.add_argument("--variant", default="cpu-int4")
    parser.add_argument("--model", help="a package; the embedded model otherwise")
    parser.add_argument("--condition", choices=CONDITIONS, default="original")
    parser.add_argument("--visual-tokens", type=int, help="positions that an image takes; all otherwise")
    parser.add_argument("--limit", type=int, help="only the first test questions")
    parser.add_argument("--sample", type=int, help="only so many test questions, drawn from all of them")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    test = json.loads((shapes.OFFICIAL / "test" / "questions.json").read_text())[: args.limit]
    if args.sample:
        drawn = np.random.default_rng(SEED).permutation(len(test))[: args.sample]
        test = [test[n] for n in sorted(drawn)]
    # The questions about one image follow each other, so that the engine reads it once.
    order = sorted(range(len(test)), key=lambda n: test[n][2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_images(args.condition, sorted({number for _, _, number in test}), folder)
        questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
        lines = ({"id": n, "question": test[n][0], "images": [files[test[n][2]]]} for n in order)
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [args.binary, "batch", str(questions), "--output", str(answers), "--variant", args.variant]
        command += ["--model", args.model] if args.model else []
        command += ["--visual-tokens", str(args.visual_tokens)] if args.visual_tokens else []
        subprocess.run(command, check=True)
        told = {line["id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    right = [told[n].get("text") == test[n][1] for n in range(len(test))]
    version = subprocess.run([args.binary, "--version"], check=True, capture_output=True, text=True).stdout
    figures = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "versions": version.split("\n")[:2],
        "machine": f"{platform.system()} {platform.machine()}",
        "variant": args.variant,
        "condition": args.condition,
        "benchmark": "easy-VQA test" + ("" if args.condition == "original" else f", {args.condition}"),
        "visual_tokens": told[0]["usage"]["image_tokens"],
        "questions": len(test),
        "right": sum(right),
        "accuracy": round(sum(right) / len(test), 5),
        "providers": told[0]["providers"],
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Asks one process about ever new pictures for a while, and reports how its memory, time and answers go on.

    python benches/soak.py --minutes 30 --json benches/runs/DATE-HOST/soak.json

Each question has a picture of its own; every so often one that was asked at the start is asked again, and must be
answered as then. Memory is the process's own, from /proc (Linux).
"""

import argparse
import datetime
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "black", "yellow", "gray", "teal", "brown")
QUESTIONS = ("what color is the shape?", "what shape is in the image?", "Describe the image.")
KNOWN = 32  # questions that come back
EVERY = 8  # one of so many is one of those


def picture(number, folder):
    """The file of a picture that no other number has."""
    draw = random.Random(number)
    image = Image.new("RGB", (64, 64), tuple(draw.randrange(200, 256) for _ in range(3)))
    x, y, size = draw.randrange(4, 28), draw.randrange(4, 28), draw.randrange(16, 32)
    shape = draw.choice(("ellipse", "rectangle"))
    getattr(ImageDraw.Draw(image), shape)((x, y, x + size, y + size), fill=draw.choice(COLORS))
    file = folder / f"{number}.png"
    image.save(file)
    return file


def questions(count, folder):
    """The lines of a batch, and how many pictures they name."""
    fresh, lines = 0, []
    for index in range(count):
        if index >= KNOWN and index % EVERY == 0:
            number = index // EVERY % KNOWN
        else:
            number, fresh = fresh, fresh + 1
        file = folder / f"{number}.png"
        if not file.exists():
            file = picture(number, folder)
        question = QUESTIONS[number % len(QUESTIONS)]
        lines.append({"id": f"{index}:{number}", "question": question, "images": [str(file)]})
    return lines, fresh


def resident(process):
    """Anonymous and file-backed memory in bytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return {name: int(fields[f"Rss{name}"].split()[0]) * 1024 for name in ("Anon", "File")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="target/release/llava-phi")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--questions", type=int, default=40_000, help="stop after so many, if they take less")
    parser.add_argument("--json", type=Path, help="file of the figures")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="further ones of `llava-phi batch`")
    options = parser.parse_args()
    samples, answers, changed = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lines, fresh = questions(options.questions, folder)
        asked, output = folder / "questions.jsonl", folder / "answers.jsonl"
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
        output.touch()
        command = [options.program, "batch", str(asked), "--output", str(output), *options.arguments]
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with output.open() as file:
            while process.poll() is None and time.monotonic() - begin < options.minutes * 60:
                time.sleep(min(5, options.minutes * 6))
                times = []
                for line in file.read().splitlines():
                    answer = json.loads(line)
                    number = answer["id"].split(":")[1]
                    if answers.setdefault(number, answer["text"]) != answer["text"]:
                        changed.append(answer["id"])
                    times.append(answer["timings_ms"]["total"])
                if times and process.poll() is None:
                    seconds = round(time.monotonic() - begin, 1)
                    samples.append(
                        {"seconds": seconds, "answers": len(times), "ms": statistics.median(times)} | resident(process)
                    )
        process.terminate()
        process.wait()
    if len(samples) < 4:
        sys.exit("error: too short for anything to be said; give more --minutes")
    # The first quarter fills what is kept of earlier prompts.
    quarter = len(samples) // 4
    first, last = samples[quarter : 2 * quarter], samples[-quarter:]
    growth = {
        name: statistics.median(one[name] for one in last) / statistics.median(one[name] for one in first)
        for name in ("Anon", "File", "ms")
    }
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "answers": sum(one["answers"] for one in samples),
        "pictures": min(fresh, len(answers)),
        "asked_again_and_answered_otherwise": changed,
        "last_quarter_to_second": growth,
        "samples": samples,
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}, indent=1))
    if changed:
        sys.exit("error: a question that came back was answered in another way")


if __name__ == "__main__":
    main()

"""Times the program from its start to the end of a one-token answer of the miniature model: `python3 benches/startup.py`.

Builds nothing: give the program with `--program`, or have `cargo build --release` run before.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/llava-phi")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="runs that are not counted")
    parser.add_argument("--image", type=Path, default=ROOT / "models/tiny/images/red-triangle.png")
    parser.add_argument("--limit-ms", type=float, default=150.0, help="what the median is held against")
    arguments = parser.parse_args()
    question = ["ask", str(arguments.image), "What is in the image?", "--max-new-tokens", "1", "--json"]
    command = [str(arguments.program), *question]

    took, inside = [], []
    for number in range(arguments.warm_up + arguments.runs):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = (time.perf_counter() - begin) * 1e3
        if number >= arguments.warm_up:
            took.append(wall)
            inside.append(json.loads(done.stdout)["timings_ms"])
    quarters = statistics.quantiles(took, n=4)
    median = statistics.median(took)
    result = {
        "what": "process start to end, one token of the miniature, ms",
        "version": subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout.split("\n")[:2],
        "runs": len(took),
        "median": round(median, 1),
        "min": round(min(took), 1),
        "quarters": [round(quarters[0], 1), round(quarters[2], 1)],
        "max": round(max(took), 1),
        "inside": {key: round(statistics.median(one[key] for one in inside), 2) for key in inside[0]},
        "limit": arguments.limit_ms,
        "below_limit": median < arguments.limit_ms,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "samples": [round(one, 1) for one in took],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

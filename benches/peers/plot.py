#!/usr/bin/env python3
"""Draws the first token and decode against the peers from a run's raw data, as SVG.

python benches/peers/plot.py benches/runs/DATE-HOST/peers.json docs/performance.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import stats

PANELS = (
    ("first-token", "first token, image + 64 text tokens", "s", False),
    ("decode-700", "decode at depth 700", "tokens/s", True),
)
OURS, THEIRS = "#c2410c", "#64748b"


def rows(record, figure, inverse):
    """Title, value, lowest and highest round, and whose, of each contender that has the figure; the best one first."""
    found = []
    for contender in record["contenders"]:
        typical = stats.typical(record["samples"], figure, contender["name"])
        if typical is None:
            continue
        by_round = stats.of_rounds(record["samples"], figure, contender["name"], typical[1])
        values = [1 / value if inverse else value for value in (typical[0], *by_round.values())]
        found.append((contender["title"], values[0], min(values[1:]), max(values[1:]), contender["ours"]))
    return sorted(found, key=lambda row: row[1], reverse=inverse)


def draw(record, path):
    """Writes the plot: a bar a contender, with the range of its rounds."""
    # Text stays text, and the same data give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "llava-phi", "font.size": 9})
    panels = [(rows(record, figure, inverse), title, unit) for figure, title, unit, inverse in PANELS]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        raise SystemExit("error: the run has neither a first token nor decode at depth 700")
    heights = [len(panel[0]) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), figsize=(8, 0.36 * sum(heights) + 1.1 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axis, (bars, title, unit) in zip(axes[:, 0], panels):
        places = range(len(bars))
        values = [bar[1] for bar in bars]
        spread = [[value - bar[2] for bar, value in zip(bars, values)], [bar[3] - bar[1] for bar in bars]]
        spread = [[max(0.0, distance) for distance in side] for side in spread]
        axis.barh(places, values, color=[OURS if bar[4] else THEIRS for bar in bars], height=0.7)
        axis.errorbar(values, places, xerr=spread, fmt="none", ecolor="#1e293b", elinewidth=1, capsize=2)
        axis.set_yticks(places, [bar[0] for bar in bars])
        for place, bar in zip(places, bars):
            axis.annotate(f"{bar[1]:.3g}", (bar[3], place), (4, 0), textcoords="offset points", va="center")
        axis.invert_yaxis()
        axis.set_title(f"{title}, {unit}", loc="left", fontsize=10)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    machine = record["machine"]
    threads = record["options"]["threads"]
    figure.text(
        0.01, 0.005, f"{record['date'][:10]}, {machine['processor']}, {threads} threads, random weights", size=7
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="peers.json of a run")
    parser.add_argument("svg", type=Path, nargs="?", default=Path("docs/performance.svg"))
    options = parser.parse_args()
    draw(json.loads(options.run.read_text(encoding="utf-8")), options.svg)


if __name__ == "__main__":
    main()

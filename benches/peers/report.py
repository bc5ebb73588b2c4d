"""Writes the tables of a run in Markdown from its raw data: `report.py peers.json` prints them again."""

import json
import sys
from pathlib import Path

import stats
from figures import ALL, MEMORY

# What is told as times faster; of the others, how much of the peer's we take.
SMALLER = ("load", *MEMORY)
SMALL_SAMPLE = 5


def report(record):
    """The whole note on `record`, which `run.py` wrote."""
    ours = [contender for contender in record["contenders"] if contender["ours"]]
    others = [contender for contender in record["contenders"] if not contender["ours"]]
    measured = [name for name in ALL if any(sample["figure"] == name for sample in record["samples"])]
    parts = [head(record)]
    for contender in ours:
        parts.append(against_the_best(record, contender, others, measured))
    parts.append(values(record, measured))
    for contender in ours:
        parts.append(against_each(record, contender, others, measured))
    parts += [settings(record), trouble(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(record):
    machine, versions, options = record["machine"], record["versions"], record["options"]
    busy = [run["busy"] for run in record["runs"] if run["busy"] is not None]
    lines = [
        "# LLaVA-Phi-3B with random weights: llava-phi and its peers, interleaved",
        "",
        f"{record['date']}, {machine['processor']}, {machine['processors']} processors"
        f" ({', '.join(machine['instructions'])}), {gb(machine['memory'])} of memory, {machine['system']}.",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        f"{options['rounds']} rounds in rotating order, {options['threads']} threads, a process of its own for each"
        " contender and round. The weights are random: times and memory mean something, answers do not."
        " Ratios are geometric means of paired rounds with 95 % bootstrap intervals;"
        f" those of fewer than {SMALL_SAMPLE} rounds have intervals too narrow to be believed, and are marked *.",
    ]
    if busy:
        lines.append(
            f"Others took {100 * min(busy):.0f} to {100 * max(busy):.0f} % of the machine while a process ran;"
            f" a sample counts as disturbed above {100 * options['disturbed']:.0f} %,"
            " and † marks what was taken from disturbed samples."
        )
    return "\n".join(lines)


def against_the_best(record, contender, others, measured):
    rows = []
    for figure in measured:
        best = stats.best_peer(record["samples"], figure, [peer["name"] for peer in others])
        if best is None:
            continue
        title = next(peer["title"] for peer in others if peer["name"] == best)
        cell = ratio_cell(record, figure, contender["name"], best)
        if cell:
            rows.append([ALL[figure].title, title, value_cell(record, figure, best)])
            rows[-1] += [value_cell(record, figure, contender["name"]), cell]
    return section(
        f"{contender['title']} against the best peer", ["figure", "best peer", "its value", "ours", "ratio"], rows
    )


def values(record, measured):
    contenders = [c for c in record["contenders"] if any(s["contender"] == c["name"] for s in record["samples"])]
    rows = [
        [ALL[figure].title, *(value_cell(record, figure, contender["name"]) for contender in contenders)]
        for figure in measured
    ]
    return section("Everybody", ["median of rounds", *(contender["title"] for contender in contenders)], rows)


def against_each(record, contender, others, measured):
    rows = []
    for figure in measured:
        cells = [ratio_cell(record, figure, contender["name"], peer["name"]) for peer in others]
        if any(cells):
            rows.append([ALL[figure].title, *cells])
    return section(f"{contender['title']} against each", ["ratio", *(peer["title"] for peer in others)], rows)


def settings(record):
    rows = [[contender["title"], contender["why"]] for contender in record["contenders"]]
    return section("Settings", ["contender", "settings, and what it does not do"], rows)


def trouble(record):
    titles = {contender["name"]: contender["title"] for contender in record["contenders"]}
    rows = [[titles[entry["contender"]], str(entry["round"]), entry["reason"]] for entry in record["left_out"]]
    return section("Left out", ["contender", "round", "reason"], rows)


def ratio_cell(record, figure, contender, peer):
    """`1.31 x (1.28-1.35)`: times faster, or the share of the peer's that we take."""
    ratio, disturbed = stats.compared(record["samples"], figure, contender, peer)
    if ratio is None:
        return ""
    if figure not in SMALLER:
        ratio = ratio.inverse()
    word = "of it" if figure in SMALLER else "x as fast"
    marks = ("*" if ratio.rounds < SMALL_SAMPLE else "") + ("†" if disturbed else "")
    return f"{ratio.mean:.2f} {word} ({ratio.low:.2f}-{ratio.high:.2f}){marks}"


def value_cell(record, figure, contender):
    found = stats.typical(record["samples"], figure, contender)
    if found is None:
        return ""
    value, disturbed = found
    return shown(value, ALL[figure].unit) + ("†" if disturbed else "")


def shown(value, unit):
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "s/token":
        return f"{1 / value:.1f} tokens/s"
    return f"{value:.2f} s"


def gb(value):
    return f"{value / 1e9:.0f} GB"


def section(title, columns, rows):
    """A heading and a table, or nothing without rows."""
    if not rows:
        return ""
    table = [columns, ["---"] * len(columns), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")

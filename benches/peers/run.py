#!/usr/bin/env python3
"""Measures llava-phi and its peers on a random LLaVA-Phi-3B, interleaved, and reports ratios.

    python benches/peers/run.py --work DIR --program target/release/llava-phi

installs the peers into DIR/venv, makes the models in DIR, and writes peers.md and peers.json to benches/runs/DATE-HOST/.
What is there already is used again.
"""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import contenders
import environment
import facts
import prepare
from figures import ALL
from report import report
from rounds import Rounds

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ROOT / "benches" / "runs"


def main():
    options = arguments()
    files = prepare.Files(options.work, options.checkpoint, options.package)
    options.venv = options.venv or options.work / "venv"
    environment.ensure(options.venv, options.work, options.torch_index)
    versions = facts.versions(options.venv / "bin" / "python", options.program)
    prepare.make(files, options.venv / "bin" / "python", options.threads)
    if options.prepare:
        return
    everybody = chosen(options, files)
    out = options.out or RUNS / f"{datetime.date.today().isoformat()}-{platform.node() or 'host'}"
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "options": {name: plain(value) for name, value in vars(options).items()},
        "machine": facts.here(),
        "versions": versions,
        "contenders": [described(contender) for contender in everybody],
        "runs": [],
        "samples": [],
        "left_out": [],
    }

    def save():
        text = json.dumps(record, indent=1, default=str)
        if options.hide:
            text = text.replace(f"{ROOT}/", "")
            # The longest first, since one may hold another.
            hidden = (options.work, options.venv, files.package, files.checkpoint, options.program, out)
            for path in sorted(filter(None, hidden), key=lambda path: -len(str(path))):
                text = text.replace(str(path), path.name)
        (out / "peers.json").write_text(text + "\n", encoding="utf-8")

    try:
        Rounds(options, everybody, record, save).run()
    except KeyboardInterrupt:
        print("stopped; the report has what was measured until now", file=sys.stderr)
    save()
    (out / "peers.md").write_text(report(record), encoding="utf-8")
    print(out / "peers.md")
    if not options.keep:
        for path in files.of_peers:
            prepare.remove(path)


def chosen(options, files):
    """The contenders that were asked for, ours first."""
    mine = []
    if options.program:
        mine = [contenders.ours(text, files.package) for text in options.ours or ["cpu-int4"]]
    known = {contender.name: contender for contender in contenders.peers(files)}
    names = options.contenders.split(",") if options.contenders else list(known)
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"error: there is no contender {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return mine + [known[name] for name in names if name]


def described(contender):
    keys = ("name", "title", "why", "ours", "settings", "program")
    return {key: getattr(contender, key) for key in keys}


def plain(value):
    return str(value) if isinstance(value, Path) else value


def only(text):
    names = text.split(",")
    for name in names:
        if name not in ALL:
            raise argparse.ArgumentTypeError(f"there is no figure {name}; there are {', '.join(ALL)}")
    return names


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help=f"directory of the models, about {environment.SIZE} GB")
    add("--venv", type=Path, help="environment of the peers, ready or to be made (default: WORK/venv)")
    add("--torch-index", metavar="URL", help="index with processor-only builds of torch")
    add("--checkpoint", type=Path, help="a random checkpoint of the true size (default: made in WORK)")
    add("--package", type=Path, help="its export, of which the f32 encoder is the baseline (default: made in WORK)")
    add("--program", type=Path, help="llava-phi; without it the peers are measured alone")
    add("--ours", action="append", metavar="NAME=PACKAGE ...", help="a setting of ours: package and arguments of bench")
    add("--contenders", help="peers, comma-separated (default: all; empty: none)")
    add("--only", type=only, default=list(ALL), help="figures, comma-separated (default: all)")
    add("--rounds", type=int, default=7)
    add("--memory-rounds", type=int, default=2, help="rounds in which the job is run for its memory")
    add("--threads", type=int, default=2)
    add("--disturbed", type=float, default=0.05, help="share of the machine that others may take of a sample")
    add("--retries", type=int, default=1, help="further samples where one was disturbed")
    add("--quiet", type=float, default=10.0, help="longest wait for a quiet machine before a sample, in seconds")
    add("--seconds", type=float, default=600.0, help="longest time of one process")
    add("--prepare", action="store_true", help="install and convert, and measure nothing")
    add("--keep", action=argparse.BooleanOptionalAction, default=True, help="keep the peers' models")
    add(
        "--hide",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write names of directories, not their paths",
    )
    add("--out", type=Path, help="directory of the report (default: benches/runs/DATE-HOST)")
    options = parser.parse_args()
    for name in ("work", "venv", "checkpoint", "package", "program", "out"):
        path = getattr(options, name)
        if path is not None:
            # A link to a program stays one: an environment's Python is a link.
            setattr(options, name, path.absolute())
    if options.contenders == "" and not options.program:
        parser.error("nobody is left to measure; give --program or --contenders")
    return options


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures `llava-phi serve` beside the servers of its peers on a random LLaVA-Phi-3B, interleaved, and reports ratios.

    python benches/peers/serving.py --work DIR --program target/release/llava-phi --llama-server PATH --genai engine,batch

Everybody gets the same prompts and says as many tokens, greedily; the end is forbidden. It makes the models in DIR unless they
are there, and writes serving.md and serving.json to benches/runs/DATE-HOST/. Workloads: `text`, prompts of their own;
`picture-new`, once, all clients at once about a picture that nobody knows; `picture`, further questions about it.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import environment
import facts
import prepare
from busy import Watch
from servers import GENAI, Failed, servers
from serving_load import questions
from serving_report import report

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ROOT / "benches" / "runs"
# Which is the faster depends on the workload; its cache of prompts in memory gains nothing where slots are enough.
LLAMA = ["--flash-attn on --cache-ram 0", "--flash-attn off --cache-ram 0"]
WORKLOADS = ("text", "picture-new", "picture")


class Levels:
    """One run: everybody in turn, round by round; each level is kept as soon as it is there."""

    def __init__(self, options, record, save):
        self.options, self.record, self.save = options, record, save
        self.before = {"text": 0, "picture-new": 10_000, "picture": 20_000}
        self.first_round = 1 + max((level["round"] for level in record["levels"]), default=-1)

    def run(self, everybody):
        """Starts all, stops each while others are asked, and ends all."""
        begin, running = time.perf_counter(), []
        try:
            for server in everybody:
                running.append(server)
                if not self.attempt(server, None, lambda server=server: self.start(server)):
                    running.remove(server)
                    server.stop()
            if not running:
                sys.exit(f"error: no server started: {self.record['left_out'][-1]['reason']}")
            longest = 0.0
            for number in range(self.first_round, self.first_round + self.options.rounds):
                if time.perf_counter() - begin + longest > self.options.seconds:
                    self.tell(f"ended before round {number}: it might take longer than --seconds allow")
                    break
                longest = max(longest, self.round(number, running))
        finally:
            for server in running:
                self.record["memory"].append({"server": server.name, **server.memory()})
                server.stop()
            self.save()

    def start(self, server):
        """Has it loaded and touches what the first question touches: a few tokens, alone and together."""
        seconds = server.start(self.options.timeout)
        self.record["loads"].append({"server": server.name, "seconds": round(seconds, 3)})
        options = argparse.Namespace(**{**vars(self.options), "tokens": 4})
        for clients in self.options.clients:
            server.ask(questions("text", clients, options, 90_000 + clients), clients, self.options.timeout)
        server.pause()
        return True

    def round(self, number, running):
        """Gives the seconds of what every round has."""
        # Rotated, so that nobody always follows the same other.
        turn, seconds = number % len(running), 0.0
        for workload in self.options.workloads:
            levels = self.options.clients if workload != "picture-new" else [max(self.options.clients)]
            if workload == "picture-new" and number > self.first_round:
                continue
            begin = time.perf_counter()
            for clients in levels:
                count = max(self.options.least, clients * self.options.each) if workload != "picture-new" else clients
                asked = questions(workload, count, self.options, self.before[workload] + 100 * number)
                for server in running[turn:] + running[:turn]:
                    if workload in server.workloads:
                        level = {"server": server.name, "workload": workload, "clients": clients, "round": number}
                        self.attempt(server, level, lambda: self.level(server, level, asked))  # noqa: B023
            seconds += time.perf_counter() - begin if workload != "picture-new" else 0.0
        return seconds

    def level(self, server, level, asked):
        server.resume()
        try:
            watch, cpu, own = Watch(), server.cpu_seconds(), time.process_time()
            found = server.ask(asked, level["clients"], self.options.timeout)
            spent = server.cpu_seconds() - cpu + time.process_time() - own
            busy = watch.share(own=spent)
        finally:
            server.pause()
        self.record["levels"].append({**level, **found, "cpu_s": round(spent, 2), "busy": busy})
        self.save()
        said = sum(one["tokens"] or 0 for one in found["answers"])
        self.tell(f"{level}: {said / found['seconds']:.1f} tokens/s, others took {100 * (busy or 0):.0f} %")

    def attempt(self, server, level, work):
        """The result of `work`; a server that failed is told of in the report."""
        try:
            return work()
        except (Failed, OSError, ValueError) as error:
            self.record["left_out"].append({"server": server.name, **(level or {}), "reason": str(error)})
            self.tell(f"{server.title}: {error}")
            return None

    def tell(self, text):
        print(text, file=sys.stderr, flush=True)


def main():
    options = arguments()
    files = prepare.Files(options.work, options.checkpoint, options.package, ("q4_0",))
    options.venv = options.venv or options.work / "venv"
    environment.ensure(options.venv, options.work, options.torch_index)
    python = options.venv / "bin" / "python"
    if not all(path.exists() for path in files.served(bool(options.genai), bool(options.llama_server))):
        prepare.make(files, python, options.threads)
    options.picture = files.picture.read_bytes()
    out = options.out or RUNS / f"{datetime.date.today().isoformat()}-{platform.node() or 'host'}"
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{options.name}.json"
    with tempfile.TemporaryDirectory() as folder:
        everybody = servers(options, files, Path(folder))
        record = begun(options, target, python, everybody)
        hidden = (options.work, options.venv, files.package, options.program, options.llama_server, out)
        hidden = sorted({str(path): path.name for path in hidden if path}.items(), key=lambda item: -len(item[0]))

        def save():
            text = compact(json.dumps(record, indent=1, default=str)).replace(f"{ROOT}/", "")
            # The longest first, since one may hold another.
            for path, name in hidden:
                text = text.replace(path, name)
            target.write_text(text + "\n", encoding="utf-8")

        try:
            Levels(options, record, save).run(everybody)
        except KeyboardInterrupt:
            print("stopped; the report has what was measured until now", file=sys.stderr)
    # From what was written, in which paths are names.
    told = report(json.loads(target.read_text(encoding="utf-8")))
    target.with_suffix(".md").write_text(told, encoding="utf-8")
    print(told)


def begun(options, target, python, everybody):
    """What is written, from an earlier run's on where --append says so."""
    versions = facts.versions(python, options.program)
    if options.llama_server:
        versions["llama-server"] = facts.first_line([options.llama_server, "--version"])
    described = [{"name": one.name, "title": one.title, "why": one.why, "ours": one.ours} for one in everybody]
    started = {
        "date": now(),
        "command": shlex.join(["python", *map(str, sys.argv)]),
        "machine": facts.here(),
        "versions": versions,
    }
    if options.append and target.exists():
        record = json.loads(target.read_text(encoding="utf-8"))
        known = {server["name"] for server in record["servers"]}
        record["servers"] += [server for server in described if server["name"] not in known]
        record["starts"].append(started)
        return record
    shown = {key: getattr(options, key) for key in ("threads", "prompt", "tokens", "picture_tokens", "disturbed")}
    record = {"schema": 1, "starts": [started], "options": shown, "servers": described}
    return record | {"loads": [], "levels": [], "memory": [], "left_out": []}


def compact(text):
    """JSON with each list of numbers on a line of its own."""
    return re.sub(r"\[[\d\s.,]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


def now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def listed(known):
    def read(text):
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there is no {name}; there are {', '.join(known)}")
        return names

    return read


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="directory of the models")
    add("--venv", type=Path, help="environment of the peers, ready or to be made (default: WORK/venv)")
    add("--torch-index", metavar="URL", help="index with processor-only builds of torch")
    add("--checkpoint", type=Path, help="a random checkpoint of the true size (default: made in WORK)")
    add("--package", type=Path, help="its export (default: made in WORK)")
    add("--program", type=Path, help="llava-phi")
    add("--ours", default="", metavar="ARGUMENTS", help="further ones of `llava-phi serve`")
    add("--llama-server", type=Path, help="llama.cpp's server, built as README.md says")
    add(
        "--llama",
        action="append",
        metavar="ARGUMENTS",
        help=f"further ones of it; again for another (default: {LLAMA})",
    )
    add("--genai", type=listed(GENAI), default=[], help=f"ways to drive onnxruntime-genai: {', '.join(GENAI)}")
    add("--workloads", type=listed(WORKLOADS), default=list(WORKLOADS), help="comma-separated (default: all)")
    add("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8])
    add("--each", type=int, default=1, help="questions of each client in a level")
    add("--least", type=int, default=2, help="questions of a level, where that is more")
    add("--prompt", type=int, default=64, help="tokens of a prompt of text")
    add("--tokens", type=int, default=64, help="new tokens behind a prompt of text")
    add("--picture-tokens", type=int, default=32, help="new tokens of an answer about the picture")
    add("--context", type=int, default=1024, help="positions that each sequence may come to")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=3600.0, help="no further round is begun that might end after so many")
    add("--timeout", type=float, default=600.0, help="seconds of one answer, or of a start")
    add("--threads", type=int, default=2)
    add("--disturbed", type=float, default=0.05, help="share of the machine that others may take of a level")
    add("--append", action="store_true", help="further rounds of the run that the files hold")
    add("--name", default="serving", help="of the files that are written")
    add("--out", type=Path, help="directory of the report (default: benches/runs/DATE-HOST)")
    options = parser.parse_args()
    options.llama = options.llama or LLAMA
    for name in ("work", "venv", "checkpoint", "package", "program", "llama_server", "out"):
        path = getattr(options, name)
        if path is not None:
            # A link to a program stays one: an environment's Python is a link.
            setattr(options, name, path.absolute())
    return options


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Loads a server of OpenAI's API with clients that ask about pictures, and reports speed, waits, errors and memory.

    python benches/serve.py --clients 1,2,4,8,16 --requests 200 --json benches/runs/DATE-HOST/serve-streams.json
    python benches/serve.py --clients 1,8 --requests 32 --known-every 1 --pictures 1 --max-tokens 32
    python benches/serve.py --clients 64 --requests 10000 --json benches/runs/DATE-HOST/serve-soak.json
    python benches/serve.py --server http://127.0.0.1:8000/v1 --model NAME --pid PID --clients 1,8 --requests 32

Without --server it starts `llava-phi serve` on a free port and ends it. Each client asks, reads the whole answer and asks
again. Some questions come back; those of them that were asked alone before the load must be answered as then.
"""

import argparse
import asyncio
import base64
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak import KNOWN, QUESTIONS, picture

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches" / "peers"))

import facts  # noqa: E402
from busy import Watch  # noqa: E402
from process import memory  # noqa: E402
from streamed import Client  # noqa: E402


class Questions:
    """The requests in the order in which they are asked, whoever asks them."""

    def __init__(self, options, folder):
        self.options, self.folder, self.asked, self.fresh = options, folder, 0, 0

    def body(self, number):
        """Question `number`: those that come back share `options.pictures`, each other one has a picture of its own."""
        shown = number % self.options.pictures if number < KNOWN else number
        file = self.folder / f"{shown}.png"
        data = (file if file.exists() else picture(shown, self.folder)).read_bytes()
        if number >= KNOWN:
            file.unlink()
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        body = {
            "model": self.options.model,
            "stream": True,
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
                    ],
                }
            ],
        }
        if self.options.usage:
            body["stream_options"] = {"include_usage": True}
        if self.options.max_tokens:
            body["max_tokens"] = self.options.max_tokens
        if self.options.never:
            body["logit_bias"] = {str(self.options.never): -100}
        return body

    def next(self):
        """The number of the next question."""
        index, self.asked = self.asked, self.asked + 1
        if index % self.options.known_every == 0:
            return index // self.options.known_every % KNOWN
        self.fresh += 1
        return KNOWN + self.fresh - 1


async def load(options, questions, alone, clients, look):
    """Asks `options.requests` questions from `clients` clients; returns the answers and what `look` saw meanwhile."""
    left, answers, changed, seen = options.requests, [], [], []
    every = max(1, options.requests // 20)

    async def one():
        nonlocal left
        client = Client(options.server, options.key, options.timeout)
        while left > 0:
            left -= 1
            number = questions.next()
            answered = await client.ask(questions.body(number))
            answers.append(answered)
            if number in alone and answered.error is None and answered.text != alone[number]:
                changed.append({"question": number, "alone": alone[number], "under_load": answered.text})
            if len(answers) % every == 0:
                seen.append({"answers": len(answers)} | look())
        client.close()

    watch, begin = Watch(), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return answers, changed, seen, time.perf_counter() - begin, watch


def figures(clients, answers, changed, seconds, options):
    """What one level of load came to; times in milliseconds."""
    good = [one for one in answers if one.error is None and not one.lost]
    tokens = sum(len(one.pieces) if one.tokens is None else one.tokens for one in good)
    first = [one.pieces[0] for one in good if one.pieces]
    between = [b - a for one in good for a, b in zip(one.pieces, one.pieces[1:], strict=False)]
    errors = {}
    for one in answers:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    return {
        "clients": clients,
        "asked": options.requests,
        "answered": len(good),
        "lost": sum(one.lost for one in answers),
        "errors": errors,
        "found_closed_and_asked_again": sum(one.again for one in answers),
        "answered_otherwise_than_alone": changed,
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 2),
        "tokens": tokens,
        "tokens_are": "counted by the server" if all(one.tokens is not None for one in good) else "pieces of text",
        "tokens_per_second": round(tokens / seconds, 2),
        "first_token_ms": quantiles(first),
        "between_tokens_ms": quantiles(between),
        "whole_ms": quantiles([one.whole for one in good]),
    }


def quantiles(values):
    """The middle and the tails, in milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3, 2) for name, q in at.items()}


def start(options, folder):
    """Starts the program; returns it, its command and its address."""
    command = [options.program, "serve", "--port", "0", *options.arguments]
    errors = folder / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    end = time.monotonic() + options.timeout
    while process.poll() is None and time.monotonic() < end:
        lines = errors.read_text().splitlines()
        if "ready" in lines:
            url = next(line.split()[-1] for line in lines if line.startswith("listening on "))
            return process, command, f"{url}/v1"
        time.sleep(0.05)
    process.kill()
    sys.exit(f"error: the server did not start: {errors.read_text().strip()}")


async def measure(options, pid, folder):
    """All levels of load, one after the other, `--rounds` times over."""
    questions, levels = Questions(options, folder), []
    client = Client(options.server, options.key, options.timeout)
    alone = {}
    for number in range(min(KNOWN, options.alone)):
        answered = await client.ask(questions.body(number))
        if answered.error or answered.lost:
            sys.exit(f"error: the first question was not answered: {answered.error or 'the answer has no end'}")
        alone[number] = answered.text
    client.close()

    def look():
        return memory(pid) if pid else {}

    for number in range(options.rounds):
        for clients in options.clients:
            before = look()
            answers, changed, seen, seconds, watch = await load(options, questions, alone, clients, look)
            level = {"round": number} | figures(clients, answers, changed, seconds, options)
            level |= {"machine_busy_share": watch.share(), "memory_before": before, "memory_after": look()}
            levels.append(level | {"memory": seen})
            shown = ("round", "clients", "answered", "lost", "errors", "tokens_per_second", "requests_per_second")
            print(json.dumps({key: level[key] for key in (*shown, "first_token_ms", "between_tokens_ms")}), flush=True)
    return levels


def summary(levels):
    """Medians over the rounds, and each level's tokens a second against the first's."""
    found = []
    for clients in dict.fromkeys(level["clients"] for level in levels):
        of = [level for level in levels if level["clients"] == clients]
        speed = statistics.median(level["tokens_per_second"] for level in of)
        found.append({"clients": clients, "tokens_per_second": speed})
        found[-1]["times_the_first"] = round(speed / found[0]["tokens_per_second"], 2)
        for name in ("first_token_ms", "between_tokens_ms"):
            if all(level[name] for level in of):
                tails = {q: statistics.median(level[name][q] for level in of) for q in ("p50", "p95", "p99")}
                found[-1][name] = tails
        samples = of[-1]["memory"]
        if samples and "rss-anonymous" in samples[0]:
            tenth = next(one for one in samples if one["answers"] * 10 >= samples[-1]["answers"])
            found[-1]["anonymous_bytes"] = {
                "at_10_percent": tenth["rss-anonymous"],
                "at_the_end": samples[-1]["rss-anonymous"],
                "ratio": round(samples[-1]["rss-anonymous"] / tenth["rss-anonymous"], 3),
            }
    return found


def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        process, command, pid = None, None, options.pid
        if options.server is None:
            process, command, options.server = start(options, folder)
            pid = process.pid
        try:
            levels = asyncio.run(measure(options, pid, folder))
        finally:
            if process:
                process.terminate()
                process.wait()
    found = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "server": " ".join(command) if command else f"{options.model}, started by somebody else",
        "exit_code_of_the_server": process.returncode if process else None,
        "version": version(options) if process else None,
        "machine": facts.here(),
        "summary": summary(levels),
        "levels": levels,
    }
    text = json.dumps(found, indent=1)
    for path in (str(Path(options.program).resolve().parent), str(ROOT)):
        text = text.replace(f"{path}/", "")
    if options.json:
        options.json.write_text(text + "\n")
    print(json.dumps(found["summary"], indent=1))
    bad = [level for level in levels if level["errors"] or level["lost"] or level["answered"] != level["asked"]]
    if bad:
        sys.exit(f"error: {len(bad)} of {len(levels)} runs had requests without an answer")
    if any(level["answered_otherwise_than_alone"] for level in levels) and not options.other_answers:
        sys.exit("error: a question was answered in another way than alone")


def version(options):
    told = subprocess.run([options.program, "--version"], capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"program": told, "commit_of_the_tree": commit.stdout.strip(), "python": sys.version.split()[0]}


def pictures(text):
    number = int(text)
    if not 1 <= number <= KNOWN:
        raise argparse.ArgumentTypeError(f"it is {number}, it must be 1 to {KNOWN}")
    return number


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--program", default="target/release/llava-phi")
    add("--server", help="base address of one that runs already, such as http://127.0.0.1:8000/v1")
    add("--model", default="llava-phi-tiny", help="what the server calls its model")
    add("--key", default=os.environ.get("OPENAI_API_KEY"), help="API key (default: that of the environment)")
    add("--pid", type=int, help="process of --server, for its memory")
    add("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2, 4, 8, 16])
    add("--requests", type=int, default=200, help="for each number of clients")
    add("--rounds", type=int, default=1, help="how often all numbers of clients are gone through")
    add("--alone", type=int, default=KNOWN, help="questions that are asked alone at first")
    add(
        "--pictures",
        type=pictures,
        default=KNOWN,
        metavar="N",
        help=f"the {KNOWN} questions that come back are about so many pictures, 1 to {KNOWN} (default: one each); with"
        " --known-every 1 there are no others, and with N = 1 everybody asks about one picture",
    )
    add("--known-every", type=int, default=8, help="one of so many questions is one that comes back")
    add("--max-tokens", type=int, help="of each answer")
    add("--never", type=int, metavar="ID", help="a token that is never said: the one that ends answers")
    add("--timeout", type=float, default=600.0, help="seconds of one answer")
    add("--usage", action=argparse.BooleanOptionalAction, default=True, help="ask the server to count tokens")
    add("--other-answers", action="store_true", help="accept answers that differ from those given alone")
    add("--json", type=Path, help="file of all figures")
    add("--arguments", nargs=argparse.REMAINDER, default=[], help="further ones of `llava-phi serve`")
    return parser.parse_args()


if __name__ == "__main__":
    main()

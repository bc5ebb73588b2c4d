"""Takes the contenders in turn, round by round, and keeps each sample as soon as it is there."""

import json
import os
import sys
import time

import ours
import process
from figures import MEMORY


class Rounds:
    """One run: `options` of the command line, `files` of the models, `record` with everything that is written."""

    def __init__(self, options, contenders, record, save):
        self.options, self.contenders, self.record, self.save = options, contenders, record, save
        self.python, self.program = options.venv / "bin" / "python", options.program

    def run(self):
        # A first, uncounted look at each reads the files into the page cache.
        for contender in self.contenders:
            self.once(contender, "warm", ["load"], keep=False)
        for number in range(self.options.rounds):
            # Rotated, so that nobody always follows the same other.
            turn = number % len(self.contenders)
            for contender in self.contenders[turn:] + self.contenders[:turn]:
                if contender.rounds is None or number < contender.rounds:
                    self.once(contender, number, self.options.only)
                    if number < self.options.memory_rounds and set(MEMORY) & set(self.options.only):
                        self.once(contender, number, self.options.only, job=True)

    def once(self, contender, number, figures, job=False, keep=True):
        """One process of one contender; its samples are kept. Ours is asked again when it was disturbed."""
        free = process.available()
        if free is not None and free < contender.memory:
            return self.skip(
                contender,
                number,
                f"needs about {contender.memory / 1e9:.0f} GB of memory, {free / 1e9:.1f} GB are left",
            )
        timed = [name for name in figures if name not in MEMORY] or ["load"]
        if contender.ours:
            command = ours.command(self.program, contender, self.options.threads, timed, job)
        else:
            command = contender.command(self.python, self.options.threads, self.worker(timed, job))
        for attempt in range(1 + (self.options.retries if contender.ours and keep and not job else 0)):
            self.tell(f"round {number}: {contender.title}{', the whole job for its memory' if job else ''}")
            ran = process.run(command, self.environment(contender), self.options.seconds)
            if ran.code:
                return self.skip(contender, number, f"ended with {ran.code}: {last_line(ran.errors)}")
            if not keep:
                return None
            disturbed = self.keep(contender, number, figures, ran, command, attempt, job)
            if not disturbed:
                break
        return None

    def keep(self, contender, number, figures, ran, command, attempt, job):
        """Writes down what a process measured; whether others disturbed it."""
        disturbed = ran.busy is not None and ran.busy > self.options.disturbed
        common = {"contender": contender.name, "round": number}
        run = {**common, "job": job, "command": command, "at": time.time(), "wall_s": ran.wall_s, "cpu_s": ran.cpu_s}
        self.record["runs"].append({**run, "busy": ran.busy, "memory": ran.memory})
        if job:
            for name in MEMORY:
                if name in ran.memory and name in figures:
                    # Others take time, not memory.
                    sample = {**common, "figure": name, "value": ran.memory[name], "disturbed": False}
                    self.record["samples"].append(sample)
        elif contender.ours:
            whole = {"busy": ran.busy, "disturbed": disturbed, "attempt": attempt}
            for sample in ours.samples(ran.printed, figures):
                self.record["samples"].append({**common, **sample, **whole})
        else:
            for line in ran.printed.splitlines():
                if line.startswith("{"):
                    sample = json.loads(line)
                    if sample["figure"] in figures:
                        self.record["samples"].append({**common, **sample})
        self.save()
        return disturbed

    def skip(self, contender, number, reason):
        self.tell(f"{contender.title} left out of round {number}: {reason}")
        self.record["left_out"].append({"contender": contender.name, "round": number, "reason": reason})
        self.save()

    def worker(self, figures, job):
        more = ["--figures", ",".join(figures), "--disturbed", str(self.options.disturbed)]
        more += ["--retries", str(self.options.retries), "--quiet", str(self.options.quiet)]
        return more + (["--job"] if job else [])

    def environment(self, contender):
        """Every library is told the number of threads; nobody looks for models on the network."""
        threads = str(self.options.threads)
        more = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        # Our program finds the same ONNX Runtime as the peers.
        return {**os.environ, **more, "VIRTUAL_ENV": str(self.options.venv)}

    def tell(self, text):
        print(text, file=sys.stderr, flush=True)


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"

"""Drives one peer in a process of its own: loads it, measures what it can, prints a JSON line a sample.

A peer is an object with `threads` chosen and nothing loaded. It has `load()`, and what it can do of:

- `encode()`: one image from pixels to image embeddings;
- `reset()`, then `read(tokens)`: reads tokens after those that it has and chooses the next one greedily;
- `step()`: reads the chosen token and chooses another; `rewind(length)`: forgets what is after `length` positions;
- `first_token()`: image and 64 text tokens, up to the first token of the answer;
- `second_question()`: another question about the image of `first_token`, the way the peer is used;
- `second_question_best()`: the same after 608 positions that a careful user kept.
"""

import argparse
import json
import random
import sys
import time

from busy import Watch, wait_until_quiet
from figures import AFTER, BEFORE, IMAGE, STEPS, TIMED


def tokens(count, seed=0):
    """Made token ids, none special."""
    draw = random.Random(seed)
    return [draw.randrange(1000, 50000) for _ in range(count)]


def arguments(description):
    """What every worker takes; `settings` is the peer's own, a JSON object."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--settings", type=json.loads, default={}, metavar="JSON")
    add("--figures", default=",".join(TIMED), help="comma-separated (default: all that the peer has)")
    add("--job", action="store_true", help="load, encode, prefill 640, decode 32 at depth 700, once, for its memory")
    add("--threads", type=int, default=2)
    add("--disturbed", type=float, default=0.05, help="share of the machine that others may take of a sample")
    add("--retries", type=int, default=1, help="further samples of a figure when one was disturbed")
    add("--quiet", type=float, default=10.0, metavar="SECONDS", help="longest wait for the machine to be quiet")
    return parser.parse_args()


class Recorder:
    """Takes samples and prints them; a disturbed one is taken again, and all are printed."""

    def __init__(self, options):
        self.options = options

    def take(self, figure, work, prepare=None, per=1, retries=None):
        for attempt in range(1 + (self.options.retries if retries is None else retries)):
            if prepare is not None:
                prepare()
            before = wait_until_quiet(self.options.disturbed, self.options.quiet)
            watch = Watch()
            work()
            seconds, share = watch.seconds(), watch.share()
            disturbed = share is not None and share > self.options.disturbed
            self.print(figure, seconds / per, busy_before=before, busy=share, disturbed=disturbed, attempt=attempt)
            if not disturbed:
                break

    def print(self, figure, value, **more):
        print(json.dumps({"figure": figure, "value": value, "at": time.time(), **more}), flush=True)


def run(peer, options):
    """Measures `peer`; the process ends with what it wrote last."""
    wanted = set(options.figures.split(","))
    recorder = Recorder(options)
    recorder.take("load", peer.load, retries=0)
    if options.job:
        job(peer)
        return
    warm_up(peer)
    if "encode" in wanted and can(peer, "encode"):
        peer.encode()
        recorder.take("encode", peer.encode)
    if can(peer, "read"):
        language(peer, wanted, recorder)
    for figure in ("first-token", "second-question", "second-question-best"):
        method = getattr(peer, figure.replace("-", "_"), None)
        if figure in wanted and method is not None:
            recorder.take(figure, method, getattr(peer, f"before_{figure.replace('-', '_')}", None))


def language(peer, wanted, recorder):
    """Prefill and decode at each depth."""
    if "prefill-128" in wanted:
        recorder.take("prefill-128", lambda: peer.read(tokens(128)), peer.reset)
    if "decode-0" in wanted:
        recorder.take("decode-0", lambda: steps(peer), lambda: deep(peer, 1), STEPS)
    if "prefill-640" in wanted:
        recorder.take("prefill-640", lambda: peer.read(tokens(BEFORE + IMAGE + AFTER)), peer.reset)
    if "decode-700" in wanted:
        deep(peer, 700, BEFORE + IMAGE + AFTER if "prefill-640" in wanted else 0)
        recorder.take("decode-700", lambda: steps(peer), lambda: peer.rewind(700), STEPS)


def job(peer):
    """What a user asks for once; its memory is read from outside."""
    if can(peer, "encode"):
        peer.encode()
    if can(peer, "read"):
        deep(peer, BEFORE + IMAGE + AFTER)
        deep(peer, 700, BEFORE + IMAGE + AFTER)
        steps(peer)


def can(peer, name):
    """Whether the peer has a method; one that its settings exclude is `None`."""
    return getattr(peer, name, None) is not None


def warm_up(peer):
    """Touches what the first run of anything touches."""
    if can(peer, "read"):
        deep(peer, 64)
        peer.step()


def deep(peer, depth, there=0):
    """Brings the cache to `depth` positions, of which `there` are in it."""
    if not there:
        peer.reset()
    peer.read(tokens(depth - there, seed=depth))


def steps(peer):
    for _ in range(STEPS):
        peer.step()


def fail(reason):
    sys.exit(f"error: {reason}")

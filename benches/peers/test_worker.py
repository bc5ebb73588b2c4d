"""What a worker asks of a peer, with a peer that counts positions."""

import argparse
import json

import pytest
import worker
from figures import STEPS, TIMED


class Counting:
    """Knows how many positions stand in its cache, and at which depth each step began."""

    def __init__(self):
        self.length, self.prefills, self.depths = None, [], []

    def load(self):
        self.length = 0

    def encode(self):
        pass

    def reset(self):
        self.length = 0

    def read(self, tokens):
        self.prefills.append((self.length, len(tokens)))
        self.length += len(tokens)

    def step(self):
        self.depths.append(self.length)
        self.length += 1

    def rewind(self, length):
        assert length <= self.length
        self.length = length


def run(peer, capsys, figures=TIMED, job=False, disturbed=2.0, retries=1):
    options = argparse.Namespace(
        figures=",".join(figures), job=job, threads=1, disturbed=disturbed, retries=retries, quiet=0.0
    )
    worker.run(peer, options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(autouse=True)
def never_waits(monkeypatch):
    monkeypatch.setattr(worker, "wait_until_quiet", lambda *_: 0.0)


def test_each_figure_is_taken_at_its_depth_and_what_the_peer_lacks_is_left(capsys):
    peer = Counting()
    samples = run(peer, capsys)
    assert [sample["figure"] for sample in samples] == [
        "load",
        "encode",
        "prefill-128",
        "decode-0",
        "prefill-640",
        "decode-700",
    ]
    assert (0, 128) in peer.prefills and (0, 640) in peer.prefills and (640, 60) in peer.prefills
    assert peer.depths[1:] == [*range(1, 1 + STEPS), *range(700, 700 + STEPS)]


def test_a_disturbed_sample_is_taken_again_from_the_same_depth_and_all_are_printed(capsys):
    peer = Counting()
    samples = run(peer, capsys, ["decode-700"], disturbed=-1.0)
    decode = [sample for sample in samples if sample["figure"] == "decode-700"]
    assert [sample["attempt"] for sample in decode] == [0, 1] and all(sample["disturbed"] for sample in decode)
    assert peer.depths[1:] == 2 * [*range(700, 700 + STEPS)]


def test_the_job_does_everything_once_and_prints_the_load_alone(capsys):
    peer = Counting()
    assert [sample["figure"] for sample in run(peer, capsys, job=True)] == ["load"]
    assert peer.prefills == [(0, 640), (640, 60)]
    assert peer.depths == [*range(700, 700 + STEPS)]


def test_a_method_that_the_settings_exclude_is_not_called(capsys):
    peer = Counting()
    peer.read = None
    assert [sample["figure"] for sample in run(peer, capsys)] == ["load", "encode"]


def test_made_tokens_are_the_same_each_time_and_never_special():
    assert worker.tokens(640) == worker.tokens(640) != worker.tokens(640, seed=2)
    assert all(1000 <= token < 50000 for token in worker.tokens(640))

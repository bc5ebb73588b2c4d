"""Ratios of samples whose ratio is known."""

import pytest
import stats
from busy import TICKS, machine_seconds, others
from synthetic import noisy, record


def samples(ours, peer):
    return record({"llava-phi-cpu-int4": {"load": ours}, "genai": {"load": peer}})["samples"]


def compared(ours, peer):
    return stats.compared(samples(ours, peer), "load", "llava-phi-cpu-int4", "genai")


def test_noise_that_all_contenders_share_leaves_the_ratio_exact():
    ratio, disturbed = compared(noisy(1.0), noisy(2.0))
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio.rounds == 7 and not disturbed


def test_the_interval_holds_the_ratio_and_the_inverse_turns_it_round():
    ratio, _ = compared(lambda number: 1.0 + 0.02 * number, lambda _: 2.0)
    assert 0.5 <= ratio.low < ratio.mean < ratio.high <= 0.56
    back = ratio.inverse()
    assert back.low < back.mean < back.high
    assert back.mean == pytest.approx(1 / ratio.mean) and back.low == pytest.approx(1 / ratio.high)


def test_the_same_samples_give_the_same_interval():
    assert compared(lambda number: 1 + number, lambda _: 2.0) == compared(lambda number: 1 + number, lambda _: 2.0)


def test_disturbed_samples_do_not_count_where_enough_others_are_there():
    taken = samples(lambda _: 1.0, lambda _: 2.0)
    taken.append({**taken[0], "value": 99.0, "disturbed": True})
    ratio, disturbed = stats.compared(taken, "load", "llava-phi-cpu-int4", "genai")
    assert ratio.mean == pytest.approx(0.5) and not disturbed


def test_where_most_rounds_are_disturbed_all_count_and_it_is_told():
    taken = [{**sample, "disturbed": sample["round"] > 1} for sample in samples(lambda _: 1.0, lambda _: 4.0)]
    ratio, disturbed = stats.compared(taken, "load", "llava-phi-cpu-int4", "genai")
    assert ratio.mean == pytest.approx(0.25) and ratio.rounds == 7 and disturbed
    assert stats.typical(taken, "load", "genai") == (4.0, True)


def test_rounds_that_only_one_contender_has_are_not_paired():
    assert stats.ratio({0: 1.0, 1: 1.0}, {1: 2.0, 2: 9.0}).rounds == 1
    assert stats.ratio({0: 1.0}, {1: 1.0}) is None
    assert stats.typical([], "load", "genai") is None


def test_the_best_peer_is_the_one_that_takes_least():
    values = {"genai": {"load": noisy(3.0)}, "llama-q4_0": {"load": noisy(2.0), "encode": noisy(1.0)}}
    taken = record(values)["samples"]
    assert stats.best_peer(taken, "load", ["genai", "llama-q4_0"]) == "llama-q4_0"
    assert stats.best_peer(taken, "encode", ["genai"]) is None


def test_others_are_what_was_neither_idle_nor_ours():
    # user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice.
    line = "cpu  100 20 30 999 999 1 2 7 50 50\ncpu0 1 1 1 1"
    ticks = 160
    assert machine_seconds(line) == pytest.approx(ticks / TICKS)
    assert others(machine=2.0, own=1.5, seconds=1.0, processors=2) == pytest.approx(0.25)
    assert others(machine=1.0, own=1.5, seconds=1.0, processors=2) == 0.0

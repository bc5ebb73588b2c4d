"""Compares two contenders by their paired rounds."""

import math
import random
from dataclasses import dataclass
from statistics import fmean, median

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of the rounds' ratios with its 95 % bootstrap interval; `rounds` is how many were paired."""

    mean: float
    low: float
    high: float
    rounds: int

    def inverse(self):
        return Ratio(1 / self.mean, 1 / self.high, 1 / self.low, self.rounds)


def of_rounds(samples, figure, contender, disturbed):
    """What one contender had of one figure: the median of each round's samples, by round.

    Disturbed samples count only where `disturbed` allows them.
    """
    values = {}
    for sample in samples:
        if sample["figure"] == figure and sample["contender"] == contender and (disturbed or not sample["disturbed"]):
            values.setdefault(sample["round"], []).append(sample["value"])
    return {number: median(of_round) for number, of_round in sorted(values.items())}


def ratio(ours, peers, seed=0):
    """`ours` over `peers`, each a value by round; `None` where no round has both."""
    logs = [math.log(ours[number] / peers[number]) for number in sorted(ours.keys() & peers.keys())]
    if not logs:
        return None
    # Fixed, so that a report made again from the same samples is the same.
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return Ratio(math.exp(fmean(logs)), math.exp(low), math.exp(high), len(logs))


def compared(samples, figure, contender, peer):
    """The ratio of two contenders, and whether disturbed samples had to be counted to have one.

    Undisturbed rounds are taken where at least half of the paired rounds have them.
    """
    everything = [of_rounds(samples, figure, name, True) for name in (contender, peer)]
    clean = [of_rounds(samples, figure, name, False) for name in (contender, peer)]
    paired, undisturbed = (len(a.keys() & b.keys()) for a, b in (everything, clean))
    if 2 * undisturbed >= paired > 0:
        return ratio(*clean), False
    return ratio(*everything), True


def typical(samples, figure, contender):
    """The median over rounds and whether disturbed samples had to be counted; `None` without samples."""
    everything = of_rounds(samples, figure, contender, True)
    clean = of_rounds(samples, figure, contender, False)
    if not everything:
        return None
    if 2 * len(clean) >= len(everything):
        return median(clean.values()), False
    return median(everything.values()), True


def best_peer(samples, figure, peers):
    """The peer whose typical value is the least, of those that have the figure."""
    known = {peer: typical(samples, figure, peer) for peer in peers}
    known = {peer: value for peer, value in known.items() if value is not None}
    return min(known, key=lambda peer: known[peer][0], default=None)

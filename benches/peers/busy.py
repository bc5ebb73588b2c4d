"""Tells how much of the machine other processes took while something was measured."""

import os
import resource
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def machine_seconds(stat):
    """Processor seconds that everybody spent since the start, from `/proc/stat`: user, nice, system, irq, softirq, steal."""
    fields = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS


class Watch:
    """Started when it is made; `share()` is what others took since then, as a share of all processors, 0 to 1.

    What belongs to the measured work is passed in as processor seconds: by default what this process and its finished
    children spent. On a system without `/proc/stat` the share is unknown, which is `None`.
    """

    def __init__(self):
        self.started = time.perf_counter()
        self.machine = read_machine()
        self.own = own_seconds()

    def seconds(self):
        return time.perf_counter() - self.started

    def share(self, own=None):
        machine = read_machine()
        if machine is None:
            return None
        own = own_seconds() - self.own if own is None else own
        return others(machine - self.machine, own, self.seconds(), os.cpu_count())


def others(machine, own, seconds, processors):
    """The share of `processors` that was neither idle nor `own` during `seconds`."""
    return min(1.0, max(0.0, machine - own) / (max(seconds, 1e-9) * processors))


def read_machine():
    try:
        return machine_seconds(Path("/proc/stat").read_text(encoding="ascii"))
    except OSError:
        return None


def own_seconds():
    spent = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        spent += usage.ru_utime + usage.ru_stime
    return spent


def wait_until_quiet(threshold, seconds):
    """Waits until others take less than `threshold` for a second, at most `seconds`; the last share that was seen."""
    end = time.perf_counter() + seconds
    while True:
        watch = Watch()
        time.sleep(1.0)
        share = watch.share()
        if share is None or share < threshold or time.perf_counter() > end:
            return share

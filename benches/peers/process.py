"""Runs one contender's process and follows its memory from outside."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from busy import Watch

# Short against the seconds that a peak lasts, rare against what looking costs.
PERIOD = 0.05


@dataclass(frozen=True)
class Ran:
    """What a process printed and took: processor seconds `cpu_s`, `busy` by others, and peaks of memory in bytes."""

    printed: str
    errors: str
    code: int
    wall_s: float
    cpu_s: float
    busy: float | None
    memory: dict


def run(command, environment, seconds):
    """Runs `command` to its end, or kills it after `seconds`."""
    watch = Watch()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
            peaks, ended = {}, 0
            try:
                while not ended:
                    time.sleep(PERIOD)
                    for name, size in memory(process.pid).items():
                        peaks[name] = max(peaks.get(name, 0), size)
                    ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if not ended and watch.seconds() > seconds:
                        process.kill()
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if not ended:
                    process.kill()
                    process.wait()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
    cpu = usage.ru_utime + usage.ru_stime
    peaks["rss-peak"] = max(peaks.get("rss-peak", 0), usage.ru_maxrss * 1024)
    # What this process itself did meanwhile, looking, is counted to the others: it disturbs as much.
    return Ran(texts[0], texts[1], process.returncode, watch.seconds(), cpu, watch.share(own=cpu), peaks)


def memory(process):
    """Bytes by the report's names, from `/proc`; empty once the process is gone, or on another system."""
    names = {"VmHWM": "rss-peak", "RssAnon": "rss-anonymous", "RssFile": "rss-file"}
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(tuple(names)))
    return {names[key]: int(value.split()[0]) * 1024 for key, value in pairs}


def available():
    """Bytes that may be taken without swapping; `None` where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

#!/usr/bin/env python3
"""Exports each variant of a checkpoint alone, checks its graphs and asks the engine for its self-check, all measured.

    python benches/variants_3b.py WORK --program target/release/llava-phi

makes a random checkpoint of the 3B model in WORK unless `--checkpoint` names one, takes the variants one after another
and deletes each package once it is measured. Python needs `llava-phi-export` installed. Times are of the whole process.
Peaks of anonymous memory are sampled every 20 ms, on Linux alone. Where the engine's plan does not fit into the memory
that is left, the engine says so, and `self_check.py` runs the graphs with their weights mapped instead.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What is exported together shares its files or needs the other's decoder.
PACKAGES = {
    "cuda-fp16": ["cuda-fp16"],
    "cuda-int4": ["cuda-int4"],
    "tensorrt-fp16": ["tensorrt-fp16"],
    "tensorrt-delta-fp16": ["tensorrt-delta-fp16"],
    "coreml-fp16": ["coreml-fp16", "qnn-fp16"],
    "nnapi-fp32": ["nnapi-fp32"],
    "cpu-int4": ["cpu-int4", "cpu-int8"],
    "cpu-int4-kv-f32": ["cpu-int4-kv-f32"],
    "portable-f32": ["portable-f32"],
}
OF_FIXED_SIZE = ("tensorrt-", "coreml-", "nnapi-")
MB = 1_000_000


def measured(command, env=None):
    """Runs a command to its end: what it printed and what it took, memory in bytes."""
    print("+", *command, file=sys.stderr, flush=True)
    started, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, env=env)
        anonymous, done = 0, 0
        try:
            while not done:
                time.sleep(0.02)
                anonymous = max(anonymous, anonymous_bytes(process.pid))
                # Of this process alone, which `resource` cannot tell.
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if not done:
                process.kill()
        output.seek(0)
        printed = output.read()
    return printed, {
        "code": process.returncode,
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "peak_anonymous": anonymous or None,
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
    }


def anonymous_bytes(process):
    """What a process holds that is no mapping of a file; 0 where the system does not tell."""
    return proc_field(f"/proc/{process}/status", "RssAnon")


def available_bytes():
    """What may be taken without swapping; 0 where the system does not tell."""
    return proc_field("/proc/meminfo", "MemAvailable")


def proc_field(path, name):
    try:
        with open(path) as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
    except OSError:
        return 0


def measure(name, variants, arguments):
    """Everything about one package, which is deleted afterwards."""
    package = arguments.work / f"package-{name}"
    shutil.rmtree(package, ignore_errors=True)
    size = ["--capacity", arguments.capacity] if name.startswith(OF_FIXED_SIZE) else []
    wanted = [word for variant in variants for word in ("--variant", variant)]
    python = [sys.executable, "-m", "llava_phi_export"]
    _, export = measured([*python, arguments.checkpoint, package, *wanted, *size])
    result = {"package": name, "variants": variants, "capacity": size[1] if size else None, "export": export}
    if export["code"]:
        return result
    try:
        files = [file for file in package.rglob("*") if file.is_file()]
        result["bytes"] = sum(file.stat().st_size for file in files)
        printed, took = measured([sys.executable, HERE / "graph_check.py", package])
        result["graphs"] = {"took": took, "found": parsed(printed)}
        result["self_checks"] = {variant: self_check(package, variant, arguments) for variant in variants}
    finally:
        if not arguments.keep_packages:
            shutil.rmtree(package, ignore_errors=True)
    return result


def self_check(package, variant, arguments):
    """What the engine says of a variant on the processor; where memory does not allow it, what its graphs compute."""
    result = {}
    if arguments.program:
        limit = max(available_bytes() - arguments.leave * MB, MB) // MB
        bound = ["--memory-limit", f"{limit}MB"] if available_bytes() else []
        ask = ["doctor", "--model", package, "--variant", variant, "--provider", "only:cpu", "--json", *bound]
        printed, took = measured([arguments.program, *ask], {**os.environ, "VIRTUAL_ENV": sys.prefix})
        report = (parsed(printed) or {}).get("package", {})
        memory, components = report.get("memory"), report.get("components")
        result["doctor"] = {"took": took, "limit": limit * MB, "memory": memory, "components": components}
        if took["code"] == 0:
            return result
    printed, took = measured([sys.executable, HERE / "self_check.py", package, variant])
    result["mapped"] = {"took": took, "distances": parsed(printed)}
    return result


def parsed(text):
    """The JSON that a command printed, or nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", type=Path, help="a directory with room for the checkpoint, 6.2 GB, and one package, up to 13 GB")
    add("--checkpoint", type=Path, help="the checkpoint to export; a random one is made otherwise")
    add("--program", type=Path, help="the engine; without it only the exporter's own runner is asked")
    add("--package", action="append", choices=PACKAGES, help="may be given several times (default: all)")
    add("--capacity", default="1024", help="positions of the caches of fixed size (default: %(default)s)")
    add("--leave", type=int, default=6000, metavar="MB", help="memory that the engine's plan must leave free")
    add("--keep-packages", action="store_true", help="do not delete packages")
    add("--out", type=Path, help="a JSON file for the results, added to what it holds")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.checkpoint is None:
        arguments.checkpoint = arguments.work / "checkpoint-3b"
        if not arguments.checkpoint.exists():
            make = ["synthesize", "llava-phi-3b", arguments.checkpoint, "--seed", "1", "--shards", "2"]
            if measured([sys.executable, "-m", "llava_phi_export", *make])[1]["code"]:
                sys.exit("error: the checkpoint could not be made; is llava-phi-export installed?")
    results = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    for name in arguments.package or PACKAGES:
        results[name] = measure(name, PACKAGES[name], arguments)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        else:
            print(json.dumps(results[name], indent=1), flush=True)


if __name__ == "__main__":
    main()

"""Describes the machine and the versions that a run was made with."""

import json
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "gguf", "torch", "transformers", "numpy")


def here():
    """Processor, cores, memory and system of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "instructions": instructions(),
        "processors": os.cpu_count(),
        "memory": memory,
        "system": platform.platform(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def processor():
    for line in cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instructions():
    """Those of the processor's extensions that the engines choose their kernels by."""
    known = (
        "avx2",
        "fma",
        "avx512f",
        "avx512bw",
        "avx_vnni",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "asimd",
        "i8mm",
    )
    for line in cpuinfo():
        if line.startswith(("flags", "Features")):
            there = set(line.split(":", 1)[1].split())
            return [name for name in known if name in there]
    return []


def cpuinfo():
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def versions(python, program):
    """Versions of the peers in the environment of `python`, and of our program where there is one."""
    code = "import importlib.metadata as m, json, sys\n"
    code += "print(json.dumps({p: m.version(p) for p in sys.argv[1:]} | {'python': sys.version.split()[0]}))"
    installed = subprocess.run([str(python), "-c", code, *PACKAGES], capture_output=True, text=True)
    if installed.returncode:
        raise RuntimeError(f"{python} lacks a peer: {installed.stderr.strip().splitlines()[-1]}")
    found = json.loads(installed.stdout)
    if program:
        found["llava-phi"] = first_line([program, "--version"])
    return found


def first_line(command):
    """What a program says first, on either stream."""
    ran = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ran.stdout.strip().splitlines()[0] if ran.stdout.strip() else ""

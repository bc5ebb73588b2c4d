#!/usr/bin/env python3
"""Runs every test, Rust and exporter; what they need is installed into `.venv` of this project."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PROJECT = ROOT / "export" / "pyproject.toml"
VARIANTS = ROOT / "target" / "tiny-variants"
STAMP = VENV / "installed.sha256"


def run(*command: object, **options: object) -> int:
    """Runs a command, shown before it starts, and gives its exit code."""
    print("+", *command, flush=True)
    return subprocess.run([str(word) for word in command], cwd=ROOT, **options).returncode


def make_environment() -> None:
    """Creates `.venv`, with virtualenv where Python comes without ensurepip, as on Debian."""
    if run(sys.executable, "-m", "venv", VENV) == 0:
        return
    bootstrap = ROOT / "target" / "virtualenv"
    must(run(sys.executable, "-m", "pip", "install", "--quiet", "--target", bootstrap, "virtualenv"))
    path = os.pathsep.join([str(bootstrap), os.environ.get("PYTHONPATH", "")])
    must(run(sys.executable, "-m", "virtualenv", "--quiet", VENV, env={**os.environ, "PYTHONPATH": path}))


def install() -> None:
    """Installs the exporter with its reference, unless this very version is installed."""
    wanted = hashlib.sha256(PROJECT.read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print("notice: installing the exporter, PyTorch and pytest into .venv (about 6 GB on Linux, once)", flush=True)
    make_environment()
    must(run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", "export[test]"))
    STAMP.write_text(wanted)


def export_variants() -> int:
    """Exports the miniature with every variant, for the tests that hold them against each other."""
    options = ["--name", "llava-phi-tiny", "--variant", "all", "--force"]
    return run(PYTHON, "-m", "llava_phi_export", "models/tiny/checkpoint", VARIANTS, *options)


def must(code: int) -> None:
    """Ends the script with the exit code of a command that failed."""
    if code != 0:
        sys.exit(code)


def main() -> None:
    """Runs both test suites and fails when either fails."""
    install()
    must(export_variants())
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV), "LLAVA_PHI_TEST_PACKAGE": str(VARIANTS)}
    rust = run("cargo", "test", "--locked", env=environment)
    exporter = run(PYTHON, "-m", "pytest", "export/tests", env=environment)
    sys.exit(rust or exporter)


if __name__ == "__main__":
    main()

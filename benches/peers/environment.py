"""Installs the peers from the package registries into a virtual environment of their own."""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOTICE = """\
This installs into {venv} and nowhere else:
  onnxruntime, onnxruntime-genai   60 MB
  llama-cpp-python                 77 MB of source, compiled for this machine: 5-20 minutes, needs a C++ compiler
  torch, transformers              1 GB with a processor-only build, up to 6 GB with CUDA libraries (see --torch-index)
  gguf, onnx-ir, matplotlib, ...   250 MB
  llava-phi-export                 from this repository
and the models take about {size} GB in {work}, of which 6 GB only while they are made."""
SIZE = 23


def ensure(directory, work, torch_index):
    """The environment's Python; makes the environment unless it is there."""
    python = directory / "bin" / "python"
    if python.exists():
        return python
    print(NOTICE.format(venv=directory, work=work, size=SIZE), file=sys.stderr, flush=True)
    venv.create(directory, with_pip=True)
    # Built without this, llama.cpp may leave out what the processor has.
    native = {**os.environ, "CMAKE_ARGS": f"-DGGML_NATIVE=ON {os.environ.get('CMAKE_ARGS', '')}".strip()}
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    more = ["--extra-index-url", torch_index] if torch_index else []
    needed = ["-r", str(HERE / "requirements.txt"), "--no-binary", "llama-cpp-python"]
    for words in ([*pip, *needed, *more], [*pip, str(ROOT / "export")]):
        if subprocess.run(words, env=native, stdout=sys.stderr).returncode:
            sys.exit(f"error: the peers could not be installed; the command was {' '.join(words)}")
    return python

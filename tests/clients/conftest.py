"""Starts `llava-phi serve` with the model inside the program: one open to everybody, one with keys, one that is soon full."""

import base64
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
PROGRAM = os.environ.get("LLAVA_PHI_BIN", str(ROOT / "target/release/llava-phi"))
IMAGES = ROOT / "models/tiny/images"
MODEL = "llava-phi-tiny"
KEY = "a-key-of-the-clients-test-0123456789"
QUESTION = "What is in the image?"


def start(folder, *arguments):
    """Starts a server on a free port; returns the process and its address once it is ready."""
    log = folder / "log"
    command = [PROGRAM, "serve", "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = log.read_text(errors="replace").splitlines()
        if "ready" in lines:
            return process, next(line.split()[-1] for line in lines if line.startswith("listening on "))
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} is not ready: {log.read_text(errors='replace')}")


def serve(folder, *arguments):
    """As a fixture: the address while the test runs; at the end the server was there all along, and ends well."""
    process, address = start(folder, *arguments)
    yield address
    assert process.poll() is None, (folder / "log").read_text(errors="replace")
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert "panicked" not in (folder / "log").read_text(errors="replace")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    """A server that asks for `KEY`."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    yield from serve(folder, "--api-key-file", str(keys))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """A server that works on one request, and lets none wait."""
    yield from serve(tmp_path_factory.mktemp("narrow"), "--parallel", "1", "--queue", "0")


@pytest.fixture(scope="session")
def client(server):
    # What fails is to be seen, not tried again.
    return OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory):
    """A folder with the script and what it needs, which npm installs unless `LLAVA_PHI_NODE_MODULES` has it."""
    if shutil.which("npm") is None:
        if os.environ.get("CI"):
            raise RuntimeError("npm is not installed and this is where every client is asked")
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in (Path(__file__).parent / "node").iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    if modules := os.environ.get("LLAVA_PHI_NODE_MODULES"):
        (folder / "node_modules").symlink_to(modules)
    else:
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, timeout=600)
    return folder


def data_uri(name):
    """One of the miniature's pictures as a client sends it."""
    return f"data:image/png;base64,{base64.b64encode((IMAGES / name).read_bytes()).decode()}"


def shown(text, *names):
    """The messages of a question about pictures."""
    images = [{"type": "image_url", "image_url": {"url": data_uri(name)}} for name in names]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

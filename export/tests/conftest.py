"""Random checkpoints of every form for the tests, made once each and kept for the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

# Idle threads of two libraries at once cost more than they bring at these sizes; read when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.config import CheckpointError
from llava_phi_export.presets import PRESETS
from llava_phi_export.synthesize import synthesize

ODD_SHAPES = ("small", "grouped", "class-token", "one-head", "wide-heads")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A function from a preset and the options of `synthesize` to a directory, which tests only read."""
    made: dict[tuple, Path] = {}

    def make(preset: str = "small", **options) -> Path:
        key = (preset, *sorted(options.items()))
        if key not in made:
            made[key] = synthesize(PRESETS[preset], tmp_path_factory.mktemp(preset) / preset, **options)
        return made[key]

    return make


@pytest.fixture
def altered(checkpoints, tmp_path):
    """A function that copies a checkpoint and applies changes to one of its JSON files; `None` removes a field.

    A dotted name reaches into an object.
    """

    def alter(changes: dict, preset: str = "small", file: str = "config.json", **options) -> Path:
        directory = tmp_path / "altered"
        if not directory.exists():
            shutil.copytree(checkpoints(preset, **options), directory)
        edit(directory / file, changes)
        return directory

    return alter


def edit(path: Path, changes: dict) -> None:
    """Applies changes to a JSON file."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *way, last = key.split(".")
        target = whole
        for step in way:
            target = target[step]
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def refusal(path: Path, **options) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, **options)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    return text

"""What fewer visual tokens cost is recorded in a package as it was measured, or not at all."""

from __future__ import annotations

import json

import pytest
from llava_phi_export import cli, measured
from llava_phi_export.config import CheckpointError
from llava_phi_export.manifest import FORMAT


def package(folder, measured_before=()):
    """A manifest as far as the command reads it."""
    content = {
        "format": FORMAT,
        "vision": {"tokens_per_image": 64, "hidden": 8},
        "variants": {"cpu-int4": {}, "portable-f32": {}},
    }
    if measured_before:
        content["vision"]["measured"] = list(measured_before)
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def result(tokens: int, right: int, **other) -> dict:
    return {
        "benchmark": "shapes",
        "variant": "cpu-int4",
        "visual_tokens": tokens,
        "questions": 100,
        "right": right,
        **other,
    }


def entry(tokens: int, right: int, whole: int) -> dict:
    return {
        "tokens": tokens, "benchmark": "shapes", "variant": "cpu-int4", "questions": 100, "right": right,
        "right_with_all": whole,
    }  # fmt: skip


def held(folder) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["vision"]["measured"]


def test_results_stand_in_the_manifest_beside_those_of_all_tokens(tmp_path, capsys):
    folder = package(tmp_path)
    files = []
    for tokens, right in ((16, 90), (64, 99), (32, 95)):
        files.append(tmp_path / f"{tokens}.json")
        files[-1].write_text(json.dumps(result(tokens, right, date="2026-11-23")))
    assert cli.main(["measured", str(folder), *map(str, files)]) == 0
    assert held(folder) == [entry(64, 99, 99), entry(32, 95, 99), entry(16, 90, 99)]
    assert "16 visual tokens: 90 of 100 right in shapes with cpu-int4, 99 with all" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["16.json", "32.json", "64.json", "manifest.json"]


def test_a_new_measurement_takes_the_place_of_the_old_one(tmp_path):
    folder = package(tmp_path, [entry(64, 99, 99), entry(16, 90, 99)])
    measured.record(folder, [result(16, 91)])
    assert held(folder) == [entry(64, 99, 99), entry(16, 91, 99)]
    # What was lost is told from the same figure everywhere.
    measured.record(folder, [result(64, 98)])
    assert held(folder) == [entry(64, 98, 98), entry(16, 91, 98)]
    measured.record(folder, [result(64, 97, variant="portable-f32"), result(8, 50, variant="portable-f32")])
    assert [(one["variant"], one["tokens"], one["right_with_all"]) for one in held(folder)] == [
        ("cpu-int4", 64, 98), ("cpu-int4", 16, 98), ("portable-f32", 64, 97), ("portable-f32", 8, 97),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (result(16, 90), "never measured over 100 questions with all 64"),
        (result(65, 90), "65 visual tokens, an image has 64"),
        (result(0, 90), "0 visual tokens"),
        (result(64, 101), "101 right answers to 100 questions"),
        (result(64, 0, questions=0), "0 right answers to 0 questions"),
        (result(64, 99, variant="gpu"), "of variant gpu, the package has cpu-int4, portable-f32"),
        (result(64, 99, benchmark=None), "benchmark None, it must be str"),
        (result(64, True), "right True, it must be int"),
    ],
)
def test_what_does_not_fit_the_package_is_refused_and_changes_nothing(tmp_path, wrong, words):
    folder = package(tmp_path)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=words):
        measured.record(folder, [wrong])
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[1]", "no"])
def test_a_file_that_holds_no_result_is_refused_in_one_sentence(tmp_path, capsys, content):
    folder = package(tmp_path)
    (tmp_path / "result.json").write_text(content)
    assert cli.main(["measured", str(folder), str(tmp_path / "result.json")]) == 2
    error = capsys.readouterr().err
    assert "result.json" in error and error.count("\n") == 1


def test_a_directory_that_is_no_package_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no package"):
        measured.record(tmp_path, [result(64, 99)])
    package(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(CheckpointError, match="has format 1"):
        measured.record(tmp_path, [result(64, 99)])

"""The command line: its words, its exit codes, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest
import tiny
from llava_phi_export import cli
from llava_phi_export.synthesize import synthesize


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return synthesize(tiny.model_config(), tmp_path_factory.mktemp("checkpoint") / "model", dtype="float32")


def run(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_default_is_what_processors_need_and_stdout_is_the_package(source, tmp_path, capsys):
    code, out, err = run(capsys, source, tmp_path / "package", "--name", "mine")
    assert code == 0 and out == f"{tmp_path / 'package'}\n"
    assert [line.split()[0] for line in err.splitlines() if "note:" not in line] == [
        "goldens",
        "ranges",
        "shared/vision_encoder",
        "shared/projector",
        "cpu-int4/decoder",
        "cpu-int4/decoder_kv_f32",
        "cpu-int8/vision_encoder",
        "cpu-int8/projector",
        "cpu-int4/decoder",
        "hashes",
    ]
    manifest = json.loads((tmp_path / "package" / "manifest.json").read_text())
    assert list(manifest["variants"]) == list(cli.DEFAULT_VARIANTS) and manifest["name"] == "mine"


def test_variants_are_written_in_order_of_preference_whatever_order_they_are_named_in(source, tmp_path, capsys):
    words = ["--variant", "portable-f32", "--variant", "cpu-int4", "--variant", "cpu-int4"]
    assert run(capsys, source, tmp_path / "package", *words)[0] == 0
    manifest = json.loads((tmp_path / "package" / "manifest.json").read_text())
    on_the_cpu = [choice["variant"] for choice in manifest["serve"]["decoder"] if choice["provider"] == "cpu"]
    assert on_the_cpu == ["cpu-int4", "portable-f32"]


def test_a_package_without_a_decoder_is_refused_before_anything_is_written(source, tmp_path, capsys):
    words = ["--variant", "nnapi-u8", "--variant", "cpu-int8"]
    code, _, err = run(capsys, source, tmp_path / "package", *words)
    assert code == 2 and err.splitlines()[-1].startswith("error: nnapi-u8 and cpu-int8 alone")
    assert "--variant cpu-int4" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_directory_of_no_pictures_calibrates_nothing(source, tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    words = ["--variant", "cpu-int4", "--variant", "nnapi-u8", "--calibration", tmp_path / folder]
    code, _, err = run(capsys, source, tmp_path / "package", *words)
    assert code == 2 and err.splitlines()[-1].startswith("error: --calibration ") and folder in err
    assert not (tmp_path / "package").exists()


def test_the_options_of_the_quantiser_reach_the_graph(source, tmp_path, capsys):
    words = ["--block-size", 16, "--accuracy-level", 1, "--quantizer", "k_quant", "--lm-head-bits", 4]
    assert run(capsys, source, tmp_path / "package", *words)[0] == 0
    model = onnx.load(tmp_path / "package" / "cpu-int4" / "decoder.onnx")
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert (attributes["block_size"], attributes["accuracy_level"], attributes["bits"]) == (16, 1, 4)
            assert node.input[3]


def test_an_existing_target_is_refused_in_one_sentence_and_replaced_with_force(source, tmp_path, capsys):
    assert run(capsys, source, tmp_path / "package")[0] == 0
    code, out, err = run(capsys, source, tmp_path / "package")
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ") and "--force" in err
    assert run(capsys, source, tmp_path / "package", "--force")[0] == 0


def test_input_that_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing"):
        code, _, err = run(capsys, path, tmp_path / "package")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("words", ["", "one", "a b --variant gpu", "a b --block-size 20", "a b --inline-limit -1"])
def test_bad_use_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(words.split())
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


def test_an_interruption_exits_with_130_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_phi_export.manifest.write", interrupted)
    assert run(capsys, source, tmp_path / "package")[0] == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_a_disk_that_takes_no_more_is_told_in_one_sentence(source, tmp_path):
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "from llava_phi_export.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(source), str(tmp_path / "package")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["synthesize", "check"])
def test_the_first_word_names_another_command(word, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([word, "--help"])
    assert error.value.code == 0 and word in capsys.readouterr().out


def test_the_module_runs_as_a_program(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "llava_phi_export", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("llava-phi-export ")

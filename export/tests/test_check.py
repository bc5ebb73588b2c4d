"""Acceptance: exported packages of odd shapes equal PyTorch at every stage, and `check` sees what does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import ODD_SHAPES, edit
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llava_phi_export import check, cli
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.config import CheckpointError
from llava_phi_export.report import as_text
from llava_phi_export.runner import Package
from llava_phi_export.samples import picture, samples
from llava_phi_export.variants import VARIANTS as EVERY

SAMPLES, TOKENS = 20, 64
VARIANTS = ["portable-f32", "cpu-int4", "cpu-int4-kv-f32"]


@pytest.fixture(scope="session")
def packages(checkpoints, tmp_path_factory):
    """A function from a preset to its package, exported once through the command line."""
    made = {}

    def make(preset: str = "small", *options: str, **form):
        key = (preset, options, *sorted(form.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp("package") / preset
            wanted = [word for variant in VARIANTS for word in ("--variant", variant)]
            assert cli.main([str(checkpoints(preset, **form)), str(directory), *wanted, *options]) == 0
            made[key] = directory
        return made[key]

    return make


def reports(package, checkpoint, variants=VARIANTS, count=SAMPLES, tokens=TOKENS):
    cases = samples(count, [], None, None)
    with Checkpoint.open(checkpoint) as opened:
        return cases, check.check(Package(package), opened, variants, cases, tokens, threads=1)


@pytest.mark.parametrize("preset", ODD_SHAPES)
def test_a_package_of_an_odd_shape_equals_pytorch(checkpoints, packages, preset):
    cases, (portable, few_bits, f32_cache) = reports(packages(preset), checkpoints(preset))
    print(as_text([portable, few_bits, f32_cache], len(cases), TOKENS))
    assert [part.stage for part in portable.differences] == [
        "pixel_values", "patch_features", "cls_attention", "image_embeds", "embeds", "logits", "logits, each step",
    ]  # fmt: skip
    for part in portable.differences:
        assert max(part.max_rel, part.l2_rel) <= part.tolerance <= 1e-4, part
    (answers,) = portable.answers
    assert (answers.answers, answers.equal, answers.tokens) == (SAMPLES, SAMPLES, SAMPLES * TOKENS)
    assert few_bits.ok and f32_cache.ok
    # Most tokens survive int8 activations; near ties may not.
    assert few_bits.answers[1].equal_tokens > 0.95 * few_bits.answers[1].tokens


@pytest.mark.parametrize("preset", ["grouped", "class-token"])
def test_every_variant_is_within_its_stated_tolerance(checkpoints, packages, preset):
    package = packages(preset, "--variant", "all", "--chunk", "32")
    cases, found = reports(package, checkpoints(preset), list(EVERY), 4, 12)
    print(as_text(found, len(cases), 12))
    assert [report.variant for report in found] == list(EVERY)
    for report in found:
        assert report.ok, report
        stages = {part.stage: part for part in report.differences}
        few_bits = "int4" in report.variant or "head" in Package(package).manifest["variants"][report.variant]
        assert ("logits, same weights" in stages) == few_bits
        assert stages["patch_features"].tolerance == (
            1e-2 if report.variant.endswith("16") or report.variant == "cuda-int4" else 1e-4
        )
        # Beside the weights that the graph holds only near ties differ, those of a cache of int8 among them.
        assert report.answers[-1].equal_tokens >= 0.9 * report.answers[-1].tokens


def test_dequantised_weights_are_those_that_the_graph_uses(checkpoints, packages):
    """Without the rounding of activations nothing but the order of sums is left."""
    for quantizer in ("search", "k_quant"):
        for bits in ("4", "8"):
            package = packages("small", "--accuracy-level", "1", "--quantizer", quantizer, "--lm-head-bits", bits)
            _, (report,) = reports(package, checkpoints(), ["cpu-int4-kv-f32"], 4, 8)
            same = [part for part in report.differences if "same weights" in part.stage]
            assert len(same) == 2
            for part in same:
                assert max(part.max_rel, part.l2_rel) < 1e-5, (quantizer, bits, part)
            assert report.answers[1].equal == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_of_weights_are_exported_whole(checkpoints, packages, dtype):
    _, (report,) = reports(packages(dtype=dtype), checkpoints(dtype=dtype), ["portable-f32"], 3, 8)
    assert report.ok


def test_every_form_exports_to_the_same_graphs(checkpoints, packages):
    first = json.loads((packages() / "manifest.json").read_text())
    for form in ({"form": "hf", "naming": "old"}, {"form": "hf", "naming": "new", "shards": 3}):
        other = json.loads((packages(**form) / "manifest.json").read_text())
        assert first["files"] == other["files"]
        assert other["source"]["checkpoint"] == "llava"


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"image_aspect_ratio": "pad"}, "pixel_values"),
        ({"vision_config.vision_tower.hidden_act": "gelu"}, "patch_features"),
        ({"vision_config.vision_tower.layer_norm_eps": 1e-2}, "patch_features"),
        ({"vision_config.vision_tower.mm_vision_select_layer": -1}, "patch_features"),
        ({"vision_config.vision_tower.num_attention_heads": 2}, "patch_features"),
        ({"layer_norm_eps": 1e-2}, "logits"),
        ({"hidden_act": "gelu"}, "logits"),
        ({"partial_rotary_factor": 0.25}, "logits"),
        ({"rope_theta": 5000.0}, "logits"),
    ],
)
def test_a_difference_is_seen_in_its_own_stage_first(altered, packages, changes, stage):
    """The package was exported from a checkpoint that differs in one field: the first stage that is off names it."""
    _, (report,) = reports(packages(), altered(changes), ["portable-f32"], 3, 2)
    wrong = [part.stage for part in report.differences if not part.ok]
    assert wrong[0] == stage


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("lm_head.bias", "logits"),
        ("model.mm_projector.2.bias", "image_embeds"),
        ("model.embed_tokens.weight", "embeds"),
        ("model.final_layernorm.bias", "logits"),
    ],
)
def test_a_tensor_that_differs_is_seen(altered, packages, name, stage):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    whole[name] = whole[name] * np.float16(1.01)
    save_file(whole, directory / "model.safetensors")
    _, (report,) = reports(packages(), directory, ["portable-f32"], 3, 2)
    assert next(part.stage for part in report.differences if not part.ok) == stage


def test_a_lost_bias_is_seen(altered, packages):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    del whole["lm_head.bias"]
    save_file(whole, directory / "model.safetensors")
    _, (report,) = reports(packages(), directory, ["portable-f32"], 1, 2)
    assert not report.ok


def test_the_cache_in_parts_equals_the_whole(checkpoints, packages):
    """A prefill in chunks, and a batch of two rows, in both forms of the cache."""
    for preset in ("small", "grouped"):
        package = Package(packages(preset, "--accuracy-level", "1"))
        embeds = np.random.default_rng(0).standard_normal((2, 11, package.manifest["decoder"]["hidden"]))
        embeds = embeds.astype(np.float32)
        for variant in VARIANTS:
            runner = package.load(variant, 1)
            whole = runner.cache(16).step(embeds[:1])
            cache = runner.cache(16)
            for start, stop in ((0, 4), (4, 5), (5, 11)):
                chunked = cache.step(embeds[:1, start:stop])
            np.testing.assert_allclose(chunked, whole, atol=1e-4)
            np.testing.assert_allclose(runner.cache(16, batch=2).step(embeds)[:1], whole, atol=1e-4)
            earlier = runner.cache(16).step(embeds[:1], index=6)
            np.testing.assert_allclose(earlier, runner.cache(16).step(embeds[:1, :7]), atol=1e-4)


def test_the_command_prints_a_table_or_json_and_exits_by_the_tolerance(checkpoints, packages, tmp_path, capsys):
    command = ["check", str(packages()), "--against", str(checkpoints()), "--tokens", "2", "--threads", "1"]
    picture(3).save(tmp_path / "one.png")
    (tmp_path / "prompts.txt").write_text("What?\n\nWhy?\n")
    images = [
        "--image",
        str(tmp_path / "one.png"),
        "--images",
        str(tmp_path),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    capsys.readouterr()
    assert cli.main([*command, *images, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and set(found["variants"]) == set(VARIANTS)
    assert found["variants"]["portable-f32"]["greedy"][0]["answers"] == 2
    assert cli.main([*command, "--samples", "2", "--variant", "portable-f32", "--tolerance", "1e-9"]) == 1
    assert "exceeded" in capsys.readouterr().out
    assert cli.main([*command, "--samples", "2", "--variant", "cpu-int4", "--int8-tolerance", "1e-5"]) == 1


def test_bad_input_to_the_command_gives_a_sentence(checkpoints, packages, tmp_path, capsys):
    package, checkpoint = str(packages()), str(checkpoints())

    def refused(*arguments: str) -> str:
        assert cli.main(["check", *arguments]) == 2
        return capsys.readouterr().err

    assert "is no package" in refused(str(tmp_path), "--against", checkpoint)
    assert "is no directory" in refused(package, "--against", str(tmp_path / "no"))
    assert "has no variant x; it has" in refused(package, "--against", checkpoint, "--variant", "x")
    assert "cannot be read as an image" in refused(package, "--against", checkpoint, "--image", str(tmp_path / "x.png"))
    assert "holds no image" in refused(package, "--against", checkpoint, "--images", str(tmp_path))
    assert "the context has 512" in refused(package, "--against", checkpoint, "--tokens", "500")
    assert "at least 1" in refused(package, "--against", checkpoint, "--tokens", "0")


def test_a_graph_that_differs_from_its_manifest_is_refused(packages, tmp_path):
    directory = shutil.copytree(packages(), tmp_path / "p")
    edit(directory / "manifest.json", {"variants.cpu-int4.decoder.graph.inputs": {}})
    with pytest.raises(CheckpointError, match="inputs differ from the manifest"):
        Package(directory).load("cpu-int4")
    edit(directory / "manifest.json", {"format": 1})
    with pytest.raises(CheckpointError, match="format 1, this version reads 3"):
        Package(directory)

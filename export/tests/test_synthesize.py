"""Random checkpoints are the same every time, of the shape asked for, and of sane activations."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import ODD_SHAPES
from llava_phi_export import cli
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.config import CheckpointError
from llava_phi_export.names import expected_shapes
from llava_phi_export.presets import PRESETS
from llava_phi_export.synthesize import random_tensor, read_shape, synthesize
from llava_phi_export.synthetic_config import rotary_factor


def test_a_seed_gives_the_same_files_and_another_seed_others(checkpoints, tmp_path):
    first, again = checkpoints(seed=3), synthesize(PRESETS["small"], tmp_path / "small", seed=3)
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    other = checkpoints(seed=4)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_a_value_does_not_depend_on_the_other_tensors():
    # Fixed for ever: a checkpoint that someone made from a seed must come out the same in later versions.
    (values,) = random_tensor(PRESETS["small"], "decoder.lm_head.bias", (4,), 1)
    np.testing.assert_array_equal(values, VALUES)
    (one,) = random_tensor(PRESETS["llava-phi-3b"], "decoder.layers.0.q_proj.bias", (5,), 1)
    (two,) = random_tensor(PRESETS["small"], "decoder.layers.0.q_proj.bias", (5,), 1)
    np.testing.assert_array_equal(one, two)


def test_a_large_tensor_comes_in_pieces():
    shape = (3, 1 << 21)
    pieces = list(random_tensor(PRESETS["small"], "decoder.embed_tokens.weight", shape, 0))
    assert [len(piece) for piece in pieces] == [1 << 22, 1 << 21]
    assert abs(np.concatenate(pieces).std() - 1) < 1e-3


def test_the_preset_of_the_original_is_the_original():
    config = PRESETS["llava-phi-3b"]
    assert config.vision.tokens_per_image == 576 and config.vision.used_layers == 23
    assert (config.decoder.rotary_dim, config.text.vocabulary, config.decoder.logits_width) == (32, 50295, 51200)
    count = sum(int(np.prod(shape)) for shape in expected_shapes(config, all_layers=True).values())
    # Phi-2 has 2.78 billion parameters, CLIP's large encoder 0.30, the projector 0.01.
    assert 3.08e9 < count < 3.11e9


@pytest.mark.parametrize("entries", [258, 300, 384, 951, 5000, 50295])
def test_the_tokenizer_has_the_entries_asked_for(tmp_path, entries):
    from llava_phi_export.synthetic_tokenizer import write_tokenizer
    from tokenizers import Tokenizer

    end = write_tokenizer(tmp_path, entries)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == entries
    assert sorted(tokenizer.get_vocab().values()) == list(range(entries))
    assert tokenizer.id_to_token(end) == "<|endoftext|>"
    if entries == 50295:
        assert end == 50256
    for text in ("USER: what is\n  this? 你好 🙂\t\t", "ASSISTANT:", "", "\x00\xff"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_too_few_entries_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="at least 258 entries, 100 were asked for"):
        synthesize(read_shape("small", 100), tmp_path / "c")


@pytest.mark.parametrize("preset", ODD_SHAPES)
def test_activations_stay_sane(checkpoints, preset):
    pytest.importorskip("torch")
    from llava_phi_export.reference import Reference
    from llava_phi_export.samples import picture

    checkpoint = Checkpoint.open(checkpoints(preset))
    for name in checkpoint.names():
        assert np.isfinite(checkpoint.tensor(name)).all()
    reference = Reference(checkpoint)
    pixels = reference.image.pixel_values(picture(4))
    features = reference.patch_features(pixels)
    images = reference.image_embeds(features)
    embeds = reference.embeds(reference.token_ids("What is this?", 1), images)
    logits = reference.logits(embeds)
    for stage in (features, images, embeds):
        assert 0.5 < stage.std() < 4
    assert 1 < logits.std() < 3
    # The answer hangs on the picture.
    other = reference.image_embeds(reference.patch_features(reference.image.pixel_values(picture(8))))
    changed = reference.logits(reference.embeds(reference.token_ids("What is this?", 1), other))
    assert np.abs(changed[-1] - logits[-1]).max() > 0.05


@pytest.mark.parametrize("form", ["llava_phi", "hf"])
def test_a_shape_is_read_from_a_configuration_of_either_form(checkpoints, form):
    config = read_shape(str(checkpoints(form=form) / "config.json"), 384)
    wanted = PRESETS["small"]
    assert (config.vision, config.projector, config.decoder) == (wanted.vision, wanted.projector, wanted.decoder)
    assert (config.image, config.text.vocabulary) == (wanted.image, 384)


def test_a_shape_is_read_from_this_package_s_own_fields(tmp_path):
    path = tmp_path / "shape.json"
    sizes = {"vision": {"hidden": 24}, "decoder": {"layers": 5}, "projector": {"kind": "linear", "layers": 1}}
    path.write_text(json.dumps(sizes | {"image": {"fit": "pad"}, "text": {"vocabulary": 290}}))
    config = read_shape(str(path))
    assert (config.vision.hidden, config.decoder.layers, config.decoder.hidden) == (24, 5, 64)
    assert (config.projector.input, config.projector.output, config.image.fit) == (24, 64, "pad")
    assert Checkpoint.open(synthesize(config, tmp_path / "c")).config.projector.kind == "linear"
    path.write_text(json.dumps({"decoder": {"depth": 5}}))
    with pytest.raises(CheckpointError, match="depth"):
        read_shape(str(path))
    with pytest.raises(CheckpointError, match="neither a file nor one of the shapes"):
        read_shape("nothing")


def test_rotary_dimensions_survive_the_factor():
    for head_dim in range(2, 257):
        for rotary in range(2, head_dim + 1, 2):
            assert int(head_dim * rotary_factor(head_dim, rotary)) == rotary


def test_the_command_writes_a_checkpoint_once(tmp_path, capsys):
    command = ["synthesize", "small", str(tmp_path / "c"), "--form", "hf", "--naming", "new", "--seed", "5",
               "--dtype", "float32", "--shards", "2"]  # fmt: skip
    assert cli.main(command) == 0
    assert Checkpoint.open(tmp_path / "c").config.form == "llava"
    assert cli.main(command) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert cli.main(["synthesize", "grouped", str(tmp_path / "d"), "--form", "hf"]) == 2
    assert "projector linear has no place in the hf form" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_and_reading_take_little_memory(tmp_path):
    import subprocess

    shape = tmp_path / "shape.json"
    decoder = {"hidden": 512, "intermediate": 2048, "logits_width": 100_000, "heads": 8, "kv_heads": 8, "head_dim": 64}
    shape.write_text(json.dumps({"decoder": decoder, "text": {"vocabulary": 300}}))
    script = f"""
import re
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.synthesize import read_shape, synthesize
from pathlib import Path
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
import tokenizers
start = peak()
synthesize(read_shape({str(shape)!r}), Path({str(tmp_path / "c")!r}))
checkpoint = Checkpoint.open({str(tmp_path / "c")!r})
written = peak()
for name in checkpoint.names():
    for row in range(0, checkpoint.shape(name)[0], 1000):
        checkpoint.rows(name, row, row + 1000)
print(start, written, peak())
"""
    start, written, read = map(int, subprocess.check_output([sys.executable, "-c", script], text=True).split())
    size = (tmp_path / "c" / "model.safetensors").stat().st_size // 1024
    assert size > 200_000
    assert written - start < 80_000 and read - written < 20_000, (start, written, read)


VALUES = np.array([0.035682741552591324, -0.06253563612699509, -0.04551565647125244, 0.17626740038394928], np.float32)

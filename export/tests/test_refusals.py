"""Every checkpoint that cannot be used gives one sentence that names the thing, its value and the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import edit, refusal
from llava_phi_export.checkpoint import Checkpoint
from safetensors.numpy import load_file, save_file


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model_type": "mipha_phi"}, "'mipha_phi' is Mipha (a SigLIP encoder)"),
        ({"model_type": "mobilevlm"}, "LDP projector"),
        ({"model_type": "bert"}, "no model that this exporter knows"),
        ({"model_type": None}, "is missing"),
        ({"vision_config.vision_tower.model_type": "siglip_vision_model"}, "only CLIP vision encoders"),
        ({"vision_config.mm_projector.mm_projector_type": "ldpnet"}, "MobileVLM's LDP projector"),
        ({"vision_config.mm_projector.mm_projector_type": "mlp0x_gelu"}, "linear and mlpNx_gelu are supported"),
        ({"vision_config.mm_projector.mm_hidden_size": 47}, "mm_hidden_size is 47"),
        ({"qk_layernorm": True}, "qk_layernorm is set"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear'"),
        ({"partial_rotary_factor": 0.2}, "makes 3 of 16 dimensions rotate"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"hidden_size": "64"}, "hidden_size is '64', a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4 heads"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is set"),
        ({"vision_config": 3}, "names no vision tower"),
        ({"vision_config.vision_tower.mm_vision_select_layer": -5}, "layer -5 is selected, but there are 3 layers"),
        ({"vision_config.vision_tower.image_size": 35}, "the encoder takes 35 pixels"),
        ({"vision_config.vision_tower.patch_size": 14}, "[48, 3, 7, 7], the configuration asks for [48, 3, 14, 14]"),
        ({"intermediate_size": 161}, "decoder.layers.0.fc1.weight has shape [160, 64], the configuration asks for"),
        ({"num_hidden_layers": 3}, "decoder.layers.2.input_layernorm.weight and 13 more is missing"),
        ({"vocab_size": 401}, "decoder.embed_tokens.weight has shape [400, 64]"),
    ],
)
def test_a_configuration_that_cannot_be_used_gives_a_sentence(altered, changes, wanted):
    assert wanted in refusal(altered(changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"text_config.model_type": "llama"}, "'llama' is a LLaMA decoder; only phi is supported"),
        ({"text_config": None}, "text_config is None, an object is needed"),
        ({"vision_feature_layer": [-2, -5]}, "the selected layer is [-2, -5]"),
        ({"vision_feature_select_strategy": "some"}, "vision_feature_select_strategy is 'some'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_config.num_channels": 4}, "num_channels is 4"),
    ],
)
def test_a_hugging_face_configuration_that_cannot_be_used_gives_a_sentence(altered, changes, wanted):
    assert wanted in refusal(altered(changes, form="hf"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"resample": 2}, "only 3 (bicubic)"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"size": {"height": 28, "width": 28}}, "size is {'height': 28, 'width': 28}"),
        ({"size": {"shortest_edge": 30}}, "the encoder takes 28 pixels"),
        ({"image_mean": [1, 2]}, "three numbers are needed"),
    ],
)
def test_an_image_recipe_that_cannot_be_used_gives_a_sentence(altered, changes, wanted):
    assert wanted in refusal(altered(changes, file="preprocessor_config.json"))


@pytest.mark.parametrize("name", ["adapter_config.json", "non_lora_trainables.bin"])
def test_a_lora_adapter_is_named(altered, name):
    directory = altered({})
    (directory / name).write_text("{}")
    assert "is a LoRA adapter" in refusal(directory) and "merge it with its base" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("base_model.model.layers.0.q_proj.lora_A.weight", "holds LoRA weights"),
        ("model.layers.0.self_attn.query_key_value.weight", "the fused layout of early Phi files"),
        ("model.vision_tower.vision_model.embeddings.patch_embedding.bias", "only CLIP is supported"),
    ],
)
def test_weights_of_another_kind_are_named(altered, name, wanted):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    save_file(whole | {name: np.zeros((4, 4), np.float16)}, directory / "model.safetensors")
    assert wanted in refusal(directory)


def test_tensors_that_no_stage_reads_are_counted(altered):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    save_file(whole | {"model.image_newline": np.zeros(4, np.float16)}, directory / "model.safetensors")
    assert "1 tensors are read by no stage, such as model.image_newline" in Checkpoint.open(directory).notes


def test_a_missing_tower_asks_for_its_flag(altered):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in whole.items() if "vision_tower" not in k}, directory / "model.safetensors")
    assert "vision.class_embedding and" in refusal(directory) and "--vision-tower DIR" in refusal(directory)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda path: path.unlink(), "holds no weights"),
        (lambda path: path.write_bytes(b""), "no whole safetensors file (0 bytes)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is too short for tensor"),
        (lambda path: path.write_bytes(b"\xff" * 100), "no whole safetensors file"),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"nope"), "a header that is no JSON"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "a header that is no JSON object"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "cannot be read as PyTorch weights"),
    ],
)
def test_damaged_weights_give_a_sentence(altered, damage, wanted):
    if "PyTorch" in wanted:
        pytest.importorskip("torch")
    directory = altered({})
    damage(directory / "model.safetensors")
    assert wanted in refusal(directory)


def test_a_pickle_that_runs_code_is_refused(altered):
    torch = pytest.importorskip("torch")
    directory = altered({})
    (directory / "model.safetensors").unlink()
    torch.save({"x": Path("/")}, directory / "pytorch_model.bin")
    assert "cannot be read as PyTorch weights" in refusal(directory)


def test_a_missing_shard_is_named(altered):
    directory = altered({}, shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(directory)
    edit(directory / "model.safetensors.index.json", {"weight_map": {"x": "../../etc/passwd"}})
    assert "a file beside it is needed" in refusal(directory)


def test_a_path_that_is_no_checkpoint_gives_a_sentence(tmp_path):
    assert "is no directory" in refusal(tmp_path / "nothing")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds a list" in refusal(tmp_path)

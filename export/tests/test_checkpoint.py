"""Every form of checkpoint gives the same model; everything unusable gives a sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ODD_SHAPES, edit, refusal
from llava_phi_export import names
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.presets import PRESETS
from llava_phi_export.weights import index_file
from safetensors.numpy import load_file, save_file


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def assert_same(first: Path | Checkpoint, second: Path | Checkpoint) -> None:
    """Same tensors, bit by bit, and the same configuration but for name, form and the tokenizer's path."""
    first, second = (Checkpoint.open(one) if isinstance(one, Path) else one for one in (first, second))
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    for part in ("vision", "projector", "decoder", "image"):
        assert getattr(first.config, part) == getattr(second.config, part)
    assert first.config.text.eos == second.config.text.eos
    assert first.config.text.vocabulary == second.config.text.vocabulary


# Forms.


@pytest.mark.parametrize("preset", ODD_SHAPES)
def test_a_checkpoint_says_all_of_its_shape(checkpoints, preset):
    config, wanted = Checkpoint.open(checkpoints(preset)).config, PRESETS[preset]
    assert (config.vision, config.projector) == (wanted.vision, wanted.projector)
    assert (config.decoder, config.image) == (wanted.decoder, wanted.image)
    assert config.text.vocabulary == wanted.text.vocabulary
    assert config.form == "llava_phi"
    assert config.text.template["after_answer"] == config.text.eos[0]


@pytest.mark.parametrize("naming", ["old", "new"])
@pytest.mark.parametrize("shards", [1, 3])
def test_both_hugging_face_namings_hold_the_same_tensors(checkpoints, naming, shards):
    found = Checkpoint.open(checkpoints(form="hf", naming=naming, shards=shards))
    assert found.config.form == "llava"
    assert_same(checkpoints(), found)


def test_shards_hold_the_same_tensors(checkpoints):
    assert len(list(checkpoints(shards=4).glob("*.safetensors"))) == 4
    assert_same(checkpoints(), checkpoints(shards=4))


def test_shards_without_an_index_are_read(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints(shards=3), tmp_path / "c")
    (directory / "model.safetensors.index.json").unlink()
    assert_same(checkpoints(), directory)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_values_keep_their_type_and_convert_to_f32(checkpoints, dtype):
    checkpoint = Checkpoint.open(checkpoints(dtype=dtype))
    name = "decoder.embed_tokens.weight"
    whole = checkpoint.tensor(name)
    assert whole.dtype.name == dtype == checkpoint.dtype(name).name
    assert checkpoint.f32(name).dtype == np.float32
    np.testing.assert_array_equal(checkpoint.f32(name), whole.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.rows(name, 7, 12), whole[7:12])
    np.testing.assert_array_equal(checkpoint.rows(name, 390, 999), whole[390:])
    assert checkpoint.shape(name) == whole.shape
    assert checkpoint.has(name) and not checkpoint.has("decoder.nothing")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_pytorch_files_hold_the_same_tensors(checkpoints, tmp_path, sharded, kind):
    torch = pytest.importorskip("torch")
    directory = shutil.copytree(checkpoints(dtype="bfloat16"), tmp_path / "c")
    whole = as_torch(torch, directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    order = sorted(whole)
    parts = [order[:40], order[40:]] if sharded else [order]
    mapping = {}
    for number, part in enumerate(parts, 1):
        name = f"pytorch_model-{number:05}-of-00002.bin" if sharded else "pytorch_model.bin"
        torch.save({key: whole[key] for key in part}, directory / name, _use_new_zipfile_serialization=kind == "zip")
        mapping |= dict.fromkeys(part, name)
    if sharded:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": mapping}))
    assert_same(checkpoints(dtype="bfloat16"), directory)
    # Files of the zip kind are read by offset, so that the weights are never in memory as a whole.
    held = [stored.loaded is not None for path in directory.glob("*.bin") for stored in index_file(path).values()]
    assert any(held) == (kind == "legacy")


def test_views_in_a_pytorch_file_are_read_as_they_look(checkpoints, tmp_path):
    torch = pytest.importorskip("torch")
    directory = shutil.copytree(checkpoints(dtype="float32"), tmp_path / "c")
    whole = as_torch(torch, directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name, tensor in whole.items():
        if name.endswith("fc1.weight"):
            whole[name] = tensor.t().contiguous().t()
        elif name.endswith("fc2.weight"):
            whole[name] = torch.cat([tensor, tensor])[len(tensor) :]
    torch.save(whole, directory / "pytorch_model.bin")
    assert_same(checkpoints(dtype="float32"), directory)


def as_torch(torch, path: Path) -> dict:
    from safetensors.torch import load_file as load_torch

    return {name: tensor.clone() for name, tensor in load_torch(path).items()}


def test_what_transformers_saves_is_read(tmp_path, checkpoints):
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig

    directory = shutil.copytree(checkpoints(form="hf", naming="new"), tmp_path / "c")
    (directory / "model.safetensors").unlink()
    text = PhiConfig(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     partial_rotary_factor=0.25, rope_theta=777.0, max_position_embeddings=256)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, hidden_act="gelu")  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=399)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(directory)
    checkpoint = Checkpoint.open(directory)
    # That class builds lm_head without Phi's bias, which is said rather than guessed.
    assert not checkpoint.config.decoder.lm_head_bias
    assert any("lm_head.bias" in note for note in checkpoint.notes)
    assert checkpoint.config.decoder.rotary_dim == 4 and checkpoint.config.decoder.rope_theta == 777.0
    assert checkpoint.config.vision.activation == "gelu"
    np.testing.assert_array_equal(checkpoint.tensor("decoder.lm_head.weight"), model.lm_head.weight.detach().numpy())
    linear = model.model.multi_modal_projector.linear_2
    np.testing.assert_array_equal(checkpoint.tensor("projector.1.weight"), linear.weight.detach().numpy())


# The layout of the wider family: parts that lie elsewhere.


@pytest.fixture
def scattered(checkpoints, tmp_path):
    """One model in three places: decoder, vision tower as CLIP saves it, projector file."""
    main, tower = tmp_path / "main", tmp_path / "clip"
    shutil.copytree(checkpoints(), main)
    tower.mkdir()
    whole = load_file(main / "model.safetensors")
    prefix, projector = "model.vision_tower.", "model.mm_projector."
    vision = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    vision["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    vision["text_model.embeddings.token_embedding.weight"] = np.zeros((3, 4), np.float16)
    save_file(vision, tower / "model.safetensors")
    save_file({k: v for k, v in whole.items() if k.startswith(projector)}, main / "mm_projector.safetensors")
    save_file({k: v for k, v in whole.items() if not k.startswith((prefix, projector))}, main / "model.safetensors")
    config = json.loads((main / "config.json").read_text())
    vision_config = config.pop("vision_config")["vision_tower"] | {"model_type": "clip_vision_model"}
    layer, feature = vision_config.pop("mm_vision_select_layer"), vision_config.pop("mm_vision_select_feature")
    config |= {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 48, "mm_vision_select_layer": layer, "mm_vision_select_feature": feature,
    }  # fmt: skip
    (main / "config.json").write_text(json.dumps(config))
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision_config}))
    shutil.move(main / "preprocessor_config.json", tower)
    return main, tower


def test_a_tower_of_its_own_is_put_in_place(checkpoints, scattered):
    main, tower = scattered
    assert_same(checkpoints(), Checkpoint.open(main, vision_tower=tower))


def test_a_named_tower_that_is_not_contained_asks_for_its_flag(scattered):
    text = refusal(scattered[0])
    assert "openai/clip-vit-large-patch14-336" in text and "--vision-tower DIR" in text


def test_a_tower_without_prefix_is_read(checkpoints, scattered):
    main, tower = scattered
    whole = load_file(tower / "model.safetensors")
    save_file({name.removeprefix("vision_model."): value for name, value in whole.items()}, tower / "model.safetensors")
    edit(tower / "config.json", {"vision_config.projection_dim": 7})
    assert_same(checkpoints(), Checkpoint.open(main, vision_tower=tower))


def test_a_projector_of_its_own_is_put_in_place(checkpoints, scattered, tmp_path):
    main, tower = scattered
    shutil.move(main / "mm_projector.safetensors", tmp_path / "p.safetensors")
    assert "projector.0.weight" in refusal(main, vision_tower=tower)
    assert "--projector FILE" in refusal(main, vision_tower=tower)
    assert_same(checkpoints(), Checkpoint.open(main, vision_tower=tower, projector=tmp_path / "p.safetensors"))
    assert "holds neither" in refusal(main, vision_tower=tower, projector=tower.parent)


def test_a_pytorch_projector_beside_the_weights_is_found(checkpoints, scattered):
    torch = pytest.importorskip("torch")
    main, tower = scattered
    found = as_torch(torch, main / "mm_projector.safetensors")
    (main / "mm_projector.safetensors").unlink()
    torch.save(found, main / "mm_projector.bin")
    assert_same(checkpoints(), Checkpoint.open(main, vision_tower=tower))


# What the configuration says.


@pytest.mark.parametrize(
    ("changes", "part", "field", "value"),
    [
        ({"layer_norm_eps": 1e-6}, "decoder", "norm_eps", 1e-6),
        ({"hidden_act": "gelu"}, "decoder", "activation", "gelu"),
        ({"partial_rotary_factor": 0.25}, "decoder", "rotary_dim", 4),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.75}}, "decoder", "rotary_dim", 12),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.75}}, "decoder", "rope_theta", 5.0),
        ({"rope_theta": 5000.0}, "decoder", "rope_theta", 5000.0),
        ({"num_key_value_heads": None}, "decoder", "kv_heads", 4),
        ({"max_position_embeddings": 99}, "decoder", "context", 99),
        ({"vision_config.vision_tower.hidden_act": "gelu_new"}, "vision", "activation", "gelu_tanh"),
        ({"vision_config.vision_tower.layer_norm_eps": 1e-3}, "vision", "norm_eps", 1e-3),
        ({"vision_config.vision_tower.mm_vision_select_layer": -3}, "vision", "select_layer", -3),
        ({"vision_config.vision_tower.mm_vision_select_feature": "cls_patch"}, "vision", "tokens_per_image", 17),
        ({"image_aspect_ratio": "pad"}, "image", "fit", "pad"),
        ({"image_aspect_ratio": None}, "image", "fit", "center_crop"),
        ({}, "image", "pad_color", (122, 116, 104)),
    ],
)
def test_a_field_of_the_configuration_is_followed(altered, changes, part, field, value):
    assert getattr(getattr(Checkpoint.open(altered(changes)).config, part), field) == value


def test_the_hugging_face_form_says_layer_and_feature(altered):
    config = Checkpoint.open(
        altered({"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, form="hf")
    ).config
    assert (config.vision.select_layer, config.vision.select_feature) == (-1, "cls_patch")
    assert (config.vision.used_layers, config.vision.tokens_per_image) == (3, 17)


def test_a_field_that_is_absent_takes_its_format_s_default_and_says_so(altered):
    checkpoint = Checkpoint.open(altered({"partial_rotary_factor": None, "layer_norm_eps": None}))
    assert checkpoint.config.decoder.rotary_dim == 8
    assert any("partial_rotary_factor: 0.5" in note for note in checkpoint.notes)
    assert any("layer_norm_eps: 1e-05" in note for note in checkpoint.notes)


def test_lm_head_s_bias_is_there_when_the_weights_have_it(checkpoints):
    assert Checkpoint.open(checkpoints()).config.decoder.lm_head_bias
    bare = Checkpoint.open(checkpoints("wide-heads"))
    assert not bare.config.decoder.lm_head_bias and not bare.has("decoder.lm_head.bias")


def test_the_image_recipe_is_the_file_s(altered):
    changes = {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 0.01}
    image = Checkpoint.open(altered(changes, file="preprocessor_config.json")).config.image
    assert (image.mean, image.std, image.rescale) == ((0.5, 0.25, 0.1), (0.5, 0.5, 0.5), 0.01)
    assert image.pad_color == (127, 63, 25)


def test_without_an_image_recipe_clip_s_own_is_taken_and_said(altered):
    directory = altered({})
    (directory / "preprocessor_config.json").unlink()
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config.image == PRESETS["small"].image
    assert any("CLIP's own" in note for note in checkpoint.notes)


def test_the_recipe_of_newer_processors_is_read(altered):
    directory = altered({"image_mean": [0.5, 0.5, 0.5], "do_pad": True}, file="preprocessor_config.json")
    edit(directory / "config.json", {"image_aspect_ratio": None})
    inner = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    image = Checkpoint.open(directory).config.image
    assert image.mean == (0.5, 0.5, 0.5) and image.fit == "pad"


def test_layers_behind_the_selected_one_may_be_missing(altered):
    directory = altered({})
    whole = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in whole.items() if "encoder.layers.2." not in name}
    save_file(kept, directory / "model.safetensors")
    assert not Checkpoint.open(directory).has("vision.layers.2.fc1.weight")


def test_a_tied_head_is_the_embedding_table(altered):
    directory = altered({"tie_word_embeddings": True})
    whole = load_file(directory / "model.safetensors")
    del whole["lm_head.weight"]
    save_file(whole, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    np.testing.assert_array_equal(
        checkpoint.tensor("decoder.lm_head.weight"), checkpoint.tensor("decoder.embed_tokens.weight")
    )


# Text.


def test_the_slow_form_of_the_tokenizer_gives_the_same_ids(checkpoints, altered):
    from tokenizers import Tokenizer

    fast = Checkpoint.open(checkpoints()).config.text
    whole = json.loads(Path(fast.tokenizer).read_text(encoding="utf-8"))
    directory = altered({})
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(
        json.dumps(whole["model"]["vocab"] | {"<|endoftext|>": fast.eos[0]}), encoding="utf-8"
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {token["content"]: token["id"] for token in whole["added_tokens"] if not token["special"]}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    with Checkpoint.open(directory) as checkpoint:
        slow = checkpoint.config.text
        assert (slow.eos, slow.vocabulary) == (fast.eos, fast.vocabulary)
        first, second = Tokenizer.from_file(str(fast.tokenizer)), Tokenizer.from_file(str(slow.tokenizer))
        texts = ["What is in this picture?", "a  b     c\t\t\td", "你好 🙂 naïve", " USER: <|endoftext|>x", "\n\n  \n"]
        for text in texts:
            assert first.encode(text).ids == second.encode(text).ids
            assert first.decode(first.encode(text).ids) == second.decode(second.encode(text).ids)
    assert not slow.tokenizer.exists()
    (directory / "merges.txt").unlink()
    assert "neither tokenizer.json nor merges.txt" in refusal(directory)


def test_ids_that_end_an_answer_come_from_the_files(altered):
    directory = altered({"eos_token_id": [368, 2]}, file="generation_config.json")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config.text.eos == (368,)
    assert any("eos_token_id 2" in note for note in checkpoint.notes)
    edit(directory / "tokenizer_config.json", {"eos_token": None})
    assert Checkpoint.open(directory).config.text.eos == (368,)
    (directory / "generation_config.json").unlink()
    assert Checkpoint.open(directory).config.text.eos == (368,)
    edit(directory / "config.json", {"eos_token_id": None})
    assert "names no token that ends an answer" in refusal(directory)


def test_a_tokenizer_that_is_wider_than_the_logits_is_refused(checkpoints, altered):
    directory = altered({})
    shutil.copy(checkpoints("one-head") / "tokenizer.json", directory)
    assert "512 entries, the decoder gives 400 logits" in refusal(directory)


# Hash.


def test_the_hash_is_that_of_the_hashes(checkpoints, altered):
    directory = checkpoints(shards=2)
    wanted = ["config.json", "preprocessor_config.json", *sorted(path.name for path in directory.glob("*.safetensors"))]
    lines = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(wanted)]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert Checkpoint.open(directory).sha256() == expected
    assert Checkpoint.open(altered({"layer_norm_eps": 1e-4}, shards=2)).sha256() != expected


@pytest.mark.parametrize("layout", ["llava_phi", "llava_old", "llava_new"])
def test_names_on_disk_lead_back_to_the_canonical_ones(layout):
    for preset in ODD_SHAPES:
        for name in names.expected_shapes(PRESETS[preset], all_layers=True):
            assert names.canonical(names.on_disk(name, layout)) == name

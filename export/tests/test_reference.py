"""The PyTorch reference is the model that `transformers` means, pixel by pixel and stage by stage."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ODD_SHAPES
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_phi_export.checkpoint import Checkpoint  # noqa: E402
from llava_phi_export.pillow_image import PillowImage, pad_to_square  # noqa: E402
from llava_phi_export.presets import PRESETS, image_config  # noqa: E402
from llava_phi_export.reference import Reference, prompt_ids  # noqa: E402
from llava_phi_export.samples import picture  # noqa: E402

SIZES = [(1, 1), (1, 40), (40, 1), (28, 28), (56, 28), (29, 28), (27, 29), (337, 28), (500, 3), (64, 100), (101, 51)]


@pytest.fixture
def reference(checkpoints):
    return Reference(Checkpoint.open(checkpoints()))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng([seed, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["center_crop", "pad"])
def test_pixels_are_those_of_the_pillow_processor(size, fit):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = image_config(28, fit)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for seed in range(3):
        image = noise(size, seed)
        whole = pad_to_square(image, config.pad_color) if fit == "pad" else image
        expected = processor(whole, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(PillowImage(config).pixel_values(image), expected)


def test_the_fit_can_be_asked_for():
    image, crop, pad = noise((60, 30)), image_config(28, "center_crop"), image_config(28, "pad")
    np.testing.assert_array_equal(PillowImage(crop).pixel_values(image, "pad"), PillowImage(pad).pixel_values(image))


@pytest.mark.parametrize(("size", "box"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((4, 1), (0, 1))])
def test_padding_lies_as_the_original_lays_it(size, box):
    square = np.asarray(pad_to_square(Image.new("RGB", size, (1, 2, 3)), (9, 9, 9)))
    rows, columns = np.nonzero((square == (1, 2, 3)).all(-1))
    assert (columns.min(), rows.min()) == box and len(rows) == size[0] * size[1]


def test_it_is_the_model_of_transformers_where_that_keeps_all_weights(checkpoints):
    """`LlavaForConditionalGeneration` loses lm_head's bias; this shape has none, so the two must agree."""
    path = checkpoints("wide-heads", form="hf", naming="new", dtype="float32")
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(path, attn_implementation="eager").eval()
    reference = Reference(Checkpoint.open(path))
    pixels = np.concatenate([reference.image.pixel_values(picture(seed)) for seed in (4, 5)])
    ids = reference.token_ids("Compare the two.", 2)
    image = [whole.config.image_token_index] * reference.config.vision.tokens_per_image
    flat = ids[0] + image + ids[1] + image + ids[2]
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([flat]), pixel_values=torch.from_numpy(pixels)).logits[0].numpy()
    embeds = reference.embeds(ids, reference.image_embeds(reference.patch_features(pixels)))
    found = reference.logits(embeds)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("preset", ODD_SHAPES)
def test_cached_steps_equal_one_run_without_a_cache(checkpoints, preset):
    reference = Reference(Checkpoint.open(checkpoints(preset)))
    embeds = reference.embeds(reference.token_ids("Why?", 0), None)
    answer = reference.greedy(embeds, 6)
    grown = np.concatenate([embeds, reference.embeds([answer.ids[:-1]], None)], axis=1)
    whole = reference.logits(grown)[embeds.shape[1] - 1 :]
    np.testing.assert_allclose(answer.logits, whole, atol=1e-4)
    assert answer.ids == whole.argmax(-1).tolist()


def test_the_selected_state_has_its_class_token_dropped_or_kept(checkpoints):
    for preset in ODD_SHAPES:
        config = PRESETS[preset].vision
        reference = Reference(Checkpoint.open(checkpoints(preset)))
        pixels = np.zeros((2, 3, config.image_size, config.image_size), np.float32)
        assert reference.patch_features(pixels).shape == (2, config.tokens_per_image, config.hidden)


def test_all_three_gelus_and_lm_head_s_bias_are_the_checkpoint_s(reference):
    assert isinstance(reference.projector[1], torch.nn.GELU) and reference.projector[1].approximate == "none"
    assert type(reference.decoder.model.layers[0].mlp.activation_fn).__name__ == "NewGELUActivation"
    assert type(reference.vision.encoder.layers[0].mlp.activation_fn).__name__ == "QuickGELUActivation"
    bias = reference.checkpoint.f32("decoder.lm_head.bias")
    np.testing.assert_array_equal(reference.decoder.lm_head.bias.detach().numpy(), bias)
    assert np.abs(bias).max() > 0.1


def test_weights_can_be_replaced(reference):
    embeds = reference.embeds(reference.token_ids("Why?", 0), None)
    before = reference.logits(embeds)
    names = ("decoder.layers.1.fc2.weight", "decoder.layers.0.q_proj.weight", "decoder.lm_head.weight")
    reference.replace((name, reference.checkpoint.f32(name)) for name in names)
    np.testing.assert_array_equal(reference.logits(embeds), before)
    for name in names:
        reference.replace([(name, reference.checkpoint.f32(name) * 1.5)])
        after = reference.logits(embeds)
        assert np.abs(after - before).max() > 1e-3
        before = after


def test_the_prompt_is_cut_at_the_images(reference):
    template, tokenizer = reference.config.text.template, reference.tokenizer
    text = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    text += "detailed, and polite answers to the user's questions. USER: <image>\n<image>\nWhich? ASSISTANT:"
    expected = [tokenizer.encode(part).ids for part in text.split("<image>")]
    assert prompt_ids(tokenizer, template, "Which?", 2) == expected
    assert tokenizer.decode(expected[0][-1:]) == " "
    assert prompt_ids(tokenizer, template, "Which?", 0) == [tokenizer.encode(text.replace("<image>\n", "")).ids]

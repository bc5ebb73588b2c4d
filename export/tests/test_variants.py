"""Every variant of many shapes, run on the CPU: each stage is near the f32 one, however the positions are fed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ODD_SHAPES
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.config import CheckpointError
from llava_phi_export.contrib import Contrib, ContribHalf, FusedHalf
from llava_phi_export.dialect import Half, Standard
from llava_phi_export.errors import ExportError
from llava_phi_export.export import ExportOptions, export
from llava_phi_export.fixed import FixedHalf, TensorRtDelta, TensorRtScatter
from llava_phi_export.nnapi import Nnapi
from llava_phi_export.presets import PRESETS
from llava_phi_export.progress import Progress
from llava_phi_export.quantize import QuantizeOptions
from llava_phi_export.runner import Package
from llava_phi_export.synthesize import synthesize
from llava_phi_export.tolerances import ATTENTION_FACTOR
from llava_phi_export.variants import VARIANTS, window_of

CAPACITY, CHUNK = 40, 8
# The miniature is trained, the others are random.
MINIATURE = Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
SHAPES = (*ODD_SHAPES, "tiny")

# Relative L2 distance to portable-f32: f32 in another order; f16 of a few layers; matrices of 4 bits in blocks of 128 (0.26
# where the trained miniature reads noise), of 8 bits.
F32, F16, INT4, INT8 = 1e-5, 2e-3, 0.3, 1.5e-2
BEFORE = {"cpu-int4": 0.0, "cpu-int4-kv-f32": 0.0, "nnapi-fp32": F32, "portable-f32": 0.0}
LOGITS = {
    "cpu-int4": INT4,
    "cpu-int4-kv-f32": INT4,
    "cuda-int4": INT4,
    "coreml-fp16": INT8,
    "qnn-fp16": INT8,
    "nnapi-fp32": INT8,
}
HALF_DECODERS = [Half, FusedHalf, ContribHalf, FixedHalf, TensorRtScatter, TensorRtDelta]

# How the positions of one full cache are cut: whole, in chunks, across chunks, one by one at the end.
PLANS = ([40], [8, 8, 8, 8, 8], [13, 1, 1, 5, 20], [3, 30, 1, 1, 1, 1, 1, 1, 1])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """|a - b| / |b|, infinite where a number is none."""
    apart = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(apart) if np.isfinite(apart) else float("inf")


class Exported:
    """One shape's package of every variant, and what portable-f32 gives for one input."""

    def __init__(self, folder, shape: str):
        source = MINIATURE if shape == "tiny" else synthesize(PRESETS[shape], folder / "model")
        with Checkpoint.open(source) as checkpoint:
            model = checkpoint.config
            # Activations that are not rounded, so that nothing but weights and sums differ.
            options = ExportOptions(
                tuple(VARIANTS), quantize=QuantizeOptions(accuracy_level=0), capacity=CAPACITY, chunk=CHUNK
            )
            export(checkpoint, folder / "package", options, Progress(None))
            names = [name for name in ("decoder.lm_head.weight", "decoder.lm_head.bias") if checkpoint.has(name)]
            self.head_weight, *bias = map(checkpoint.f32, names)
            self.head_bias = bias[0] if bias else 0
        self.package = Package(folder / "package")
        random = np.random.default_rng(0)
        size, hidden = model.image.size, model.decoder.hidden
        self.pixels = random.standard_normal((2, 3, size, size), dtype=np.float32)
        self.embeds = random.standard_normal((1, CAPACITY, hidden), dtype=np.float32)
        self.others = random.standard_normal((1, CAPACITY, hidden), dtype=np.float32)
        base = self.package.load("portable-f32", 1)
        self.features = base.patch_features(self.pixels)
        self.attention = base.cls_attention(self.pixels)
        self.images = base.image_embeds(self.features)
        self.logits = self.all_logits("portable-f32", self.embeds)

    def all_logits(self, variant: str, embeds: np.ndarray) -> np.ndarray:
        """Logits of every position, read one by one."""
        positions = self.package.load(variant, 1).cache(CAPACITY)
        return np.stack([positions.step(embeds[:, at : at + 1])[0] for at in range(embeds.shape[1])])

    def exact_head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits f32 by the checkpoint's own matrix."""
        return hidden.astype(np.float32) @ self.head_weight.T + self.head_bias


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return cache(lambda shape: Exported(tmp_path_factory.mktemp(shape), shape))


each = pytest.mark.parametrize(
    ("shape", "variant"), [(shape, variant) for shape in SHAPES for variant in VARIANTS if variant != "portable-f32"]
)


@each
def test_the_stages_before_the_decoder_are_near_the_portable_ones(exported, shape, variant):
    model = exported(shape)
    runner, limit = model.package.load(variant, 1), BEFORE.get(variant, F16)
    assert distance(runner.patch_features(model.pixels), model.features) <= limit
    assert distance(runner.cls_attention(model.pixels), model.attention) <= ATTENTION_FACTOR * limit
    assert distance(runner.image_embeds(model.features), model.images) <= limit


@each
def test_logits_are_near_the_portable_ones_however_the_positions_are_fed(exported, shape, variant):
    model = exported(shape)
    runner, limit = model.package.load(variant, 1), LOGITS.get(variant, F16)
    for plan in PLANS:
        positions, end = runner.cache(CAPACITY), 0
        for new in plan:
            found = positions.step(model.embeds[:, end : end + new])
            end += new
            assert distance(found[0], model.logits[end - 1]) <= limit, (plan, end)
        assert positions.length == CAPACITY
        with pytest.raises(CheckpointError, match="do not fit"):
            positions.step(model.embeds[:, :1])
    earlier = runner.cache(CAPACITY).step(model.embeds[:, :30], index=11)
    assert distance(earlier[0], model.logits[11]) <= limit


@each
def test_what_was_read_and_cut_off_does_not_matter(exported, shape, variant):
    """A prefix is kept and something else is read after it, up to the last place of the cache."""
    model = exported(shape)
    runner, limit = model.package.load(variant, 1), LOGITS.get(variant, F16)
    mixed = np.concatenate([model.embeds[:, :10], model.others[:, 10:]], axis=1)
    expected = model.all_logits("portable-f32", mixed)
    positions = runner.cache(CAPACITY)
    positions.step(model.embeds[:, :37])
    positions.truncate(10)
    assert distance(positions.step(mixed[:, 10:11])[0], expected[10]) <= limit
    positions.step(mixed[:, 11:20])
    positions.truncate(15)
    assert distance(positions.step(mixed[:, 15:])[0], expected[-1]) <= limit


@pytest.mark.parametrize("shape", SHAPES)
def test_few_bits_and_heads_apart_cost_no_more_than_their_rounding(exported, shape):
    """The same 4-bit weights in f16 and in f32; the decoders that end in hidden states with an exact head."""
    model = exported(shape)
    expected = model.all_logits("cpu-int4-kv-f32", model.embeds)
    assert distance(model.package.load("cuda-int4", 1).cache(CAPACITY).step(model.embeds)[0], expected[-1]) <= F16
    for variant, limit in (("coreml-fp16", F16), ("qnn-fp16", F16), ("nnapi-fp32", F32)):
        runner = model.package.load(variant, 1)
        runner.head = model.exact_head
        assert distance(runner.cache(CAPACITY).step(model.embeds)[0], model.logits[-1]) <= limit


def test_variants_share_what_is_the_same_file(exported):
    variants = exported("tiny").package.manifest["variants"]

    def path(variant: str, component: str) -> str:
        spec = variants[variant][component]
        return spec.get("graph", spec)["path"]

    assert variants["coreml-fp16"] == variants["qnn-fp16"]
    for component in ("vision_encoder", "projector"):
        for users in (("cpu-int4", "portable-f32"), ("cuda-int4", "cuda-fp16"), ("tensorrt-fp16", "coreml-fp16")):
            assert len({path(user, component) for user in users}) == 1
        places = {path(variant, component) for variant in VARIANTS}
        assert len(places) == 4 and sum(place.startswith("shared/") for place in places) == 3
    assert {path(variant, "head") for variant in ("coreml-fp16", "qnn-fp16", "nnapi-fp32")} == {"shared/head.onnx"}
    heads = [variant for variant in VARIANTS if "head" in variants[variant]]
    assert heads == ["coreml-fp16", "qnn-fp16", "nnapi-fp32"]


def test_what_a_decoder_declares_is_what_its_form_of_the_cache_promises(exported):
    model = exported("grouped")
    variants, sizes = model.package.manifest["variants"], model.package.manifest["decoder"]
    past = [1, sizes["kv_heads"], CAPACITY, sizes["head_dim"]]
    fixed = {"capacity": CAPACITY, "chunk": CHUNK}

    def io(variant: str) -> tuple[dict, dict, dict]:
        decoder = variants[variant]["decoder"]
        return decoder["kv"], *({n: (s["dtype"], s["shape"]) for n, s in decoder["graph"][k].items()} for k in ("inputs", "outputs"))  # fmt: skip

    for variant, dtype, last in (
        ("coreml-fp16", "f16", "hidden_states"), ("nnapi-fp32", "f32", "hidden_states"),
        ("tensorrt-delta-fp16", "f16", "logits"),
    ):  # fmt: skip
        kv, inputs, outputs = io(variant)
        assert kv == {"form": "delta", "dtype": dtype, **fixed}
        assert inputs.pop("inputs_embeds") == (dtype, [1, CHUNK, sizes["hidden"]])
        for name in ("rope_cos", "rope_sin"):
            assert inputs.pop(name) == (dtype, [1, 1, CHUNK, sizes["rotary"]["dim"] // 2])
        assert inputs.pop("attention_mask") == (dtype, [1, 1, CHUNK, CAPACITY + CHUNK])
        if last == "logits":
            assert inputs.pop("logits_index") == ("i64", [1])
            assert outputs.pop("logits") == ("f32", [1, sizes["logits_width"]])
        else:
            assert outputs.pop("hidden_states") == (dtype, [1, CHUNK, sizes["hidden"]])
        assert set(map(str, inputs.values())) == {str((dtype, past))} and len(inputs) == 2 * sizes["layers"]
        new = (dtype, [1, sizes["kv_heads"], CHUNK, sizes["head_dim"]])
        assert outputs == {name.replace("past_key", "new_key"): new for name in inputs}
    kv, inputs, outputs = io("tensorrt-fp16")
    assert kv == {"form": "scatter", "dtype": "f16", **fixed}
    assert inputs.pop("inputs_embeds") == ("f16", [1, "new", sizes["hidden"]])
    assert inputs.pop("position_ids") == ("i64", [1, "new"])
    assert inputs.pop("write_indices") == inputs.pop("logits_index") == ("i64", [1])
    assert inputs.pop("attention_mask") == ("f16", [1, 1, "new", CAPACITY])
    assert outputs.pop("logits") == ("f32", [1, sizes["logits_width"]])
    assert all(spec == ("f16", past) for spec in inputs.values())
    assert outputs == {name.replace("past_key_values", "present"): ("f16", past) for name in inputs}
    for variant in ("cuda-fp16", "cuda-int4"):
        kv, inputs, outputs = io(variant)
        assert kv == {"form": "shared", "dtype": "f16"}
        assert inputs["past_key_values.0.key"][0] == inputs["inputs_embeds"][0] == "f16"
        assert outputs["logits"] == ("f32", ["rows", sizes["logits_width"]])
    tables = model.package.rotary()
    assert np.allclose(tables[0] ** 2 + tables[1] ** 2, 1, atol=1e-6) and len(tables[0]) == sizes["context"]


@pytest.mark.parametrize("dialect", HALF_DECODERS)
def test_scores_beyond_f16_are_computed(tmp_path, dialect):
    """Phi-2's fault in f16. A number that all keys share adds 1e5 to every score and changes no answer."""
    source = tiny.checkpoint(decoder={"context": 24})
    config = source.config.decoder
    tiny.raise_scores(source, 1e5)
    x = np.random.default_rng(1).standard_normal((1, 8, config.hidden), dtype=np.float32)
    # Beside the same weights: 4 bits in f32, or the checkpoint's own.
    same = Contrib if dialect is ContribHalf else Standard
    options = QuantizeOptions(accuracy_level=0)
    found, expected = (
        tiny.first_run(tiny.export_graph(tmp_path, source, "decoder", speaker, options), source, x)
        for speaker in (dialect, same)
    )
    assert distance(found, expected) <= 1e-2


@pytest.mark.parametrize("dialect", [Half, FusedHalf, FixedHalf, TensorRtScatter])
@pytest.mark.parametrize("name", ["decoder.layers.1.fc2.weight", "decoder.layers.0.q_proj.bias"])
def test_a_number_that_f16_cannot_hold_is_refused_by_name(tmp_path, dialect, name):
    source = tiny.checkpoint()
    source.tensors[name].reshape(-1)[3] = -7e4
    with pytest.raises(ExportError, match=rf"{name.replace('.', chr(92) + '.')} holds 7e\+04, f16 ends at 65504"):
        tiny.export_graph(tmp_path, source, "decoder", dialect)


def test_scales_that_f16_cannot_hold_are_refused_by_name(tmp_path):
    source = tiny.checkpoint()
    source.tensors["decoder.layers.1.fc2.weight"][3, 4] = 1e6
    with pytest.raises(ExportError, match=r"the scales of decoder\.layers\.1\.fc2\.weight"):
        tiny.export_graph(tmp_path, source, "decoder", ContribHalf)


def test_a_matrix_is_converted_in_parts(tmp_path, monkeypatch):
    """The same bytes, and never more rows at once than a part has."""
    source = tiny.checkpoint()
    whole = {}
    for dialect in (Half, Nnapi, ContribHalf):
        whole[dialect] = tiny.export_graph(tmp_path, source, "decoder", dialect).read_bytes()
    monkeypatch.setattr("llava_phi_export.dialect._PART", 700)
    rows, seen = type(source).rows, []
    monkeypatch.setattr(type(source), "rows", lambda *of: seen.append(rows(*of)) or seen[-1])
    for dialect, expected in whole.items():
        assert tiny.export_graph(tmp_path, source, "decoder", dialect).read_bytes() == expected
    assert max(part.size for part in seen) <= 700


def test_sizes_of_the_cache_are_clipped_or_refused_in_one_sentence():
    config = replace(tiny.DECODER, context=100)
    assert window_of(Half, config, None, 4) is None
    assert (window_of(FixedHalf, config, None, None).capacity, window_of(FixedHalf, config, None, None).chunk) == (
        100,
        16,
    )
    assert window_of(TensorRtScatter, config, None, None).chunk == 100
    assert window_of(TensorRtDelta, config, 50, 20).chunk == 20
    assert window_of(TensorRtDelta, config, 10, 20).chunk == 10
    for capacity, chunk, sentence in (
        (101, None, "--capacity is 101, it must be from 1 to the decoder's context of 100"),
        (0, None, "--capacity is 0"),
        (None, 0, "--chunk is 0, it must be at least 1"),
    ):
        with pytest.raises(ExportError, match=sentence):
            window_of(Nnapi, config, capacity, chunk)


def test_a_runner_refuses_more_positions_or_rows_than_a_fixed_cache_has(exported):
    runner = exported("tiny").package.load("coreml-fp16", 1)
    with pytest.raises(CheckpointError, match="41 positions are asked for, the caches of coreml-fp16 hold 40"):
        runner.cache(41)
    with pytest.raises(CheckpointError, match="a batch of 2"):
        runner.cache(8, batch=2)


def test_a_head_that_the_fused_attention_cannot_take_is_refused_for_cuda_too(tmp_path):
    source = tiny.checkpoint(decoder={"head_dim": 20})
    for dialect in (FusedHalf, ContribHalf):
        with pytest.raises(ExportError, match=r"head_dim 20.*portable-f32"):
            tiny.export_graph(tmp_path, source, "decoder", dialect)
    for dialect in (Half, FixedHalf, TensorRtScatter, Nnapi):
        assert tiny.export_graph(tmp_path, source, "decoder", dialect).is_file()

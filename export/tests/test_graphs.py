"""Each graph against `transformers`, in both dialects and many shapes; the cache against itself."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
import torch_reference
from llava_phi_export.contrib import Contrib
from llava_phi_export.dialect import Standard
from llava_phi_export.errors import ExportError
from llava_phi_export.quantize import QuantizeOptions, dequantize, quantize

# Largest difference over largest value: f32 sums in another order, over a few layers.
F32 = 1e-5
# Activations rounded to int8 by blocks of 32, one rounding a matrix.
INT8 = 5e-2


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def embeds(config, batch: int, positions: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, positions, config.hidden), dtype=np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 5, "heads": 3, "hidden": 27, "intermediate": 50},
        {"image_size": 30, "patch_size": 7, "select_layer": -1},
        {"activation": "gelu", "select_layer": 2, "norm_eps": 1e-3},
        {"activation": "gelu_tanh", "select_feature": "cls_patch"},
        {"select_layer": -4},
    ],
)
def test_the_vision_encoder_gives_the_selected_hidden_state_of_clip(tmp_path, changes):
    source = tiny.checkpoint(vision=changes)
    graph = tiny.session(tiny.export_graph(tmp_path, source, "vision_encoder"))
    size = source.config.vision.image_size
    pixels = np.random.default_rng(2).standard_normal((2, 3, size, size), dtype=np.float32)
    names = [output.name for output in graph.get_outputs()]
    features, *attention = graph.run(names, {"pixel_values": pixels})
    assert difference(features, torch_reference.vision(source, pixels)) < F32
    # Without a layer nobody attends to anything.
    assert names == ["patch_features", "cls_attention"][: 1 + bool(source.config.vision.used_layers)]
    for weights in attention:
        assert difference(weights, torch_reference.cls_attention(source, pixels)) < F32


def test_layers_after_the_selected_one_are_not_exported(tmp_path):
    source = tiny.checkpoint(vision={"layers": 4})
    model = onnx.load(tiny.export_graph(tmp_path, source, "vision_encoder"))
    names = [initializer.name for initializer in model.graph.initializer]
    assert any("layers.2." in name for name in names)
    assert not any("layers.3." in name or "post_layernorm" in name for name in names)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_projector_has_an_exact_gelu_between_its_layers(tmp_path, layers):
    source = tiny.checkpoint(projector={"layers": layers, "kind": f"mlp{layers}x_gelu"})
    graph = tiny.session(tiny.export_graph(tmp_path, source, "projector"))
    features = np.random.default_rng(3).standard_normal((2, 5, 24), dtype=np.float32) * 3
    (found,) = graph.run(["image_embeds"], {"patch_features": features})
    assert difference(found, torch_reference.project(source, features)) < F32


SHAPES = [
    {},
    {"heads": 2, "kv_heads": 2, "head_dim": 80, "rotary_dim": 32, "hidden": 160, "layers": 2},
    {"heads": 6, "kv_heads": 2, "head_dim": 16, "rotary_dim": 16, "hidden": 96},
    {"heads": 5, "kv_heads": 1, "head_dim": 24, "rotary_dim": 8, "hidden": 50, "intermediate": 77},
    {"heads": 3, "kv_heads": 3, "head_dim": 40, "rotary_dim": 10, "hidden": 33, "logits_width": 51, "layers": 1},
    {"heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 6, "rope_theta": 1e6, "norm_eps": 1e-3},
    {"activation": "gelu"},
]
SHAPES_OF_NO_FUSED_KERNEL = [
    {"heads": 3, "kv_heads": 3, "head_dim": 20, "rotary_dim": 8, "hidden": 60},
    {"heads": 4, "kv_heads": 2, "head_dim": 6, "rotary_dim": 2, "hidden": 24},
]


@pytest.mark.parametrize("changes", SHAPES + SHAPES_OF_NO_FUSED_KERNEL)
def test_the_portable_decoder_equals_phi_at_every_position(tmp_path, changes):
    source = tiny.checkpoint(decoder=changes)
    config = source.config.decoder
    path = tiny.export_graph(tmp_path, source, "decoder")
    x = embeds(config, 2, 11)
    expected = torch_reference.logits(torch_reference.phi(source), x)
    for position in (0, 4, 10):
        found = tiny.Concat(path, config).run(x, index=[position, position])
        assert difference(found, expected[:, position]) < F32


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("level, method, limit", [(1, "rtn", F32), (0, "k_quant", F32), (4, "rtn", INT8)])
def test_the_int4_decoder_equals_phi_with_the_same_dequantised_weights(tmp_path, changes, level, method, limit):
    source = tiny.checkpoint(decoder=changes)
    config = source.config.decoder
    options = QuantizeOptions(accuracy_level=level, method=method)
    path = tiny.export_graph(tmp_path, source, "decoder", Contrib, options)
    x = embeds(config, 1, 11)
    expected = torch_reference.logits(torch_reference.phi(source, rounded(source, options)), x)
    assert difference(tiny.Shared(path, config, 16).run(x), expected[:, -1]) < limit


def rounded(source, options: QuantizeOptions) -> dict[str, np.ndarray]:
    """The decoder's tensors as the int4 graph holds them."""
    tensors = {}
    for name, values in source.tensors.items():
        if name.startswith("decoder.") and values.ndim == 2 and "embed_tokens" not in name:
            bits = options.bits(name.removesuffix(".weight"))
            values = dequantize(quantize(values, bits, options), bits, values.shape[1])
        tensors[name] = values
    return tensors


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("dialect", [Standard, Contrib])
def test_one_prefill_equals_chunks_and_single_steps(tmp_path, changes, dialect):
    source = tiny.checkpoint(decoder=changes)
    config = source.config.decoder
    path = tiny.export_graph(tmp_path, source, "decoder", dialect, QuantizeOptions(accuracy_level=1))
    x = embeds(config, 1, 13)

    def last(chunks: list[int]) -> np.ndarray:
        driver = tiny.Concat(path, config) if dialect is Standard else tiny.Shared(path, config, 20)
        parts = np.split(x, np.cumsum(chunks)[:-1], axis=1)
        return [driver.run(part) for part in parts][-1]

    whole = last([13])
    assert difference(last([6, 4, 3]), whole) < F32
    assert difference(last([8, 1, 1, 1, 1, 1]), whole) < F32
    assert difference(last([1] * 13), whole) < F32


@pytest.mark.parametrize("dialect", [Standard, Contrib])
def test_logits_of_several_positions_in_one_run_equal_those_of_single_steps(tmp_path, dialect):
    source = tiny.checkpoint()
    config = source.config.decoder
    path = tiny.export_graph(tmp_path, source, "decoder", dialect, QuantizeOptions(accuracy_level=1))
    x = embeds(config, 1, 13)

    def driver():
        return tiny.Concat(path, config) if dialect is Standard else tiny.Shared(path, config, 20)

    alone, together = driver(), driver()
    single = np.concatenate([alone.run(x[:, [at]]) for at in range(13)])
    together.run(x[:, :8])
    assert difference(together.run(x[:, 8:], index=[0, 1, 2, 3, 4]), single[8:]) < F32
    picked = driver().run(x, index=[12, 3, 3])
    assert difference(picked, single[[12, 3, 3]]) < F32


@pytest.mark.parametrize("changes", SHAPES)
def test_rows_of_different_length_in_a_shared_batch_equal_the_rows_alone(tmp_path, changes):
    source = tiny.checkpoint(decoder=changes)
    config = source.config.decoder
    path = tiny.export_graph(tmp_path, source, "decoder", Contrib, QuantizeOptions(accuracy_level=1))
    x = embeds(config, 2, 9)
    new = [9, 5]
    batch = tiny.Shared(path, config, 16, batch=2)
    alone = [tiny.Shared(path, config, 16) for _ in new]
    together = batch.run(x, new)
    for row, count in enumerate(new):
        assert difference(together[row], alone[row].run(x[row : row + 1, :count])[0]) < F32
    for step in range(4):
        y = embeds(config, 2, 1, seed=10 + step)
        together = batch.run(y)
        for row in range(2):
            assert difference(together[row], alone[row].run(y[row : row + 1])[0]) < F32


def test_portable_graphs_use_the_standard_domain_only(tmp_path):
    source = tiny.checkpoint()
    for component in ("vision_encoder", "projector", "decoder"):
        model = onnx.load(tiny.export_graph(tmp_path, source, component))
        assert [entry.domain for entry in model.opset_import] == [""]
        # DirectML and OpenVINO read no later one.
        assert model.opset_import[0].version == 20
        assert {node.domain for node in model.graph.node} == {""}
        assert "Attention" not in {node.op_type for node in model.graph.node}
        onnx.checker.check_model(model, full_check=True)


def test_the_int4_graph_is_made_of_the_fused_operators(tmp_path):
    model = onnx.load(tiny.export_graph(tmp_path, tiny.checkpoint(), "decoder", Contrib))
    count = [node.op_type for node in model.graph.node].count
    layers = tiny.DECODER.layers
    assert count("GroupQueryAttention") == layers
    # Packed q, k and v; dense; fc1; fc2; and lm_head.
    assert count("MatMulNBits") == 4 * layers + 1
    assert count("SkipLayerNormalization") == layers
    assert count("MatMul") == count("CastLike") == count("RotaryEmbedding") == 0


def test_a_head_that_the_fused_attention_cannot_take_is_refused_by_name(tmp_path):
    with pytest.raises(ExportError, match=r"head_dim 20.*portable-f32"):
        tiny.export_graph(tmp_path, tiny.checkpoint(decoder={"head_dim": 20}), "decoder", Contrib)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    source = tiny.checkpoint()
    source.tensors["decoder.layers.1.fc2.weight"][3, 4] = np.nan
    with pytest.raises(ExportError, match=r"decoder\.layers\.1\.fc2\.weight"):
        tiny.export_graph(tmp_path, source, "decoder", Contrib)


def test_a_decoder_without_biases_is_exported_without_them(tmp_path):
    source = tiny.checkpoint(decoder={"lm_head_bias": False, "qkv_bias": False})
    assert not source.has("decoder.lm_head.bias") and not source.has("decoder.layers.0.q_proj.bias")
    x = embeds(source.config.decoder, 1, 5)
    portable = tiny.Concat(tiny.export_graph(tmp_path, source, "decoder"), source.config.decoder).run(x)
    folder = tmp_path / "int4"
    folder.mkdir()
    options = QuantizeOptions(accuracy_level=1)
    path = tiny.export_graph(folder, source, "decoder", Contrib, options)
    small = tiny.Shared(path, source.config.decoder, 8).run(x)
    parts = ("q_proj", "k_proj", "v_proj")
    zeros = {f"decoder.layers.{i}.{part}.bias": np.zeros(128, np.float32) for i in range(3) for part in parts}
    zeros["decoder.lm_head.bias"] = np.zeros(320, np.float32)
    model = torch_reference.phi(source, {**source.tensors, **zeros})
    assert difference(portable, torch_reference.logits(model, x)[:, -1]) < F32
    model = torch_reference.phi(source, {**rounded(source, options), **zeros})
    assert difference(small, torch_reference.logits(model, x)[:, -1]) < F32

"""A cache of int8: its scales hold what may come, its graph computes what the one with a cache of f32 does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from llava_phi_export import stages
from llava_phi_export.attention import KvScales, rotary_tables
from llava_phi_export.contrib import Contrib, ContribInt8Kv
from llava_phi_export.kv_scales import HEADROOM, key_range
from llava_phi_export.progress import Progress
from llava_phi_export.quantize import QuantizeOptions
from test_graphs import F32, SHAPES, difference, embeds

# Activations stay f32, so that nothing but the cache differs.
OPTIONS = QuantizeOptions(block_size=32, accuracy_level=1)


def scales_of(source, x: np.ndarray) -> KvScales:
    """Scales for what the f32 model keeps of `x`."""
    config, keys, values = source.config.decoder, [], []

    def seen(key: np.ndarray, value: np.ndarray) -> None:
        keys.append(key_range(key, config))
        values.append(np.abs(value).max((0, 2)))

    stages.hidden_states(source, x, np.array([-1]), Progress(None), seen)
    # The weights of 4 bits make other keys than those that were seen.
    return KvScales(*(np.stack(part).astype(np.float32) * 1.3 / 127 for part in (keys, values)))


def graphs(folder, changes: dict, x_seed: int = 1):
    """A model, some embeddings [2, 14, hidden], and the drivers of its decoder with a cache of f32 and of int8."""
    source = tiny.checkpoint(decoder=changes)
    config = source.config.decoder
    x = embeds(config, 2, 14, x_seed)
    scales = scales_of(source, x[:1])
    paths = []
    for name, dialect in (("f32", Contrib), ("i8", ContribInt8Kv)):
        (folder / name).mkdir()
        paths.append(tiny.export_graph(folder / name, source, "decoder", dialect, OPTIONS, scales=scales))
    return config, x, scales, [lambda batch=1, path=path: tiny.Shared(path, config, 20, batch) for path in paths]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_are_near_those_with_a_cache_of_f32_however_the_positions_are_fed(tmp_path, changes):
    _, x, _, (exact, rounded) = graphs(tmp_path, changes)
    expected = exact().run(x[:1])
    for plan in ([14], [6, 5, 3], [8] + [1] * 6, [1] * 14):
        driver = rounded()
        parts = np.split(x[:1], np.cumsum(plan)[:-1], axis=1)
        found = [driver.run(part) for part in parts][-1]
        assert 1e-6 < difference(found, expected) < 5e-2, plan


@pytest.mark.parametrize("changes", SHAPES[:4])
def test_the_borders_of_runs_do_not_matter(tmp_path, changes):
    """The new rows are read as the cache holds them, so that a prefix read before and one read now are the same."""
    _, x, _, (_, rounded) = graphs(tmp_path, changes)
    whole, parts = rounded(), rounded()
    parts.run(x[:1, :6])
    assert difference(parts.run(x[:1, 6:]), whole.run(x[:1])) < F32
    rows = [driver.cache["0.key"].numpy()[:, :, :14] for driver in (whole, parts)]
    assert np.abs(rows[0].astype(int) - rows[1]).max() <= 1


@pytest.mark.parametrize("changes", SHAPES)
def test_the_first_layer_keeps_the_nearest_multiples_of_its_scales(tmp_path, changes):
    _, x, scales, (exact, rounded) = graphs(tmp_path, changes)
    drivers = exact(), rounded()
    for driver in drivers:
        driver.run(x[:1])
    for kind, steps in (("key", scales.key), ("value", scales.value)):
        wanted, found = (driver.cache[f"0.{kind}"].numpy()[:, :, :14] for driver in drivers)
        steps = steps[0][None, :, None]
        assert np.abs(found * steps - wanted).max() <= 0.501 * steps.max()
        assert found.dtype == np.int8 and np.abs(found.astype(int)).max() > 60


def test_rows_of_different_length_equal_the_rows_alone(tmp_path):
    _, x, _, (_, rounded) = graphs(tmp_path, SHAPES[2])
    together, alone = rounded(2).run(x, [14, 5]), [rounded(), rounded()]
    for row, count in enumerate((14, 5)):
        assert difference(together[row], alone[row].run(x[row : row + 1, :count])[0]) < F32


def test_decoders_that_differ_in_their_cache_alone_read_one_data_file(checkpoints, tmp_path):
    from llava_phi_export import cli
    from llava_phi_export.runner import Package

    names, logits = ("cpu-int4", "cpu-int4-kv-f32"), []
    x = np.random.default_rng(0).standard_normal((1, 9, 64), dtype=np.float32)
    for limit in ("0", "16000000"):
        words = [word for name in names for word in ("--variant", name)]
        root = tmp_path / limit
        assert cli.main([str(checkpoints("small")), str(root), *words, "--inline-limit", limit]) == 0
        package = Package(root)
        specs = [package.graphs(name, "decoder") for name in names]
        assert [spec["path"] for spec in specs] == ["cpu-int4/decoder.onnx", "cpu-int4/decoder_kv_f32.onnx"]
        shared = [["cpu-int4/decoder.onnx.data"]] * 2 if limit == "0" else [None, None]
        assert [spec.get("data") for spec in specs] == shared
        listed = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert set(package.manifest["files"]) == listed - {"manifest.json"}
        logits.append([package.load(name, 1).cache(9).step(x)[0] for name in names])
    assert np.array_equal(logits[0], logits[1]) and not np.array_equal(logits[0][0], logits[0][1])


def test_a_range_of_keys_holds_at_any_position():
    config = tiny.model_config(decoder={"head_dim": 24, "rotary_dim": 8, "kv_heads": 2}).decoder
    random = np.random.default_rng(0)
    raw = random.standard_normal((1, 2, 5, 24))
    cos, sin = (table[:, None, None].astype(np.float64) for table in rotary_tables(config))

    def turned(position: int) -> np.ndarray:
        a, b, rest = raw[..., :4], raw[..., 4:8], raw[..., 8:]
        c, s = cos[position], sin[position]
        return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)

    bound = key_range(turned(3), config)
    for position in range(config.context):
        assert (np.abs(turned(position)).max((0, 2)) <= bound * (1 + 1e-6)).all()
    # And is no wider than the turn makes it.
    assert np.array_equal(bound[:, 8:], np.abs(raw[..., 8:]).max((0, 2)))


def test_a_package_has_scales_a_channel_from_its_own_talk(checkpoints, tmp_path):
    from llava_phi_export import cli

    package = tmp_path / "package"
    assert cli.main([str(checkpoints("grouped")), str(package), "--variant", "cpu-int4"]) == 0
    model = onnx.load(package / "cpu-int4" / "decoder.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert nodes
    for layer, node in enumerate(nodes):
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["k_quant_type"] == attributes["v_quant_type"] == b"PER_CHANNEL"
        assert attributes["kv_cache_bit_width"] == 8
        for place, kind in ((12, "key"), (13, "value")):
            assert node.input[place] == f"decoder.layers.{layer}.{kind}_scale"
            scale = held[node.input[place]]
            assert scale.ndim == 4 and scale.shape[0] == scale.shape[2] == 1 and (scale > 0).all()
            assert scale.std() > 0
    assert HEADROOM > 1

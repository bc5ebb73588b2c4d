"""Few-bit weights: what is stored is near what was given, and options that mean nothing are refused."""

from __future__ import annotations

import numpy as np
import pytest
from llava_phi_export.errors import ExportError
from llava_phi_export.quantize import QuantizeOptions, dequantize, quantize

SHAPES = [(1, 16), (7, 160), (33, 100), (64, 31)]


def matrix(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["rtn", "search", "k_quant"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_a_weight_is_off_by_less_than_one_step_of_its_block(shape, method, bits, block):
    rows = matrix(shape)
    quantized = quantize(rows, bits, QuantizeOptions(block_size=block, method=method))
    found = dequantize(quantized, bits, shape[1])
    blocks = -(-shape[1] // block)
    assert quantized.packed.shape == (shape[0], blocks, block * bits // 8) and quantized.packed.dtype == np.uint8
    assert quantized.scales.shape == (shape[0], blocks) and quantized.scales.dtype == np.float32
    step = np.repeat(np.abs(quantized.scales), block, axis=1)[:, : shape[1]]
    # The searches give up the ends of a block for its middle, by up to three steps.
    assert (np.abs(found - rows) <= step * (1.01 if method == "rtn" else 3)).all()


@pytest.mark.parametrize("method", ["rtn", "search", "k_quant"])
def test_rows_quantise_alone_so_that_a_matrix_may_come_in_parts(method):
    rows, options = matrix((20, 96)), QuantizeOptions(method=method)
    whole = quantize(rows, 4, options)
    parts = [quantize(rows[:7], 4, options), quantize(rows[7:], 4, options)]
    assert np.array_equal(whole.packed, np.concatenate([part.packed for part in parts]))
    assert np.array_equal(whole.scales, np.concatenate([part.scales for part in parts]))


def test_a_block_of_zeros_stays_zero():
    for method in ("rtn", "search", "k_quant"):
        rows = matrix((4, 64))
        rows[:, 32:] = 0
        found = dequantize(quantize(rows, 4, QuantizeOptions(block_size=32, method=method)), 4, 64)
        assert np.isfinite(found).all() and not found[:, 32:].any()


def test_a_search_for_the_scales_is_nearer_than_rounding():
    rows = matrix((256, 256))
    error = {
        method: float(np.square(dequantize(quantize(rows, 4, QuantizeOptions(method=method)), 4, 256) - rows).mean())
        for method in ("rtn", "search", "k_quant")
    }
    assert error["k_quant"] < 0.95 * error["rtn"] and error["search"] < 0.92 * error["rtn"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_search_is_nearer_in_every_block_and_keeps_to_the_integers(bits):
    rows = matrix((64, 160), seed=1)
    rows[3, 7], rows[4, 32:64], rows[5, :32] = 40.0, 1e-30, 0.25
    errors = []
    for method in ("rtn", "search"):
        quantized = quantize(rows, bits, QuantizeOptions(block_size=32, method=method))
        assert quantized.zero_points is None and np.isfinite(quantized.scales).all()
        found = dequantize(quantized, bits, 160)
        errors.append(np.square(found - rows).reshape(64, 5, 32).sum(-1))
    assert (errors[1] <= errors[0] * 1.001 + 1e-12).all()


@pytest.mark.parametrize("options", [{"block_size": 48}, {"accuracy_level": 3}, {"method": "awq"}, {"lm_head_bits": 2}])
def test_an_option_that_means_nothing_is_refused_with_its_choices(options):
    (value,) = options.values()
    with pytest.raises(ExportError, match=f"{value}, it must be one of"):
        QuantizeOptions(**options)


def test_the_last_matrix_has_its_own_bits():
    assert QuantizeOptions().bits("decoder.lm_head") == 8
    assert QuantizeOptions(lm_head_bits=4).bits("decoder.lm_head") == 4
    assert QuantizeOptions().bits("decoder.layers.3.fc1") == 4

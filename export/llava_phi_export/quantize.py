"""Weights to few-bit integers with one scale a block, in the layout of ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from .errors import ExportError

METHODS = ("rtn", "search", "k_quant")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 4)


# What the largest number of a block is tried as, by what `rtn` makes of it: more tries gain less than a hundredth.
_TRIED = (1.1, 1.0, 0.9, 0.8)


@dataclass(frozen=True)
class QuantizeOptions:
    """How matrices in few bits are stored and multiplied.

    `block_size` columns share a scale. `accuracy_level` is ONNX Runtime's: 4 rounds activations to int8 (fast), 1 and
    0 keep them f32. `method` is `rtn` (round to nearest, symmetric), `search` (the same with the best of several scales
    for each block) or `k_quant` (a search for scale and zero point, slower). `lm_head_bits` is 4 or 8; every other matrix of the decoder has 4, those before the decoder have 8.
    """

    block_size: int = 128
    accuracy_level: int = 4
    method: str = "search"
    lm_head_bits: int = 8

    def __post_init__(self):
        for name, value, choices in (
            ("block size", self.block_size, BLOCK_SIZES),
            ("accuracy level", self.accuracy_level, ACCURACY_LEVELS),
            ("quantizer", self.method, METHODS),
            ("lm_head bits", self.lm_head_bits, (4, 8)),
        ):
            if value not in choices:
                raise ExportError(f"{name} is {value}, it must be one of {', '.join(map(str, choices))}")

    def bits(self, tensor: str) -> int:
        """Bits of a weight of the matrix `tensor`."""
        if tensor.endswith("lm_head"):
            return self.lm_head_bits
        return 4 if tensor.startswith("decoder.") else 8


@dataclass(frozen=True)
class Quantized:
    """Rows of one matrix: `packed` u8 [rows, blocks, bytes], `scales` f32 [rows, blocks], `zero_points` u8 or None."""

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def quantize(rows: np.ndarray, bits: int, options: QuantizeOptions) -> Quantized:
    """Quantises `rows` f32 [rows, columns]; each row alone, so a matrix may come in parts."""
    if not np.isfinite(rows).all():
        raise ExportError("it has a weight that is not a finite number; the checkpoint is damaged or overflowed")
    if options.method == "rtn":
        config = DefaultWeightOnlyQuantConfig(block_size=options.block_size, is_symmetric=True, bits=bits)
        packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(rows.T))
        return Quantized(packed, scales, None)
    if options.method == "search":
        return _search(rows, bits, options.block_size)
    return _k_quant(rows, bits, options.block_size)


def dequantize(quantized: Quantized, bits: int, columns: int) -> np.ndarray:
    """The f32 [rows, columns] matrix that MatMulNBits multiplies by."""
    rows, blocks = quantized.scales.shape
    values = _unpack(quantized.packed.reshape(rows, blocks, -1), bits).astype(np.float32)
    if quantized.zero_points is None:
        zeros = np.float32(2 ** (bits - 1))
    else:
        zeros = _unpack(quantized.zero_points, bits)[:, :blocks, None].astype(np.float32)
    return ((values - zeros) * quantized.scales[..., None]).reshape(rows, -1)[:, :columns]


def _search(rows: np.ndarray, bits: int, block: int) -> Quantized:
    """Symmetric; of the scales tried for a block, and the best one for the integers that each of them gives, the one
    with the least squared error."""
    values = _blocks(rows, block)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The number farthest from 0 becomes the lowest integer, which has no counterpart above.
    farthest = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1) / low
    unit = np.divide(values, farthest, out=np.zeros_like(values), where=farthest != 0)
    gained, scales = (np.zeros(values.shape[:2], np.float32) for _ in range(2))
    for tried in _TRIED:
        found = np.clip(np.rint(unit * np.float32(1 / tried)), low, high)
        both, squared = (np.einsum("rbi,rbi->rb", found, other) for other in (values, found))
        # With its best scale, both / squared, the squared error of a block is that of zeros less this.
        gain = np.divide(both * both, squared, out=np.zeros_like(both), where=squared > 0)
        better = gain > gained
        gained[better], scales[better] = gain[better], (both / np.maximum(squared, 1))[better]
    step = scales[..., None]
    found = np.divide(values, step, out=np.zeros_like(values), where=step != 0)
    packed = (np.clip(np.rint(found), low, high) - low).astype(np.uint8)
    return Quantized(_pack(packed, bits), scales, None)


def _blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """[rows, columns] as [rows, blocks, block], zeros after the last column."""
    count, columns = rows.shape
    blocks = -(-columns // block)
    if columns == blocks * block:
        return np.ascontiguousarray(rows, np.float32).reshape(count, blocks, block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    return padded.reshape(count, blocks, block)


def _k_quant(rows: np.ndarray, bits: int, block: int) -> Quantized:
    padded = _blocks(rows, block)
    count, blocks, _ = padded.shape
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of one value divide 0 by 0 in a branch not taken
        values, scales, zeros = quant_tensor_k_quant_cpu(padded.reshape(count, -1), bits, block)
    values = values.astype(np.uint8).reshape(count, blocks, block)
    zeros = zeros.astype(np.uint8).reshape(count, blocks)
    return Quantized(_pack(values, bits), scales.astype(np.float32).reshape(count, blocks), _pack(zeros, bits))


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)

"""Weights to few-bit integers with one scale a block, in the layout of ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from .errors import ExportError

METHODS = ("rtn", "k_quant")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 4)


@dataclass(frozen=True)
class QuantizeOptions:
    """How matrices in few bits are stored and multiplied.

    `block_size` columns share a scale. `accuracy_level` is ONNX Runtime's: 4 rounds activations to int8 (fast), 1 and
    0 keep them f32. `method` is `rtn` (round to nearest, symmetric) or `k_quant` (a search for scale and zero point,
    slower). `lm_head_bits` is 4 or 8; every other matrix of the decoder has 4, those before the decoder have 8.
    """

    block_size: int = 32
    accuracy_level: int = 4
    method: str = "rtn"
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


def _k_quant(rows: np.ndarray, bits: int, block: int) -> Quantized:
    count, columns = rows.shape
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of one value divide 0 by 0 in a branch not taken
        values, scales, zeros = quant_tensor_k_quant_cpu(padded, bits, block)
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

"""The dialect of NNAPI: every size known, at most four axes, products of weights as Gemm over rows, few operators."""

from __future__ import annotations

import math

from .dialect import joint
from .fixed import Fixed

# Abramowitz and Stegun 7.1.26: erfc(z) = polynomial(t) * exp(-z * z), t = 1 / (1 + p z), for z >= 0, within 1.5e-7.
_ERFC_P = 0.3275911
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


class Nnapi(Fixed):
    """Only operators that NNAPI has; layers carry rows [positions, width]; f32, which the provider may relax to f16.

    Opset 15: from 17 and 20 on ONNX Runtime folds the norm and the GELU back into operators that NNAPI lacks.
    Constants have one axis: ONNX Runtime gives NNAPI no scalar.
    """

    opset = 15

    def enter(self, x, width):
        return self.op.Reshape(x, [-1, width])

    def leave(self, x, positions, width):
        return self.op.Reshape(x, [1, positions, width])

    def layer_norm(self, x, norm, eps):
        op = self.op
        apart = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
        variance = op.ReduceMean(op.Mul(apart, apart), axes=[-1], keepdims=1)
        normed = op.Div(apart, op.Sqrt(op.Add(variance, [eps])))
        return op.Add(op.Mul(normed, self.tensor(f"{norm}.weight")), self.tensor(f"{norm}.bias"))

    def activation(self, x, kind):
        op = self.op
        match kind:
            case "gelu":
                # x * Phi(x) = max(x, 0) - |x| * erfc(|x| / sqrt 2) / 2, off by less than 4e-7 with f32 sums.
                size = op.Abs(x)
                t = op.Div([1.0], op.Add(op.Mul(size, [_ERFC_P / math.sqrt(2)]), [1.0]))
                polynomial = op.Mul(t, [_ERFC[0]])
                for factor in _ERFC[1:]:
                    polynomial = op.Mul(op.Add(polynomial, [factor]), t)
                bell = op.Exp(op.Mul(op.Mul(x, x), [-0.5]))
                return op.Sub(op.Relu(x), op.Mul(op.Mul(op.Mul(size, [0.5]), polynomial), bell))
            case "gelu_tanh":
                # (1 + tanh y) / 2 = sigmoid(2 y).
                slope = 2 * math.sqrt(2 / math.pi)
                inner = op.Add(op.Mul(op.Mul(x, x), [slope * 0.044715]), [slope])
                return op.Mul(x, op.Sigmoid(op.Mul(x, inner)))
            case "quick_gelu":
                return op.Mul(x, op.Sigmoid(op.Mul(x, [1.702])))
        return super().activation(x, kind)

    def linear(self, x, *layers):
        # The checkpoint's [out, in] as it is: NNAPI's own order, and no matrix is turned in memory.
        shapes = [self.checkpoint.shape(f"{layer}.weight") for layer in layers]
        parts = (part for layer in layers for part in self._parts(f"{layer}.weight"))
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        weight = self.graph.weight_in_parts(joint(layers, "weight"), self.dtype.numpy(), shape, parts)
        bias = self._bias(layers)
        return self.op.Gemm(x, weight, *[] if bias is None else [bias], transB=1)

    def heads(self, x, heads, head_dim):
        return self.op.Transpose(self.op.Reshape(x, [1, -1, heads, head_dim]), perm=[0, 2, 1, 3])

    def mean(self, x, axes):
        return self.op.ReduceMean(x, axes=list(axes), keepdims=0)

    def merge(self, x, width):
        return self.op.Reshape(self.op.Transpose(x, perm=[0, 2, 1, 3]), [-1, width])

    def split(self, x, widths):
        # NNAPI splits evenly only.
        parts, start = [], 0
        for width in widths:
            parts.append(self.op.Slice(x, [start], [start + width], [3]))
            start += width
        return parts

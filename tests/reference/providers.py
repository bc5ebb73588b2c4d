"""Makes block.onnx and mixed.onnx: the tiny graphs that `tests/providers.rs` runs on other providers than the processor.

Run it from the repository root: `python tests/reference/providers.py`. It needs numpy and onnx.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
ROWS, WIDTH, INNER = 16, 32, 64
F16 = TensorProto.FLOAT16


def save(name, middle):
    """Two matrix products with `middle` between them: f16, and of fixed shapes, as neural processors want it."""
    rng = np.random.default_rng(0)
    weights = {
        "up": rng.standard_normal((WIDTH, INNER)) / WIDTH**0.5,
        "bias": rng.standard_normal(INNER) / 4,
        "down": rng.standard_normal((INNER, WIDTH)) / INNER**0.5,
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "up"], ["wide"], name="up"),
            helper.make_node("Add", ["wide", "bias"], ["biased"], name="bias"),
            helper.make_node(middle, ["biased"], ["bent"], name="middle"),
            helper.make_node("MatMul", ["bent", "down"], ["narrow"], name="down"),
            helper.make_node("Add", ["narrow", "x"], ["y"], name="residual"),
        ],
        name,
        [helper.make_tensor_value_info("x", F16, [1, ROWS, WIDTH])],
        [helper.make_tensor_value_info("y", F16, [1, ROWS, WIDTH])],
        [numpy_helper.from_array(value.astype(np.float16), key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, HERE / f"{name}.onnx")


if __name__ == "__main__":
    save("block", "Gelu")
    # QNN has no Shrink, so that a part is left to the processor.
    save("mixed", "Shrink")

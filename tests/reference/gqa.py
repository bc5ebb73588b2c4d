"""Makes gqa.onnx, external.onnx and slow.onnx: the tiny graphs that the tests of `src/runtime` run.

Run it from the repository root: `python tests/reference/gqa.py`. It needs numpy and onnx.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
HEADS, HEAD_DIM, ROTARY, CONTEXT = 2, 32, 16, 16
F32, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def save(name, graph, opsets, **kwargs):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opsets], ir_version=10)
    onnx.save(model, HERE / name, **kwargs)


def gqa():
    """Grouped-query attention alone, its cache in the shared form, with rotary embeddings over half of a head."""
    angles = np.outer(np.arange(CONTEXT), 1.0 / 10000 ** (np.arange(0, ROTARY, 2) / ROTARY)).astype(np.float32)
    cache = ["batch", HEADS, "capacity", HEAD_DIM]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past.key", "past.value", "seqlens_k", "total_sequence_length", "cos", "sin"],
        ["out", "present.key", "present.value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        do_rotary=1,
    )
    graph = helper.make_graph(
        [node],
        "gqa",
        [value(n, F32, ["batch", "new", HEADS * HEAD_DIM]) for n in "qkv"]
        + [value("past.key", F32, cache), value("past.value", F32, cache)]
        + [value("seqlens_k", I32, ["batch"]), value("total_sequence_length", I32, [])],
        [value("out", F32, ["batch", "new", HEADS * HEAD_DIM])]
        + [value("present.key", F32, cache), value("present.value", F32, cache)],
        [numpy_helper.from_array(np.cos(angles), "cos"), numpy_helper.from_array(np.sin(angles), "sin")],
    )
    save("gqa.onnx", graph, [("", 21), ("com.microsoft", 1)])


def external():
    """y = x W with the weight in a file of its own, as the decoder's are; past is concatenated before x."""
    weight = (np.arange(512, dtype=np.float32).reshape(2, 256) - 256) / 64
    graph = helper.make_graph(
        [
            helper.make_node("Concat", ["past", "x"], ["present"], axis=0),
            helper.make_node("MatMul", ["present", "weight"], ["y"]),
        ],
        "external",
        [value("past", F32, ["past", 2]), value("x", F32, ["new", 2])],
        [value("present", F32, ["total", 2]), value("y", F32, ["total", 256])],
        [numpy_helper.from_array(weight, "weight")],
    )
    save(
        "external.onnx", graph, [("", 21)], save_as_external_data=True, location="external.onnx.data", size_threshold=0
    )


def slow():
    """A loop that runs as often as it is told, so that there is time to end it from another thread."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m", "m"], ["square"]),
            helper.make_node("Clip", ["square", "low", "high"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [value("step", I64, []), value("go", TensorProto.BOOL, []), value("m", F32, [64, 64])],
        [value("go_on", TensorProto.BOOL, []), value("next", F32, [64, 64])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["steps", "", "x"], ["y"], body=body)],
        "slow",
        [value("steps", I64, []), value("x", F32, [64, 64])],
        [value("y", F32, [64, 64])],
        [numpy_helper.from_array(np.float32(-1), "low"), numpy_helper.from_array(np.float32(1), "high")],
    )
    save("slow.onnx", graph, [("", 21)])


if __name__ == "__main__":
    gqa()
    external()
    slow()

#!/usr/bin/env python3
"""Tells what ONNX's checker and its strict shape inference say of every graph of a package, as JSON.

Weights are not loaded: the checker goes by path, and shape inference reads only those constants that are small.
"""

import json
import sys
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

# Larger constants are weights, on whose values no shape depends.
LARGEST_CONSTANT = 4096


def check(path):
    """One graph: the checker's word, and sizes of values that are not known or vary."""
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and onnx.numpy_helper.np.prod(tensor.dims) <= LARGEST_CONSTANT:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        known[value.name] = [size.dim_value or size.dim_param or None for size in value.type.tensor_type.shape.dim]
    ends = [size for value in [*inferred.input, *inferred.output] for size in known[value.name]]
    declared = {size for size in ends if isinstance(size, str)}
    made = [name for node in inferred.node for name in node.output if name]
    shapes = [known.get(name) for name in [*made, *(value.name for value in inferred.input)]]
    sizes = [size for shape in shapes if shape is not None for size in shape]
    return {
        "checker": "ok",
        "inference": "ok",
        "nodes": len(inferred.node),
        "values": len(shapes),
        "without_shape": shapes.count(None),
        # Inference invents names for sizes that it cannot know.
        "unknown_sizes": sum(not isinstance(size, int) and size not in declared for size in sizes),
        "varying": sorted(declared),
        "most_axes": max(len(shape) for shape in shapes if shape is not None),
    }


def main():
    package, found = Path(sys.argv[1]), {}
    for path in sorted(package.rglob("*.onnx")):
        name = path.relative_to(package).with_suffix("").as_posix()
        try:
            found[name] = check(path)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            found[name] = {"failed": str(error)}
    print(json.dumps(found))
    return any("failed" in graph for graph in found.values())


if __name__ == "__main__":
    sys.exit(main())

"""What runtimes that compile a graph once can read: known sizes, listed operators, one partition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
from llava_phi_export.contrib import Contrib, ContribHalf, FusedHalf
from llava_phi_export.dialect import Half, Standard
from llava_phi_export.fixed import Fixed, FixedHalf, TensorRtDelta, TensorRtScatter
from llava_phi_export.nnapi import Nnapi
from llava_phi_export.quantize import QuantizeOptions
from onnxruntime.tools.mobile_helpers import usability_checker
from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

COMPONENTS = ("vision_encoder", "projector", "decoder")
# What ONNX Runtime's CoreML provider can put into an ML Program, and its NNAPI provider into a model.
COREML = set(
    "Sigmoid Tanh Relu PRelu LeakyRelu Gelu Softplus Elu HardSigmoid Erf Reciprocal Round Sqrt Exp Sin Cos Ceil Add Div "
    "Mul Max Pow Sub ReduceMean ReduceMin ReduceMax ReduceProd ReduceSum LayerNormalization And ArgMax Cast Clip Concat "
    "Conv Flatten Gather GatherND Gemm Identity MatMul Pad Reshape Resize Shape Slice Split Softmax Squeeze Tile "
    "Transpose Unsqueeze Where".split()
)
NNAPI = set(
    "Abs Exp Floor Log Neg Sigmoid Sin Sqrt Tanh Add Div Mul Pow PRelu Sub Min Max ReduceMean Conv Gemm MatMul Cast Clip "
    "Concat Elu Flatten Gather Identity LeakyRelu Pad Relu Reshape Resize Slice Softmax Split Squeeze Transpose "
    "Unsqueeze".split()
)
# Grouped heads, a class token, every activation; a patch that does not divide the image, no bias.
MODELS = (
    {
        "vision": {"activation": "gelu", "select_feature": "cls_patch"},
        "projector": {"layers": 3, "kind": "mlp3x_gelu"},
        "decoder": {"heads": 6, "kv_heads": 2, "head_dim": 24, "rotary_dim": 6, "hidden": 40, "intermediate": 77},
    },
    {
        "vision": {"image_size": 30, "patch_size": 7, "select_layer": -1},
        "projector": {"layers": 1, "kind": "linear"},
        "decoder": {"heads": 1, "kv_heads": 1, "head_dim": 40, "rotary_dim": 40, "lm_head_bias": False, "qkv_bias": False},
    },
    {"vision": {"activation": "gelu_tanh"}},
)  # fmt: skip

fixed = pytest.mark.parametrize("dialect", [Fixed, FixedHalf, TensorRtDelta, Nnapi])
models = pytest.mark.parametrize("changes", MODELS)


def graphs(folder: Path, changes: dict, dialect) -> dict[str, onnx.ModelProto]:
    """The three components, or the decoder of TensorRT's dialects, with the shapes of every value, checked."""
    source = tiny.checkpoint(**changes)
    found = {}
    for component in components(dialect):
        model = onnx.load(tiny.export_graph(folder, source, component, dialect))
        onnx.checker.check_model(model, full_check=True)
        found[component] = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return found


def components(dialect) -> tuple[str, ...]:
    """What a dialect is for: a wide stream is a decoder's."""
    return ("decoder",) if dialect.wide_stream else COMPONENTS


def sizes(model: onnx.ModelProto) -> dict[str, list]:
    """Shape of every value of a graph; a name where a size is not known."""
    graph = model.graph
    known = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        known[value.name] = [size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim]
    return known


@fixed
@models
def test_every_size_of_a_fixed_graph_is_known_and_no_value_has_more_than_four_axes(tmp_path, changes, dialect):
    for model in graphs(tmp_path, changes, dialect).values():
        known = sizes(model)
        for node in model.graph.node:
            assert node.domain == "" and node.op_type != "CastLike"
            for name in node.output:
                assert all(isinstance(size, int) for size in known[name]) and len(known[name]) <= 4, (name, known[name])


@models
def test_of_the_scatter_decoder_only_the_new_positions_vary(tmp_path, changes):
    model = graphs(tmp_path, changes, TensorRtScatter)["decoder"]
    assert model.opset_import[0].version == 24 and {node.domain for node in model.graph.node} == {""}
    declared = [*model.graph.input, *model.graph.output]
    names = {size.dim_param for value in declared for size in value.type.tensor_type.shape.dim if size.dim_param}
    assert names == {"new"}
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    inputs, outputs = ({value.name for value in values} for values in (model.graph.input, model.graph.output))
    assert len(scatters) == 2 * len({name.split(".")[1] for name in inputs if name.startswith("past")})
    for node in scatters:
        # TensorRT updates a cache in place that comes in and goes out as it is.
        assert node.input[0] in inputs and node.input[2] == "write_indices" and node.output[0] in outputs
        assert [attribute.i for attribute in node.attribute if attribute.name == "axis"] == [-2]


@pytest.mark.parametrize(
    ("dialect", "opset"),
    [(Standard, 20), (Half, 20), (Contrib, 20), (FusedHalf, 20), (ContribHalf, 20), (FixedHalf, 20),
     (TensorRtDelta, 20), (TensorRtScatter, 24), (Nnapi, 15)],
)  # fmt: skip
def test_a_graph_asks_for_no_later_opset_than_its_runtime_reads(tmp_path, dialect, opset):
    for component in components(dialect):
        model = onnx.load(tiny.export_graph(tmp_path, tiny.checkpoint(), component, dialect))
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
        onnx.checker.check_model(model)


@models
@pytest.mark.parametrize("dialect", [FusedHalf, ContribHalf, Half, FixedHalf, TensorRtDelta, TensorRtScatter])
def test_of_an_f16_graph_scores_and_softmax_are_f32(tmp_path, changes, dialect):
    for component, model in graphs(tmp_path, changes, dialect).items():
        graph = model.graph
        types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info]}
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        made = {name: node for node in graph.node for name in node.output}
        softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
        assert bool(softmaxes) == (component != "projector" and not dialect.contrib)
        for node in softmaxes:
            assert types[node.input[0]] == types[node.output[0]] == onnx.TensorProto.FLOAT
            product = made[node.input[0]]
            product = made[product.input[0]] if product.op_type == "Add" else product
            assert product.op_type == "MatMul"
            assert {types[name] for name in product.input} == {onnx.TensorProto.FLOAT}
        weights = [tensor for tensor in graph.initializer if tensor.name.endswith(".weight") and len(tensor.dims) > 1]
        assert {tensor.data_type for tensor in weights} <= {onnx.TensorProto.FLOAT16}


@models
def test_coreml_has_every_operator_and_their_constants_are_constant(tmp_path, changes):
    for component, model in graphs(tmp_path, changes, FixedHalf).items():
        constants = {tensor.name for tensor in model.graph.initializer}
        operators = {node.op_type for node in model.graph.node}
        assert operators <= COREML, (component, operators - COREML)
        for node in model.graph.node:
            if node.op_type in ("Slice", "Reshape", "Split"):
                assert set(node.input[1:]) <= constants, node.name


@models
def test_nnapi_has_every_operator_in_the_form_that_it_takes(tmp_path, changes):
    for component, model in graphs(tmp_path, changes, Nnapi).items():
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        operators, known = {node.op_type for node in model.graph.node}, sizes(model)
        assert operators <= NNAPI - {"Split"}, (component, operators - NNAPI)
        # It is given no scalars, and nothing but f32 where numbers are computed.
        assert all(tensor.dims for tensor in constants.values())
        values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
        values = [value for value in values if value.name not in constants]
        assert {value.type.tensor_type.elem_type for value in values} == {onnx.TensorProto.FLOAT}
        for node in model.graph.node:
            shapes = [known[name] for name in node.input]
            if node.op_type == "Gemm":
                assert [len(shape) for shape in shapes[:2]] == [2, 2] and set(node.input[1:]) <= set(constants)
            elif node.op_type == "MatMul":
                left, right = shapes
                assert len(left) == len(right) >= 3 and left[:-2] == right[:-2], node.name
            elif node.op_type in ("Slice", "Reshape"):
                assert set(node.input[1:]) <= set(constants), node.name


@models
# Not f16 optimised: the CPU, whose optimiser it is, has no f16 kernels for some nodes and takes them apart.
@pytest.mark.parametrize(
    ("dialect", "optimized"), [(Fixed, False), (Fixed, True), (FixedHalf, False), (Nnapi, False), (Nnapi, True)]
)
def test_onnx_runtime_finds_one_partition_of_all_nodes(tmp_path, changes, dialect, optimized):
    graphs(tmp_path, changes, dialect)
    for component in COMPONENTS:
        path = tmp_path / f"{component}.onnx"
        if optimized:
            optimize_model(path, tmp_path / "optimized.onnx", level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC)
            path = tmp_path / "optimized.onnx"
        model = ModelProtoWithShapeInfo(path).model_with_shape_info
        if dialect is Nnapi:
            found = usability_checker.check_nnapi_partitions(model, require_fixed_input_sizes=True)
        else:
            found = usability_checker.check_coreml_partitions(model, True, "coreml_supported_mlprogram_ops.md")
        assert (found.num_partitions, found.num_supported_nodes) == (1, found.num_nodes), (
            component,
            found.unsupported_ops,
        )
        assert found.num_subgraphs == 0


def test_a_graph_is_known_to_caches_by_its_nodes_and_its_weights(tmp_path):
    def key(source, dialect=FixedHalf) -> str:
        model = onnx.load(tiny.export_graph(tmp_path, source, "decoder", dialect))
        (value,) = (prop.value for prop in model.metadata_props if prop.key == "COREML_CACHE_KEY")
        # CoreML's provider refuses longer ones, and ones with other characters.
        assert value.isalnum() and len(value) <= 64
        return value

    first = key(tiny.checkpoint())
    assert key(tiny.checkpoint()) == first
    assert (
        len(
            {
                first,
                key(tiny.checkpoint(seed=1)),
                key(tiny.checkpoint(), Fixed),
                key(tiny.checkpoint(decoder={"norm_eps": 1e-4})),
            }
        )
        == 4
    )


def test_without_the_error_function_gelu_is_off_by_less_than_its_f32_rounding_allows(tmp_path):
    """Of the projector's exact GELU there is only what NNAPI can add, multiply and raise."""
    source = tiny.checkpoint(vision={"hidden": 4}, projector={"layers": 2}, decoder={"hidden": 4})
    for layer in range(2):
        source.tensors[f"projector.{layer}.weight"][:] = np.eye(4)
        source.tensors[f"projector.{layer}.bias"][:] = 0
    graph = tiny.session(tiny.export_graph(tmp_path, source, "projector", Nnapi))
    rows = graph.get_inputs()[0].shape[1]
    worst = 0.0
    for x in np.split(np.linspace(-14, 14, rows * 4 * 250, dtype=np.float32), 250):
        (found,) = graph.run(None, {"patch_features": x.reshape(1, rows, 4)})
        exact = np.array([0.5 * float(value) * math.erfc(-float(value) / math.sqrt(2)) for value in x])
        worst = max(worst, float(np.abs(found.reshape(-1) - exact).max()))
    # 1.5e-7 / 2 * |x| of the approximation where its tail is felt, and half a unit of f32 in the last place.
    assert worst < 6e-7


@pytest.mark.parametrize("dialect", [FusedHalf, ContribHalf, TensorRtDelta, TensorRtScatter])
def test_for_nvidia_an_f16_decoder_adds_and_normalises_in_f32(tmp_path, dialect):
    model = onnx.load(tiny.export_graph(tmp_path, tiny.checkpoint(), "decoder", dialect))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if "LayerNormalization" in node.op_type]
    assert len(norms) == tiny.DECODER.layers + 1
    for node in norms:
        assert {types[name] for name in node.input[-2:]} == {onnx.TensorProto.FLOAT}
    # Layers far beyond f16's squares, and near its end.
    for size in (300.0, 3e4):
        source = tiny.checkpoint()
        source.tensors["decoder.layers.0.fc2.bias"][5] = size
        x = np.random.default_rng(1).standard_normal((1, 8, 64), dtype=np.float32)
        same = Contrib if dialect is ContribHalf else Standard
        options = QuantizeOptions(accuracy_level=0)
        found, expected = (
            tiny.first_run(tiny.export_graph(tmp_path, source, "decoder", speaker, options), source, x)
            for speaker in (dialect, same)
        )
        assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)

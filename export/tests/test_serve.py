"""The order in which variants serve: every exported graph once a provider, and all of them on the CPU."""

from __future__ import annotations

import itertools

import pytest
from llava_phi_export.export import CHOICES
from llava_phi_export.serve import orders
from llava_phi_export.tolerances import _CLASSES

F16 = ("tensorrt-fp16", "tensorrt-delta-fp16", "coreml-fp16", "qnn-fp16")
PROVIDERS = {
    "cpu", "cuda", "tensorrt", "coreml", "nnapi", "xnnpack", "qnn", "openvino", "webgpu", "directml", "tensorrt-rtx",
}  # fmt: skip


def variant(name: str) -> dict:
    """A variant's components with files shared as in a package."""
    folder = "f16-fixed" if name in F16 else "f16" if "cuda" in name else "f32"
    folder = folder if name not in ("cpu-int8", "nnapi-u8", "nnapi-fp32") else name
    parts = {"vision_encoder": {"path": f"{folder}/vision_encoder"}}
    if name != "nnapi-u8":
        parts["projector"] = {"path": f"{folder}/projector"}
    if name not in ("cpu-int8", "nnapi-u8"):
        where = "f16-fixed" if name in ("coreml-fp16", "qnn-fp16") else name
        parts["decoder"] = {"graph": {"path": f"{where}/decoder"}, "kv": {}}
    if name in ("coreml-fp16", "qnn-fp16", "nnapi-fp32"):
        parts["head"] = {"path": "shared/head"}
    return parts


def served(*names: str) -> dict[str, list[str]]:
    found = orders({name: variant(name) for name in names})
    return {part: [f"{choice['variant']}@{choice['provider']}" for choice in found[part]] for part in found}


def test_every_variant_has_a_tolerance():
    assert set(_CLASSES) == set(CHOICES)


def test_the_whole_package_serves_in_the_order_that_is_documented():
    found = served(*CHOICES)
    assert found["vision_encoder"][:9] == [
        "tensorrt-fp16@tensorrt", "cuda-fp16@cuda", "tensorrt-fp16@cuda", "coreml-fp16@coreml", "qnn-fp16@qnn",
        "cpu-int8@cpu", "cpu-int4@cpu", "cuda-fp16@tensorrt-rtx", "cuda-fp16@webgpu",
    ]  # fmt: skip
    assert found["vision_encoder"].index("nnapi-u8@nnapi") + 1 == found["vision_encoder"].index("nnapi-fp32@nnapi")
    assert found["decoder"][:10] == [
        "tensorrt-fp16@tensorrt", "tensorrt-delta-fp16@tensorrt", "cuda-int4@cuda", "cuda-fp16@cuda",
        "tensorrt-fp16@cuda", "tensorrt-delta-fp16@cuda", "cuda-int4@tensorrt-rtx", "cuda-fp16@tensorrt-rtx",
        "cpu-int4@cpu", "cpu-int4-kv-f32@cpu",
    ]  # fmt: skip
    assert found["head"] == ["coreml-fp16@cpu"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_choice_of_variants_runs_anywhere_and_names_no_graph_twice_for_a_provider(size):
    for names in itertools.combinations(CHOICES, size):
        parts = {name: variant(name) for name in names}
        for component, choices in orders(parts).items():
            graphs = {name: part[component] for name, part in parts.items() if component in part}
            paths = {name: graph.get("graph", graph)["path"] for name, graph in graphs.items()}
            seen = [(paths[choice["variant"]], choice["provider"]) for choice in choices]
            assert len(seen) == len(set(seen)) and {provider for _, provider in seen} <= PROVIDERS
            assert {path for path, provider in seen if provider == "cpu"} == set(paths.values())


def test_a_package_without_a_head_has_no_order_for_it():
    assert set(served("cpu-int4")) == {"vision_encoder", "projector", "decoder"}

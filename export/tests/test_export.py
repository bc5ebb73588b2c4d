"""A checkpoint on disk to a package: its manifest, its files, and an answer made with them."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
import torch_reference
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.errors import ExportError
from llava_phi_export.export import ExportOptions, export
from llava_phi_export.progress import Progress
from llava_phi_export.synthesize import synthesize

BOTH = ("cpu-int4", "portable-f32")


def write_checkpoint(folder: Path, dtype: str = "float32", **changes) -> Path:
    return synthesize(tiny.model_config(**changes), folder, dtype=dtype)


def export_to(source: Path, target: Path, **options) -> dict:
    with Checkpoint.open(source) as checkpoint:
        export(checkpoint, target, ExportOptions(**options), Progress(None))
    return json.loads((target / "manifest.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def package(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packages") / "both"
    export_to(source, target, variants=BOTH, inline_limit=100_000)
    return target


@pytest.fixture(scope="module")
def manifest(package) -> dict:
    return json.loads((package / "manifest.json").read_text())


def test_the_manifest_has_the_fields_of_the_engines_schema_and_no_other(manifest):
    rust = Path(__file__).parents[2] / "src" / "package" / "manifest.rs"
    structs = {
        name: set(re.findall(r"^    pub (\w+):", body, re.M))
        for name, body in re.findall(r"^pub struct (\w+) \{\n(.*?)^\}", rust.read_text(), re.M | re.S)
    }
    decoder = manifest["variants"]["cpu-int4"]["decoder"]
    for name, value in {
        "Manifest": manifest,
        "SourceInfo": manifest["source"],
        "ImageSpec": manifest["image"],
        "TextSpec": manifest["text"],
        "Template": manifest["text"]["template"],
        "VisionSpec": manifest["vision"],
        "EmbeddingSpec": manifest["embedding"],
        "DecoderSpec": manifest["decoder"],
        "Variant": manifest["variants"]["cpu-int4"],
        "DecoderGraphSpec": decoder,
        "GraphSpec": decoder["graph"],
        "KvSpec": decoder["kv"],
        "TensorSpec": decoder["graph"]["inputs"]["inputs_embeds"],
        "Choice": manifest["serve"]["decoder"][0],
        "Tolerance": manifest["variants"]["cpu-int4"]["tolerance"],
        "GoldenSpec": manifest["goldens"],
        "FileInfo": manifest["files"]["tokenizer.json"],
    }.items():
        optional = {
            "Manifest": {"snapshots"},
            "VisionSpec": {"measured"},
            "DecoderSpec": {"rotary"},
            "Variant": {"head"},
            "KvSpec": {"capacity", "chunk"},
        }.get(name, set())
        assert set(value) == structs[name] - optional, name
    assert set(manifest["serve"]) == structs["Serve"] - {"head"}


def test_every_file_is_listed_with_its_size_and_hash(package, manifest):
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = files[name].read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_encoder_and_the_projector_are_stored_once(manifest):
    for component in ("vision_encoder", "projector"):
        first, second = (manifest["variants"][variant][component] for variant in BOTH)
        assert first == second and first["path"] == f"shared/{component}.onnx"


def test_a_decoder_declares_what_its_form_of_the_cache_needs(manifest):
    cache = ["batch", 4, "capacity", 32]
    shared = manifest["variants"]["cpu-int4"]["decoder"]
    assert shared["kv"] == {"form": "shared", "dtype": "i8"}
    assert shared["graph"]["inputs"] == {
        "inputs_embeds": {"dtype": "f32", "shape": ["batch", "new", 64]},
        "seqlens_k": {"dtype": "i32", "shape": ["batch"]},
        "total_sequence_length": {"dtype": "i32", "shape": []},
        "logits_index": {"dtype": "i64", "shape": ["rows"]},
        **{f"past_key_values.{i}.{k}": {"dtype": "i8", "shape": cache} for i in range(3) for k in ("key", "value")},
    }
    assert shared["graph"]["outputs"] == {
        "logits": {"dtype": "f32", "shape": ["rows", 320]},
        **{f"present.{i}.{k}": {"dtype": "i8", "shape": cache} for i in range(3) for k in ("key", "value")},
    }
    concat = manifest["variants"]["portable-f32"]["decoder"]
    assert concat["kv"] == {"form": "concat", "dtype": "f32"}
    assert concat["graph"]["inputs"]["position_ids"] == {"dtype": "i64", "shape": ["batch", "new"]}
    assert concat["graph"]["inputs"]["attention_mask"] == {"dtype": "f32", "shape": ["batch", 1, "new", "total"]}
    assert concat["graph"]["inputs"]["past_key_values.2.value"]["shape"] == ["batch", 4, "past", 32]
    assert concat["graph"]["outputs"]["present.2.value"]["shape"] == ["batch", 4, "total", 32]


def test_the_graphs_declare_what_the_manifest_says(package, manifest):
    specs = []
    for variant in manifest["variants"].values():
        specs += [variant["vision_encoder"], variant["projector"], variant["decoder"]["graph"]]
    for spec in specs:
        graph = tiny.session(package / spec["path"])
        for declared, said in ((graph.get_inputs(), spec["inputs"]), (graph.get_outputs(), spec["outputs"])):
            assert {value.name: value.shape for value in declared} == {name: io["shape"] for name, io in said.items()}


def test_large_weights_lie_beside_their_graph_and_small_ones_in_it(package, manifest):
    for spec in (manifest["variants"][BOTH[1]]["decoder"]["graph"], manifest["variants"][BOTH[1]]["projector"]):
        large = "decoder" in spec["path"]
        assert spec.get("data", []) == ([spec["path"] + ".data"] if large else [])
        model = onnx.load(package / spec["path"], load_external_data=False)
        outside = {tensor.external_data[0].value for tensor in model.graph.initializer if tensor.external_data}
        assert outside == ({"decoder.onnx.data"} if large else set())


def test_where_the_weights_lie_changes_no_number(source, package, tmp_path):
    export_to(source, tmp_path / "inline", variants=BOTH)
    export_to(source, tmp_path / "outside", variants=BOTH, inline_limit=0)
    x = np.random.default_rng(0).standard_normal((1, 5, 64), dtype=np.float32)
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.config.decoder
    for driver, variant in ((tiny.Concat, "portable-f32"), (lambda p, c: tiny.Shared(p, c, 8), "cpu-int4")):
        roots = (tmp_path / "inline", package, tmp_path / "outside")
        logits = [driver(root / variant / "decoder.onnx", config).run(x) for root in roots]
        assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_the_same_checkpoint_gives_the_same_bytes(source, package, tmp_path):
    again = export_to(source, tmp_path / "again", variants=BOTH, inline_limit=100_000)
    assert again == json.loads((package / "manifest.json").read_text())


def test_the_tokenizer_is_copied_byte_for_byte(source, package):
    assert (package / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "f16"), ("float32", "f32"), ("bfloat16", "f16")])
def test_the_embedding_table_loses_nothing(tmp_path, dtype, stored):
    folder = write_checkpoint(tmp_path / "model", dtype)
    manifest = export_to(folder, tmp_path / "package")
    with Checkpoint.open(folder) as checkpoint:
        table = checkpoint.f32("decoder.embed_tokens.weight")
    spec = manifest["embedding"]
    assert {**spec, "dtype": None} == {"file": "embeddings.bin", "rows": 320, "columns": 64, "dtype": None}
    # Small bfloat16 numbers may fall below what f16 holds; then, and only then, the table is f32.
    fits = np.array_equal(table.astype(np.float16).astype(np.float32), table)
    assert spec["dtype"] == (stored if fits else "f32")
    raw = np.fromfile(tmp_path / "package" / "embeddings.bin", {"f16": "<f2", "f32": "<f4"}[spec["dtype"]])
    assert np.array_equal(raw.astype(np.float32), table.reshape(-1))


def test_the_portable_package_answers_as_the_reference_does(source, package, manifest):
    """The whole walk: pixels, features, embeddings, splice, and 24 greedy tokens."""
    with Checkpoint.open(source) as checkpoint:
        config = checkpoint.config
        names = checkpoint.names()
        memory = tiny.MemoryCheckpoint.__new__(tiny.MemoryCheckpoint)
        memory.config, memory.tensors = config, {name: checkpoint.f32(name) for name in names}
    random = np.random.default_rng(5)
    size = config.vision.image_size
    table = np.fromfile(package / "embeddings.bin", "<f4").reshape(320, 64)
    vision = tiny.session(package / "shared/vision_encoder.onnx")
    project = tiny.session(package / "shared/projector.onnx")
    model = torch_reference.phi(memory)
    for _ in range(3):
        pixels = random.standard_normal((1, 3, size, size), dtype=np.float32)
        before, after = random.integers(0, 300, 4), random.integers(0, 300, 5)
        (features,) = vision.run(["patch_features"], {"pixel_values": pixels})
        (image,) = project.run(None, {"patch_features": features})
        expected = torch_reference.project(memory, torch_reference.vision(memory, pixels))
        assert np.abs(image - expected).max() < 1e-5 * np.abs(expected).max()
        prompt = np.concatenate([table[before], image[0], table[after]])[None]
        decoder = tiny.Concat(package / "portable-f32/decoder.onnx", config.decoder)
        logits, ids = decoder.run(prompt), []
        for _ in range(20):
            ids.append(int(logits[0].argmax()))
            logits = decoder.run(table[ids[-1]][None, None])
        reference = torch.from_numpy(np.concatenate([table[before], expected[0], table[after]])[None])
        wanted = []
        with torch.no_grad():
            for _ in range(20):
                wanted.append(int(model(inputs_embeds=reference).logits[0, -1].argmax()))
                reference = torch.cat([reference, torch.from_numpy(table[wanted[-1]])[None, None]], 1)
        assert ids == wanted


def test_an_error_in_the_middle_leaves_no_package(source, tmp_path, monkeypatch):
    def broken(*_):
        raise ExportError("it broke")

    monkeypatch.setattr("llava_phi_export.decoder.build", broken)
    with pytest.raises(ExportError, match="it broke"):
        export_to(source, tmp_path / "package")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_killed_before_the_manifest_leaves_nothing_that_opens(source, tmp_path):
    program = (
        "import os, signal, sys; from llava_phi_export import cli, manifest\n"
        "manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    target = tmp_path / "package"
    done = subprocess.run([sys.executable, "-c", program, str(source), str(target)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("package.partial-") and not (left / "manifest.json").exists()
    export_to(source, target)
    assert (target / "manifest.json").is_file()

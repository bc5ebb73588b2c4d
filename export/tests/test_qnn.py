"""The QNN plugin's HTP simulator runs the fixed f16 graphs whole, when `onnxruntime-qnn` is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from llava_phi_export.checkpoint import Checkpoint
from llava_phi_export.export import ExportOptions, export
from llava_phi_export.progress import Progress
from llava_phi_export.synthesize import synthesize

plugin = importlib.util.find_spec("onnxruntime_qnn")
pytestmark = pytest.mark.skipif(
    plugin is None, reason="the QNN plugin is not installed: pip install --no-deps onnxruntime-qnn"
)

# Its libraries are found by the loader, which reads the environment when a process starts.
_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime as ort
from llava_phi_export.runner import Package

folder = Path(sys.argv[2])
ort.register_execution_provider_library("QNNExecutionProvider", str(folder / "libonnxruntime_providers_qnn.so"))
devices = [device for device in ort.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
package = Package(Path(sys.argv[1]))
base, other = package.load("portable-f32", 1), package.load("qnn-fp16", 1)
for component in ("vision_encoder", "projector", "decoder"):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # A node that QNN does not take is an error then.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], {"backend_path": str(folder / "libQnnHtp.so")})
    other._sessions[component] = ort.InferenceSession(str(package.path("qnn-fp16", component)), options)

def distance(found, expected):
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))

random, size = np.random.default_rng(0), package.manifest["image"]["size"]
pixels = random.standard_normal((1, 3, size, size), dtype=np.float32)
features = base.patch_features(pixels)
images = base.image_embeds(features)
embeds = random.standard_normal((1, 12, package.manifest["decoder"]["hidden"]), dtype=np.float32)
one, two = base.cache(16), other.cache(16)
apart = [distance(two.step(embeds[:, a:b]), one.step(embeds[:, a:b])) for a, b in ((0, 10), (10, 11), (11, 12))]
print(json.dumps({
    "patch_features": distance(other.patch_features(pixels), features),
    "image_embeds": distance(other.image_embeds(features), images),
    "logits": max(apart),
}))
"""


@pytest.mark.parametrize("scores", [0, 1e5])
def test_the_simulator_takes_every_node_and_is_near_the_portable_variant(tmp_path, scores):
    """Also with scores that f16 cannot hold: the casts to f32 hold in its compiler."""
    model = tiny.model_config(decoder={"heads": 4, "kv_heads": 2, "head_dim": 24, "rotary_dim": 16})
    source = synthesize(model, tmp_path / "model", dtype="float32")
    with Checkpoint.open(source) as checkpoint:
        if scores:
            tiny.raise_scores(checkpoint, scores)
        options = ExportOptions(("qnn-fp16", "portable-f32"), capacity=16, chunk=8)
        export(checkpoint, tmp_path / "package", options, Progress(None))
    folder = Path(next(iter(plugin.submodule_search_locations)))
    libraries = [str(folder), str(folder.with_name("onnxruntime_qnn.libs")), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path / "package"), str(folder)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    apart = json.loads(done.stdout.splitlines()[-1])
    # f16 in every step; in the logits also the head's 8 bits.
    assert apart["patch_features"] < 3e-3 and apart["image_embeds"] < 3e-3 and apart["logits"] < 2e-2, apart

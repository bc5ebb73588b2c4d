"""Random models of any small shape in memory, and drivers that run exported graphs as the engine does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from llava_phi_export import decoder, projector, vision_encoder
from llava_phi_export.config import DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from llava_phi_export.dialect import Contrib, Standard
from llava_phi_export.graph import Graph
from llava_phi_export.names import expected_shapes
from llava_phi_export.progress import Progress
from llava_phi_export.quantize import QuantizeOptions

VISION = VisionConfig(24, 40, 3, 2, 28, 7, "quick_gelu", 1e-5, -2, "patch")
PROJECTOR = ProjectorConfig("mlp2x_gelu", 2, 24, 64, "gelu")
DECODER = DecoderConfig(64, 96, 3, 4, 4, 32, 16, 5000.0, "gelu_tanh", 1e-6, 48, 320, True, True)


def model_config(vision: dict | None = None, projector: dict | None = None, decoder: dict | None = None) -> ModelConfig:
    """A small model with some fields changed."""
    image = ImageConfig(28, "center_crop", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1 / 255, (127, 102, 76))
    text = TextConfig(Path("tokenizer.json"), 300, (299,), {})
    vision = replace(VISION, **vision or {})
    decoder = replace(DECODER, **decoder or {})
    projector = replace(PROJECTOR, input=vision.hidden, output=decoder.hidden, **projector or {})
    return ModelConfig("tiny", "llava_phi", vision, projector, decoder, image, text)


class MemoryCheckpoint:
    """A checkpoint of random numbers; weights shrink with their width so that activations stay near 1."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config, self.notes = config, []
        random = np.random.default_rng(seed)
        self.tensors = {}
        for name, shape in expected_shapes(config).items():
            values = random.standard_normal(shape, dtype=np.float32)
            if "norm" in name and name.endswith(".weight"):
                values = 1 + values * 0.1
            elif len(shape) > 1:
                values *= np.prod(shape[1:]) ** -0.5 * (1.5 if "_proj" in name else 1)
            else:
                values *= 0.1
            self.tensors[name] = values.astype(np.float32)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.tensors[name][start:stop]

    def f32(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float32)


def checkpoint(seed: int = 0, **changes) -> MemoryCheckpoint:
    """A random checkpoint of a small model with some fields changed."""
    return MemoryCheckpoint(model_config(**changes), seed)


def session(path: Path) -> ort.InferenceSession:
    """Opens a graph as the engine does: one thread, CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 2
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_graph(folder: Path, source: MemoryCheckpoint, component: str, dialect=Standard, options=None) -> Path:
    """Exports one component and returns its path."""
    path = folder / f"{component}.onnx"
    graph = Graph(component, path, opset=dialect.opset, contrib=dialect.contrib, inline_limit=1 << 20)
    extra = [options or QuantizeOptions()] if dialect is Contrib else []
    build = {"vision_encoder": vision_encoder, "projector": projector, "decoder": decoder}[component].build
    part = {"vision_encoder": "vision"}.get(component, component)
    build(graph, dialect(graph, source, *extra), getattr(source.config, part), Progress(None))
    graph.save()
    return path


class Concat:
    """Drives a `concat` decoder for rows of equal length."""

    def __init__(self, path: Path, config: DecoderConfig):
        self.graph, self.config, self.length, self.past = session(path), config, 0, None

    def run(self, embeds: np.ndarray, index=None) -> np.ndarray:
        """Reads `embeds` [batch, new, hidden]; returns the logits of position `index` (default: the last)."""
        config, (batch, new, _) = self.config, embeds.shape
        if self.past is None:
            empty = np.zeros((batch, config.kv_heads, 0, config.head_dim), np.float32)
            self.past = {
                f"past_key_values.{i}.{kind}": empty for i in range(config.layers) for kind in ("key", "value")
            }
        positions = np.arange(self.length, self.length + new)
        mask = np.where(np.arange(self.length + new)[None] <= positions[:, None], 0, -1e9).astype(np.float32)
        outputs = [output.name for output in self.graph.get_outputs()]
        results = self.graph.run(
            outputs,
            {
                "inputs_embeds": embeds,
                "position_ids": np.tile(positions, (batch, 1)),
                "attention_mask": np.tile(mask, (batch, 1, 1, 1)),
                "logits_index": np.full(batch, new - 1) if index is None else np.asarray(index, np.int64),
                **self.past,
            },
        )
        self.length += new
        named = dict(zip(outputs, results, strict=True))
        self.past = {name: named[name.replace("past_key_values", "present")] for name in self.past}
        return named["logits"]


class Shared:
    """Drives a `shared` decoder through one buffer of `capacity` rows, each row of the batch with its own length."""

    def __init__(self, path: Path, config: DecoderConfig, capacity: int, batch: int = 1):
        self.graph, self.lengths, self.capacity = session(path), np.zeros(batch, np.int32), capacity
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        # Rows that were never written must not matter.
        self.cache = {
            f"{i}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7e3, np.float32))
            for i in range(config.layers)
            for kind in ("key", "value")
        }

    def run(self, embeds: np.ndarray, new=None) -> np.ndarray:
        """Reads `new` positions of each row of `embeds` [batch, widest, hidden]; returns the last one's logits."""
        new = np.full(len(embeds), embeds.shape[1], np.int32) if new is None else np.asarray(new, np.int32)
        self.lengths += new
        binding = self.graph.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds)
        binding.bind_cpu_input("seqlens_k", self.lengths - 1)
        binding.bind_cpu_input("total_sequence_length", np.array(self.lengths.max(), np.int32))
        binding.bind_cpu_input("logits_index", new.astype(np.int64) - 1)
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.graph.run_with_iobinding(binding)
        logits = {name: value for name, value in zip(self._names(), binding.get_outputs(), strict=True)}["logits"]
        return logits.numpy()

    def _names(self) -> list[str]:
        return [*(f"present.{name}" for name in self.cache), "logits"]

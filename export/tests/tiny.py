"""Random models of any small shape in memory, and drivers that run exported graphs as the engine does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from llava_phi_export import decoder, projector, vision_encoder
from llava_phi_export.attention import rotary_tables
from llava_phi_export.config import DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from llava_phi_export.dialect import Standard, Window
from llava_phi_export.graph import Graph
from llava_phi_export.names import expected_shapes
from llava_phi_export.progress import Progress

VISION = VisionConfig(24, 40, 3, 2, 28, 7, "quick_gelu", 1e-5, -2, "patch")
PROJECTOR = ProjectorConfig("mlp2x_gelu", 2, 24, 64, "gelu")
WINDOW = Window(24, 8)
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


def raise_scores(source, by: float) -> None:
    """Adds `by` to every score: one number of each head, which is not rotated, is the same in all queries and keys."""
    config = source.config.decoder
    number = np.float16((by * config.head_dim**0.5) ** 0.5)
    read = source.f32, source.rows
    places = (np.arange(config.heads) + 1) * config.head_dim - 1

    def changed(name: str, values: np.ndarray, start: int = 0) -> np.ndarray:
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            values = np.array(values)
            rows = np.isin(np.arange(start, start + len(values)), places)
            values[rows] = number if name.endswith("bias") else 0
        return values

    source.f32 = lambda name: changed(name, read[0](name))
    source.rows = lambda name, start, stop: changed(name, read[1](name, start, stop), start)


def checkpoint(seed: int = 0, **changes) -> MemoryCheckpoint:
    """A random checkpoint of a small model with some fields changed."""
    return MemoryCheckpoint(model_config(**changes), seed)


def session(path: Path) -> ort.InferenceSession:
    """Opens a graph as the engine does: one thread, CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 2
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_graph(
    folder: Path, source: MemoryCheckpoint, component: str, dialect=Standard, options=None, window=WINDOW, scales=None
) -> Path:
    """Exports one component and returns its path; `window` is for the dialects whose cache has a fixed size."""
    path, config = folder / f"{component}.onnx", source.config
    graph = Graph(component, path, opset=dialect.opset, contrib=dialect.contrib, inline_limit=1 << 20)
    speaker = dialect(graph, source, options, window)
    speaker.kv_scales = scales
    match component:
        case "vision_encoder":
            vision_encoder.build(graph, speaker, config.vision, Progress(None))
        case "projector":
            patches = config.vision.tokens_per_image if dialect.batch == 1 else "patches"
            projector.build(graph, speaker, config.projector, Progress(None), patches)
        case "decoder":
            decoder.build(graph, speaker, config.decoder, Progress(None))
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
                "logits_index": np.arange(batch) * new + (new - 1 if index is None else np.asarray(index, np.int64)),
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
        types = {value.name: value.type for value in self.graph.get_inputs()}
        # Rows that were never written must not matter.
        rows = (
            np.full(shape, 77, np.int8) if "int8" in types["past_key_values.0.key"] else np.full(shape, 7e3, np.float32)
        )
        self.cache = {
            f"{i}.{kind}": ort.OrtValue.ortvalue_from_numpy(rows.copy())
            for i in range(config.layers)
            for kind in ("key", "value")
        }

    def run(self, embeds: np.ndarray, new=None, index=None) -> np.ndarray:
        """Reads `new` positions of each row of `embeds` [batch, widest, hidden]; logits of `index` (default: the last)."""
        new = np.full(len(embeds), embeds.shape[1], np.int32) if new is None else np.asarray(new, np.int32)
        self.lengths += new
        binding = self.graph.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds)
        binding.bind_cpu_input("seqlens_k", self.lengths - 1)
        binding.bind_cpu_input("total_sequence_length", np.array(self.lengths.max(), np.int32))
        widest = embeds.shape[1]
        index = new.astype(np.int64) - 1 if index is None else np.asarray(index, np.int64)
        binding.bind_cpu_input("logits_index", np.arange(len(embeds)) * widest + index)
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.graph.run_with_iobinding(binding)
        logits = {name: value for name, value in zip(self._names(), binding.get_outputs(), strict=True)}["logits"]
        return logits.numpy()

    def _names(self) -> list[str]:
        return [*(f"present.{name}" for name in self.cache), "logits"]


def first_run(path: Path, source: MemoryCheckpoint, x: np.ndarray) -> np.ndarray:
    """Logits of the last of `x` [1, new, hidden], read at the beginning, by a decoder of any form that takes `x` whole.

    A decoder that ends in hidden states is followed by the checkpoint's own head.
    """
    graph, new = session(path), x.shape[1]
    shapes = {value.name: [1 if size == "batch" else size for size in value.shape] for value in graph.get_inputs()}
    types = {value.name: np.float16 if "float16" in value.type else np.float32 for value in graph.get_inputs()}
    columns = shapes["attention_mask"][-1] if "attention_mask" in shapes else 0
    columns = new if isinstance(columns, str) else columns
    # The columns of the new positions come last in a delta, first in a scatter.
    first = columns - new if "rope_cos" in shapes else 0
    allowed = np.arange(columns)[None] - first <= np.arange(new)[:, None]
    angles = np.stack(rotary_tables(source.config.decoder))[:, None, None, :new]
    known = {
        "inputs_embeds": x,
        "logits_index": np.array([new - 1]),
        "position_ids": np.arange(new)[None],
        "write_indices": np.array([0]),
        "seqlens_k": np.array([new - 1], np.int32),
        "total_sequence_length": np.array(new, np.int32),
        "rope_cos": angles[0],
        "rope_sin": angles[1],
        "attention_mask": np.where(allowed & (np.arange(columns)[None] >= first), 0, -1e4)[None, None],
    }
    feeds = {}
    for name, shape in shapes.items():
        sizes = [{"past": 0, "capacity": new}.get(size, size) for size in shape]
        value = known[name] if name in known else np.zeros(sizes)
        feeds[name] = value if value.dtype.kind == "i" else value.astype(types[name])
    names = [output.name for output in graph.get_outputs()]
    named = dict(zip(names, graph.run(names, feeds), strict=True))
    if "logits" in named:
        return named["logits"][0]
    head = source.tensors["decoder.lm_head.weight"], source.tensors["decoder.lm_head.bias"]
    return named["hidden_states"][0, -1].astype(np.float32) @ head[0].T + head[1]

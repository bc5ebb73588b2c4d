"""Drives a package with ONNX Runtime from Python: each stage alone, and the decoder through its cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from .caches import FORMS, NUMPY, Cache
from .config import CheckpointError
from .manifest import FORMAT
from .vision_encoder import ATTENTION


class Package:
    """A package's manifest and tables; `load` opens the graphs of one variant."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory} is no package: its manifest.json cannot be read ({error})") from error
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {self.manifest.get('format')!r}, this version reads {FORMAT}")
        embedding = self.manifest["embedding"]
        self.embedding = np.memmap(
            self.directory / embedding["file"], dtype=NUMPY[embedding["dtype"]], mode="r",
            shape=(embedding["rows"], embedding["columns"]),
        )  # fmt: skip

    def variants(self) -> list[str]:
        """Names of the variants that have a decoder."""
        return [name for name, variant in self.manifest["variants"].items() if variant.get("decoder")]

    def spec(self, variant: str, component: str) -> dict:
        """The graph's entry; a component that the variant lacks is another variant's."""
        variants = self.manifest["variants"]
        if variant not in variants:
            raise CheckpointError(f"{self.directory} has no variant {variant}; it has {', '.join(variants)}")
        for entry in [variants[variant], *variants.values()]:
            if entry.get(component):
                return entry[component]
        raise CheckpointError(f"{self.directory} has no {component} in any variant")

    def holds(self, variant: str, component: str) -> bool:
        """Whether the variant has the component itself."""
        return bool(self.manifest["variants"].get(variant, {}).get(component))

    def path(self, variant: str, component: str) -> Path:
        """Where the graph lies."""
        spec = self.spec(variant, component)
        return self.directory / spec.get("graph", spec)["path"]

    def graphs(self, variant: str, component: str) -> dict:
        """Inputs and outputs of the graph."""
        spec = self.spec(variant, component)
        return spec.get("graph", spec)

    def rotary(self) -> np.ndarray:
        """Cosines, then sines: [2, context, dim / 2] f32."""
        sizes = self.manifest["decoder"]
        tables = np.fromfile(self.directory / sizes["rotary"]["file"], "<f4")
        return tables.reshape(2, sizes["context"], sizes["rotary"]["dim"] // 2)

    def load(self, variant: str, threads: int = 0) -> Runner:
        """Opens the graphs of a variant."""
        return Runner(self, variant, threads)

    def embed(self, ids) -> np.ndarray:
        """Rows [ids, hidden] f32 of the embedding table."""
        return self.embedding[np.asarray(ids, np.int64)].astype(np.float32)


class Runner:
    """The sessions of one variant on the CPU provider."""

    def __init__(self, package: Package, variant: str, threads: int = 0):
        self.package, self.variant = package, variant
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._options = options
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        decoder = package.spec(variant, "decoder")
        self.kv, self.graph = decoder["kv"], decoder["graph"]
        self.sizes = package.manifest["decoder"]
        self._check(self.graph, "decoder")

    def session(self, component: str) -> onnxruntime.InferenceSession:
        """The session of one component, opened when it is first asked for."""
        if component not in self._sessions:
            path = self.package.path(self.variant, component)
            self._sessions[component] = onnxruntime.InferenceSession(
                str(path), self._options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[component]

    def close(self, component: str) -> None:
        """Frees the session of one component."""
        self._sessions.pop(component, None)

    def is_half(self, component: str) -> bool:
        """Whether the component's activations are f16."""
        inputs = self.package.graphs(self.variant, component)["inputs"]
        return any(spec["dtype"] == "f16" for spec in inputs.values())

    def patch_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """[batch, 3, size, size] to [batch, tokens_per_image, vision.hidden], f32."""
        return self._rows("vision_encoder", "pixel_values", pixel_values, "patch_features")

    def cls_attention(self, pixel_values: np.ndarray) -> np.ndarray | None:
        """[batch, 3, size, size] to [batch, tokens_per_image], f32, of an encoder that gives it."""
        if ATTENTION not in self.package.graphs(self.variant, "vision_encoder")["outputs"]:
            return None
        return self._rows("vision_encoder", "pixel_values", pixel_values, ATTENTION)

    def image_embeds(self, patch_features: np.ndarray) -> np.ndarray:
        """[batch, patches, vision.hidden] to [batch, patches, decoder.hidden], f32."""
        return self._rows("projector", "patch_features", patch_features, "image_embeds")

    def head(self, hidden_states: np.ndarray) -> np.ndarray:
        """Hidden states [batch, hidden] of a decoder that ends there to logits [batch, width], f32."""
        return self._rows("head", "hidden_states", hidden_states, "logits")

    def embeds(self, ids: list[list[int]], image_embeds: np.ndarray | None) -> np.ndarray:
        """[1, positions, decoder.hidden]: the text's rows with each image in its place."""
        parts = [self.package.embed(ids[0])]
        for number, piece in enumerate(ids[1:]):
            parts += [image_embeds[number], self.package.embed(piece)]
        return np.concatenate(parts)[None]

    def cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache for `capacity` positions."""
        return FORMS[self.kv["form"]](self, capacity, batch)

    def forced(self, embeds: np.ndarray, ids: list[int]) -> np.ndarray:
        """Logits [tokens, width] of the prompt and of every id but the last, fed one by one."""
        cache = self.cache(embeds.shape[1] + len(ids))
        logits = [cache.step(embeds)[0]]
        for id in ids[:-1]:
            logits.append(cache.step(self.package.embed([id])[None])[0])
        return np.stack(logits)

    def _rows(self, component: str, source: str, values: np.ndarray, result: str) -> np.ndarray:
        """Runs a graph of one input for one output, row by row where it takes no more; values are f32 outside."""
        spec = self.package.graphs(self.variant, component)["inputs"][source]
        values = np.ascontiguousarray(values, NUMPY[spec["dtype"]])
        parts = [values] if isinstance(spec["shape"][0], str) else [values[row : row + 1] for row in range(len(values))]
        session = self.session(component)
        return np.concatenate([session.run([result], {source: part})[0] for part in parts]).astype(np.float32)

    def _check(self, graph: dict, component: str) -> None:
        """The graph's inputs and outputs are those that the manifest lists."""
        session = self.session(component)
        for what, listed, held in (
            ("inputs", graph["inputs"], session.get_inputs()),
            ("outputs", graph["outputs"], session.get_outputs()),
        ):
            names = {value.name for value in held}
            if names != set(listed):
                wrong = sorted(names ^ set(listed))[0]
                raise CheckpointError(f"graph {component}: {what} differ from the manifest at {wrong}; export again")

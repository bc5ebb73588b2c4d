"""Drives a package with ONNX Runtime from Python: each stage alone, and both forms of the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime

from .config import CheckpointError

_NUMPY = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}
_FORBIDDEN = np.float32(-1e9)
COMPONENTS = ("vision_encoder", "projector", "decoder")


class Package:
    """A package's manifest and tables; `load` opens the graphs of one variant."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory} is no package: its manifest.json cannot be read ({error})") from error
        if self.manifest.get("format") != 1:
            raise CheckpointError(f"{path} has format {self.manifest.get('format')!r}, this version reads 1")
        embedding = self.manifest["embedding"]
        self.embedding = np.memmap(
            self.directory / embedding["file"], dtype=_NUMPY[embedding["dtype"]], mode="r",
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

    def path(self, variant: str, component: str) -> Path:
        """Where the graph lies."""
        spec = self.spec(variant, component)
        return self.directory / spec.get("graph", spec)["path"]

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
        self.kv = decoder["kv"]
        self.sizes = package.manifest["decoder"]
        self._check(decoder["graph"], "decoder")

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

    def patch_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """[batch, 3, size, size] to [batch, tokens_per_image, vision.hidden]."""
        return self.session("vision_encoder").run(["patch_features"], {"pixel_values": pixel_values})[0]

    def image_embeds(self, patch_features: np.ndarray) -> np.ndarray:
        """[batch, patches, vision.hidden] to [batch, patches, decoder.hidden]."""
        return self.session("projector").run(["image_embeds"], {"patch_features": patch_features})[0]

    def embeds(self, ids: list[list[int]], image_embeds: np.ndarray | None) -> np.ndarray:
        """[1, positions, decoder.hidden]: the text's rows with each image in its place."""
        parts = [self.package.embed(ids[0])]
        for number, piece in enumerate(ids[1:]):
            parts += [image_embeds[number], self.package.embed(piece)]
        return np.concatenate(parts)[None]

    def cache(self, capacity: int, batch: int = 1) -> Cache:
        """An empty cache for `capacity` positions."""
        kind = SharedCache if self.kv["form"] == "shared" else ConcatCache
        return kind(self, capacity, batch)

    def forced(self, embeds: np.ndarray, ids: list[int]) -> np.ndarray:
        """Logits [tokens, width] of the prompt and of every id but the last, fed one by one."""
        cache = self.cache(embeds.shape[1] + len(ids))
        logits = [cache.step(embeds)[0]]
        for id in ids[:-1]:
            logits.append(cache.step(self.package.embed([id])[None])[0])
        return np.stack(logits)

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


class Cache:
    """Keys and values of `length` positions of each row."""

    def __init__(self, runner: Runner, capacity: int, batch: int):
        self.runner, self.capacity, self.batch, self.length = runner, capacity, batch, 0
        self.sizes, self.dtype = runner.sizes, _NUMPY[runner.kv["dtype"]]
        self.names = [f"{layer}.{part}" for layer in range(self.sizes["layers"]) for part in ("key", "value")]

    def buffer(self, positions: int) -> np.ndarray:
        return np.zeros((self.batch, self.sizes["kv_heads"], positions, self.sizes["head_dim"]), self.dtype)

    def step(self, embeds: np.ndarray, index: int | None = None) -> np.ndarray:
        """Reads new positions [batch, new, hidden]; logits [batch, width] of the last one, or of `index`."""
        new = embeds.shape[1]
        if self.length + new > self.capacity:
            raise CheckpointError(f"{self.length + new} positions do not fit into a cache of {self.capacity}")
        picked = np.full(self.batch, new - 1 if index is None else index, np.int64)
        logits = self.run({"inputs_embeds": np.ascontiguousarray(embeds, np.float32), "logits_index": picked}, new)
        self.length += new
        return logits


class SharedCache(Cache):
    """Past and present are one buffer of the whole capacity, written in place."""

    def __init__(self, runner: Runner, capacity: int, batch: int):
        super().__init__(runner, capacity, batch)
        self._arrays = [self.buffer(capacity) for _ in self.names]
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]

    def run(self, inputs: dict, new: int) -> np.ndarray:
        total = self.length + new
        inputs["seqlens_k"] = np.full(self.batch, total - 1, np.int32)
        inputs["total_sequence_length"] = np.array(total, np.int32)
        binding = self.runner.session("decoder").io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, value in zip(self.names, self._values, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.runner.session("decoder").run_with_iobinding(binding)
        # The caches were bound before, so the logits are the last output.
        return binding.get_outputs()[-1].numpy()


class ConcatCache(Cache):
    """The present is the past with the new positions appended, in new buffers."""

    def __init__(self, runner: Runner, capacity: int, batch: int):
        super().__init__(runner, capacity, batch)
        self._arrays = [self.buffer(0) for _ in self.names]

    def run(self, inputs: dict, new: int) -> np.ndarray:
        total = self.length + new
        positions = np.arange(self.length, total, dtype=np.int64)
        inputs["position_ids"] = np.broadcast_to(positions, (self.batch, new)).copy()
        later = np.arange(total)[None, :] > positions[:, None]
        mask = np.where(later, _FORBIDDEN, np.float32(0))[None, None]
        inputs["attention_mask"] = np.broadcast_to(mask, (self.batch, 1, new, total)).copy()
        for name, array in zip(self.names, self._arrays, strict=True):
            inputs[f"past_key_values.{name}"] = array
        wanted = ["logits", *(f"present.{name}" for name in self.names)]
        logits, *self._arrays = self.runner.session("decoder").run(wanted, inputs)
        return logits

"""The decode loop's caches, one class for each form: what a run is given, what it leaves behind."""

from __future__ import annotations

import numpy as np
import onnxruntime

from .config import CheckpointError

NUMPY = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "i32": np.int32, "i64": np.int64}
# What is added to a score that must not count.
_FORBIDDEN = {"f32": np.float32(-1e9), "f16": np.float16(-1e4)}


class Cache:
    """Keys and values of `length` positions of each row; `runner` has the sessions and the graph's description."""

    def __init__(self, runner, capacity: int, batch: int):
        self.runner, self.capacity, self.batch, self.length = runner, capacity, batch, 0
        self.sizes, self.kv = runner.sizes, runner.kv
        self.names = [f"{layer}.{part}" for layer in range(self.sizes["layers"]) for part in ("key", "value")]
        self._inputs = runner.graph["inputs"]
        if "capacity" not in self.kv:
            return
        if capacity > self.kv["capacity"]:
            raise CheckpointError(
                f"{capacity} positions are asked for, the caches of {runner.variant} hold {self.kv['capacity']}; "
                "export again with a larger --capacity"
            )
        if batch != 1:
            raise CheckpointError(f"a batch of {batch} is asked for, {runner.variant} reads one row at a time")

    def step(self, embeds: np.ndarray, index: int | None = None) -> np.ndarray:
        """Reads new positions [batch, new, hidden]; logits [batch, width] f32 of the last one, or of `index`."""
        new = embeds.shape[1]
        if self.length + new > self.capacity:
            raise CheckpointError(f"{self.length + new} positions do not fit into a cache of {self.capacity}")
        index = new - 1 if index is None else index
        chunk, logits = self.kv.get("chunk", new), None
        embeds = np.ascontiguousarray(embeds, self._dtype("inputs_embeds"))
        for start in range(0, new, chunk):
            part = embeds[:, start : start + chunk]
            wanted = start <= index < start + chunk
            found = self._run(part, part.shape[1], index - start if wanted else None)
            logits = found if wanted else logits
            self.length += part.shape[1]
        return logits

    def truncate(self, length: int) -> None:
        """Forgets what comes after the first `length` positions."""
        if not 0 <= length <= self.length:
            raise CheckpointError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length

    def _run(self, embeds: np.ndarray, new: int, index: int | None) -> np.ndarray:
        """One run over at most a chunk; logits f32 of `index`, of any position where it is None."""
        raise NotImplementedError

    def _dtype(self, name: str) -> type:
        return NUMPY[self._inputs[name]["dtype"]]

    def _buffer(self, positions: int) -> np.ndarray:
        shape = (self.batch, self.sizes["kv_heads"], positions, self.sizes["head_dim"])
        return np.zeros(shape, NUMPY[self.kv["dtype"]])

    def _picked(self, index: int | None, new: int) -> np.ndarray:
        """Position `index` of each row of the batch, of any where it is None, among `new` a row."""
        return np.arange(self.batch, dtype=np.int64) * new + (index or 0)

    def _mask(self, allowed: np.ndarray) -> np.ndarray:
        """[batch, 1, new, total] of allowed [new, total]."""
        dtype = self._inputs["attention_mask"]["dtype"]
        mask = np.where(allowed, NUMPY[dtype](0), _FORBIDDEN[dtype])[None, None]
        return np.broadcast_to(mask, (self.batch, *mask.shape[1:])).copy()

    def _positions(self, new: int) -> np.ndarray:
        return np.arange(self.length, self.length + new, dtype=np.int64)


class ConcatCache(Cache):
    """The present is the past with the new positions appended, in new buffers."""

    def __init__(self, runner, capacity: int, batch: int):
        super().__init__(runner, capacity, batch)
        self._arrays = [self._buffer(0) for _ in self.names]

    def truncate(self, length):
        super().truncate(length)
        self._arrays = [np.ascontiguousarray(array[:, :, :length]) for array in self._arrays]

    def _run(self, embeds, new, index):
        positions = self._positions(new)
        inputs = {
            "inputs_embeds": embeds,
            "logits_index": self._picked(index, new),
            "position_ids": np.broadcast_to(positions, (self.batch, new)).copy(),
            "attention_mask": self._mask(np.arange(self.length + new)[None, :] <= positions[:, None]),
        }
        inputs |= {f"past_key_values.{name}": array for name, array in zip(self.names, self._arrays, strict=True)}
        wanted = ["logits", *(f"present.{name}" for name in self.names)]
        logits, *self._arrays = self.runner.session("decoder").run(wanted, inputs)
        return logits


class _InPlaceCache(Cache):
    """Past and present are one buffer of the whole capacity, written in place."""

    def __init__(self, runner, capacity: int, batch: int):
        super().__init__(runner, capacity, batch)
        self._arrays = [self._buffer(self.kv.get("capacity", capacity)) for _ in self.names]
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]

    def _run(self, embeds, new, index):
        inputs = {"inputs_embeds": embeds, "logits_index": self._picked(index, new), **self._steps(new)}
        session = self.runner.session("decoder")
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in zip(self.names, self._values, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        # The caches were bound before, so the logits are the last output.
        return binding.get_outputs()[-1].numpy()

    def _steps(self, new: int) -> dict[str, np.ndarray]:
        """What tells the graph the positions."""
        raise NotImplementedError


class SharedCache(_InPlaceCache):
    """The graph knows positions and mask from the lengths."""

    def _steps(self, new):
        total = self.length + new
        return {
            "seqlens_k": np.full(self.batch, total - 1, np.int32),
            "total_sequence_length": np.array(total, np.int32),
        }


class ScatterCache(_InPlaceCache):
    """The graph is told where the new rows begin and which columns count."""

    def _steps(self, new):
        positions = self._positions(new)
        return {
            "position_ids": positions[None],
            "write_indices": positions[:1],
            "attention_mask": self._mask(np.arange(self.kv["capacity"])[None, :] <= positions[:, None]),
        }


class DeltaCache(Cache):
    """The past is read only and the graph gives the new rows of a whole chunk; those that count are copied in."""

    def __init__(self, runner, capacity: int, batch: int):
        super().__init__(runner, capacity, batch)
        self._arrays = [self._buffer(self.kv["capacity"]) for _ in self.names]
        self._angles = runner.package.rotary()
        rows = np.arange(self.kv["chunk"])
        self._causal = rows[None, :] <= rows[:, None]

    def _run(self, embeds, new, index):
        chunk, capacity = self.kv["chunk"], self.kv["capacity"]
        padded = np.zeros((1, chunk, embeds.shape[2]), embeds.dtype)
        padded[:, :new] = embeds
        past = np.broadcast_to(np.arange(capacity) < self.length, (chunk, capacity))
        inputs = {
            "inputs_embeds": padded,
            "attention_mask": self._mask(np.concatenate([past, self._causal], axis=1)),
        }
        for name, table in zip(("rope_cos", "rope_sin"), self._angles, strict=True):
            rows = np.zeros((1, 1, chunk, table.shape[1]), self._dtype(name))
            rows[0, 0, :new] = table[self.length : self.length + new]
            inputs[name] = rows
        inputs |= {f"past_key_values.{name}": array for name, array in zip(self.names, self._arrays, strict=True)}
        result = "logits" if "logits_index" in self._inputs else "hidden_states"
        if result == "logits":
            inputs["logits_index"] = self._picked(index, new)
        wanted = [result, *(f"new_key_values.{name}" for name in self.names)]
        found, *rows = self.runner.session("decoder").run(wanted, inputs)
        for array, part in zip(self._arrays, rows, strict=True):
            array[:, :, self.length : self.length + new] = part[:, :, :new]
        if index is None or result == "logits":
            return found
        return self.runner.head(found[:, index])


FORMS = {"shared": SharedCache, "scatter": ScatterCache, "delta": DeltaCache, "concat": ConcatCache}

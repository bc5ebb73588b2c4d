"""Results that every variant must come near: those of the f32 model in standard operators."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import stages
from .config import ModelConfig
from .errors import ExportError
from .pattern import pattern, pixel_values
from .progress import Progress
from .vision_encoder import ATTENTION

FILE = "goldens.safetensors"
_IMAGE_ROWS = 16
_POSITIONS = 64
_QUESTION = "What is in the picture? Describe every shape and its colour."
# Fixed, not the greedy ones: all positions are then read in one walk over the weights instead of three, and no near tie
# of two logits makes another file on another machine.
_ANSWER = "The picture shows"
_NEXT = 2


@dataclass(frozen=True)
class Prompt:
    """Ids around the first `image_rows` rows of an image, and the ids that are read one by one after them."""

    before: np.ndarray
    image_rows: int
    after: np.ndarray
    next: np.ndarray


def prompt(config: ModelConfig) -> Prompt:
    """A short prompt with the beginning of the template's text, an image and a question, from the model's tokenizer."""
    from tokenizers import Tokenizer

    context = config.decoder.context
    room = min(_POSITIONS, context // 2) - _NEXT
    if room < 3:
        raise ExportError(f"the decoder's context has {context} positions, a prompt with an image needs 10")
    tokenizer = Tokenizer.from_file(str(config.text.tokenizer))
    template = config.text.template
    rows = min(_IMAGE_ROWS, config.vision.tokens_per_image, max(room // 3, 1))
    after_count = (room - rows) // 2
    before_count = room - rows - after_count

    def ids(text: str, count: int) -> np.ndarray:
        found = tokenizer.encode(text, add_special_tokens=False).ids[:count]
        # A tokenizer may know no letter of the text.
        return np.array(found or [n % config.text.vocabulary for n in range(count)], np.int64)

    return Prompt(
        ids(template["system"] + template["after_system"] + template["before_user"], before_count),
        rows,
        ids(template["after_image"] + _QUESTION + template["after_user"] + template["before_answer"], after_count),
        ids(_ANSWER, _NEXT),
    )


class Goldens:
    """One walk through the model: `tensors` by the names of the manifest's schema, and what a second walk needs."""

    def __init__(self, checkpoint, table: np.ndarray, progress: Progress):
        """Computes them; `table` [rows, hidden] is the package's embedding table.

        No more than one layer's weights are in memory at once. Raises `ExportError` where a number is not finite.
        """
        config: ModelConfig = checkpoint.config
        ask = prompt(config)
        progress.start("goldens", config.vision.used_layers + config.decoder.layers + 3)
        pixels = pixel_values(pattern(config.image.size), config.image)
        features, attention = stages.patch_features(checkpoint, pixels, progress)
        images = stages.image_embeds(checkpoint, features)
        progress.step()
        before, after, following = (table[ids].astype(np.float32) for ids in (ask.before, ask.after, ask.next))
        self._embeds = np.concatenate([before, images[0, : ask.image_rows], after, following])[None]
        self._rows = self._embeds.shape[1] - 1 - np.arange(len(ask.next), -1, -1)
        self._hidden = stages.hidden_states(checkpoint, self._embeds, self._rows, progress)
        self.image_rows = ask.image_rows
        self.tensors = {
            "pixel_values": pixels,
            "patch_features": features,
            "image_embeds": images,
            "tokens_before": ask.before,
            "tokens_after": ask.after,
            "next_tokens": ask.next,
            "logits": stages.logits(checkpoint, self._hidden),
        }
        if attention is not None:
            self.tensors[ATTENTION] = attention
        progress.finish()

    def logits(self, checkpoint, progress: Progress) -> np.ndarray:
        """The logits with the decoder of another checkpoint of the same sizes."""
        return stages.logits(checkpoint, stages.hidden_states(checkpoint, self._embeds, self._rows, progress))

    def head(self, checkpoint) -> np.ndarray:
        """The logits with the last matrix of another checkpoint and this one's layers."""
        return stages.logits(checkpoint, self._hidden)

    def write(self, path: Path) -> dict:
        """Writes the tensors as one `safetensors` file; returns its part of the manifest."""
        from safetensors.numpy import save

        with open(path, "wb") as file:
            file.write(save({name: np.ascontiguousarray(tensor) for name, tensor in sorted(self.tensors.items())}))
            file.flush()
            os.fsync(file.fileno())
        return {"file": path.name, "image_rows": self.image_rows}

"""Scales of a cache of int8, one a channel: how large keys and values were over a made talk about pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from . import stages
from .attention import KvScales
from .config import DecoderConfig, ModelConfig
from .progress import Progress

# The largest number of int8 that has a negative, and what is left above the largest key or value that was seen: one
# that is cut off costs more than steps that are half as wide again.
_LARGEST, HEADROOM = 127, 1.5
# Positions that are read: an image of the original's and some text. More cost time and widen no range by much.
_POSITIONS = 768
_TALK = (
    ("What is in the picture? Describe every shape and its colour.", "A red circle stands above two blue bars."),
    ("How many people are there, and what are they doing?", "There are 3: one reads, the others play football."),
    ("Is it day or night?\nAnswer the question using a single word or phrase.", "Night"),
    ("What does the sign say?", 'It says "Open 9-17, closed on Sundays", in white letters on green.'),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b\n"),
    ("Was sieht man im Hintergrund?", "Einen See, dahinter Berge; der Himmel ist grau."),
    ("Why is the dog wet?", "It has probably just been swimming: its fur drips and there is a pond nearby."),
)


def measure(checkpoint, table: np.ndarray, pictures: Iterable[np.ndarray], progress: Progress) -> KvScales:
    """Reads a talk with the f32 model, one layer's weights in memory at a time.

    `table` [rows, hidden] is the embedding table, `pictures` are pixel values [1, 3, size, size]. Raises `ExportError`
    where a number is not finite.
    """
    config = checkpoint.config
    embeds = np.concatenate(list(_talk(checkpoint, table, pictures, progress)))
    embeds = embeds[: min(_POSITIONS, config.decoder.context)][None]
    keys, values = [], []

    def seen(key: np.ndarray, value: np.ndarray) -> None:
        keys.append(key_range(key, config.decoder))
        values.append(np.abs(value).max((0, 2)))

    progress.start("ranges of keys and values", config.decoder.layers)
    stages.hidden_states(checkpoint, embeds, np.array([-1]), progress, seen)
    progress.finish()
    return KvScales(_steps(keys), _steps(values))


def key_range(keys: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """The largest size of each channel [kv_heads, head_dim] that keys [1, kv_heads, positions, head_dim] can have.

    The keys are rotated. Another position turns a pair of channels by another angle, so that what bounds both is the
    pair's length.
    """
    half = config.rotary_dim // 2
    pairs = np.hypot(keys[..., :half], keys[..., half : 2 * half])
    return np.concatenate([pairs, pairs, np.abs(keys[..., 2 * half :])], axis=-1).max((0, 2))


def _steps(ranges: list[np.ndarray]) -> np.ndarray:
    # A channel that is always 0 needs some scale.
    return np.maximum(np.stack(ranges) * (HEADROOM / _LARGEST), 1e-8).astype(np.float32)


def _talk(checkpoint, table: np.ndarray, pictures: Iterable[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    """Rows [positions, hidden] of a conversation in the model's own template, a picture before each question, until
    there are enough."""
    from tokenizers import Tokenizer

    config: ModelConfig = checkpoint.config
    tokenizer, template = Tokenizer.from_file(str(config.text.tokenizer)), config.text.template
    count, wanted = 0, min(_POSITIONS, config.decoder.context)
    pictures = list(pictures)
    prefix = template["system"] + template["after_system"] + template["before_user"]
    for number in range(wanted):
        if count >= wanted:
            return
        question, answer = _TALK[number % len(_TALK)]
        text = template["after_image"] + question + template["after_user"] + template["before_answer"]
        text += template["answer_separator"] + answer
        before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in (prefix, text))
        parts = [table[np.array(before, np.int64)]]
        # Room for the text of every question before the pictures come a second time.
        if number < max(1, wanted // (2 * config.vision.tokens_per_image)):
            features, _ = stages.patch_features(checkpoint, pictures[number % len(pictures)], Progress(None))
            parts.append(stages.image_embeds(checkpoint, features)[0])
        after = np.array([*after, template["after_answer"]], np.int64)
        rows = np.concatenate([*parts, table[after]]).astype(np.float32)
        count += len(rows)
        yield rows
        prefix = template["before_user"]

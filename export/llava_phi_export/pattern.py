"""Pictures made of whole numbers: every machine draws the same bytes."""

from __future__ import annotations

import numpy as np

from .config import ImageConfig


def pattern(size: int, number: int = 0) -> np.ndarray:
    """RGB bytes [size, size, 3]: a slope of colour a channel, a disc, a bar and a checkered corner.

    `number` turns the slopes and moves the shapes, for a set of different pictures.
    """
    y, x = np.mgrid[:size, :size].astype(np.int64)
    last = max(size - 1, 1)
    slopes = [x, y, last - x, last - y, (x + y) // 2, (x - y + last) // 2]
    picture = np.stack([slopes[(number + channel) % 6] * 255 // last for channel in range(3)], axis=-1)
    step = 7 * number + 3
    across, down = (step * size // 16) % size, (5 * step * size // 32) % size
    disc = (x - across) ** 2 + (y - down) ** 2 < (size * (2 + number % 3) // 8) ** 2
    picture[disc] = [(83 * number + shift) % 256 for shift in (230, 40, 90)]
    bar = abs((x - down) + 2 * (y - across)) < size // 5
    picture[bar] = [(61 * number + shift) % 256 for shift in (20, 60, 200)]
    square = max(size // 16, 1)
    corner = (x < size // 3) & (y >= size - size // 3)
    picture[corner] = np.where((x // square + y // square) % 2, 245, 10)[corner][:, None]
    return picture.astype(np.uint8)


def pixel_values(picture: np.ndarray, image: ImageConfig) -> np.ndarray:
    """The bytes of an RGB picture of the right size as the encoder takes them: f32 [1, 3, size, size]."""
    values = (picture.astype(np.float64) * image.rescale).astype(np.float32)
    values = (values - np.array(image.mean, np.float32)) / np.array(image.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))[None]

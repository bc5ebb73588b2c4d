"""Pixel values as the model's reference makes them, with Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .config import ImageConfig


def pad_to_square(image: Image.Image, color: tuple) -> Image.Image:
    """The image in the middle of a square of the colour, as the original's `expand2square` lays it."""
    width, height = image.size
    if width == height:
        return image
    edge = max(width, height)
    square = Image.new("RGB", (edge, edge), color)
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


class PillowImage:
    """Pixel values as `CLIPImageProcessor` (the Pillow one) makes them."""

    def __init__(self, config: ImageConfig):
        self.config = config

    def resized(self, image: Image.Image, fit: str | None = None) -> Image.Image:
        """`size` x `size` RGB, before the values are scaled; `fit` overrides the configuration's."""
        size, image = self.config.size, image.convert("RGB")
        if (fit or self.config.fit) == "pad":
            image = pad_to_square(image, tuple(self.config.pad_color))
        width, height = image.size
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def pixel_values(self, image: Image.Image, fit: str | None = None) -> np.ndarray:
        """[1, 3, size, size] f32."""
        values = np.asarray(self.resized(image, fit)).astype(np.float64) * self.config.rescale
        mean, std = np.array(self.config.mean, np.float32), np.array(self.config.std, np.float32)
        values = (values.astype(np.float32) - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))[None]

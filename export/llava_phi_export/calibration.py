"""The pictures from which the ranges of activations are taken: the user's, or made ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .config import CheckpointError, ImageConfig
from .pattern import pattern, pixel_values

MADE = 8
_MOST = 64


class Calibration:
    """Pixel values [1, 3, size, size] f32, one picture at a time."""

    def __init__(self, directory: Path | None, image: ImageConfig):
        self._image, self._directory = image, directory
        self._paths = None if directory is None else _images(directory)

    def note(self, user: str) -> str:
        """What the ranges that `user` takes from the pictures are worth."""
        if self._paths is None:
            return (
                f"{user} takes its ranges from {MADE} made pictures; real ones are better, give some with --calibration"
            )
        return f"{user} takes its ranges from {len(self._paths)} pictures of {self._directory}"

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._paths is None:
            for number in range(MADE):
                yield pixel_values(pattern(self._image.size, number), self._image)
            return
        from .pillow_image import PillowImage
        from .samples import open_image

        recipe = PillowImage(self._image)
        for path in self._paths:
            yield recipe.pixel_values(open_image(path))


def _images(directory: Path) -> list[Path]:
    try:
        from .samples import EXTENSIONS
    except ImportError as error:
        raise CheckpointError("--calibration needs Pillow; pip install 'llava-phi-export[torch]'") from error
    if not directory.is_dir():
        raise CheckpointError(f"--calibration {directory} is no directory")
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise CheckpointError(f"--calibration {directory} holds no image")
    # More pictures widen ranges to their outliers and cost time, nothing else.
    return paths[:_MOST]

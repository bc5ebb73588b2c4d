"""Pictures and questions for a comparison when the user brings none: made from a seed, of awkward sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .config import CheckpointError

_SIZES = ((64, 64), (97, 31), (20, 75), (1, 9), (301, 200), (336, 337), (128, 1), (50, 51), (640, 480), (33, 99))
_PROMPTS = (
    "What is in this picture?",
    "Describe the image.",
    "Is there a red circle on the left?\nAnswer the question using a single word or phrase.",
    "Übersetze: 你好, мир! 🙂",
    "def area(r):\n    return 3.14 * r ** 2   # what does it do?",
    "How many    objects can you\tcount?",
    "What colour is the square below the triangle, and what shape is to its right?",
)
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Sample:
    """A prompt of one turn and its images, each RGB."""

    name: str
    images: tuple[Image.Image, ...]
    prompt: str


def picture(seed: int) -> Image.Image:
    """A picture of gradients, noise and shapes; the size goes through a list of awkward ones."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    width, height = _SIZES[seed % len(_SIZES)]
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    noise = generator.integers(0, 256, (height, width, 3))
    share = generator.random()
    image = Image.fromarray((share * ramp + (1 - share) * noise).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = int(generator.integers(0, width)), int(generator.integers(0, height))
        color = tuple(int(value) for value in generator.integers(0, 256, 3))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((x, y, x + max(width // 3, 1), y + max(height // 3, 1)), fill=color)
    return image


def open_image(path: Path) -> Image.Image:
    """An image file as the engine sees it: turned upright, RGB."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path} cannot be read as an image: {error}") from error


def samples(count: int, images: list[Path], directory: Path | None, prompts: Path | None) -> list[Sample]:
    """`count` samples, or as many as there are images of the user's: one image each, but for two.

    Of the made ones the second has no image and the third has two.
    """
    paths = list(images)
    if directory is not None:
        if not directory.is_dir():
            raise CheckpointError(f"--images {directory} is no directory")
        paths += sorted(path for path in directory.iterdir() if path.suffix.lower() in EXTENSIONS)
        if not paths:
            raise CheckpointError(f"--images {directory} holds no image")
    texts = list(_PROMPTS)
    if prompts is not None:
        try:
            texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--prompts {prompts} cannot be read: {error}") from error
        if not texts:
            raise CheckpointError(f"--prompts {prompts} holds no line of text")
    if paths:
        return [Sample(path.name, (open_image(path),), texts[i % len(texts)]) for i, path in enumerate(paths)]
    found = []
    for i in range(count):
        pictures = {1: (), 2: (picture(2), picture(102))}.get(i, (picture(i),))
        found.append(Sample(f"made-{i}", pictures, texts[i % len(texts)]))
    return found

"""Renders 64 x 64 images of the easy-VQA kind, re-encodes official ones, and keeps both in one array with their labels."""

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image

SIDE = 64
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
OFFICIAL = Path(easy_vqa.__file__).parent / "data"
HELD_OUT = 181  # labelled official training images kept for validation, the last ones


@dataclass
class Scene:
    """What an image shows: one shape. Lengths are in pixels of the 64 x 64 image."""

    shape: str
    color: str
    x: float  # centre of the shape's bounding box
    y: float
    extent: float  # longer side of the bounding box
    dark: bool  # background


def resize_and_crop(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Shortest edge to `side` (Pillow bicubic, the long edge floored), then the central square: CLIP's preprocessing."""
    width, height = image.size
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after one round through JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def coverage(shape, x, y, width, height, angle, px, py, pixel):
    """How much of each pixel the shape covers, 0..1, from signed distances; `pixel` is a pixel's side."""
    sin, cos = np.sin(angle), np.cos(angle)
    u = (px - x) * cos + (py - y) * sin
    v = (py - y) * cos - (px - x) * sin
    if shape == "circle":
        inside = [width / 2 - np.sqrt(u * u + v * v)]
    elif shape == "rectangle":
        inside = [width / 2 - np.abs(u), height / 2 - np.abs(v)]
    else:  # apex up, base down
        slope = np.hypot(height, width / 2)
        edge = ((v + height / 2) * (width / 2) - np.abs(u) * height) / slope
        inside = [edge, height / 2 - v]
    result = 1.0
    for distance in inside:
        result = result * np.clip(distance / pixel + 0.5, 0, 1)
    return result


def background(rng, ink, px, py):
    """An image-sized background that stays far from the shape's color `ink`, of several kinds."""
    kind = rng.random()

    def light():
        return rng.integers(230, 256, 3).astype(np.float32)

    if kind < 0.55:  # as in easy-VQA
        first = second = light()
    else:  # any tint; half of these are gradients
        while True:
            low = 200 if kind < 0.75 else 30
            first = rng.integers(low, 256, 3).astype(np.float32)
            second = first if rng.random() < 0.5 else np.clip(first + rng.integers(-60, 61, 3), 0, 255)
            if min(np.linalg.norm(ink - first), np.linalg.norm(ink - second)) > 120:
                break
    angle = rng.uniform(0, 2 * np.pi)
    t = np.clip(0.5 + ((px - 32) * np.cos(angle) + (py - 32) * np.sin(angle)) / SIDE, 0, 1)[..., None]
    canvas = first + (second - first) * t
    if rng.random() < 0.15:
        canvas = canvas + rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return canvas, float(((first + second) / 2) @ (0.299, 0.587, 0.114)) < 150


def render(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """One random scene, drawn at 40..300 pixels, perhaps compressed, and brought to 64 x 64."""
    shape = SHAPES[rng.integers(3)]
    color = list(COLORS)[rng.integers(8)]
    width = rng.uniform(7, 33)
    if shape == "circle":
        height = width
    elif shape == "triangle":
        height = width * (0.866 if rng.random() < 0.7 else rng.uniform(0.75, 1.15))
    else:
        height = width * rng.uniform(0.85, 1.18) if rng.random() < 0.4 else rng.uniform(7, 33)
    angle = rng.uniform(-0.26, 0.26) if shape != "circle" and rng.random() < 0.12 else 0.0
    x = rng.uniform(width / 2, SIDE - width / 2)
    y = rng.uniform(height / 2, SIDE - height / 2)

    side = SIDE if rng.random() < 0.35 else round(log_uniform(rng, 40, 300))
    columns = rows = side
    if rng.random() < 0.15:  # not square: the centre is what the model will see
        longer = round(side * rng.uniform(1.02, 1.5))
        columns, rows = (longer, side) if rng.random() < 0.5 else (side, longer)
    pixel = SIDE / side
    px = ((np.arange(columns) + 0.5 - (columns - side) / 2) * pixel)[None, :]
    py = ((np.arange(rows) + 0.5 - (rows - side) / 2) * pixel)[:, None]
    ink = np.array(COLORS[color], np.float32)
    if rng.random() < 0.3:
        ink = np.clip(ink + rng.integers(-12, 13, 3), 0, 255)
    canvas, dark = background(rng, ink, px, py)
    alpha = coverage(shape, x, y, width, height, angle, px, py, pixel)[..., None]
    canvas = canvas + (ink - canvas) * alpha
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    if rng.random() < 0.45:
        image = jpeg(image, int(rng.integers(50, 96)))
    return np.asarray(resize_and_crop(image)), Scene(shape, color, x, y, max(width, height), dark)


def render_many(seed_and_count) -> tuple[np.ndarray, list[Scene]]:
    seed, count = seed_and_count
    rng = np.random.default_rng(seed)
    images, scenes = zip(*(render(rng) for _ in range(count)))
    return np.stack(images), list(scenes)


def official_labels(split: str) -> dict[int, tuple[str, str]]:
    """Image number to (shape, color), from direct questions alone: yes/no questions are often negated."""
    labels = {}
    for question, answer, number in json.loads((OFFICIAL / split / "questions.json").read_text()):
        words = question.rstrip("?").split()
        found = labels.setdefault(number, {})
        if answer in SHAPES:
            found["shape"] = answer
            for word in words:
                if word in COLORS:
                    found["color"] = word
        elif answer in COLORS:
            found["color"] = answer
            for word in words:
                if word in SHAPES:
                    found["shape"] = word
    return {n: (f["shape"], f["color"]) for n, f in sorted(labels.items()) if len(f) == 2}


def official_image(split: str, number: int) -> Image.Image:
    return Image.open(OFFICIAL / split / "images" / f"{number}.png").convert("RGB")


def locate(pixels: np.ndarray, shape: str, color: str) -> Scene:
    """The scene of an official image whose shape and color are known: where that color is."""
    near = np.abs(pixels.astype(int) - COLORS[color]).sum(-1) < 60
    rows, columns = np.nonzero(near)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return Scene(shape, color, (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top), False)


def reencode(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image at another size (40..300) and through JPEG (quality 50..95), as a user's copy might be."""
    side = round(log_uniform(rng, 40, 300))
    filter_ = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)[rng.integers(3)]
    return jpeg(image.resize((side, side), filter_), int(rng.integers(50, 96)))


def official_train(seed: int, copies: int):
    """Labelled official training images, each with re-encoded copies; and the held-out ones for validation."""
    rng = np.random.default_rng(seed)
    images, scenes, held_images, held_scenes = [], [], [], []
    labels = list(official_labels("train").items())
    for index, (number, (shape, color)) in enumerate(labels):
        image = official_image("train", number)
        pixels = np.asarray(image)
        scene = locate(pixels, shape, color)
        if index >= len(labels) - HELD_OUT:
            held_images.append(pixels)
            held_scenes.append(scene)
            continue
        images.append(pixels)
        scenes.append(scene)
        for _ in range(copies):
            images.append(np.asarray(resize_and_crop(reencode(image, rng))))
            scenes.append(scene)
    return (np.stack(images), scenes), (np.stack(held_images), held_scenes)


def rendered(seed: int, count: int, workers: int = 2, chunk: int = 1000) -> tuple[np.ndarray, list[Scene]]:
    """`count` rendered scenes; the result does not depend on `workers`."""
    jobs = [((seed, i), chunk) for i in range(count // chunk)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(render_many, jobs))
    return np.concatenate([p[0] for p in parts]), [s for p in parts for s in p[1]]

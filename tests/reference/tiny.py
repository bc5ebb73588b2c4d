"""Makes tiny.json: what PyTorch computes with the checkpoint of models/tiny, for tests/fidelity.rs.

    python tests/reference/tiny.py                  after models/tiny/checkpoint or models/tiny/package changed
    python tests/reference/tiny.py CHECKPOINT       the same from another directory

Each image is drawn from integers, as tests/support.rs draws it, or is a file of tests/images. Of each stage every k-th
value is kept, its number of values and its L2 norm. An answer is 64 greedy tokens, whatever they are: the end token
does not end it. It is cut before a token whose logit leads by less than 1e-3, which sums in another order could turn.
Needs: the exporter of export/ with its extra `torch`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "export"))

from llava_phi_export.checkpoint import Checkpoint  # noqa: E402
from llava_phi_export.reference import Reference  # noqa: E402

TOKENS = 64
LEAD = 1e-3
IMAGE_ID = -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "<|endoftext|>"


def drawing(width, height, background, *shapes):
    names = ("kind", "color", "x", "y", "radius")
    return {
        "width": width,
        "height": height,
        "background": background,
        "shapes": [dict(zip(names, shape, strict=True)) for shape in shapes],
    }


RED, GREEN, BLUE = [200, 30, 40], [30, 160, 60], [40, 60, 200]
LIGHT, DARK = [230, 228, 235], [40, 38, 44]
IMAGES = {
    "red circle": {"draw": drawing(64, 64, LIGHT, ("circle", RED, 30, 34, 14))},
    "blue square": {"draw": drawing(64, 64, LIGHT, ("square", BLUE, 40, 24, 11))},
    "green triangle": {"draw": drawing(128, 128, LIGHT, ("triangle", GREEN, 50, 70, 30))},
    "small": {"draw": drawing(64, 64, DARK, ("circle", [220, 210, 60], 12, 50, 7))},
    "wide": {"draw": drawing(120, 50, LIGHT, ("circle", BLUE, 60, 25, 18))},
    "wide, padded": {"draw": drawing(120, 50, LIGHT, ("circle", BLUE, 60, 25, 18)), "fit": "pad"},
    "tall, padded": {"draw": drawing(37, 201, DARK, ("square", RED, 18, 100, 16)), "fit": "pad"},
    "two shapes": {
        "draw": drawing(200, 150, LIGHT, ("square", GREEN, 60, 70, 35), ("triangle", RED, 140, 80, 40)),
    },
    "one pixel": {"draw": drawing(1, 1, RED)},
    "turned file": {"file": "exif-rotated-6.png"},
    "file with alpha": {"file": "alpha.png", "fit": "pad"},
}
# Turns of a name or text each: an image is named in angle brackets, every other turn is an answer.
CASES = [
    ["<red circle>what color is the shape?"],
    ["<red circle>what shape is in the image?"],
    ["<red circle>is there a blue shape?"],
    ["<blue square>what shape is present?"],
    ["<blue square>is there not a circle in the image?"],
    ["<blue square>describe the image."],
    ["<green triangle>what is in the picture?"],
    ["<green triangle>what shape is present?\nAnswer the question using a single word or phrase."],
    ["<small>what is the color of the circle?"],
    ["<small>how big is the shape?"],
    ["<wide>what color is it?"],
    ["<wide, padded>what color is it?"],
    ["<wide, padded>describe the image in one sentence."],
    ["<tall, padded>what is in the image?"],
    ["<two shapes>what do you see?"],
    ["<one pixel>is the background light or dark?"],
    ["<turned file>describe the image."],
    ["<file with alpha>what does the image show?"],
    ["what color is the shape?"],
    ["\u00dcbersetze:  \u4f60\u597d, \u043c\u0438\u0440! \U0001f642\t<image> </s> def f(x):\n    return x"],
    ["<red circle>what shape is this?", "circle", "what color is it?"],
    ["<blue square>what is in the image?", "a blue square", "where is the shape?", "in the middle", "is it red?"],
    ["<red circle><blue square>what is in the second image?"],
    ["<green triangle>what is this?", "a green triangle", "<small>do the images show the same shape?"],
]


def draw(spec):
    """The picture as tests/support.rs draws it."""
    width, height = spec["width"], spec["height"]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = spec["background"]
    y, x = np.mgrid[:height, :width]
    for shape in spec["shapes"]:
        dx, dy, radius = x - shape["x"], y - shape["y"], shape["radius"]
        inside = {
            "circle": dx * dx + dy * dy <= radius * radius,
            "square": np.maximum(abs(dx), abs(dy)) <= radius,
            "triangle": (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius),
        }[shape["kind"]]
        pixels[inside] = shape["color"]
    return Image.fromarray(pixels)


def picture(spec):
    if "draw" in spec:
        return draw(spec["draw"])
    with Image.open(HERE.parent / "images" / spec["file"]) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def stage(values, kept):
    """A sample of an array, exact in f32."""
    flat = np.ascontiguousarray(values, np.float32).ravel()
    every = max(len(flat) // kept, 1)
    # An odd step visits every channel.
    every += 1 - every % 2
    return {
        "count": len(flat),
        "every": every,
        "values": [float(f"{value:.9g}") for value in flat[::every]],
        "norm": float(np.linalg.norm(flat.astype(np.float64))),
    }


def messages(turns):
    """The turns in the form of a saved conversation, and the names of their images."""
    names, out = [], []
    for number, turn in enumerate(turns):
        parts = []
        while number % 2 == 0 and turn.startswith("<") and turn[1 : turn.index(">")] in IMAGES:
            name, turn = turn[1:].split(">", 1)
            parts.append({"image": len(names)})
            names.append(name)
        role = "assistant" if number % 2 else "user"
        out.append({"role": role, "parts": [*parts, {"text": turn}]})
    return out, names


def token_ids(tokenizer, conversation):
    """What `tokenizer_image_token` makes of `conv_phi_v0`: texts between images alone, -200 for an image."""
    # Text of the user is never a special token or an image, so neither is looked for in it.
    chunks = [SYSTEM + " "]
    ids = []

    def flush():
        if chunks[0]:
            tokenizer.encode_special_tokens = True
            ids.extend(tokenizer.encode(chunks[0], add_special_tokens=False).ids)
        chunks[0] = ""

    for message in conversation:
        chunks[0] += "USER: " if message["role"] == "user" else " "
        for part in message["parts"]:
            if "text" in part:
                chunks[0] += part["text"]
            else:
                flush()
                ids.append(IMAGE_ID)
                chunks[0] += "\n"
        if message["role"] == "user":
            chunks[0] += " ASSISTANT:"
        else:
            flush()
            ids.append(tokenizer.token_to_id(END))
    flush()
    return ids


def spans(ids):
    """The texts between images, one list more than there are images."""
    found = [[]]
    for token in ids:
        if token == IMAGE_ID:
            found.append([])
        else:
            found[-1].append(token)
    return found


def answer(reference, embeds):
    greedy = reference.greedy(embeds, TOKENS)
    top = np.sort(greedy.logits, axis=1)[:, -2:]
    close = np.flatnonzero(top[:, 1] - top[:, 0] < LEAD)
    ids = greedy.ids[: close[0] if len(close) else TOKENS]
    assert max(ids, default=0) < reference.tokenizer.get_vocab_size(), "a padding row of the logits leads"
    return ids, greedy.logits[0]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint", nargs="?", type=Path, default=ROOT / "models" / "tiny" / "checkpoint")
    with Checkpoint.open(arguments.parse_args().checkpoint) as checkpoint:
        reference = Reference(checkpoint)
        images, embeds = {}, {}
        for name, spec in IMAGES.items():
            pixels = reference.image.pixel_values(picture(spec), spec.get("fit"))
            features = reference.patch_features(pixels)
            embeds[name] = reference.image_embeds(features)
            images[name] = spec | {
                "pixel_values": stage(pixels, 60),
                "patch_features": stage(features, 120),
                "image_embeds": stage(embeds[name], 120),
            }
        cases = []
        for turns in CASES:
            conversation, names = messages(turns)
            ids = token_ids(reference.tokenizer, conversation)
            rows = np.concatenate([embeds[name] for name in names]) if names else None
            greedy, logits = answer(reference, reference.embeds(spans(ids), rows))
            cases.append(
                {
                    "messages": conversation,
                    "images": names,
                    "ids": ids,
                    "logits": stage(logits, 100),
                    "answer": greedy,
                }
            )
            print(f"{len(greedy):3} {turns[-1]!r}: {reference.tokenizer.decode(greedy)[:60]!r}")
        result = {"checkpoint": checkpoint.sha256(), "tokens": TOKENS, "images": images, "cases": cases}
    (HERE / "tiny.json").write_text(join_numbers(json.dumps(result, indent=1)) + "\n", encoding="utf-8")


def join_numbers(text):
    """Puts lists of numbers on one line."""
    return re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


if __name__ == "__main__":
    main()

"""Makes what tests/preprocess.rs compares with: Pillow's and transformers' results, as hashes in image.json.

    python tests/reference/image.py                 writes tests/reference/image.json from tests/images
    python tests/reference/image.py --images        makes tests/images again first (needs scikit-image)
    python tests/reference/image.py --photos DIR    writes scikit-image's photographs and their hashes to DIR

Needs pillow 13, transformers 5.23 (its CLIPImageProcessorPil) and numpy.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import PIL
import transformers
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

HERE = Path(__file__).parent
IMAGES = HERE.parent / "images"
PAD = (122, 116, 104)  # int(mean * 255) of CLIP's mean


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def synthetic(kind, width, height):
    """The same bytes as `synthetic` in tests/preprocess.rs: 32-bit integers only."""
    index = np.arange(width * height * 3, dtype=np.uint32)
    if kind == "noise":
        value = index * np.uint32(2654435761) + np.uint32(width * 31 + height)
        value ^= value >> np.uint32(15)
        value *= np.uint32(2246822519)
        value ^= value >> np.uint32(13)
        value >>= np.uint32(24)
    else:
        channel, pixel = index % 3, index // 3
        x, y = pixel % width, pixel // width
        if kind == "edges":
            value = ((x // 5 + y // 3 + channel) % 2) * 255
        else:
            value = (x * (channel + 2) // 3 + y * (4 - channel) // 2) % 256
    return value.astype(np.uint8).reshape(height, width, 3)


def shapes():
    """(kind, width, height, size): awkward ones by hand, then more by a generator."""
    kinds = ["noise", "edges", "slope"]
    sizes = [336, 64, 28, 224, 37]
    by_hand = [
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 3),
        (3, 1),
        (1, 7),
        (7, 1),
        (1, 64),
        (64, 1),
        (1, 1000),
        (1000, 1),
        (2, 2),
        (2, 3),
        (3, 2),
        (3, 3),
        (4, 4),
        (5, 4),
        (4, 5),
        (2, 500),
        (500, 2),
        (3, 4999),
        (17, 4001),
        (4001, 17),
        (28, 28),
        (37, 37),
        (64, 64),
        (224, 224),
        (336, 336),
        (336, 337),
        (337, 336),
        (335, 336),
        (336, 335),
        (337, 901),
        (901, 337),
        (448, 336),
        (336, 448),
        (672, 336),
        (336, 672),
        (672, 672),
        (673, 671),
        (1024, 768),
        (768, 1024),
        (640, 480),
        (480, 640),
        (1001, 1000),
        (1000, 1001),
        (999, 333),
        (333, 999),
        (28, 29),
        (29, 28),
        (63, 64),
        (65, 64),
        (127, 129),
        (128, 64),
        (56, 56),
        (74, 37),
        (37, 74),
        (1920, 1080),
        (1080, 1920),
        (2000, 30),
        (30, 2000),
        (1500, 1500),
        (100, 100),
        (50, 51),
        (11, 13),
        (13, 11),
        (9, 300),
    ]
    cases = [(kinds[n % 3], *shape, sizes[n % 5]) for n, shape in enumerate(by_hand)]
    cases += [("noise", *shape, 336) for shape in by_hand if max(shape) < 700]
    cases += [("noise", 5000, 3, 64), ("edges", 3, 5000, 64), ("noise", 5000, 3, 336), ("noise", 3000, 2500, 336)]
    state = 1
    while len(cases) < 240:
        state = (state * 1103515245 + 12345) % 2**31
        width = 1 + (state >> 8) % (40 if state % 3 == 0 else 900)
        state = (state * 1103515245 + 12345) % 2**31
        height = 1 + (state >> 8) % (40 if state % 5 == 0 else 900)
        cases.append((kinds[len(cases) % 3], width, height, sizes[len(cases) % 5]))
    return cases


def expand2square(image):
    """What LLaVA does before the processor when a checkpoint pads."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), PAD)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def processed(image, size, fit):
    """(u8 [size, size, 3], f32 [3, size, size]) of the reference."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    if fit == "pad":
        image = expand2square(image)
    resized = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    values = processor(image, return_tensors="np")["pixel_values"][0]
    assert resized.dtype == np.uint8 and values.dtype == np.float32
    return resized.transpose(1, 2, 0), values


def hashes(image, size, fit):
    resized, values = processed(image, size, fit)
    return {"size": size, "fit": fit, "u8": sha(resized), "f32": sha(values)}


def resizes():
    for kind, width, height, size in shapes():
        image = Image.fromarray(synthetic(kind, width, height))
        for fit in ("center_crop", "pad"):
            yield {"kind": kind, "width": width, "height": height, **hashes(image, size, fit)}


def opened(path):
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def decodes():
    """What Pillow reads from each file of tests/images, or that it refuses."""
    for path in sorted(IMAGES.iterdir()):
        if path.suffix == ".md" or path.is_dir():
            continue
        try:
            rgb = np.asarray(opened(path))
            yield {"file": path.name, "width": rgb.shape[1], "height": rgb.shape[0], "u8": sha(rgb)}
        except Exception as error:
            yield {"file": path.name, "refused": type(error).__name__}


def photos(folder):
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for path in sorted(Path(data.__file__).parent.iterdir()):
        if path.suffix not in (".png", ".jpg"):
            continue
        image = Image.open(path).convert("RGB")
        name = f"{path.stem}.png"
        image.save(folder / name)
        for size in (336, 64):
            for fit in ("center_crop", "pad"):
                cases.append({"file": name, **hashes(image, size, fit)})
    write(folder / "photos.json", {"resize": cases})


def write(path, content):
    lists = (
        f'  "{k}": [\n    ' + ",\n    ".join(map(json.dumps, v)) + "\n  ]"
        for k, v in content.items()
        if isinstance(v, list)
    )
    plain = (f'  "{k}": {json.dumps(v)}' for k, v in content.items() if not isinstance(v, list))
    path.write_text("{\n" + ",\n".join([*plain, *lists]) + "\n}\n")


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--images", action="store_true")
    options.add_argument("--photos", type=Path, metavar="DIR")
    options = options.parse_args()
    if options.photos:
        return photos(options.photos)
    if options.images:
        sys.path.insert(0, str(HERE))
        import image_files

        image_files.make(IMAGES)
    write(
        HERE / "image.json",
        {
            "made_with": f"pillow {PIL.__version__}, transformers {transformers.__version__}, numpy {np.__version__}",
            "resize": list(resizes()),
            "decode": list(decodes()),
        },
    )


if __name__ == "__main__":
    main()

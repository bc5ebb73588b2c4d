"""Makes one file of a peer's model: `convert.py WHAT SOURCE TARGET`, in the peers' environment."""

import argparse
from pathlib import Path

FORMS = ("q4_0", "q4_k_m")


def picture(_, target):
    """Slopes with grain over them, of a small photograph's size."""
    import numpy as np
    from PIL import Image

    row, column = np.mgrid[0:480, 0:640]
    slopes = np.stack([column / 639, row / 479, (row + column) / 1118], -1) * 255
    grain = np.random.default_rng(0).normal(0, 12, slopes.shape)
    Image.fromarray((slopes + grain).clip(0, 255).astype(np.uint8)).save(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("text", "genai-engine", "mmproj", "gguf", "picture", *FORMS))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    # Each needs other libraries, some of them slow to come.
    if options.what == "text":
        from text_checkpoint import write
    elif options.what == "genai-engine":
        from genai_engine import write
    elif options.what == "mmproj":
        from gguf_vision import write
    elif options.what == "gguf":
        from gguf_text import write
    elif options.what == "picture":
        write = picture
    else:
        from gguf_quantize import quantize

        def write(source, target):
            quantize(source, target, options.what, options.threads)

    write(options.source, options.target)


if __name__ == "__main__":
    main()

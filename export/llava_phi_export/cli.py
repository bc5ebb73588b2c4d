"""The command line: export, and the first word for what else the package can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .config import CheckpointError
from .errors import ExportError
from .quantize import ACCURACY_LEVELS, BLOCK_SIZES, METHODS, QuantizeOptions

OK, BAD, INTERRUPTED = 0, 2, 130

# For processors: the decoder whose cache is small, the one that reads prompts faster, and the small encoder.
DEFAULT_VARIANTS = ("cpu-int4", "cpu-int4-kv-f32", "cpu-int8")

_EPILOG = """\
other commands:
  llava-phi-export synthesize ...   writes a random checkpoint of any shape
  llava-phi-export check ...        compares a package with PyTorch, stage by stage
  llava-phi-export measured ...     records what fewer visual tokens cost a package
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for bad use or input, 130 when it was interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        match argv[:1]:
            case ["synthesize"]:
                from . import synthesize

                return synthesize.main(argv[1:]) or OK
            case ["check"]:
                from . import check

                return check.main(argv[1:]) or OK
            case ["measured"]:
                from . import measured

                return measured.main(argv[1:]) or OK
        return _export(_parser().parse_args(argv))
    except (CheckpointError, ExportError) as error:
        return _refuse(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "a file could not be read or written: "
        return _refuse(where + (error.strerror or str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from .export import CHOICES

    parser = argparse.ArgumentParser(
        prog="llava-phi-export",
        description="Exports a LLaVA-Phi checkpoint to a package that llava-phi runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="directory with config.json and the weights")
    add("package", metavar="PACKAGE", type=Path, help="directory to write")
    add(
        "--variant", action="append", choices=[*CHOICES, "all"], dest="variants",
        help="what to export, may be given several times (default: cpu-int4, cpu-int4-kv-f32, cpu-int8)",
    )  # fmt: skip
    add("--vision-tower", metavar="DIR", help="the vision tower, when the checkpoint does not hold it")
    add("--projector", metavar="PATH", help="the projector's file or directory, when the checkpoint does not hold it")
    add("--name", help="what the model is called (default: the checkpoint's name)")
    add("--force", action="store_true", help="replace an existing package, once the new one is whole")
    add(
        "--calibration", metavar="DIR", type=Path,
        help="a directory of pictures that show nnapi-u8 and caches of int8 which numbers occur (default: made ones)",
    )  # fmt: skip
    group = parser.add_argument_group("caches of a fixed size (tensorrt, coreml, qnn, nnapi)")
    group.add_argument(
        "--capacity", type=int, metavar="N", help="positions of the cache, at most the model's context (default: all)"
    )
    group.add_argument(
        "--chunk", type=int, metavar="N",
        help="positions of one run, at most the capacity (default: 16; tensorrt-fp16 256, tensorrt-delta-fp16 128)",
    )  # fmt: skip
    group = parser.add_argument_group("cpu-int4, cuda-int4")
    defaults = QuantizeOptions()
    group.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=defaults.block_size,
        help="columns that share a scale (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--accuracy-level", type=int, choices=ACCURACY_LEVELS, default=defaults.accuracy_level,
        help="4 rounds activations to int8, 0 and 1 keep them f32 and are slow (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--quantizer", choices=METHODS, default=defaults.method,
        help="rtn rounds to nearest; k_quant searches scales and zero points, slowly (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--lm-head-bits", type=int, choices=(4, 8), default=defaults.lm_head_bits,
        help="bits of the last matrix (default: %(default)s)",
    )  # fmt: skip
    add(
        "--inline-limit", type=_size, metavar="BYTES", default=16 << 20,
        help="graphs with less weight than this are one file (default: %(default)s)",
    )  # fmt: skip
    add("--version", action="version", version=f"llava-phi-export {__version__}")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from .checkpoint import Checkpoint
    from .export import CHOICES, ExportOptions, export
    from .progress import Progress

    variants = arguments.variants or DEFAULT_VARIANTS
    options = ExportOptions(
        variants=CHOICES if "all" in variants else tuple(dict.fromkeys(variants)),
        name=arguments.name,
        force=arguments.force,
        quantize=QuantizeOptions(
            arguments.block_size, arguments.accuracy_level, arguments.quantizer, arguments.lm_head_bits
        ),
        inline_limit=arguments.inline_limit,
        calibration=arguments.calibration,
        capacity=arguments.capacity,
        chunk=arguments.chunk,
    )
    checkpoint = Checkpoint.open(
        arguments.checkpoint, vision_tower=arguments.vision_tower, projector=arguments.projector
    )
    with checkpoint:
        for note in checkpoint.notes:
            print(f"note: {note}", file=sys.stderr)
        export(checkpoint, arguments.package, options, Progress(sys.stderr))
    print(arguments.package)
    return OK


def _size(text: str) -> int:
    size = int(text)
    if size < 0:
        raise ValueError
    return size


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return BAD

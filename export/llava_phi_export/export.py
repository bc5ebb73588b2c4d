"""A checkpoint to a package: each component built once for the variants that use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import embedding, kv_scales, manifest, variants, vision_variants
from .attention import KvScales
from .calibration import Calibration
from .config import ModelConfig
from .dialect import Window
from .errors import ExportError
from .goldens import FILE, Goldens
from .graph import I8, Graph, share_data
from .package import new_package
from .progress import Progress
from .quantize import QuantizeOptions
from .rounding import Rounding
from .tolerances import tolerance
from .variants import VARIANTS
from .vision_variants import VISION_VARIANTS

# All that may be exported; those after the first have no decoder.
CHOICES = (*VARIANTS, *VISION_VARIANTS)


@dataclass(frozen=True)
class ExportOptions:
    """What is exported and how. A graph whose weights are smaller than `inline_limit` bytes is one file.

    `capacity` and `chunk` are the positions of a cache of fixed size and of one run of its decoder; None leaves them to
    the model's context and to the variant. `calibration` is a directory of pictures that show which
    numbers occur, for `nnapi-u8` and for caches of int8.
    """

    variants: tuple[str, ...] = ("cpu-int4",)
    name: str | None = None
    force: bool = False
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    inline_limit: int = 16 << 20
    capacity: int | None = None
    chunk: int | None = None
    calibration: Path | None = None


def export(checkpoint, target: Path, options: ExportOptions, progress: Progress) -> None:
    """Writes the package of `checkpoint` to the directory `target`.

    Raises `ExportError` for what the user can mend; `target` is then as it was.
    """
    config: ModelConfig = checkpoint.config
    if not set(options.variants) & set(VARIANTS):
        raise ExportError(f"{' and '.join(options.variants)} alone has no decoder; add --variant cpu-int4")
    with new_package(target, force=options.force) as root:
        write = _Writer(root, checkpoint, options, progress)
        shutil.copyfile(config.text.tokenizer, write.add("tokenizer.json"))
        dtype = embedding.write(write.add("embeddings.bin"), checkpoint)
        table = embedding.read(root / "embeddings.bin", dtype, checkpoint)
        golden = Goldens(checkpoint, table, progress)
        if any(VARIANTS[name].decoder.kv_dtype == I8 for name in VARIANTS if name in options.variants):
            pictures = Calibration(options.calibration, config.image)
            progress.note(pictures.note("the cache of int8"))
            write.kv_scales = kv_scales.measure(checkpoint, table, pictures, progress)
        del table  # an open mapping keeps Windows from moving the package
        goldens = golden.write(write.add(FILE))
        built = {}
        for name in VARIANTS:
            if name in options.variants:
                built[name] = variants.build(name, write, config, options.capacity, options.chunk)
        for name in VISION_VARIANTS:
            if name in options.variants:
                built[name] = vision_variants.build(name, write, config, options.calibration)
        rounding = Rounding(checkpoint, golden, progress)
        for name, parts in built.items():
            parts["tolerance"] = tolerance(name, parts, root, golden, rounding)
        rotary = None
        if any(map(variants.reads_rotary, built.values())):
            rotary = variants.write_rotary(write.add("rotary.bin"), config.decoder)
        progress.start("hashes", 2)
        files = manifest.file_table(root, write.files)
        progress.step()
        content = manifest.manifest(
            config,
            name=options.name or config.name,
            sha256=checkpoint.sha256(),
            embedding=manifest.embedding_spec("embeddings.bin", checkpoint.shape(embedding.TENSOR), dtype),
            variants=built,
            rotary=rotary,
            goldens=goldens,
            files=files,
        )
        progress.finish()
        manifest.write(root, content)


class _Writer:
    """Writes the files of one package and remembers them."""

    def __init__(self, root: Path, checkpoint, options: ExportOptions, progress: Progress):
        self.root, self._checkpoint, self.options, self.progress = root, checkpoint, options, progress
        self.files: list[Path] = []
        self._specs: dict[Path, dict] = {}
        self.kv_scales: KvScales | None = None

    def add(self, relative: str) -> Path:
        """The path of a file that is about to be written."""
        path = self.root / relative
        self.files.append(path)
        return path

    def graph(
        self, folder: str | Path, component: str, dialect: type, build: Callable, config, *,
        window: Window | None = None, file: str | None = None,
    ) -> dict:  # fmt: skip
        """Builds one component in one dialect, unless the file is there; returns its part of the manifest."""
        path = self.root / folder / f"{file or component}.onnx"
        return self.made(path, lambda: self.build(path, component, dialect, build, config, window))

    def made(self, path: Path, make: Callable[[], list[Path]]) -> dict:
        """Has a graph made, unless it is there; returns its part of the manifest."""
        if path not in self._specs:
            path.parent.mkdir(exist_ok=True)
            self.progress.start(path.relative_to(self.root).with_suffix("").as_posix(), 1)
            files = share_data(make())
            self.progress.finish()
            self.files += files
            self._specs[path] = manifest.graph_spec(self.root, files)
        return self._specs[path]

    def build(
        self, path: Path, component: str, dialect: type, build: Callable, config, window: Window | None = None
    ) -> list[Path]:
        """Builds one component in one dialect; returns its files."""
        limit = self.options.inline_limit
        graph = Graph(component, path, opset=dialect.opset, contrib=dialect.contrib, inline_limit=limit)
        self.progress.total(build_steps(component, config))
        speaks = dialect(graph, self._checkpoint, self.options.quantize, window)
        speaks.kv_scales = self.kv_scales
        build(graph, speaks, config, self.progress)
        return graph.save()


def build_steps(component: str, config) -> int:
    """Steps that a component's builder tells to the progress."""
    match component:
        case "vision_encoder":
            return config.used_layers
        case "decoder":
            return config.layers + 1
        case "head":
            return 1
    return config.layers

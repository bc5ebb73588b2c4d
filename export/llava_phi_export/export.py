"""A checkpoint to a package: each component built once for the variants that use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import decoder, embedding, manifest, projector, vision_encoder
from .config import ModelConfig
from .dialect import Contrib, Standard
from .graph import Graph
from .package import new_package
from .progress import Progress
from .quantize import QuantizeOptions

# Best first: the order in which the engine tries them.
VARIANTS = {
    "cpu-int4": Contrib,
    "portable-f32": Standard,
}
_PROVIDERS = {"cpu-int4": ["cpu"], "portable-f32": ["cpu"]}
_SHARED = "shared"


@dataclass(frozen=True)
class ExportOptions:
    """What is exported and how. A graph whose weights are smaller than `inline_limit` bytes is one file."""

    variants: tuple[str, ...] = ("cpu-int4",)
    name: str | None = None
    force: bool = False
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    inline_limit: int = 16 << 20


def export(checkpoint, target: Path, options: ExportOptions, progress: Progress) -> None:
    """Writes the package of `checkpoint` to the directory `target`.

    Raises `ExportError` for what the user can mend; `target` is then as it was.
    """
    config: ModelConfig = checkpoint.config
    with new_package(target, force=options.force) as root:
        write = _Writer(root, checkpoint, options, progress)
        shutil.copyfile(config.text.tokenizer, write.add("tokenizer.json"))
        dtype = embedding.write(write.add("embeddings.bin"), checkpoint)
        vision = write.graph(_SHARED, "vision_encoder", Standard, vision_encoder.build, config.vision)
        project = write.graph(_SHARED, "projector", Standard, projector.build, config.projector)
        variants = {}
        for name, dialect in VARIANTS.items():
            if name not in options.variants:
                continue
            graph = write.graph(name, "decoder", dialect, decoder.build, config.decoder)
            kv = {"form": dialect.kv_form, "dtype": "f32"}
            variants[name] = {
                "vision_encoder": vision,
                "projector": project,
                "decoder": {"graph": graph, "kv": kv},
            }
        progress.start("hashes", 2)
        files = manifest.file_table(root, write.files)
        progress.step()
        content = manifest.manifest(
            config,
            name=options.name or config.name,
            sha256=checkpoint.sha256(),
            embedding=manifest.embedding_spec("embeddings.bin", checkpoint.shape(embedding.TENSOR), dtype),
            variants=variants,
            providers=_PROVIDERS,
            files=files,
        )
        progress.finish()
        manifest.write(root, content)


class _Writer:
    """Writes the files of one package and remembers them."""

    def __init__(self, root: Path, checkpoint, options: ExportOptions, progress: Progress):
        self._root, self._checkpoint, self._options, self._progress = root, checkpoint, options, progress
        self.files: list[Path] = []

    def add(self, relative: str) -> Path:
        """The path of a file that is about to be written."""
        path = self._root / relative
        self.files.append(path)
        return path

    def graph(self, folder: str, component: str, dialect: type, build: Callable, config) -> dict:
        """Builds one component in one dialect; returns its part of the manifest."""
        (self._root / folder).mkdir(exist_ok=True)
        graph = Graph(
            component,
            self._root / folder / f"{component}.onnx",
            opset=dialect.opset,
            contrib=dialect.contrib,
            inline_limit=self._options.inline_limit,
        )
        extra = [self._options.quantize] if dialect is Contrib else []
        self._progress.start(f"{folder}/{component}", build_steps(component, config))
        build(graph, dialect(graph, self._checkpoint, *extra), config, self._progress)
        files = graph.save()
        self._progress.finish()
        self.files += files
        return manifest.graph_spec(self._root, files)


def build_steps(component: str, config) -> int:
    """Steps that a component's builder tells to the progress."""
    match component:
        case "vision_encoder":
            return config.used_layers
        case "decoder":
            return config.layers + 1
    return config.layers

"""Makes the same random model for everybody, once, by each peer's own converter."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FORMS = ("q4_0", "q4_k_m")


@dataclass(frozen=True)
class Files:
    """Where everything lies, below one directory."""

    root: Path
    given: Path | None = None
    given_package: Path | None = None
    forms: tuple[str, ...] = FORMS

    @property
    def checkpoint(self):
        return self.given or self.root / "checkpoint"

    @property
    def package(self):
        return self.given_package or self.root / "package"

    @property
    def text_checkpoint(self):
        return self.root / "text-checkpoint"

    @property
    def genai(self):
        return self.root / "genai-int4-last"

    @property
    def genai_128(self):
        """The same in blocks as large as ours."""
        return self.root / "genai-int4-128"

    @property
    def genai_engine(self):
        """The same with logits of all positions, weights shared."""
        return self.root / "genai-int4-engine"

    @property
    def gguf(self):
        return {form: self.root / f"text-{form}.gguf" for form in self.forms}

    @property
    def mmproj(self):
        return self.root / "mmproj-f16.gguf"

    @property
    def of_peers(self):
        """What was converted for them."""
        return [self.genai, self.genai_128, self.genai_engine, *self.gguf.values(), self.mmproj]

    @property
    def picture(self):
        return self.root / "picture.png"

    @property
    def vision_onnx(self):
        return self.package / "shared" / "vision_encoder.onnx"

    @property
    def projector_onnx(self):
        return self.package / "shared" / "projector.onnx"

    def served(self, genai, llama):
        """What the servers read; `genai` and `llama` say whether theirs are asked for."""
        found = [self.package / "manifest.json", self.picture]
        found += [self.genai_engine] if genai else []
        return found + ([*self.gguf.values(), self.mmproj] if llama else [])


def make(files, python, threads):
    """Makes what is not there; each appears under its name once it is whole."""
    files.root.mkdir(parents=True, exist_ok=True)
    threads = str(threads)

    def step(target, command):
        if target.exists():
            return
        print(f"making {target}", file=sys.stderr, flush=True)
        partial = target.with_name(f"{target.stem}.partial{target.suffix}")
        remove(partial)
        words = [str(partial if word == target else word) for word in command]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
        if subprocess.run([str(python), *words], env=environment, stdout=sys.stderr).returncode:
            remove(partial)
            sys.exit(f"error: {target} could not be made; the command was {' '.join([str(python), *words])}")
        partial.rename(target)

    export = ["-m", "llava_phi_export"]
    convert = [HERE / "convert.py"]
    if files.given is None:
        step(
            files.checkpoint, [*export, "synthesize", "llava-phi-3b", files.checkpoint, "--seed", "1", "--shards", "2"]
        )
    if files.given_package is None:
        step(files.package, [*export, files.checkpoint, files.package])
    step(files.text_checkpoint, [*convert, "text", files.checkpoint, files.text_checkpoint])
    builder = ["-m", "onnxruntime_genai.models.builder", "-m", "random", "-i", files.text_checkpoint]
    builder += ["-p", "int4", "-e", "cpu", "-c", files.root / "builder-cache"]
    for model, more in ((files.genai, []), (files.genai_128, ["block_size=128"])):
        step(model, [*builder, "-o", model, "--extra_options", "prune_lm_head=true", *more])
    step(files.genai_engine, [*convert, "genai-engine", files.genai, files.genai_engine])
    step(files.mmproj, [*convert, "mmproj", files.checkpoint, files.mmproj])
    whole = files.root / "text-f16.gguf"
    if not all(path.exists() for path in files.gguf.values()):
        step(whole, [*convert, "gguf", files.checkpoint, whole])
        for form, path in files.gguf.items():
            step(path, [*convert, form, whole, path, "--threads", threads])
        whole.unlink()
    step(files.picture, [*convert, "picture", files.checkpoint, files.picture])
    shutil.rmtree(files.root / "builder-cache", ignore_errors=True)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

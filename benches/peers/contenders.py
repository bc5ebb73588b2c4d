"""Lists who is measured, how each is started and with which settings."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
GB = 1_000_000_000


@dataclass(frozen=True)
class Contender:
    """`script` is a worker of this folder, run with `settings`; without one it is our program with `program` arguments.

    `memory` is about what the process takes, in bytes: it is not started where less is available. `rounds` limits how
    many rounds it takes part in. `why` tells which settings were chosen and what it cannot do.
    """

    name: str
    title: str
    why: str
    memory: int
    script: str | None = None
    settings: dict = field(default_factory=dict)
    program: tuple[str, ...] = ()
    rounds: int | None = None

    @property
    def ours(self):
        return self.script is None

    def command(self, python, threads, more):
        """The worker's command line."""
        settings = json.dumps(self.settings, default=str)
        return [str(python), str(HERE / self.script), "--settings", settings, "--threads", str(threads), *more]


def peers(files):
    """Everybody but us; `files` says where what was made for them lies."""
    vision = {"vision": files.vision_onnx, "projector": files.projector_onnx}
    llama = {"vision": files.mmproj, "picture": files.picture, "vision_flash_attn": True}
    torch = {"checkpoint": files.checkpoint, "text": files.text_checkpoint}
    return [
        Contender(
            "genai",
            "onnxruntime-genai int4",
            "model builder's int4 for the CPU (block 32, accuracy level 4) with `prune_lm_head=true`, which leaves out "
            "the logits of all prompt positions but the last; the language model alone, since it has no LLaVA",
            4 * GB,
            "peer_genai.py",
            {"model": files.genai},
        ),
        Contender(
            "genai-128",
            "onnxruntime-genai int4, block 128",
            "as before with blocks as large as ours, rounded to the nearest, which the builder does not do by itself",
            4 * GB,
            "peer_genai.py",
            {"model": files.genai_128},
        ),
        Contender(
            "genai-ort",
            "onnxruntime-genai int4 + ONNX Runtime f32 encoder",
            "what a user could assemble by hand: encode with ONNX Runtime, then the prefill of as many token ids; it "
            "would need an input of embeddings to give a right answer",
            6 * GB,
            "peer_genai_ort.py",
            {"model": files.genai, **vision},
        ),
        Contender(
            "llama-q4_0",
            "llama.cpp Q4_0",
            "repacked by llama.cpp while it loads; flash attention on for vision, off for text; KV f16, batch 512",
            5 * GB,
            "peer_llama.py",
            {"model": files.gguf["q4_0"], **llama},
        ),
        Contender(
            "llama-q4_k_m",
            "llama.cpp Q4_K_M",
            "as Q4_0",
            5 * GB,
            "peer_llama.py",
            {"model": files.gguf["q4_k_m"], **llama},
        ),
        Contender(
            "ort-f32",
            "ONNX Runtime f32 encoder",
            "the encoder and the projector of our package as f32 graphs, in plain ONNX Runtime from Python",
            3 * GB,
            "peer_ort.py",
            vision,
        ),
        Contender(
            "torch-bf16",
            "PyTorch bfloat16",
            "Transformers' classes with scaled-dot-product attention, eager; fast where the processor has bf16",
            9 * GB,
            "peer_torch.py",
            {**torch, "dtype": "bfloat16"},
            rounds=3,
        ),
        Contender(
            "torch-f32",
            "PyTorch float32",
            "as bfloat16; the form that every processor runs",
            16 * GB,
            "peer_torch.py",
            {**torch, "dtype": "float32"},
            rounds=2,
        ),
    ]


def ours(text, default_package):
    """One of ours from `NAME=PACKAGE further arguments`; `NAME` alone is the default package."""
    name, _, rest = text.partition("=")
    words = shlex.split(rest) or [str(default_package)]
    if not name:
        sys.exit(f"error: --ours is '{text}', it must be NAME=PACKAGE with further arguments of bench behind it")
    return Contender(
        f"llava-phi-{name}",
        f"llava-phi {name}",
        " ".join(words[1:]) or "defaults",
        5 * GB,
        program=("--model", *words),
    )

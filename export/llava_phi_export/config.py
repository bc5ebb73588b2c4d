"""What a checkpoint says about its model, as plain frozen values that every builder reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class CheckpointError(Exception):
    """Why a checkpoint cannot be used: one sentence that names the thing, its value and the way out."""


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision encoder; `select_layer` indexes `hidden_states`, whose first entry precedes every layer."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    select_layer: int
    select_feature: str

    @property
    def used_layers(self) -> int:
        """Layers that run before the selected hidden state."""
        return self.select_layer + self.layers + 1 if self.select_layer < 0 else self.select_layer

    @property
    def patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Rows of the patch features of one image."""
        return self.patches + (self.select_feature == "cls_patch")


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear layers from the encoder's width to the decoder's, with `activation` between them."""

    kind: str
    layers: int
    input: int
    output: int
    activation: str


@dataclass(frozen=True)
class DecoderConfig:
    """A Phi decoder: one LayerNorm a layer, attention and MLP side by side, rotary on the first dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    activation: str
    norm_eps: float
    context: int
    logits_width: int
    lm_head_bias: bool
    qkv_bias: bool


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes `size` x `size` pixel values."""

    size: int
    fit: str
    mean: tuple
    std: tuple
    rescale: float
    pad_color: tuple


@dataclass(frozen=True)
class TextConfig:
    """The tokenizer's file, its entries (added tokens counted), the ids that end an answer, and the prompt template."""

    tokenizer: Path
    vocabulary: int
    eos: tuple[int, ...]
    template: dict


@dataclass(frozen=True)
class ModelConfig:
    """One model, whatever form it was stored in; `form` is `llava_phi` or `llava`."""

    name: str
    form: str
    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    image: ImageConfig
    text: TextConfig


def conversation_template(eos: int) -> dict:
    """The prompt template that every LLaVA-Phi was trained with; checkpoints do not carry it."""
    return {
        "system": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
        "after_system": " ",
        "before_user": "USER: ",
        "after_user": " ",
        "before_answer": "ASSISTANT:",
        "answer_separator": " ",
        "after_answer": eos,
        "after_image": "\n",
    }

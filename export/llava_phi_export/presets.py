"""Shapes that `synthesize` knows by name: the original's, and small ones whose sizes all differ from it."""

from __future__ import annotations

from pathlib import Path

from .config import (
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    conversation_template,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def image_config(size: int, fit: str, mean: tuple = CLIP_MEAN, std: tuple = CLIP_STD) -> ImageConfig:
    """CLIP's recipe for one size."""
    return ImageConfig(size, fit, mean, std, 1 / 255, tuple(int(value * 255) for value in mean))


def _model(name: str, fit: str, vocabulary: int, vision: VisionConfig, projector: str, decoder: DecoderConfig):
    layers = 1 if projector == "linear" else int(projector[3])
    text = TextConfig(Path("tokenizer.json"), vocabulary, (), conversation_template(0))
    shape = ProjectorConfig(projector, layers, vision.hidden, decoder.hidden, "gelu")
    return ModelConfig(name, "llava_phi", vision, shape, decoder, image_config(vision.image_size, fit), text)


def _vision(hidden, intermediate, layers, heads, image, patch, activation="quick_gelu", eps=1e-5, layer=-2,
            feature="patch") -> VisionConfig:  # fmt: skip
    return VisionConfig(hidden, intermediate, layers, heads, image, patch, activation, eps, layer, feature)


def _decoder(hidden, intermediate, layers, heads, kv_heads, head_dim, rotary, theta, eps, context, width,
             bias=True) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(hidden, intermediate, layers, heads, kv_heads, head_dim, rotary, theta, "gelu_tanh", eps,
                         context, width, bias, True)  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        _model(
            "llava-phi-3b", "center_crop", 50295,
            _vision(1024, 4096, 24, 16, 336, 14), "mlp2x_gelu",
            _decoder(2560, 10240, 32, 32, 32, 80, 32, 10000.0, 1e-5, 2048, 51200),
        ),
        # The original's kind of shape, all sizes other.
        _model(
            "small", "center_crop", 384,
            _vision(48, 96, 3, 3, 28, 7), "mlp2x_gelu",
            _decoder(64, 160, 2, 4, 4, 16, 8, 10000.0, 1e-5, 512, 400),
        ),
        # Fewer heads for keys, another epsilon and base, one linear layer, the last hidden state, padding.
        _model(
            "grouped", "pad", 300,
            _vision(64, 100, 2, 4, 40, 8, "gelu", 1e-6, -1), "linear",
            _decoder(96, 200, 3, 4, 2, 24, 6, 5000.0, 1e-6, 448, 333),
        ),
        # The original's head_dim and rotary dimensions; the class token is kept; three projector layers.
        _model(
            "class-token", "center_crop", 951,
            _vision(40, 150, 5, 2, 32, 16, "gelu_tanh", 1e-5, -3, "cls_patch"), "mlp3x_gelu",
            _decoder(160, 320, 2, 2, 2, 80, 32, 10000.0, 1e-5, 640, 1000),
        ),
        # A patch that does not divide the image, one head that rotates whole, one layer of each.
        _model(
            "one-head", "pad", 512,
            _vision(36, 72, 2, 1, 30, 7), "mlp2x_gelu",
            _decoder(40, 130, 1, 1, 1, 40, 40, 10000.0, 1e-4, 512, 512),
        ),
        # Heads wider than the hidden size; a layer counted from the front; lm_head without a bias.
        _model(
            "wide-heads", "center_crop", 1900,
            _vision(56, 112, 4, 7, 42, 6, "quick_gelu", 1e-5, 2), "mlp2x_gelu",
            _decoder(72, 144, 4, 3, 3, 32, 16, 20000.0, 1e-5, 512, 2000, False),
        ),
    )
}  # fmt: skip

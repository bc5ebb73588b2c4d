"""Builds the miniature LLaVA-Phi (CLIP, mlp2x_gelu, Phi) and reads and writes it in the original checkpoint's form."""

import json
import os
import shutil
from pathlib import Path

import tokenizer as bpe
import torch
from questions import END
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
TEXT = {
    "vocab_size": 640,  # rows of logits; the tokenizer has fewer entries, as Phi-2's does
    "hidden_size": 160,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.4,
    "rope_theta": 5000.0,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "initializer_range": 0.02,
}
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2


class LlavaPhi(nn.Module):
    """The three parts. Splicing and decoding are left to the callers, who need them in different forms."""

    def __init__(self, end: int):
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
        self.projector = nn.Sequential(
            nn.Linear(VISION["hidden_size"], TEXT["hidden_size"]),
            nn.GELU(),
            nn.Linear(TEXT["hidden_size"], TEXT["hidden_size"]),
        )
        self.decoder = PhiForCausalLM(PhiConfig(**TEXT, bos_token_id=None, eos_token_id=end, pad_token_id=end))

    def features(self, pixels: torch.Tensor, layers: int = VISION["num_hidden_layers"] - 1) -> torch.Tensor:
        """Patch features after `layers` layers, CLS dropped. The default is `hidden_states[-2]`: `[n, 64, 128]`."""
        hidden = self.vision.pre_layrnorm(self.vision.embeddings(pixels))
        for layer in self.vision.encoder.layers[:layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]


def normalise(images: torch.Tensor) -> torch.Tensor:
    """`[n, 64, 64, 3]` u8 to CLIP's pixel values `[n, 3, 64, 64]`."""
    return ((images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def save(model: LlavaPhi, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the checkpoint beside `directory` and then puts it in its place."""
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    prefixes = {"vision.": "model.vision_tower.vision_model.", "projector.": "model.mm_projector.", "decoder.": ""}
    weights = {}
    for name, value in model.state_dict().items():
        prefix = next(p for p in prefixes if name.startswith(p))
        weights[prefixes[prefix] + name.removeprefix(prefix)] = value.detach().contiguous().clone()
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END)
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": ["LlavaPhiForCausalLM"],
        "model_type": "llava_phi",
        **TEXT,
        **ids,
        "torch_dtype": "float32",
        "freeze_vision_tower": False,
        "image_aspect_ratio": "square",
        "vision_config": {
            "vision_tower": {
                "model_type": "clip_vision_model",
                **VISION,
                "mm_vision_select_feature": "patch",
                "mm_vision_select_layer": -2,
            },
            "mm_projector": {
                "model_type": "llava_phi_projector",
                "mm_projector_type": "mlp2x_gelu",
                "mm_hidden_size": VISION["hidden_size"],
                "hidden_size": TEXT["hidden_size"],
            },
        },
    }
    side = VISION["image_size"]
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    for name, content in (
        ("config.json", config),
        ("preprocessor_config.json", preprocessor),
        ("generation_config.json", {"do_sample": False, **ids}),
    ):
        (new / name).write_text(json.dumps(content, indent=2) + "\n")
    bpe.save(tokenizer, new, TEXT["max_position_embeddings"])
    (new / "model.safetensors").chmod(0o644)
    if directory.exists():
        os.rename(directory, old)
    os.rename(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def load(directory: Path) -> tuple[LlavaPhi, Tokenizer]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = LlavaPhi(tokenizer.token_to_id(END))
    weights = {}
    for name, value in load_file(directory / "model.safetensors").items():
        if name.startswith("model.vision_tower.vision_model."):
            name = "vision." + name.removeprefix("model.vision_tower.vision_model.")
        elif name.startswith("model.mm_projector."):
            name = "projector." + name.removeprefix("model.mm_projector.")
        else:
            name = "decoder." + name
        weights[name] = value
    model.load_state_dict(weights)
    return model.eval(), tokenizer


def int_blocks(weight: torch.Tensor, bits: int, block: int = 32) -> torch.Tensor:
    """`weight` as its quantised form reads: round to nearest, symmetric, one scale per `block` inputs, absmax / 2^(bits-1)."""
    half = 2 ** (bits - 1)
    blocks = weight.reshape(weight.shape[0], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-8) / half
    return ((blocks / scale).round().clamp(-half, half - 1) * scale).reshape(weight.shape)


def quantised(decoder: PhiForCausalLM) -> dict[str, torch.Tensor]:
    """The decoder's linear weights as int4 (lm_head: int8) would read them; gradients pass straight through."""
    result = {}
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2 and "embed_tokens" not in name:
            rounded = int_blocks(weight.detach(), 8 if "lm_head" in name else 4)
            result[name] = weight + (rounded - weight.detach())
    return result

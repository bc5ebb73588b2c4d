"""Writes the configuration files of a checkpoint in either form."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .config import ModelConfig


def write_json(path: Path, value: dict) -> None:
    """Writes an object for a person to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def rotary_factor(head_dim: int, rotary_dim: int) -> float:
    """The `partial_rotary_factor` from which a reader's `int(head_dim * factor)` gives `rotary_dim`."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 2)


def write_configs(config: ModelConfig, directory: Path, form: str, naming: str, eos: int, dtype: str) -> None:
    """Writes config.json, generation_config.json and preprocessor_config.json in one form and naming."""
    vision, decoder, image = config.vision, config.decoder, config.image
    to_hf = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    tower = {
        "model_type": "clip_vision_model" if form == "hf" else "llava_phi_clip_vision_model",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": to_hf[vision.activation],
        "layer_norm_eps": vision.norm_eps,
    }
    text = {
        "vocab_size": decoder.logits_width,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_act": "gelu_new" if decoder.activation == "gelu_tanh" else decoder.activation,
        "layer_norm_eps": decoder.norm_eps,
        "max_position_embeddings": decoder.context,
        "tie_word_embeddings": False,
        "qk_layernorm": False,
        "bos_token_id": eos,
        "eos_token_id": eos,
    }
    if decoder.head_dim * decoder.heads != decoder.hidden:
        text["head_dim"] = decoder.head_dim
    rope = {
        "rope_theta": decoder.rope_theta,
        "partial_rotary_factor": rotary_factor(decoder.head_dim, decoder.rotary_dim),
    }
    if form == "hf" and naming == "new":
        text["rope_parameters"] = {"rope_type": "default", **rope}
    else:
        text |= rope
    if form == "hf":
        whole = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {"model_type": "phi", **text},
            "vision_config": tower,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": vision.select_layer,
            "vision_feature_select_strategy": "default" if vision.select_feature == "patch" else "full",
            "image_token_index": min(config.text.vocabulary, decoder.logits_width - 1),
        }
    else:
        tower |= {
            "mm_vision_select_layer": vision.select_layer,
            "mm_vision_select_feature": vision.select_feature,
        }
        projector = {
            "model_type": "llava_phi_projector",
            "mm_projector_type": config.projector.kind,
            "mm_hidden_size": config.projector.input,
            "hidden_size": config.projector.output,
        }
        whole = {
            "architectures": ["LlavaPhiForCausalLM"],
            "model_type": "llava_phi",
            **text,
            "vision_config": {"vision_tower": tower, "mm_projector": projector},
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
        }
    whole |= {"image_aspect_ratio": "pad" if image.fit == "pad" else "square", "torch_dtype": dtype}
    write_json(directory / "config.json", whole)
    write_json(directory / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos})
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": image.rescale,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
    write_json(directory / "preprocessor_config.json", processor)

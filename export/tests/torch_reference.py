"""The models of `transformers` with the weights of a random checkpoint: what an exported graph must compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def _load(model: torch.nn.Module, tensors: dict[str, np.ndarray], rename) -> torch.nn.Module:
    found = {rename(name): torch.from_numpy(np.array(values)) for name, values in tensors.items() if rename(name)}
    missing, unexpected = model.load_state_dict(found, strict=False)
    missing = [name for name in missing if "post_layernorm" not in name and "position_ids" not in name]
    assert not missing and not unexpected, (missing, unexpected)
    return model.eval()


def vision(source, pixels: np.ndarray) -> np.ndarray:
    """Patch features [batch, tokens, hidden] by CLIPVisionModel's hidden states."""
    config = source.config.vision
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=_ACTIVATIONS[config.activation],
            layer_norm_eps=config.norm_eps,
            attn_implementation="eager",
        )
    )
    prefix = "vision_model." if hasattr(model, "vision_model") else ""

    def rename(name: str) -> str | None:
        if not name.startswith("vision."):
            return None
        name = name.removeprefix("vision.").replace("pre_layernorm", "pre_layrnorm")
        if "embedding" in name:
            return f"{prefix}embeddings.{name}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = name.replace(part, f"self_attn.{part}")
        for part in ("fc1", "fc2"):
            name = name.replace(part, f"mlp.{part}")
        return prefix + (f"encoder.{name}" if name.startswith("layers.") else name)

    # The unused last layers may lack weights in the checkpoint; they keep torch's own.
    model.load_state_dict(
        {rename(name): torch.from_numpy(np.array(v)) for name, v in source.tensors.items() if rename(name)},
        strict=False,
    )
    with torch.no_grad():
        states = model.eval()(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
    features = states[config.select_layer]
    return (features[:, 1:] if config.select_feature == "patch" else features).numpy()


def cls_attention(source, pixels: np.ndarray) -> np.ndarray:
    """The class token's attention [batch, tokens] in the last layer before the selected state, written out by hand."""
    config, used = source.config.vision, source.config.vision.used_layers
    before = VisionView(source, used - 1)
    states = torch.from_numpy(vision(before, pixels))
    prefix = f"vision.layers.{used - 1}"

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(source.tensors[f"{prefix}.{name}"])

    normed = torch.nn.functional.layer_norm(
        states, states.shape[-1:], tensor("layer_norm1.weight"), tensor("layer_norm1.bias"), config.norm_eps
    )
    size = config.hidden // config.heads
    q, k = (
        torch.nn.functional.linear(normed, tensor(f"{part}.weight"), tensor(f"{part}.bias"))
        .unflatten(-1, (config.heads, size))
        .transpose(1, 2)
        for part in ("q_proj", "k_proj")
    )
    weights = (q[:, :, :1] @ k.transpose(-1, -2) * size**-0.5).softmax(-1)[:, :, 0].mean(1)
    return (weights[:, 1:] if config.select_feature == "patch" else weights).numpy()


class VisionView:
    """A checkpoint whose selected state is that after `layers` layers, the class token with it."""

    def __init__(self, source, layers: int):
        vision = replace(source.config.vision, select_layer=layers, select_feature="cls_patch")
        self.config, self.tensors = replace(source.config, vision=vision), source.tensors


def project(source, features: np.ndarray) -> np.ndarray:
    """Image embeddings by linear layers with the exact GELU between them."""
    x = torch.from_numpy(features)
    for layer in range(source.config.projector.layers):
        weight, bias = (torch.from_numpy(source.tensors[f"projector.{layer}.{part}"]) for part in ("weight", "bias"))
        x = torch.nn.functional.linear(torch.nn.functional.gelu(x) if layer else x, weight, bias)
    return x.numpy()


def phi(source, tensors: dict[str, np.ndarray] | None = None) -> PhiForCausalLM:
    """PhiForCausalLM with the decoder's weights, or with `tensors` in their place."""
    config = source.config.decoder
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=config.logits_width,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden_act=_ACTIVATIONS[config.activation],
            max_position_embeddings=config.context,
            layer_norm_eps=config.norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.rotary_dim / config.head_dim,
            },
            attn_implementation="eager",
        )
    )

    def rename(name: str) -> str | None:
        if not name.startswith("decoder."):
            return None
        name = name.removeprefix("decoder.")
        if name.startswith("lm_head."):
            return name
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            name = name.replace(part, f"self_attn.{part}")
        for part in ("fc1", "fc2"):
            name = name.replace(part, f"mlp.{part}")
        return f"model.{name}"

    return _load(model, tensors or source.tensors, rename)


def logits(model: PhiForCausalLM, embeds: np.ndarray) -> np.ndarray:
    """Logits of every position [batch, positions, width]."""
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()

"""Turns the JSON objects of a checkpoint into configurations, with a sentence for every field that cannot be used."""

from __future__ import annotations

import re
from typing import Any

from .config import CheckpointError, DecoderConfig, ProjectorConfig, VisionConfig

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Fields:
    """One JSON object of a checkpoint: typed look-ups whose errors name the file and the field.

    A field that is absent takes the default of the format that the object belongs to, and `notes` says so.
    """

    def __init__(self, values: dict, where: str, notes: list[str]):
        self.values, self.where, self.notes = values, where, notes

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.where} has no {key}; take the file that belongs to these weights")
            self.notes.append(f"{self.where} has no {key}: {default}, the default of its format")
            return default
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, a whole number of at least {least} is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, a number above 0 is needed")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, a text is needed")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self.text(key, default)
        if value not in ACTIVATIONS:
            raise CheckpointError(f"{self.where}: {key} {value!r} is not supported; {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[value]

    def inner(self, key: str) -> Fields:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, an object is needed")
        return Fields(value, f"{self.where} {key}", self.notes)


def vision_config(fields: Fields, select_layer: Any, select_feature: Any) -> VisionConfig:
    """The encoder of a `vision_config` object in CLIP's format."""
    kind = str(fields.get("model_type") or "clip_vision_model")
    if "clip" not in kind or "siglip" in kind:
        raise CheckpointError(
            f"{fields.where}: model_type {kind!r} is another image encoder; only CLIP vision encoders are supported"
        )
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise CheckpointError(f"{fields.where}: the selected layer is {select_layer!r}, one whole number is supported")
    if select_feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{fields.where}: the selected feature is {select_feature!r}; patch and cls_patch are known"
        )
    channels = fields.get("num_channels")
    if channels not in (None, 3):
        raise CheckpointError(f"{fields.where}: num_channels is {channels!r}, images have 3")
    config = VisionConfig(
        hidden=fields.integer("hidden_size", 768),
        intermediate=fields.integer("intermediate_size", 3072),
        layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 32),
        activation=fields.activation("hidden_act", "quick_gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        select_layer=select_layer,
        select_feature=select_feature,
    )
    if config.hidden % config.heads:
        raise CheckpointError(
            f"{fields.where}: num_attention_heads {config.heads} does not divide hidden_size {config.hidden}"
        )
    if config.patch_size > config.image_size:
        raise CheckpointError(
            f"{fields.where}: patch_size {config.patch_size} is larger than image_size {config.image_size}"
        )
    if not 0 <= config.used_layers <= config.layers:
        raise CheckpointError(f"{fields.where}: layer {select_layer} is selected, but there are {config.layers} layers")
    return config


def projector_config(kind: str, where: str, input_width: int, output_width: int, activation: str) -> ProjectorConfig:
    """The projector of a LLaVA projector type: `linear` or `mlpNx_gelu`."""
    match = re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind)
    if kind != "linear" and match is None:
        names = "MobileVLM's LDP projector" if kind.startswith("ldp") else "another projector"
        raise CheckpointError(f"{where}: mm_projector_type {kind!r} is {names}; linear and mlpNx_gelu are supported")
    return ProjectorConfig(kind, int(match[1]) if match else 1, input_width, output_width, activation)


def decoder_config(fields: Fields, lm_head_bias: bool, qkv_bias: bool) -> DecoderConfig:
    """The decoder of a configuration in Phi's format; the two flags say what the weights hold."""
    if fields.get("qk_layernorm"):
        raise CheckpointError(f"{fields.where}: qk_layernorm is set; decoders that normalise queries are not supported")
    hidden = fields.integer("hidden_size", 2048)
    heads = fields.integer("num_attention_heads", 32)
    kv_heads = heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads")
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif hidden % heads:
        raise CheckpointError(f"{fields.where}: num_attention_heads {heads} does not divide hidden_size {hidden}")
    else:
        head_dim = hidden // heads
    if heads % kv_heads:
        raise CheckpointError(f"{fields.where}: num_key_value_heads {kv_heads} does not divide {heads} heads")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if rope is None:
        rope = {}
    elif not isinstance(rope, dict):
        raise CheckpointError(f"{fields.where}: rope_parameters is {rope!r}, an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{fields.where}: rope_type {kind!r} is not supported; only plain rotary positions are")
    # Older files keep the two numbers beside the sizes, newer ones inside rope_parameters; the inner ones rule.
    both = Fields({**fields.values, **rope}, fields.where, fields.notes)
    factor = both.number("partial_rotary_factor", 0.5)
    rotary_dim = int(head_dim * factor)
    if factor > 1 or rotary_dim % 2 or rotary_dim == 0:
        raise CheckpointError(
            f"{fields.where}: partial_rotary_factor {factor} makes {rotary_dim} of {head_dim} dimensions rotate; "
            "an even number from 2 on is needed"
        )
    return DecoderConfig(
        hidden=hidden,
        intermediate=fields.integer("intermediate_size", 8192),
        layers=fields.integer("num_hidden_layers", 24),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=both.number("rope_theta", 10000.0),
        activation=fields.activation("hidden_act", "gelu_new"),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        context=fields.integer("max_position_embeddings", 2048),
        logits_width=fields.integer("vocab_size", 51200),
        lm_head_bias=lm_head_bias,
        qkv_bias=qkv_bias,
    )

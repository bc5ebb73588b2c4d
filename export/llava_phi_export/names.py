"""One name for each tensor of a model, whatever form of checkpoint it lies in, and the shape it must have."""

from __future__ import annotations

import re

from .config import ModelConfig

_VISION = re.compile(r"(?:model\.)?(?:vision_tower\.){1,2}(?:vision_model\.)?(.+)")
_TOWER = re.compile(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)")
_PROJECTOR = re.compile(r"(?:model\.)?(?:mm_projector|multi_modal_projector)\.(.+)")
_HEAD = re.compile(r"(?:language_model\.)?lm_head\.(weight|bias)")
_DECODER = re.compile(r"(?:language_model\.model\.|model\.language_model\.|model\.)(.+)")


def canonical(name: str) -> str | None:
    """The canonical name of a tensor in a LLaVA checkpoint of any form; `None` for one that no stage reads."""
    if match := _VISION.fullmatch(name):
        return _vision(match[1])
    if match := _PROJECTOR.fullmatch(name):
        return _projector(match[1])
    if match := _HEAD.fullmatch(name):
        return f"decoder.lm_head.{match[1]}"
    if match := _DECODER.fullmatch(name):
        return _decoder(match[1])
    return None


def canonical_in_tower(name: str) -> str | None:
    """The canonical name of a tensor in a directory that holds a CLIP model or its vision encoder alone."""
    if match := _TOWER.fullmatch(name):
        return _vision(match[1])
    found = canonical(name)
    return found if found and found.startswith("vision.") else None


def canonical_in_projector(name: str) -> str | None:
    """The canonical name of a tensor in a file that holds a projector alone."""
    found = canonical(name) or _projector(name)
    return found if found and found.startswith("projector.") else None


def is_known_leftover(name: str) -> bool:
    """Whether a tensor without a canonical name is one that checkpoints usually carry and no stage reads."""
    return name.endswith(("position_ids", "inv_freq", "attn.bias", "masked_bias")) or "post_layernorm" in name


def _vision(rest: str) -> str | None:
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)", rest):
        return f"vision.layers.{match[1]}.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"pre_layrnorm\.(weight|bias)", rest):
        return f"vision.pre_layernorm.{match[1]}"
    if match := re.fullmatch(r"embeddings\.(class_embedding|(?:patch|position)_embedding\.(?:weight|bias))", rest):
        return f"vision.{match[1]}"
    return None


def _projector(rest: str) -> str | None:
    if match := re.fullmatch(r"linear_([1-9]\d*)\.(weight|bias)", rest):
        return f"projector.{int(match[1]) - 1}.{match[2]}"
    # In the sequence of the original form the odd places are activations, which have no weights.
    if (match := re.fullmatch(r"(\d+)\.(weight|bias)", rest)) and int(match[1]) % 2 == 0:
        return f"projector.{int(match[1]) // 2}.{match[2]}"
    return f"projector.0.{rest}" if rest in ("weight", "bias") else None


def _decoder(rest: str) -> str | None:
    if rest == "embed_tokens.weight" or re.fullmatch(r"final_layernorm\.(weight|bias)", rest):
        return f"decoder.{rest}"
    wanted = r"layers\.(\d+)\.(?:self_attn\.|mlp\.)?(q_proj|k_proj|v_proj|dense|fc1|fc2|input_layernorm)\.(weight|bias)"
    if match := re.fullmatch(wanted, rest):
        return f"decoder.layers.{match[1]}.{match[2]}.{match[3]}"
    return None


def expected_shapes(config: ModelConfig, all_layers: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the stages read, by canonical name, in the order of the walk.

    Encoder layers behind the selected one are left out unless `all_layers` asks for them.
    """
    vision, decoder, shapes = config.vision, config.decoder, {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    shapes["vision.class_embedding"] = (vision.hidden,)
    shapes["vision.patch_embedding.weight"] = (vision.hidden, 3, vision.patch_size, vision.patch_size)
    shapes["vision.position_embedding.weight"] = (vision.patches + 1, vision.hidden)
    norm("vision.pre_layernorm", vision.hidden)
    for i in range(vision.layers if all_layers else vision.used_layers):
        at = f"vision.layers.{i}"
        norm(f"{at}.layer_norm1", vision.hidden)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}.{part}", vision.hidden, vision.hidden)
        norm(f"{at}.layer_norm2", vision.hidden)
        linear(f"{at}.fc1", vision.intermediate, vision.hidden)
        linear(f"{at}.fc2", vision.hidden, vision.intermediate)
    for i in range(config.projector.layers):
        linear(f"projector.{i}", config.projector.output, config.projector.output if i else config.projector.input)
    shapes["decoder.embed_tokens.weight"] = (decoder.logits_width, decoder.hidden)
    for i in range(decoder.layers):
        at = f"decoder.layers.{i}"
        norm(f"{at}.input_layernorm", decoder.hidden)
        linear(f"{at}.q_proj", decoder.heads * decoder.head_dim, decoder.hidden, decoder.qkv_bias)
        linear(f"{at}.k_proj", decoder.kv_heads * decoder.head_dim, decoder.hidden, decoder.qkv_bias)
        linear(f"{at}.v_proj", decoder.kv_heads * decoder.head_dim, decoder.hidden, decoder.qkv_bias)
        linear(f"{at}.dense", decoder.hidden, decoder.heads * decoder.head_dim)
        linear(f"{at}.fc1", decoder.intermediate, decoder.hidden)
        linear(f"{at}.fc2", decoder.hidden, decoder.intermediate)
    norm("decoder.final_layernorm", decoder.hidden)
    linear("decoder.lm_head", decoder.logits_width, decoder.hidden, decoder.lm_head_bias)
    return shapes


def on_disk(name: str, layout: str) -> str:
    """The name of a canonical tensor in a checkpoint of one layout: `llava_phi`, `llava_old` or `llava_new`."""
    part, _, rest = name.partition(".")
    if part == "vision":
        prefix = {"llava_phi": "model.vision_tower.vision_model.", "llava_old": "vision_tower.vision_model."}
        prefix = prefix.get(layout, "model.vision_tower.vision_model.")
        if match := re.fullmatch(r"layers\.(\d+)\.(\w+)\.(\w+)", rest):
            inner = match[2]
            home = "self_attn." if inner.endswith("_proj") else "mlp." if inner.startswith("fc") else ""
            return f"{prefix}encoder.layers.{match[1]}.{home}{inner}.{match[3]}"
        if rest.startswith("pre_layernorm"):
            return prefix + rest.replace("pre_layernorm", "pre_layrnorm")
        if rest.startswith("post_layernorm"):
            return prefix + rest
        return f"{prefix}embeddings.{rest}"
    if part == "projector":
        index, _, leaf = rest.partition(".")
        if layout == "llava_phi":
            return f"model.mm_projector.{2 * int(index)}.{leaf}"
        home = "multi_modal_projector" if layout == "llava_old" else "model.multi_modal_projector"
        return f"{home}.linear_{int(index) + 1}.{leaf}"
    if rest.startswith("lm_head"):
        return f"language_model.{rest}" if layout == "llava_old" else rest
    prefix = {"llava_phi": "model.", "llava_old": "language_model.model."}.get(layout, "model.language_model.")
    if match := re.fullmatch(r"layers\.(\d+)\.(\w+)\.(\w+)", rest):
        inner = match[2]
        home = "mlp." if inner.startswith("fc") else "" if inner == "input_layernorm" else "self_attn."
        return f"{prefix}layers.{match[1]}.{home}{inner}.{match[3]}"
    return prefix + rest

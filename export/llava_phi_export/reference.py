"""The model in PyTorch, stage by stage, put together from the parts that the original is made of (extra `torch`).

`LlavaForConditionalGeneration` is not used: it builds its `lm_head` without the bias that Phi has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .checkpoint import Checkpoint
from .config import CheckpointError
from .pillow_image import PillowImage

try:
    import torch
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
except ImportError as error:
    raise CheckpointError(
        "the PyTorch reference needs torch and transformers; pip install 'llava-phi-export[torch]'"
    ) from error

_GELU = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def set_threads(threads: int) -> None:
    """Threads of PyTorch; 0 leaves its choice."""
    if threads:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Greedy:
    """Ids of a greedy answer and the logits [tokens, width] that each was chosen from."""

    ids: list[int]
    logits: np.ndarray


class Reference:
    """Stages in f32 with eager attention; every array that goes in or comes out is numpy."""

    def __init__(self, checkpoint: Checkpoint):
        from tokenizers import Tokenizer

        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.image = PillowImage(self.config.image)
        self.tokenizer = Tokenizer.from_file(str(self.config.text.tokenizer))
        self.vision = _vision(checkpoint)
        self.projector = _projector(checkpoint)
        self.decoder = _decoder(checkpoint)
        self.embedding = self.decoder.model.embed_tokens.weight

    def replace(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Puts other values into decoder tensors, by canonical names, such as dequantised ones."""
        parameters = dict(self.decoder.named_parameters())
        for name, values in weights:
            parameter = parameters[_phi_name(name)]
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))

    @torch.no_grad()
    def patch_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """[batch, 3, size, size] to [batch, tokens_per_image, vision.hidden]: the selected hidden state."""
        output = self.vision(torch.from_numpy(pixel_values), output_hidden_states=True)
        features = output.hidden_states[self.config.vision.select_layer]
        if self.config.vision.select_feature == "patch":
            features = features[:, 1:]
        return features.numpy()

    @torch.no_grad()
    def cls_attention(self, pixel_values: np.ndarray) -> np.ndarray:
        """[batch, 3, size, size] to [batch, tokens_per_image]: how the class token attends in the last used layer."""
        vision = self.config.vision
        output = self.vision(torch.from_numpy(pixel_values), output_attentions=True)
        attention = output.attentions[vision.used_layers - 1][:, :, 0].mean(1)
        return (attention[:, 1:] if vision.select_feature == "patch" else attention).numpy()

    @torch.no_grad()
    def image_embeds(self, patch_features: np.ndarray) -> np.ndarray:
        """[batch, patches, vision.hidden] to [batch, patches, decoder.hidden]."""
        return self.projector(torch.from_numpy(np.ascontiguousarray(patch_features))).numpy()

    def token_ids(self, question: str, images: int) -> list[list[int]]:
        """Ids of the text between the images of a prompt of one turn: one list more than there are images."""
        return prompt_ids(self.tokenizer, self.config.text.template, question, images)

    @torch.no_grad()
    def embeds(self, ids: list[list[int]], image_embeds: np.ndarray | None) -> np.ndarray:
        """[1, positions, decoder.hidden]: the text's rows with each image in its place."""
        parts = []
        for number, piece in enumerate(ids):
            if number:
                parts.append(torch.from_numpy(image_embeds[number - 1]))
            parts.append(nn.functional.embedding(torch.tensor(piece, dtype=torch.long), self.embedding))
        return torch.cat(parts)[None].numpy()

    @torch.no_grad()
    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """Logits [positions, logits_width] of every position, without a cache."""
        return self.decoder(inputs_embeds=torch.from_numpy(embeds), use_cache=False).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, embeds: np.ndarray, tokens: int) -> Greedy:
        """`tokens` tokens of the highest logit each; the end token does not end it."""
        ids: list[int] = []
        logits = np.empty((tokens, self.config.decoder.logits_width), np.float32)
        inputs, cache = torch.from_numpy(embeds), None
        for step in range(tokens):
            output = self.decoder(inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits[step] = output.logits[0, -1].numpy()
            ids.append(int(logits[step].argmax()))
            inputs = self.embedding[ids[-1]][None, None]
        return Greedy(ids, logits)


def prompt_ids(tokenizer, template: dict, question: str, images: int) -> list[list[int]]:
    """Ids of the text around the images; the parts are tokenised alone, as `tokenizer_image_token` does."""
    before = template["system"] + template["after_system"] + template["before_user"]
    after = question + template["after_user"] + template["before_answer"]
    texts = [before] + [template["after_image"]] * images
    texts[-1] += after
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def _tensors(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(checkpoint.f32(source)) for name, source in names.items()}


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Gives a module on the meta device its tensors."""
    missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise CheckpointError(f"the reference does not fit the checkpoint: {missing[:1] or unexpected[:1]}")
    return module.eval()


def _vision(checkpoint: Checkpoint) -> nn.Module:
    vision = checkpoint.config.vision
    config = CLIPVisionConfig(
        hidden_size=vision.hidden, intermediate_size=vision.intermediate, num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads, image_size=vision.image_size, patch_size=vision.patch_size,
        hidden_act=_GELU[vision.activation], layer_norm_eps=vision.norm_eps, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    inner = getattr(model, "vision_model", model)
    names = {
        "embeddings.class_embedding": "vision.class_embedding",
        "embeddings.patch_embedding.weight": "vision.patch_embedding.weight",
        "embeddings.position_embedding.weight": "vision.position_embedding.weight",
        "pre_layrnorm.weight": "vision.pre_layernorm.weight",
        "pre_layrnorm.bias": "vision.pre_layernorm.bias",
    }
    for i in range(vision.layers):
        for part in ("layer_norm1", "layer_norm2", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
            home = "self_attn." if part.endswith("_proj") else "mlp." if part.startswith("fc") else ""
            for leaf in ("weight", "bias"):
                source = f"vision.layers.{i}.{part}.{leaf}"
                if i < vision.used_layers or checkpoint.has(source):
                    names[f"encoder.layers.{i}.{home}{part}.{leaf}"] = source
    tensors = _tensors(checkpoint, names)
    for name, parameter in inner.state_dict().items():
        # What no stage reads may be missing from a checkpoint, and meta tensors cannot run.
        if name not in tensors:
            tensors[name] = torch.zeros(parameter.shape)
    _fill(inner, tensors)
    positions = inner.embeddings.num_positions
    inner.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    return model.eval()


def _projector(checkpoint: Checkpoint) -> nn.Module:
    projector = checkpoint.config.projector
    gelu = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh")}[projector.activation]
    modules: list[nn.Module] = []
    names = {}
    for i in range(projector.layers):
        if i:
            modules.append(gelu())
        names |= {f"{2 * i}.{leaf}": f"projector.{i}.{leaf}" for leaf in ("weight", "bias")}
        modules.append(nn.Linear(projector.output if i else projector.input, projector.output, device="meta"))
    return _fill(nn.Sequential(*modules), _tensors(checkpoint, names))


def _phi_name(name: str) -> str:
    """The name that `PhiForCausalLM` gives a canonical decoder tensor."""
    rest = name.removeprefix("decoder.")
    parts = rest.split(".")
    if parts[0] == "layers":
        part = parts[2]
        home = "mlp." if part.startswith("fc") else "" if part == "input_layernorm" else "self_attn."
        return f"model.layers.{parts[1]}.{home}{part}.{parts[3]}"
    return rest if parts[0] == "lm_head" else f"model.{rest}"


def _decoder(checkpoint: Checkpoint) -> nn.Module:
    from .names import expected_shapes
    from .synthetic_config import rotary_factor

    decoder = checkpoint.config.decoder
    config = PhiConfig(
        vocab_size=decoder.logits_width, hidden_size=decoder.hidden, intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads, num_key_value_heads=decoder.kv_heads,
        hidden_act={"gelu_tanh": "gelu_new", "gelu": "gelu", "quick_gelu": "quick_gelu"}[decoder.activation],
        max_position_embeddings=decoder.context, layer_norm_eps=decoder.norm_eps, rope_theta=decoder.rope_theta,
        partial_rotary_factor=rotary_factor(decoder.head_dim, decoder.rotary_dim), tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    if decoder.head_dim * decoder.heads != decoder.hidden:
        config.head_dim = decoder.head_dim
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    names = {_phi_name(name): name for name in expected_shapes(checkpoint.config) if name.startswith("decoder.")}
    tensors = _tensors(checkpoint, names)
    for name, parameter in model.state_dict().items():
        # Phi's classes always have these biases; a checkpoint without them means zero.
        if name not in tensors and name.endswith(".bias"):
            tensors[name] = torch.zeros(parameter.shape)
    _fill(model, tensors)
    model.model.rotary_emb = PhiRotaryEmbedding(config)
    return model.eval()

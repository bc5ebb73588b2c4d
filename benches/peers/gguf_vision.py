"""Writes the vision tower and the projector of a LLaVA-Phi checkpoint as a GGUF file for llama.cpp's `mtmd`."""

import json

import gguf
import numpy as np
from checkpoint import Tensors

TOWER = "model.vision_tower.vision_model"
PARTS = {
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
# CLIP's own; as in a checkpoint's preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def write(checkpoint, path):
    """Writes `path` with matrices in f16, the form in which llama.cpp publishes its vision files."""
    whole = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = whole["vision_config"]["vision_tower"]
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name("random LLaVA-Phi")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_vision_image_size(config["image_size"])
    writer.add_vision_patch_size(config["patch_size"])
    writer.add_vision_embedding_length(config["hidden_size"])
    writer.add_vision_feed_forward_length(config["intermediate_size"])
    writer.add_vision_projection_dim(whole["hidden_size"])
    # llama.cpp stops before the last of the layers that this counts, which gives LLaVA's layer -2.
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(config["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(config["layer_norm_eps"])
    writer.add_vision_image_mean(MEAN)
    writer.add_vision_image_std(STD)
    writer.add_vision_use_gelu(False)
    with Tensors(checkpoint) as tensors:
        for name, source in names(layers):
            array = tensors[source]
            narrow = array.ndim > 1 and "position" not in name
            writer.add_tensor(name, np.ascontiguousarray(array if narrow else array.astype(np.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def names(layers):
    """Pairs of a tensor's name in GGUF and in the checkpoint."""
    yield "v.class_embd", f"{TOWER}.embeddings.class_embedding"
    yield "v.patch_embd.weight", f"{TOWER}.embeddings.patch_embedding.weight"
    yield "v.position_embd.weight", f"{TOWER}.embeddings.position_embedding.weight"
    yield from both("v.pre_ln", f"{TOWER}.pre_layrnorm")
    for layer in range(layers):
        for name, source in PARTS.items():
            yield from both(f"v.blk.{layer}.{name}", f"{TOWER}.encoder.layers.{layer}.{source}")
    for layer in (0, 2):
        yield from both(f"mm.{layer}", f"model.mm_projector.{layer}")


def both(name, source):
    for kind in ("weight", "bias"):
        yield f"{name}.{kind}", f"{source}.{kind}"

"""Writes the language model of a LLaVA-Phi checkpoint as a GGUF file of f16 weights.

llama.cpp's own converter recognises a model by a hash of how its tokenizer splits a text, which a random model's tokenizer
cannot have; so the `gguf` package writes the file, with the names and metadata that the converter gives Phi-2.
"""

import json

import gguf
import numpy as np
from checkpoint import Tensors

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def write(checkpoint, path):
    """Writes `path`; the vision tower and the projector stay out of it."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(path, "phi2")
    writer.add_name("random LLaVA-Phi")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * hidden / heads))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, checkpoint, config)
    with Tensors(checkpoint) as tensors:
        for name, source in names(config["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                if f"{source}.{kind}" in tensors:
                    writer.add_tensor(f"{name}.{kind}", matrix_or_f32(tensors[f"{source}.{kind}"]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def names(layers):
    """Pairs of a tensor's name in GGUF and in the checkpoint, both without `.weight` and `.bias`."""
    yield "token_embd", "model.embed_tokens"
    for layer in range(layers):
        for name, source in PARTS.items():
            yield f"blk.{layer}.{name}", f"model.layers.{layer}.{source}"
    yield "output_norm", "model.final_layernorm"
    yield "output", "lm_head"


def matrix_or_f32(array):
    """Matrices as they are, vectors in f32, as llama.cpp's converter has them."""
    return np.ascontiguousarray(array if array.ndim > 1 else array.astype(np.float32))


def add_tokenizer(writer, checkpoint, config):
    """The checkpoint's tokens; ids that the tokenizer lacks become unused ones, so that none is out of range."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    tokens, kinds = [], []
    for number in range(config["vocab_size"]):
        if number in added:
            tokens.append(added[number]["content"])
            special = added[number]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(texts.get(number, f"[PAD{number}]"))
            kinds.append(gguf.TokenType.NORMAL if number in texts else gguf.TokenType.UNUSED)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)

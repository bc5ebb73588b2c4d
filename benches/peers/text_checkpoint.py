"""Presents the language model of a LLaVA-Phi checkpoint as a Phi-2 checkpoint, for converters that know Phi-2 alone.

The weights are not copied: Phi-2's names are the ones that LLaVA-Phi uses, so links to the files are enough, and what
belongs to the vision tower is unexpected to a reader of Phi-2, who leaves it.
"""

import json
from pathlib import Path

KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "layer_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "qk_layernorm",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "partial_rotary_factor",
    "torch_dtype",
)


def write(checkpoint, directory):
    """Makes `directory` a Phi-2 checkpoint of links to `checkpoint`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = {key: config[key] for key in KEPT if key in config}
    text |= {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "preprocessor_config.json"):
            link = directory / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(Path(file).resolve())
    return directory

"""Measures PyTorch with Transformers' classes: CLIP, the projector and Phi-2.

settings: `checkpoint`, the LLaVA-Phi checkpoint; `text`, its language model as a Phi-2 checkpoint; `dtype`, `float32` or
`bfloat16`, of everything; `language`, false to leave the language model.
"""

import json
from pathlib import Path

import torch
import worker
from checkpoint import Tensors
from figures import AFTER, BEFORE, IMAGE
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, PhiForCausalLM

TOWER = "model.vision_tower.vision_model."


class Torch:
    def __init__(self, settings, threads):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.settings = settings
        self.dtype = getattr(torch, settings["dtype"])
        if not settings.get("language", True):
            self.read = self.first_token = self.second_question_best = None

    def load(self):
        checkpoint = Path(self.settings["checkpoint"])
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        tower = config["vision_config"]["vision_tower"]
        # Layer -2 is what is used: the last layer is not built.
        layers = tower["num_hidden_layers"] - 1
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
        vision = CLIPVisionConfig(num_hidden_layers=layers, **{name: tower[name] for name in names})
        with torch.device("meta"):
            self.vision = CLIPVisionModel(vision)
            self.projector = torch.nn.Sequential(
                torch.nn.Linear(tower["hidden_size"], config["hidden_size"]),
                torch.nn.GELU(),
                torch.nn.Linear(config["hidden_size"], config["hidden_size"]),
            )
        with Tensors(checkpoint) as tensors:
            fill(self.vision, tensors, self.dtype, lambda name: TOWER + name.removeprefix("vision_model."))
            fill(self.projector, tensors, self.dtype, lambda name: "model.mm_projector." + name)
        self.pixels = torch.randn(1, 3, vision.image_size, vision.image_size).to(self.dtype)
        if self.settings.get("language", True):
            self.phi = PhiForCausalLM.from_pretrained(self.settings["text"], dtype=self.dtype).eval()

    def encode(self):
        return self.projector(self.vision(self.pixels).last_hidden_state[:, 1:])

    def reset(self):
        self.cache = DynamicCache()

    def forward(self, **what):
        logits = self.phi(**what, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.chosen = int(logits[0, -1].argmax())

    def read(self, tokens):
        self.forward(input_ids=torch.tensor([tokens]))

    def step(self):
        self.read([self.chosen])

    def rewind(self, length):
        if self.cache.get_seq_length() > length:
            self.cache.crop(length)

    def first_token(self):
        self.reset()
        table = self.phi.get_input_embeddings()
        text = table(torch.tensor([worker.tokens(BEFORE + AFTER)]))
        self.forward(inputs_embeds=torch.cat([text[:, :BEFORE], self.encode(), text[:, BEFORE:]], 1))

    def before_second_question_best(self):
        self.reset()
        self.read(worker.tokens(BEFORE + IMAGE))

    def second_question_best(self):
        self.read(worker.tokens(AFTER, seed=2))


def fill(module, tensors, dtype, source):
    """Gives a module without storage the checkpoint's tensors; `source` names them."""
    state = {}
    for name, _ in module.named_parameters():
        state[name] = torch.from_numpy(tensors[source(name)]).to(dtype)
    missing = module.load_state_dict(state, strict=False, assign=True).missing_keys
    # Computed by nobody here: layer -2 ends before it.
    missing = [name for name in missing if "post_layernorm" not in name]
    if missing:
        worker.fail(f"the checkpoint lacks {', '.join(missing)}")
    for name, value in module.named_buffers():
        if value.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.arange(value.shape[-1]).reshape(value.shape))


if __name__ == "__main__":
    options = worker.arguments(__doc__)
    if options.settings["dtype"] not in ("float32", "bfloat16"):
        worker.fail(f"dtype is {options.settings['dtype']}, it must be float32 or bfloat16")
    worker.run(Torch(options.settings, options.threads), options)

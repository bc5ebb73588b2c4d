"""Reads single tensors of a checkpoint of several safetensors files as NumPy arrays."""

import json

from safetensors import safe_open


class Tensors:
    """The tensors of a checkpoint by name; each is read when it is asked for."""

    def __init__(self, checkpoint):
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self.places = index["weight_map"]
        self.files = {name: safe_open(checkpoint / name, "np") for name in set(self.places.values())}

    def __contains__(self, name):
        return name in self.places

    def __getitem__(self, name):
        return self.files[self.places[name]].get_tensor(name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.files.clear()

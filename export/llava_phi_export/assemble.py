"""Puts a checkpoint together from what its form lays where: configuration, tensors by canonical name, files, notes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import names
from .config import CheckpointError, ImageConfig, ModelConfig, TextConfig, conversation_template
from .fields import ACTIVATIONS, Fields, decoder_config, projector_config, vision_config
from .image_recipe import image_recipe
from .tokenizer_files import read_json, text_config
from .weights import Stored, index_file, weight_files


def config_without_weights(path: Path) -> ModelConfig:
    """The shapes of a config.json of either form; lm_head is taken to have a bias, as Phi's has."""
    opener = Opener(path.parent, None, None)
    root = Fields(read_json(path), path.name, opener.notes)
    form, vision, projector, fields = opener.parts(root)
    decoder = decoder_config(fields, lm_head_bias=True, qkv_bias=True)
    text = TextConfig(path.parent / "tokenizer.json", decoder.logits_width, (), conversation_template(0))
    return ModelConfig(path.parent.name, form, vision, projector, decoder, opener.image(root, vision.image_size), text)


class Opener:
    """The parts of one checkpoint while they are put together."""

    def __init__(self, path: Path, tower: Path | None, projector: Path | None):
        self.path, self.tower, self.projector = path, tower, projector
        self.notes: list[str] = []
        self.files: list[Path] = []
        self.stored: dict[str, Stored] = {}

    def open(self) -> tuple[ModelConfig, tempfile.TemporaryDirectory]:
        """The configuration and the directory of a converted tokenizer; fills `stored`, `files` and `notes`."""
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is no directory; a checkpoint is a directory with a config.json")
        self._refuse_adapters()
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{self.path} has no config.json; a checkpoint is a directory with a config.json")
        root = Fields(read_json(self.path / "config.json"), "config.json", self.notes)
        self.files.append(self.path / "config.json")
        form, vision, projector, text = self.parts(root)
        self._read_weights()
        decoder = decoder_config(
            text, "decoder.lm_head.bias" in self.stored, "decoder.layers.0.q_proj.bias" in self.stored
        )
        if text.get("tie_word_embeddings") and "decoder.lm_head.weight" not in self.stored:
            if "decoder.embed_tokens.weight" in self.stored:
                self.stored["decoder.lm_head.weight"] = self.stored["decoder.embed_tokens.weight"]
        if not decoder.lm_head_bias:
            self.notes.append("there is no lm_head.bias among the weights; Phi has one, and some converters lose it")
        image = self.image(root, vision.image_size)
        scratch = tempfile.TemporaryDirectory(prefix="llava-phi-export-")
        try:
            texts = text_config(self.path, root.values, decoder.logits_width, Path(scratch.name), self.notes)
            name = self.path.resolve().name or "model"
            config = ModelConfig(name, form, vision, projector, decoder, image, texts)
            self._check_shapes(config)
        except BaseException:
            scratch.cleanup()
            raise
        return config, scratch

    def parts(self, root: Fields):
        """Form, encoder, projector and the fields of the decoder."""
        kind = root.get("model_type")
        if kind not in ("llava", "llava_phi", "llava-phi"):
            raise CheckpointError(
                f"config.json: model_type {kind!r} is {_kin(kind)}; llava_phi and llava are supported"
            )
        if root.get("mm_use_im_start_end"):
            raise CheckpointError("config.json: mm_use_im_start_end is set; tokens around an image are not supported")
        return self._hugging_face(root) if kind == "llava" else self._original(root)

    def _refuse_adapters(self) -> None:
        for name in ("adapter_config.json", "non_lora_trainables.bin"):
            if (self.path / name).is_file():
                raise CheckpointError(
                    f"{self.path} is a LoRA adapter (it has {name}); merge it with its base model first"
                )

    def _read_weights(self) -> None:
        files = weight_files(self.path)
        if not files:
            raise CheckpointError(
                f"{self.path} holds no weights; model.safetensors, pytorch_model.bin or their shards are read"
            )
        self._add(files, names.canonical)
        if self.tower is not None:
            if not self.tower.is_dir():
                raise CheckpointError(f"--vision-tower {self.tower} is no directory")
            tower_files = weight_files(self.tower)
            if not tower_files:
                raise CheckpointError(f"--vision-tower {self.tower} holds no weights")
            if any(name.startswith("vision.") for name in self.stored):
                self.notes.append("the checkpoint's own vision tower is replaced by the one of --vision-tower")
                self.stored = {name: at for name, at in self.stored.items() if not name.startswith("vision.")}
            self._add(tower_files, names.canonical_in_tower)
        self._read_projector()

    def _read_projector(self) -> None:
        contained = any(name.startswith("projector.") for name in self.stored)
        if self.projector is None and contained:
            return
        home = self.projector or self.path
        found = [home] if home.is_file() else []
        for name in () if found else ("mm_projector.safetensors", "mm_projector.bin"):
            if (home / name).is_file():
                found = [home / name]
                break
        if not found:
            if self.projector is None:
                return
            found = weight_files(home)
        if not found:
            raise CheckpointError(f"--projector {home} holds neither mm_projector.safetensors nor mm_projector.bin")
        if contained:
            self.notes.append("the checkpoint's own projector is replaced by the one of --projector")
            self.stored = {name: at for name, at in self.stored.items() if not name.startswith("projector.")}
        self._add(found, names.canonical_in_projector)

    def _add(self, files: list[Path], rename) -> None:
        unused = []
        for path in files:
            for name, stored in index_file(path).items():
                if "lora_" in name:
                    raise CheckpointError(f"{path.name} holds LoRA weights ({name}); merge them with their base first")
                if name.endswith(("query_key_value.weight", "Wqkv.weight")):
                    raise CheckpointError(
                        f"{path.name} holds {name}, the fused layout of early Phi files; convert it with transformers"
                    )
                if (target := rename(name)) is not None:
                    self.stored[target] = stored
                elif rename is names.canonical and not names.is_known_leftover(name):
                    unused.append(name)
        if unused:
            self.notes.append(f"{len(unused)} tensors are read by no stage, such as {unused[0]}")
        self.files += files

    def _original(self, root: Fields):
        """The parts of a `llava_phi` configuration, nested (the original) or flat (the wider family)."""
        nested = root.get("vision_config")
        if isinstance(nested, dict) and "vision_tower" in nested:
            tower = root.inner("vision_config").inner("vision_tower")
            settings = root.inner("vision_config").inner("mm_projector")
        else:
            tower, settings = self._tower_of_its_own(root), root
        own_layer = tower.get("mm_vision_select_layer")
        layer = root.get("mm_vision_select_layer") if own_layer is None else own_layer
        feature = tower.get("mm_vision_select_feature") or root.get("mm_vision_select_feature")
        if layer is None:
            layer = -2
            self.notes.append("config.json has no mm_vision_select_layer: -2, the default of its format")
        if self.tower is not None and tower.values.get("hidden_size") is not None:
            tower = Fields({**tower.values, **self._tower_fields().values}, tower.where, self.notes)
        vision = vision_config(tower, layer, feature or "patch")
        kind = settings.text("mm_projector_type", "linear")
        projector = projector_config(kind, settings.where, vision.hidden, root.integer("hidden_size", 2048), "gelu")
        width = settings.get("mm_hidden_size")
        if width is not None and width != vision.hidden:
            raise CheckpointError(
                f"{settings.where}: mm_hidden_size is {width}, the vision tower's hidden_size is {vision.hidden}"
            )
        return "llava_phi", vision, projector, root

    def _tower_of_its_own(self, root: Fields) -> Fields:
        named = root.get("mm_vision_tower") or root.get("vision_tower")
        if named is None:
            raise CheckpointError(
                "config.json names no vision tower: neither vision_config.vision_tower nor mm_vision_tower"
            )
        if "siglip" in str(named).lower():
            raise CheckpointError(f"config.json: mm_vision_tower {named!r} is a SigLIP encoder; only CLIP is supported")
        if self.tower is None:
            raise CheckpointError(
                f"config.json names the vision tower {named!r} but does not describe it; "
                "give the directory that holds it with --vision-tower DIR"
            )
        return self._tower_fields()

    def _tower_fields(self) -> Fields:
        path = self.tower / "config.json"
        if not path.is_file():
            raise CheckpointError(f"--vision-tower {self.tower} has no config.json; copy the encoder's own")
        if path not in self.files:
            self.files.append(path)
        fields = Fields(read_json(path), str(path), self.notes)
        return fields.inner("vision_config") if fields.get("vision_config") is not None else fields

    def _hugging_face(self, root: Fields):
        """The parts of a `llava` configuration."""
        text = root.inner("text_config")
        kind = text.get("model_type")
        if kind != "phi":
            raise CheckpointError(
                f"config.json text_config: model_type {kind!r} is {_kin(kind)}; only phi is supported"
            )
        tower = self._tower_fields() if self.tower is not None else root.inner("vision_config")
        strategy = root.text("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy is {strategy!r}; default and full are known"
            )
        layer = root.get("vision_feature_layer")
        if layer is None:
            layer = -2
            self.notes.append("config.json has no vision_feature_layer: -2, the default of its format")
        if isinstance(layer, list) and len(layer) == 1:
            layer = layer[0]
        vision = vision_config(tower, layer, "patch" if strategy == "default" else "cls_patch")
        name = root.text("projector_hidden_act", "gelu")
        if name not in ACTIVATIONS:
            raise CheckpointError(f"config.json: projector_hidden_act {name!r} is not supported; gelu is")
        width = text.integer("hidden_size", 2048)
        projector = projector_config("mlp2x_gelu", "config.json", vision.hidden, width, ACTIVATIONS[name])
        return "llava", vision, projector, text

    def image(self, root: Fields, size: int) -> ImageConfig:
        """The image recipe, which lies with the checkpoint or with its vision tower."""
        return image_recipe(root, [home for home in (self.path, self.tower) if home], size, self.files)

    def _check_shapes(self, config: ModelConfig) -> None:
        """Every tensor that a stage reads is there and has the shape that the configuration asks for."""
        if "vision.patch_embedding.bias" in self.stored:
            raise CheckpointError("the vision tower's patch embedding has a bias, as SigLIP's; only CLIP is supported")
        shapes = names.expected_shapes(config)
        missing = [name for name in shapes if name not in self.stored]
        if missing:
            way = ""
            if all(name.startswith("vision.") for name in missing):
                way = "; give the directory that holds the vision tower with --vision-tower DIR"
            elif all(name.startswith("projector.") for name in missing):
                way = "; give the file that holds the projector with --projector FILE"
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"tensor {missing[0]}{more} is missing from the weights of {self.path}{way}")
        for name, shape in shapes.items():
            found = self.stored[name].shape
            if found != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {list(found)}, the configuration asks for {list(shape)}"
                )


def _kin(kind) -> str:
    """What a model type that is not supported is, in words."""
    text = str(kind).lower()
    for part, words in (
        ("mipha", "Mipha (a SigLIP encoder)"),
        ("tinyllava", "TinyLLaVA (a SigLIP encoder)"),
        ("imp", "Imp (a SigLIP encoder)"),
        ("mobilevlm", "MobileVLM (the LDP projector and a LLaMA decoder)"),
        ("mobilellama", "MobileVLM (the LDP projector and a LLaMA decoder)"),
        ("siglip", "a SigLIP encoder"),
        ("phi-msft", "the early form of Phi"),
        ("phi3", "Phi-3"),
        ("llava_next", "LLaVA-NeXT"),
        ("llama", "a LLaMA decoder"),
        ("llava", "another kind of LLaVA"),
    ):
        if part in text:
            return words
    return "no model that this exporter knows" if kind is not None else "missing"

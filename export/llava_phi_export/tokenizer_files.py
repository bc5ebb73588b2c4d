"""Finds or makes the `tokenizer.json` of a checkpoint, and the ids that end an answer."""

from __future__ import annotations

import json
from pathlib import Path

from .config import CheckpointError, TextConfig, conversation_template


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, an object is needed")
    return value


def text_config(directory: Path, config: dict, logits_width: int, scratch: Path, notes: list[str]) -> TextConfig:
    """The text part of a checkpoint; a tokenizer that is not in the fast form is converted into `scratch`."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        path = _convert(directory, scratch)
        notes.append(f"{directory} has no tokenizer.json; made from vocab.json and merges.txt")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from error
    # The highest id counts, not the number of entries: the ids of a file may have holes.
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < vocabulary <= logits_width:
        raise CheckpointError(
            f"{path} has {vocabulary} entries, the decoder gives {logits_width} logits; they belong to two models"
        )
    eos = _eos(directory, config, tokenizer, notes)
    return TextConfig(path, vocabulary, eos, conversation_template(eos[0]))


def _eos(directory: Path, config: dict, tokenizer, notes: list[str]) -> tuple[int, ...]:
    """The tokenizer's end token, as the reference passes it, then those of generation_config that are special."""
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found: list[int] = []

    def add(where: str, value) -> None:
        for id in value if isinstance(value, list) else [value]:
            if id is None or id in found:
                continue
            if isinstance(id, bool) or not isinstance(id, int) or id not in special:
                notes.append(f"{where} names eos_token_id {id!r}, which is no special token of the tokenizer: left out")
            else:
                found.append(id)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not found and (directory / name).is_file():
            token = read_json(directory / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            add(name, None if token is None else tokenizer.token_to_id(token))
    if (directory / "generation_config.json").is_file():
        add("generation_config.json", read_json(directory / "generation_config.json").get("eos_token_id"))
    if not found:
        add("config.json", config.get("eos_token_id"))
    if not found and isinstance(config.get("text_config"), dict):
        add("config.json text_config", config["text_config"].get("eos_token_id"))
    if not found:
        raise CheckpointError(
            f"{directory} names no token that ends an answer; give generation_config.json an eos_token_id "
            "that is a special token of the tokenizer"
        )
    return tuple(found)


def _convert(directory: Path, scratch: Path) -> Path:
    """A `tokenizer.json` from the slow form of the CodeGen and GPT-2 family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has neither tokenizer.json nor {path.name}; copy the tokenizer's files into it"
            )
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{vocabulary} and merges.txt are no byte-level BPE tokenizer: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = _added_tokens(directory)
    known = tokenizer.get_vocab_size(with_added_tokens=False)
    for id, token in sorted(added.items()):
        held = tokenizer.token_to_id(token.content)
        if held is None and id != known:
            raise CheckpointError(
                f"{directory}: added token {token.content!r} has id {id}, the next free one is {known}"
            )
        if held is not None and held != id:
            raise CheckpointError(f"{directory}: added token {token.content!r} has id {id}, vocab.json says {held}")
        known += held is None
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    path = scratch / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _added_tokens(directory: Path) -> dict:
    """Tokens beside the BPE vocabulary by id: `added_tokens_decoder` of newer files, else `added_tokens.json`."""
    from tokenizers import AddedToken

    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    listed = settings.get("added_tokens_decoder")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if isinstance(listed, dict) and listed:
        return {
            int(id): AddedToken(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags})
            for id, entry in listed.items()
        }
    found = {}
    if (directory / "added_tokens.json").is_file():
        # Runs of spaces and tabs in CodeGen: matched as they stand, not special.
        for content, id in read_json(directory / "added_tokens.json").items():
            found[id] = AddedToken(content, normalized=True, special=False)
    vocabulary = read_json(directory / "vocab.json")
    map_path = directory / "special_tokens_map.json"
    special = read_json(map_path) if map_path.is_file() else {}
    for key in ("eos_token", "bos_token", "unk_token", "pad_token"):
        token = settings.get(key, special.get(key))
        content = token.get("content") if isinstance(token, dict) else token
        id = vocabulary.get(content)
        if content is not None and id is not None:
            found[id] = AddedToken(content, normalized=False, special=True)
    if "<|endoftext|>" in vocabulary and not any(token.special for token in found.values()):
        # The default of the CodeGen tokenizer's class, which files without settings rely on.
        found[vocabulary["<|endoftext|>"]] = AddedToken("<|endoftext|>", normalized=False, special=True)
    return found

"""A byte-level BPE tokenizer with exactly the number of entries asked for, made without a corpus."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from .config import CheckpointError, conversation_template

END = "<|endoftext|>"
_WORDS = """the of and to in is that it for was on are as with his they be at one have this from or had by not word but
what some we can out other were all there when up use your how said an each she which do their time if will way about
many then them write would like so these her long make thing see him two has look more day could go come did number
sound no most people my over know water than call first who may down side been now find any new work part take get
place made live where after back little only round man year came show every good me give our under image picture colour
shape red green blue yellow black white left right above below large small describe answer question yes circle square
triangle""".split()


def write_tokenizer(directory: Path, entries: int) -> int:
    """Writes `tokenizer.json` and `tokenizer_config.json`; gives the id of the token that ends an answer.

    Laid out as CodeGen's: bytes, merges, `<|endoftext|>`, then runs of blanks as added tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    if entries < 258:
        raise CheckpointError(f"a byte-level tokenizer has at least 258 entries, {entries} were asked for")
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    runs = runs[len(runs) - min(len(runs), (entries - 257) // 8) :]
    vocabulary = {byte: id for id, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    room = entries - len(runs) - 1
    for word in _words():
        if len(vocabulary) >= room:
            break
        # Every prefix of a word becomes an entry, so merging from the left spells the whole word.
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary and len(vocabulary) < room:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in runs])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False, "eos_token": END, "pad_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.token_to_id(END)


def _words():
    """Words of the prompt template, common words, then syllables without end; a blank before is part of the word."""
    template = conversation_template(0)
    prompt = " ".join(str(part) for part in template.values()).replace(".", " ").replace("'", " ").split()
    for word in [*prompt, *_WORDS]:
        yield "Ġ" + word
        yield word
    syllables = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxz", "aeiou")]
    for length in itertools.count(1):
        for parts in itertools.product(syllables, repeat=length):
            yield "Ġ" + "".join(parts)
            yield "".join(parts)

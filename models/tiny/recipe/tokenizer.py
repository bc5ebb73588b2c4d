"""Trains the byte-level BPE tokenizer (of CodeGen's kind) on the questions, answers and prompt of this recipe."""

import json
from pathlib import Path
from random import Random

import questions
from shapes import COLORS, SHAPES, Scene
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ENTRIES = 575  # alphabet and merges; <|endoftext|> and the four whitespace runs come on top


def corpus(seed: int, turns: int = 20000):
    """Prompts, questions and answers of random scenes."""
    rng = Random(seed)
    yield from [questions.prompt("what shape is in the image?", 0)] * 200
    yield from [questions.NO_IMAGE] * 200
    for _ in range(turns):
        scenes = [
            questions.words(
                Scene(
                    rng.choice(SHAPES),
                    rng.choice(list(COLORS)),
                    rng.uniform(4, 60),
                    rng.uniform(4, 60),
                    rng.uniform(7, 33),
                    rng.random() < 0.5,
                )
            )
            for _ in range(2)
        ]
        question, answer = questions.turn(rng, scenes[0]) if rng.random() < 0.7 else questions.pair_turn(rng, scenes)
        yield f"USER: {question} ASSISTANT: {answer}"


def train(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(questions.END, special=True, normalized=False)])
    # CodeGen's runs of spaces and tabs, fewer of them; like there, they are ordinary text, not special.
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in (" " * 4, " " * 3, " " * 2, "\t\t")])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "CodeGenTokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": questions.END,
        "pad_token": questions.END,
        "unk_token": questions.END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

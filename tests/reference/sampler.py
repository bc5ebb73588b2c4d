"""Makes sampler.json: what the warpers of Hugging Face transformers keep, and what is drawn from it.

    python tests/reference/sampler.py

The random numbers are ChaCha with 8 rounds written out here from its definition, keyed with the seed as the
first 8 of 32 bytes: a 64-bit word, low half first, makes a number below 1 from its upper 53 bits.
Needs: torch, transformers.
"""

import json
import math
import random
from pathlib import Path

import torch
from transformers.generation import logits_process as warpers

HERE = Path(__file__).parent
MASK = 0xFFFFFFFF


def quarter_round(s, a, b, c, d):
    """One quarter round of ChaCha, in place."""
    for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = (s[x] + s[y]) & MASK
        s[z] ^= s[x]
        s[z] = ((s[z] << turn) | (s[z] >> (32 - turn))) & MASK


def chacha8(seed):
    """64-bit words of the stream that `seed` keys."""
    key = [seed & MASK, seed >> 32, 0, 0, 0, 0, 0, 0]
    block = 0
    while True:
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, block & MASK, block >> 32, 0, 0]
        s = list(start)
        for _ in range(4):
            for a, b, c, d in (
                (0, 4, 8, 12),
                (1, 5, 9, 13),
                (2, 6, 10, 14),
                (3, 7, 11, 15),
                (0, 5, 10, 15),
                (1, 6, 11, 12),
                (2, 7, 8, 13),
                (3, 4, 9, 14),
            ):
                quarter_round(s, a, b, c, d)
        words = [(x + y) & MASK for x, y in zip(s, start)]
        yield from (low | high << 32 for low, high in zip(words[::2], words[1::2]))
        block += 1


def kept(logits, history, options):
    """Probability by id after all warpers, in the order of `transformers`' `generate`."""
    scores = torch.tensor([logits], dtype=torch.float32)
    ids = torch.tensor([history], dtype=torch.long)
    chain = [warpers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])] if history else []
    chain.append(warpers.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"] is not None:
        chain.append(warpers.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        chain.append(warpers.TopPLogitsWarper(options["top_p"]))
    if options["min_p"] > 0:
        chain.append(warpers.MinPLogitsWarper(options["min_p"]))
    for step in chain:
        scores = step(ids, scores)
    scores = scores[0].double()
    chances = scores.softmax(-1)
    order = sorted(range(len(logits)), key=lambda id: (-scores[id].item(), id))
    return [(id, chances[id].item()) for id in order if scores[id] != -math.inf]


def drawn(chances, points):
    for point in points:
        left = point * sum(chance for _, chance in chances)
        chosen = chances[-1][0]
        for id, chance in chances:
            left -= chance
            if left < 0:
                chosen = id
                break
        yield chosen


def main():
    pick = random.Random(1)
    cases = []
    for number in range(60):
        size = pick.choice([8, 40, 300])
        # Sixty-fourths are exact in f32 and no two are equal, so no cut falls between equals.
        logits = [n / 64 for n in pick.sample(range(-1000, 600), size)]
        options = {
            "repetition_penalty": pick.choice([1.0, 1.0, 1.25, 0.75]),
            "temperature": pick.choice([1.0, 0.25, 0.75, 2.5]),
            "top_k": pick.choice([None, None, 1, 3, 20, 1000]),
            "top_p": pick.choice([1.0, 1.0, 0.0625, 0.5, 0.90625, 0.984375]),
            "min_p": pick.choice([0.0, 0.0, 0.0, 0.03125, 0.25]),
        }
        history = [pick.randrange(size) for _ in range(pick.choice([0, 5, 5]))]
        chances = kept(logits, history, options)
        words = chacha8(number)
        points = [(next(words) >> 11) / 2**53 for _ in range(12)]
        cases.append(
            {
                "logits": logits,
                "history": history,
                "seed": number,
                **options,
                "kept": [id for id, _ in chances],
                "chances": [round(chance, 7) for _, chance in chances[:8]],
                "drawn": list(drawn(chances, points)),
            }
        )
    rows = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (HERE / "sampler.json").write_text(f"[\n{rows}\n]\n", encoding="ascii", newline="\n")


if __name__ == "__main__":
    main()

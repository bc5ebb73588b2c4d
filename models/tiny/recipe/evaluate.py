"""Measures a checkpoint by greedy free generation: all official easy-VQA test questions, and what lies beyond them."""

import argparse
import copy
import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import questions
import shapes
import torch
from PIL import Image

import model as mini

SEED = 777  # not the training seed: these rendered scenes are new


@torch.no_grad()
def features(net: mini.LlavaPhi, images: list[np.ndarray]) -> torch.Tensor:
    """Projected patches `[n, 64, 160]` from `hidden_states[-2]` of the stock encoder."""
    rows = []
    for start in range(0, len(images), 200):
        pixels = mini.normalise(torch.from_numpy(np.stack(images[start : start + 200])))
        hidden = net.vision(pixels, output_hidden_states=True).hidden_states[-2]
        rows.append(net.projector(hidden[:, 1:]))
    return torch.cat(rows)


@torch.no_grad()
def answer(net: mini.LlavaPhi, tokenizer, items, rows: torch.Tensor, limit: int = 40) -> list[str]:
    """Greedy answers to `items`, each a prompt with `<image>` in it and the indices into `rows` of its images."""
    embed = net.decoder.model.embed_tokens
    end = tokenizer.token_to_id(questions.END)
    groups = defaultdict(list)  # by length, so that nothing is padded
    for number, (text, images) in enumerate(items):
        pieces = [tokenizer.encode(piece).ids for piece in text.split(questions.IMAGE)]
        assert len(pieces) == len(images) + 1
        groups[sum(map(len, pieces)) + mini.PATCHES * len(images)].append((number, pieces, images))
    answers = [""] * len(items)
    for group in groups.values():
        for start in range(0, len(group), 192):
            part = group[start : start + 192]
            spliced = []
            for _, pieces, images in part:
                row = [embed(torch.tensor(pieces[0]))]
                for piece, image in zip(pieces[1:], images):
                    row += [rows[image], embed(torch.tensor(piece, dtype=torch.long))]
                spliced.append(torch.cat(row))
            embeds = torch.stack(spliced)
            out = net.decoder.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
            for (number, _, _), ids in zip(part, out.tolist()):
                answers[number] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def official(net, tokenizer, test, images: dict[int, np.ndarray]) -> np.ndarray:
    """Which test questions are answered exactly."""
    place, different = {}, []
    for pixels in images.values():
        if pixels.tobytes() not in place:
            place[pixels.tobytes()] = len(different)
            different.append(pixels)
    rows = features(net, different)
    items = [(questions.prompt(q), (place[images[n].tobytes()],)) for q, _, n in test]
    asked = sorted(set(items))  # gray images are all one: each question once
    told = dict(zip(asked, answer(net, tokenizer, asked, rows, limit=16)))
    return np.array([told[item] == a for item, (_, a, _) in zip(items, test)])


def majority(test) -> float:
    """Accuracy of the most frequent training answer to each question: what text alone can reach."""
    counts = defaultdict(Counter)
    for question, reply, _ in json.loads((shapes.OFFICIAL / "train" / "questions.json").read_text()):
        counts[question][reply] += 1
    return float(np.mean([counts[q].most_common(1)[0][0] == a for q, a, _ in test]))


def integers(net: mini.LlavaPhi) -> mini.LlavaPhi:
    """A copy whose decoder holds the values that int4 (lm_head: int8) would."""
    result = copy.deepcopy(net)
    values = {k: v.detach() for k, v in mini.quantised(result.decoder).items()}
    result.decoder.load_state_dict(values, strict=False)
    return result


def beyond(net, tokenizer, count: int) -> dict[str, float]:
    """Exact answers about new rendered scenes, for the kinds of question that easy-VQA does not have."""
    rng, draw = Random(SEED), np.random.default_rng(SEED)
    pictures = [shapes.render(draw) for _ in range(count)]
    rows = features(net, [p for p, _ in pictures])
    scenes = [questions.words(s) for _, s in pictures]
    sets = defaultdict(list)  # kind: (prompt, images, answer)
    for i, scene in enumerate(scenes):
        question, reply = questions.official(rng, scene)
        sets["official questions"].append((questions.prompt(question), [i], reply))
        question, reply = questions.yes_no(rng, scene, questions.OTHER_YES, questions.OTHER_NO, "csb")
        sets["other yes/no"].append((questions.prompt(questions.vary(rng, question)), [i], reply))
        question, reply = questions.direct(rng, scene, questions.OTHER_DIRECT[:13])
        sets["other direct"].append((questions.prompt(questions.vary(rng, question)), [i], reply))
        question, reply = questions.direct(rng, scene, questions.OTHER_DIRECT[15:])
        sets["size, place, background"].append((questions.prompt(question), [i], reply))
        described = questions.DESCRIPTION.format(**scene)
        sets["description, every word"].append((questions.prompt(rng.choice(questions.DESCRIBE)), [i], described))
        sets["no image"].append((f"{questions.SYSTEM}USER: {question} ASSISTANT:", [], questions.NO_IMAGE))
        talk = questions.prompt(questions.OFFICIAL_DIRECT[4][0]) + f" {scene['shape']}{questions.END}"
        question, reply = questions.turn(rng, scene)
        talk += f"USER: {question} ASSISTANT: {reply}{questions.END}"
        question, reply = questions.official(rng, scene)
        sets["third turn"].append((f"{talk}USER: {question} ASSISTANT:", [i], reply))
        j = rng.randrange(count)
        question, reply = questions.pair_turn(rng, [scene, scenes[j]])
        sets["two images"].append((questions.prompt(question, 2), [i, j], reply))
    result = {}
    for kind, entries in sets.items():
        told = answer(net, tokenizer, [e[:2] for e in entries], rows)
        result[kind] = float(np.mean([t == e[2] for t, e in zip(told, entries)]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--limit", type=int, default=None, help="only the first test questions")
    parser.add_argument("--beyond", type=int, default=300, help="rendered scenes for the other kinds of question")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.time()
    net, tokenizer = mini.load(args.checkpoint)
    test = json.loads((shapes.OFFICIAL / "test" / "questions.json").read_text())[: args.limit]
    files = {n: shapes.official_image("test", n) for n in sorted({n for _, _, n in test})}
    figures = {"questions": len(test)}

    def report(name, value):
        figures[name] = value
        print(f"{name:48} {value:.4f}   ({time.time() - began:.0f} s)", flush=True)

    plain = {n: np.asarray(shapes.resize_and_crop(f)) for n, f in files.items()}
    right = official(net, tokenizer, test, plain)
    report("official test", right.mean())
    for name, chosen in (
        ("yes/no", [a in ("yes", "no") for _, a, _ in test]),
        ("shape", [a in shapes.SHAPES for _, a, _ in test]),
        ("color", [a in shapes.COLORS for _, a, _ in test]),
    ):
        report(f"official test, {name}", right[np.array(chosen)].mean())
    wrong = Counter(n for ok, (_, _, n) in zip(right, test) if not ok)
    figures["images with a wrong answer"] = dict(wrong.most_common())
    print("images with a wrong answer:", wrong.most_common(20))

    gray = {n: np.full_like(p, 128) for n, p in plain.items()}
    report("official test, gray images", official(net, tokenizer, test, gray).mean())
    report("most frequent training answer per question", majority(test))

    rng = np.random.default_rng(SEED)
    copies, sides = {}, {}
    for n, file in files.items():
        sides[n] = round(shapes.log_uniform(rng, 40, 300))
        larger = file.resize((sides[n], sides[n]), Image.Resampling.BICUBIC)
        copies[n] = np.asarray(shapes.resize_and_crop(shapes.jpeg(larger, int(rng.integers(60, 96)))))
    right = official(net, tokenizer, test, copies)
    report("official test, JPEG 60..95 at 40..300 px", right.mean())
    small = np.array([sides[n] < shapes.SIDE for _, _, n in test])
    report("official test, JPEG at 40..63 px", right[small].mean())
    report("official test, JPEG at 64..300 px", right[~small].mean())

    four = integers(net)
    report("official test, decoder int4, lm_head int8", official(four, tokenizer, test, plain).mean())
    for kind, value in beyond(net, tokenizer, args.beyond).items():
        report(f"beyond: {kind}", value)
    report("first 3,000 of these, int4 on the JPEG images", official(four, tokenizer, test[:3000], copies).mean())
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

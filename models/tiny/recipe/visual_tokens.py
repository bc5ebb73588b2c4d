"""Compares ways to choose fewer rows of an image, in PyTorch: exact answers about test images and about new scenes."""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import questions
import shapes
import torch
from evaluate import SEED

import model as mini

LAYER = mini.VISION["num_hidden_layers"] - 2  # whose output the features are


class Images:
    """For each image its features `[64, 128]`, the class token's attention `[64]` and the mean key `[64, 32]`."""

    @torch.no_grad()
    def __init__(self, net: mini.LlavaPhi, pictures: list[np.ndarray]):
        net.vision.set_attn_implementation("eager")
        heads, kept = mini.VISION["num_attention_heads"], {}
        layers = getattr(net.vision, "vision_model", net.vision).encoder.layers
        hook = layers[LAYER].self_attn.k_proj.register_forward_hook(lambda *call: kept.update(keys=call[2]))
        features, attention, keys = [], [], []
        for start in range(0, len(pictures), 200):
            pixels = mini.normalise(torch.from_numpy(np.stack(pictures[start : start + 200])))
            out = net.vision(pixels, output_hidden_states=True, output_attentions=True)
            features.append(out.hidden_states[-2][:, 1:])
            attention.append(out.attentions[LAYER][:, :, 0, 1:].mean(1))
            keys.append(kept["keys"].unflatten(-1, (heads, -1)).mean(2)[:, 1:])
        hook.remove()
        self.features, self.attention, self.keys = torch.cat(features), torch.cat(attention), torch.cat(keys)


def spread(count: int, of: int) -> list[int]:
    """`count` of `of` places at equal distances."""
    return [(2 * place + 1) * of // (2 * count) for place in range(count)]


def farthest(metric: torch.Tensor, first: int, count: int) -> list[int]:
    """Rows each of which is the least like those before it."""
    found, nearest = [first], metric @ metric[first]
    while len(found) < count:
        found.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, metric @ metric[found[-1]])
    return found


def choose(features, attention, keys, dominant: int, contextual: int, *, by="features", targets="spread", merge="mean"):
    """Rows most attended to, and rows that others joined, in the order of the patches: `[dominant + contextual, 128]`."""
    order = torch.argsort(-attention, stable=True)
    rows = {row: features[row] for row in order[:dominant].tolist()}
    rest = sorted(order[dominant:].tolist())
    if contextual:
        metric = torch.nn.functional.normalize(features if by == "features" else keys, dim=-1)
        if targets == "spread":
            chosen = [rest[place] for place in spread(contextual, len(rest))]
        elif targets == "farthest":
            first = int(attention[rest].argmax())
            chosen = sorted(rest[place] for place in farthest(metric[rest], first, contextual))
        else:  # as in VisionZip's code
            chosen = rest[:: max(1, len(rest) // contextual)][:contextual]
        groups = {row: [row] for row in chosen}
        others = [row for row in rest if row not in groups]
        best = (metric[others] @ metric[chosen].T).argmax(1).tolist() if others else []
        for row, place in zip(others, best):
            groups[chosen[place]].append(row)
        for row, group in groups.items():
            joined = features[group[1:]].mean(0) if group[1:] else torch.zeros_like(features[row])
            rows[row] = {"mean": features[group].mean(0), "sum": features[row] + joined, "none": features[row]}[merge]
    return torch.stack([rows[row] for row in sorted(rows)])


def ways(count: int, rng: np.random.Generator) -> dict[str, Callable]:
    """Ways to keep `count` of 64 rows, by name; each takes features, attention and keys of one image."""

    def way(dominant: int, **named) -> Callable:
        return lambda f, a, k: choose(f, a, k, dominant, count - dominant, **named)

    found: dict[str, Callable] = {
        "every so many": lambda f, a, k: f[spread(count, len(f))],
        "random": lambda f, a, k: f[sorted(rng.permutation(len(f))[:count])],
        "dominant alone": way(count),
        "least attended alone": lambda f, a, k: choose(f, -a, k, count, 0),
        "contextual alone": way(0),
    }
    for part in (5 / 6, 1 / 2, 1 / 4):
        dominant = min(round(count * part), count - 1)
        found[f"both, {dominant} + {count - dominant}"] = way(dominant)
    dominant = min(round(count * 5 / 6), count - 1)
    name = f"both, {dominant} + {count - dominant}"
    found[f"{name}, by keys"] = way(dominant, by="keys")
    found[f"{name}, nothing merged"] = way(dominant, merge="none")
    found[f"{name}, as VisionZip's code"] = way(dominant, by="keys", targets="first", merge="sum")
    found[f"both, {count // 2} + {count - count // 2}, targets far apart"] = way(count // 2, targets="farthest")
    return found


@torch.no_grad()
def right(net: mini.LlavaPhi, rows: torch.Tensor, asked: list[tuple]) -> int:
    """How many of `asked` (ids before and after the image, of the answer, the image's number) are answered exactly.

    The answer's own tokens are fed: greedy generation gives them all exactly when each is the likeliest after those before.
    """
    embed, count = net.decoder.model.embed_tokens, 0
    groups = defaultdict(list)
    for item in asked:
        groups[tuple(map(len, item[:3]))].append(item)
    for (_, _, length), group in groups.items():
        for start in range(0, len(group), 128):
            part = group[start : start + 128]
            before = embed(torch.tensor([before for before, *_ in part]))
            after = embed(torch.tensor([after + answer[:-1] for _, after, answer, _ in part]))
            embeds = torch.cat([before, rows[[number for *_, number in part]], after], 1)
            hidden = net.decoder.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -length:]
            wanted = torch.tensor([answer for _, _, answer, _ in part])
            count += int((net.decoder.lm_head(hidden).argmax(-1) == wanted).all(1).sum())
    return count


def official(count: int) -> tuple[list[np.ndarray], list[tuple[str, str, int]]]:
    """Test images, and as many test questions about them: question, answer, image."""
    test = json.loads((shapes.OFFICIAL / "test" / "questions.json").read_text())
    test = [test[n] for n in sorted(np.random.default_rng(5).permutation(len(test))[:count])]
    numbers = sorted({number for *_, number in test})
    place = {number: at for at, number in enumerate(numbers)}
    pictures = [np.asarray(shapes.resize_and_crop(shapes.official_image("test", number))) for number in numbers]
    return pictures, [(question, answer, place[number]) for question, answer, number in test]


def scenes(count: int) -> tuple[list[np.ndarray], list[tuple[str, str, int]]]:
    """New rendered scenes, and four questions about each: two for place, size or ground, two for shape and color."""
    rng, draw = Random(SEED), np.random.default_rng(SEED)
    drawn = [shapes.render(draw) for _ in range(count)]
    asked = []
    for number, (_, scene) in enumerate(drawn):
        scene = questions.words(scene)
        turns = [questions.direct(rng, scene, questions.OTHER_DIRECT[15:]) for _ in range(2)]
        turns += [questions.direct(rng, scene, questions.OTHER_DIRECT[:13]), questions.official(rng, scene)]
        asked += [(question, answer, number) for question, answer in turns]
    return [picture for picture, _ in drawn], asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--set", choices=("official", "scenes"), default="scenes", help="what is asked")
    parser.add_argument("--count", type=int, default=150, help="test questions, or scenes of four questions each")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 8, 4], help="rows that are kept of 64")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    net, tokenizer = mini.load(args.checkpoint)
    end = tokenizer.token_to_id(questions.END)
    pictures, turns = (official if args.set == "official" else scenes)(args.count)
    images, asked = Images(net, pictures), []
    for question, answer, number in turns:
        before, after = (tokenizer.encode(text).ids for text in questions.prompt(question).split(questions.IMAGE))
        asked.append((before, after, [*tokenizer.encode(f" {answer}").ids, end], number))
    figures = {}
    plans = {(mini.PATCHES, "all"): lambda f, a, k: f}
    for tokens in args.tokens:
        plans |= {(tokens, name): way for name, way in ways(tokens, np.random.default_rng(1)).items()}
    for (tokens, name), way in plans.items():
        each = zip(images.features, images.attention, images.keys)
        with torch.no_grad():
            rows = net.projector(torch.stack([way(*image) for image in each]))
        figures[f"{tokens}, {name}"] = count = right(net, rows, asked)
        print(f"{tokens:>3}  {name:<44} {count:>6} of {len(asked)}  {count / len(asked):.2%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"set": args.set, "questions": len(asked), "right": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

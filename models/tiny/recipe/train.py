"""Trains the miniature in LLaVA's stages and writes the checkpoint and learning_curve.csv."""

import argparse
import csv
import math
import pickle
import time
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import questions
import shapes
import tokenizer as bpe
import torch
from torch.func import functional_call
from torch.nn import functional as F

import model as mini

SEED = 20
LENGTH = 272  # positions of a packed sequence
PAD = -1  # segment of padding
# name: (optimizer steps, batch, peak learning rate)
STAGES = {
    "encoder": (900, 96, 1.5e-3),
    "language": (150, 24, 2e-3),
    "projector": (120, 24, 2e-3),
    "all": (1650, 20, 1.5e-3),
}
SENTENCE_WEIGHT = 0.3  # per token of a description, so that its many tokens do not crowd out the short answers


class Data:
    """Images with the words for each: rendered ones, official ones, re-encoded official ones, held-out ones."""

    def __init__(self, count: int, work: Path):
        file = work / f"images-{count}.pickle"
        if not file.exists():
            file.write_bytes(pickle.dumps((*shapes.official_train(SEED, copies=5), shapes.rendered(SEED, count))))
        official, held, drawn = pickle.loads(file.read_bytes())
        self.images = torch.from_numpy(np.concatenate([official[0], drawn[0]]))
        self.scenes = official[1] + drawn[1]
        self.official = len(official[1])
        self.held_images = torch.from_numpy(held[0])
        self.held_scenes = held[1]

    def draw(self, rng: Random) -> tuple[torch.Tensor, shapes.Scene]:
        """An image, perhaps mirrored, and its scene; two in five are official images or copies of them."""
        low, high = (0, self.official) if rng.random() < 0.4 else (self.official, len(self.scenes))
        index = rng.randrange(low, high)
        image, scene = self.images[index], self.scenes[index]
        x, y = scene.x, scene.y
        if rng.random() < 0.5:
            image, x = image.flip(1), shapes.SIDE - x
        if rng.random() < 0.25:
            image, y = image.flip(0), shapes.SIDE - y
        if rng.random() < 0.3:
            shift = torch.tensor([rng.randint(-6, 6) for _ in range(3)])
            image = (image.int() + shift).clamp(0, 255).to(torch.uint8)
        return image, shapes.Scene(scene.shape, scene.color, x, y, scene.extent, scene.dark)


class Packer:
    """Packs turns into sequences of LENGTH positions.

    A sequence is a prefix (system text, images) and turns. Turns that stand alone do not see each other and each
    continues the prefix's positions: exactly as many single-turn examples, at one prefix's cost. In a conversation
    the turns follow each other and see what came before.
    """

    def __init__(self, tokenizer, data: Data | None):
        self.tokenizer, self.data, self.cache = tokenizer, data, {}
        self.ease = 0.0  # of the questions
        self.end = tokenizer.token_to_id(questions.END)

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text).ids
        return self.cache[text]

    def sequence(self, prefix: list[int], turns, conversation: bool, first: str = "\n"):
        """Rows of (token, position, segment, weight of the token as a target); -100 is a patch of an image."""
        rows = [(token, position, 0, 0.0) for position, token in enumerate(prefix)]
        at, count = len(prefix), 0
        for segment, (question, answer) in enumerate(turns, 1):
            ask = first + question if not conversation or segment == 1 else "USER: " + question
            asked = self.ids(ask + " ASSISTANT:")
            told = self.ids(" " + answer) + [self.end]
            if len(rows) + len(asked) + len(told) > LENGTH:
                break
            if not conversation:
                at = len(prefix)
            weight = SENTENCE_WEIGHT if len(told) > 8 else 1.0
            mark = 0 if conversation else segment
            rows += [(token, at + i, mark, 0.0) for i, token in enumerate(asked)]
            at += len(asked)
            rows += [(token, at + i, mark, weight) for i, token in enumerate(told)]
            at += len(told)
            count += 1
        rows += [(self.end, 0, PAD, 0.0)] * (LENGTH - len(rows))
        return rows, count

    def batch(self, rng: Random, size: int, described: bool = False):
        """`size` sequences of mixed kinds. With `described`, a sentence stands where the image would."""
        rows, images, count = [], [], 0
        system = self.ids(questions.SYSTEM + "USER: ")
        patches = [-100] * mini.PATCHES
        for _ in range(size):
            dice = rng.random()
            conversation = rng.random() < 0.2
            pair = 0.05 < dice < 0.15 and not described
            prefix, first = system, "\n"
            drawn = [self.data.draw(rng) for _ in range(2 if pair else 1)]
            scenes = [questions.words(scene) for _, scene in drawn]
            if pair and rng.random() < 0.3:  # else a shared shape or color would be rare
                drawn, scenes = self.alike(rng, drawn, scenes)
            turns = (questions.turn(rng, scenes[0], self.ease) for _ in range(99))
            if dice < 0.05:  # no image: the same questions, one answer
                prefix, first = self.ids(questions.SYSTEM + "USER:"), " "
                turns = ((question, questions.NO_IMAGE) for question, _ in turns)
                drawn = []
            elif described:
                prefix = self.ids(questions.SYSTEM + "USER: " + questions.DESCRIPTION.format(**scenes[0]))
                drawn = []
            elif pair:
                prefix = system + patches + self.ids("\n") + patches
                turns = (questions.pair_turn(rng, scenes) for _ in range(99))
            else:
                prefix = system + patches
            row, turn_count = self.sequence(prefix, turns, conversation, first)
            rows.append(row)
            images += [image for image, _ in drawn]
            count += turn_count
        table = np.array(rows, dtype=np.float32)
        tokens, positions, segments = (torch.from_numpy(table[:, :, i].astype(np.int64)) for i in range(3))
        weights = torch.from_numpy(table[:, :, 3].copy())
        return tokens, positions, segments, weights, torch.stack(images) if images else None, count

    def alike(self, rng: Random, drawn, scenes):
        what = rng.choice(("shape", "color"))
        for _ in range(24):
            if scenes[0][what] == scenes[1][what]:
                break
            drawn[1] = self.data.draw(rng)
            scenes[1] = questions.words(drawn[1][1])
        return drawn, scenes


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Which positions see which, `[n, 1, LENGTH, LENGTH]`: causal, within the own segment or the prefix."""
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    mask = causal & ((key == 0) | (key == query))
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[:, None]


class Decoding(torch.nn.Module):
    """The decoder as a function of (embeddings, mask, positions, which rows want logits)."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, embeds, mask, positions, wanted):
        hidden = self.decoder.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return self.decoder.lm_head(hidden.last_hidden_state[wanted])


def answer_logits(net: mini.LlavaPhi, batch, weights=None):
    """Logits that predict the weighted tokens, these tokens and their weights. `weights` replaces the decoder's."""
    tokens, positions, segments, weight, images, _ = batch
    embeds = net.decoder.model.embed_tokens(tokens.clamp_min(0))
    if images is not None:
        rows = net.projector(net.features(mini.normalise(images)))
        embeds = embeds.masked_scatter((tokens == -100)[..., None], rows)
    wanted = torch.zeros_like(weight, dtype=torch.bool)
    wanted[:, :-1] = weight[:, 1:] > 0
    replaced = {f"decoder.{k}": v for k, v in weights.items()} if weights else {}
    logits = functional_call(Decoding(net.decoder), replaced, (embeds, visible(segments), positions, wanted))
    chosen = weight > 0
    return logits, tokens[chosen], weight[chosen]


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 2 %."""
    warm = min(1.0, (step + 1) / max(1, min(100, steps // 10)))
    return warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def optimizer(groups) -> torch.optim.AdamW:
    """AdamW over (modules, learning rate); weight decay on matrices only."""
    result = []
    for modules, learning_rate in groups:
        parameters = list(chain.from_iterable(m.parameters() for m in modules))
        for decay, chosen in (
            (0.05, [p for p in parameters if p.dim() > 1]),
            (0.0, [p for p in parameters if p.dim() < 2]),
        ):
            result.append({"params": chosen, "peak": learning_rate, "lr": 0.0, "weight_decay": decay})
    return torch.optim.AdamW(result, betas=(0.9, 0.98))


def descend(opt, loss, step: int, steps: int) -> None:
    for group in opt.param_groups:
        group["lr"] = group["peak"] * rate(step, steps)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
    opt.step()


class Run:
    """One training run: the parts, and the log of what happened."""

    def __init__(self, out: Path, work: Path, scale: float, resumed: bool):
        torch.manual_seed(SEED)
        self.out, self.work, self.scale, self.start = out, work, scale, time.time()
        self.tokenizer = bpe.train(SEED)
        self.net = mini.LlavaPhi(self.tokenizer.token_to_id(questions.END))
        for layer in self.net.decoder.model.layers:
            layer.mlp.activation_fn = torch.nn.GELU(approximate="tanh")  # gelu_new in one kernel
        self.data = Data(max(2000, round(40000 * min(1, scale)) // 1000 * 1000), work)
        self.packer = Packer(self.tokenizer, self.data)
        self.samples = 0
        self.log = open(work / "learning_curve.csv", "a" if resumed else "w", newline="")
        self.csv = csv.writer(self.log)
        if not resumed:
            self.csv.writerow(("stage", "step", "seconds", "samples", "loss", "held_out_accuracy", "ease"))
        print(f"data ready: {len(self.data.scenes)} images, {time.time() - self.start:.0f} s", flush=True)

    def record(self, stage, step, loss, accuracy="", ease="") -> None:
        row = (stage, step, round(time.time() - self.start), self.samples, f"{loss:.4f}", accuracy, ease)
        self.csv.writerow(row)
        self.log.flush()
        print(*row, flush=True)

    def keep(self) -> None:
        mini.save(self.net, self.tokenizer, self.out)

    def stage(self, name: str):
        steps, batch, peak = STAGES[name]
        return max(1, round(steps * self.scale)), batch, peak, Random(f"{SEED} {name}")

    def encoder(self) -> None:
        """Shape, color and place from the mean patch of the last layer and of the one before, which the model uses."""
        steps, batch, peak, rng = self.stage("encoder")
        heads = torch.nn.ModuleList(torch.nn.Linear(mini.VISION["hidden_size"], 3 + 8 + 3) for _ in range(2))
        opt = optimizer([([self.net.vision, heads], peak)])
        names = list(shapes.COLORS)
        used = mini.VISION["num_hidden_layers"] - 1

        def read(images):
            hidden = self.net.vision.pre_layrnorm(self.net.vision.embeddings(mini.normalise(images)))
            for index, layer in enumerate(self.net.vision.encoder.layers, 1):
                hidden = layer(hidden, attention_mask=None)
                if index == used:
                    early = hidden
            return heads[0](early[:, 1:].mean(1)), heads[1](hidden[:, 1:].mean(1))

        for step in range(steps):
            images, scenes = zip(*(self.data.draw(rng) for _ in range(batch)))
            shape = torch.tensor([shapes.SHAPES.index(s.shape) for s in scenes])
            color = torch.tensor([names.index(s.color) for s in scenes])
            place = torch.tensor([[s.x, s.y, s.extent] for s in scenes]) / shapes.SIDE
            loss = 0
            for out in read(torch.stack(images)):
                loss = loss + F.cross_entropy(out[:, :3], shape) + F.cross_entropy(out[:, 3:11], color)
                loss = loss + 5 * F.smooth_l1_loss(out[:, 11:], place, beta=0.1)
            descend(opt, loss, step, steps)
            self.samples += batch
            if step % 50 == 49 or step == steps - 1:
                with torch.no_grad():
                    guess = read(self.data.held_images)[0]
                held = self.data.held_scenes
                right = [
                    shapes.SHAPES[s] == scene.shape and names[c] == scene.color
                    for s, c, scene in zip(guess[:, :3].argmax(1), guess[:, 3:11].argmax(1), held)
                ]
                self.record("encoder", step + 1, loss.item(), f"{np.mean(right):.4f}")

    def language(self) -> None:
        """The decoder alone, on text: every token, with a sentence in the image's place. Stands for Phi-2's pretraining."""
        steps, batch, peak, rng = self.stage("language")
        opt = optimizer([([self.net.decoder], peak)])
        for step in range(steps):
            packed = list(self.packer.batch(rng, batch, described=True))
            _tokens, _, segments, weight, _, count = packed
            real = (segments != PAD).float()
            real[:, 0] = 0
            # A segment's first token does not follow the token packed before it.
            real[:, 1:][segments[:, 1:] != segments[:, :-1]] = 0
            packed[3] = torch.maximum(weight, 0.1 * real)
            self.samples += count
            logits, targets, scale = answer_logits(self.net, packed)
            loss = (F.cross_entropy(logits, targets, reduction="none") * scale).sum() / scale.sum()
            descend(opt, loss, step, steps)
            if step % 25 == 24:
                self.record("language", step + 1, loss.item())

    def answers(self, name: str, groups, quantise: bool) -> None:
        """Answers from images, first easy ones; negation comes in as the held-out answers come right. With `quantise`, the last half's steps see int4 weights every other time."""
        steps, batch, peak, rng = self.stage(name)
        opt = optimizer([(modules, peak * factor) for modules, factor in groups])
        trained = {id(p) for g in opt.param_groups for p in g["params"]}
        for parameter in self.net.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        mean, since = 0.0, time.time()
        self.packer.ease = 1.0
        for step in range(steps):
            packed = self.packer.batch(rng, batch)
            weights = mini.quantised(self.net.decoder) if quantise and step * 2 > steps and step % 2 else None
            logits, targets, scale = answer_logits(self.net, packed, weights)
            loss = (F.cross_entropy(logits, targets, reduction="none") * scale).sum() / scale.sum()
            descend(opt, loss, step, steps)
            self.samples += packed[-1]
            mean += loss.item() / 50
            if step % 50 == 49 or step == steps - 1:
                accuracy = self.validate()
                self.record(name, step + 1, mean, f"{accuracy:.4f}", self.packer.ease)
                mean = 0.0
                if accuracy > 0.9:
                    self.packer.ease = max(0.0, self.packer.ease - 0.25)
            if time.time() - since > 180:
                since = time.time()
                self.keep()
        self.net.requires_grad_(True)

    @torch.no_grad()
    def validate(self) -> float:
        """Share of right answers (every token by argmax) to official questions about the held-out images."""
        rng, rows = Random(SEED), []
        prefix = self.packer.ids(questions.SYSTEM + "USER: ") + [-100] * mini.PATCHES
        scenes = [questions.words(s) for s in self.data.held_scenes[:32]]
        for scene in scenes:
            turns = (questions.official(rng, scene, 0.5 * (1 - self.packer.ease)) for _ in range(99))
            rows.append(self.packer.sequence(prefix, turns, False)[0])
        table = torch.tensor(rows)
        tokens, positions, segments = (table[:, :, i].long() for i in range(3))
        batch = (tokens, positions, segments, table[:, :, 3], self.data.held_images[:32], 0)
        logits, targets, _ = answer_logits(self.net, batch)
        # An official answer is one token and the end: pairs.
        return (logits.argmax(-1) == targets).reshape(-1, 2).all(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("checkpoint"), help="checkpoint directory to write")
    parser.add_argument("--work", type=Path, default=Path("."), help="directory for learning_curve.csv and stage files")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument(
        "--from-stage", choices=list(STAGES), default="encoder", help="resume from the saved stage before"
    )
    parser.add_argument("--threads", type=int, default=1, help="on a busy machine one is faster than two")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.work, args.scale, args.from_stage != "encoder")
    net = run.net
    stages = {
        "encoder": run.encoder,
        "language": run.language,
        "projector": lambda: run.answers("projector", [([net.projector], 1.0)], quantise=False),
        "all": lambda: run.answers("all", [([net.vision], 0.4), ([net.projector, net.decoder], 1.0)], quantise=True),
    }
    names = list(stages)
    for name in names[: names.index(args.from_stage)]:
        net.load_state_dict(torch.load(args.work / f"{name}.pt"))
    for name in names[names.index(args.from_stage) :]:
        began = time.time()
        stages[name]()
        print(f"stage {name}: {time.time() - began:.0f} s", flush=True)
        torch.save(net.state_dict(), args.work / f"{name}.pt")
        run.keep()


if __name__ == "__main__":
    main()

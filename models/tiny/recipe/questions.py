"""Writes the questions, answers and descriptions of a scene, and the prompt around them (LLaVA-Phi's conv_phi_v0)."""

from random import Random

from shapes import COLORS, SHAPES, Scene

END = "<|endoftext|>"
IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
NO_IMAGE = "There is no image."
SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's evaluation scripts append this

# {x} is "red shape", "circle" or, beyond easy-VQA, "red circle".
OFFICIAL_YES = (
    "is there a {x}?",
    "is there a {x} in the image?",
    "is a {x} present?",
    "does the image contain a {x}?",
)
OFFICIAL_NO = (
    "is there not a {x}?",
    "is there not a {x} in the image?",
    "is no {x} present?",
    "does the image not contain a {x}?",
)
OFFICIAL_DIRECT = (
    ("what color is the shape?", "{color}"),
    ("what color is the {shape}?", "{color}"),
    ("what is the color of the shape?", "{color}"),
    ("what is the color of the {shape}?", "{color}"),
    ("what shape is in the image?", "{shape}"),
    ("what shape does the image contain?", "{shape}"),
    ("what shape is present?", "{shape}"),
    ("what is the {color} shape?", "{shape}"),
)
OTHER_YES = (
    "do you see a {x}?",
    "can you see a {x} in the image?",
    "does the picture show a {x}?",
    "is there a {x} in the picture?",
    "is this a {x}?",
    "is it a {x}?",
)
OTHER_NO = ("is there no {x}?", "is there no {x} in the image?")
OTHER_DIRECT = (
    ("what shape is this?", "{shape}"),
    ("which shape is in the picture?", "{shape}"),
    ("what shape do you see?", "{shape}"),
    ("name the shape.", "{shape}"),
    ("what is its shape?", "{shape}"),
    ("what color is it?", "{color}"),
    ("which color does the shape have?", "{color}"),
    ("what color do you see?", "{color}"),
    ("what colour is the shape?", "{color}"),
    ("name the color of the shape.", "{color}"),
    ("what is in the image?", "a {color} {shape}"),
    ("what is in the picture?", "a {color} {shape}"),
    ("which object is in the image?", "a {color} {shape}"),
    ("how many shapes are in the image?", "one"),
    ("how many images are there?", "one"),
    ("how big is the shape?", "{size}"),
    ("what size is the {shape}?", "{size}"),
    ("where is the shape?", "{place}"),
    ("where is the {shape}?", "{place}"),
    ("is the background light or dark?", "{ground}"),
)
DESCRIBE = (
    "describe the image.",
    "describe the image in one sentence.",
    "please describe the picture.",
    "what do you see?",
    "what does the image show?",
)
DESCRIPTION = "The {nth}image shows a {size} {color} {shape} on a {ground} background, {place}."
PAIR_DIRECT = (
    ("what is in the {nth} image?", "a {color} {shape}"),
    ("what shape is in the {nth} image?", "{shape}"),
    ("what is the {nth} shape?", "{shape}"),
    ("what color is the {nth} shape?", "{color}"),
    ("what color is the shape in the {nth} image?", "{color}"),
    ("what is the color of the {nth} shape?", "{color}"),
)
PAIR_YES = ("is there a {x} in the {nth} image?", "does the {nth} image contain a {x}?", "is the {nth} shape a {x}?")
PAIR_SAME = (
    ("do the images show the same shape?", "shape"),
    ("are the two shapes the same?", "shape"),
    ("do the shapes have the same color?", "color"),
    ("are both shapes the same color?", "color"),
)


def words(scene: Scene) -> dict[str, str]:
    """The words for a scene. A circle of 14 pixels is small, one of 24 large; places are thirds of the image."""
    column = "left" if scene.x < 21.5 else "right" if scene.x > 42.5 else ""
    row = "top" if scene.y < 21.5 else "bottom" if scene.y > 42.5 else ""
    if row and column:
        place = f"near the {row} {column} corner"
    elif row or column:
        place = f"near the {row or column} edge"
    else:
        place = "in the center"
    return {
        "shape": scene.shape,
        "color": scene.color,
        "size": "small" if scene.extent < 14.5 else "large" if scene.extent > 23.5 else "medium",
        "place": place,
        "ground": "dark" if scene.dark else "light",
        "nth": "",
    }


def phrase(rng: Random, scene: dict, kinds: str) -> tuple[str, bool]:
    """A noun phrase such as "red shape" and whether the scene has it (45 %). `kinds`: of c, s, b(oth)."""
    kind = rng.choice(kinds)
    shape, color = scene["shape"], scene["color"]
    true = rng.random() < 0.45
    if not true:
        wrong = rng.choice(("shape", "color", "both")) if kind == "b" else {"c": "color", "s": "shape"}[kind]
        if wrong != "color":
            shape = rng.choice([s for s in SHAPES if s != shape])
        if wrong != "shape":
            color = rng.choice([c for c in COLORS if c != color])
    return {"c": f"{color} shape", "s": shape, "b": f"{color} {shape}"}[kind], true


def yes_no(rng: Random, scene: dict, positive, negated, kinds: str, share: float = 0.5) -> tuple[str, str]:
    """`share` is that of the negated templates."""
    noun, true = phrase(rng, scene, kinds)
    negative = bool(negated) and rng.random() < share
    template = rng.choice(negated if negative else positive)
    return template.format(x=noun, **scene), "yes" if true != negative else "no"


def direct(rng: Random, scene: dict, templates) -> tuple[str, str]:
    question, answer = rng.choice(templates)
    return question.format(**scene), answer.format(**scene)


def official(rng: Random, scene: dict, share: float = 0.5) -> tuple[str, str]:
    """A question in easy-VQA's own words."""
    if rng.random() < 0.65:
        return yes_no(rng, scene, OFFICIAL_YES, OFFICIAL_NO, "ccs", share)
    return direct(rng, scene, OFFICIAL_DIRECT)


def vary(rng: Random, question: str, short: bool = True) -> str:
    """Upper or lower case at the beginning, with or without the last mark, with or without LLaVA's suffix."""
    if rng.random() < 0.35:
        question = question[0].upper() + question[1:]
    dice = rng.random()
    if dice < 0.12:
        return question[:-1]
    if dice < 0.22 and short:
        return question + SUFFIX
    return question


def turn(rng: Random, scene: dict, ease: float = 0.0) -> tuple[str, str]:
    """A question about one image, and its answer. With `ease` 1, yes/no questions are many and never negated.

    A negated yes/no question is the parity of two things to learn; nothing pulls towards either before the other
    is known.
    """
    dice, share = rng.random(), 0.5 * (1 - ease)
    if rng.random() < 0.4 * ease:
        question, answer = yes_no(rng, scene, OFFICIAL_YES, (), "csb")
    elif dice < 0.58:
        question, answer = official(rng, scene, share)
    elif dice < 0.74:
        templates = (OFFICIAL_YES + OTHER_YES, OFFICIAL_NO + OTHER_NO)
        question, answer = yes_no(rng, scene, *templates, "csbbb", share)
        if rng.random() < 0.25:
            other = rng.choice(("is the shape {c}?", "is the {s} {c}?", "is it {c}?"))
            color = scene["color"] if rng.random() < 0.5 else rng.choice(list(COLORS))
            question = other.format(c=color, s=scene["shape"])
            answer = "yes" if color == scene["color"] else "no"
    elif dice < 0.92:
        question, answer = direct(rng, scene, OTHER_DIRECT)
    else:
        return vary(rng, rng.choice(DESCRIBE), short=False), DESCRIPTION.format(**scene)
    return vary(rng, question), answer


def pair_turn(rng: Random, scenes: list[dict]) -> tuple[str, str]:
    """A question about two images, and its answer."""
    which = rng.randrange(2)
    scene = scenes[which] | {"nth": ("first", "second")[which]}
    dice = rng.random()
    if dice < 0.5:
        question, answer = direct(rng, scene, PAIR_DIRECT)
    elif dice < 0.72:
        question, answer = yes_no(rng, scene, PAIR_YES, (), "csb")
    elif dice < 0.88:
        question, what = rng.choice(PAIR_SAME)
        answer = "yes" if scenes[0][what] == scenes[1][what] else "no"
    elif dice < 0.92:
        question, answer = "how many images are there?", "two"
    else:
        return f"describe the {scene['nth']} image.", DESCRIPTION.format(**scene | {"nth": scene["nth"] + " "})
    return vary(rng, question), answer


def prompt(question: str, images: int = 1) -> str:
    """The first turn, up to where the model answers."""
    return f"{SYSTEM}USER: {(IMAGE + chr(10)) * images}{question} ASSISTANT:"

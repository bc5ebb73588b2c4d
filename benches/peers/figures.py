"""Names what is measured, with its unit."""

from dataclasses import dataclass

# A prompt of the first question: text before the image, the image, text after it.
BEFORE, IMAGE, AFTER = 32, 576, 32
# Greedy steps of one decode sample.
STEPS = 32
CONTEXT = 1024


@dataclass(frozen=True)
class Figure:
    """`title` is the report's row; `unit` one of s, s/token, bytes. Less is better for each."""

    name: str
    title: str
    unit: str


ALL = {
    figure.name: figure
    for figure in (
        Figure("load", "load to ready, files cached", "s"),
        Figure("encode", "image encode", "s"),
        Figure("prefill-128", "prefill of 128 tokens", "s"),
        Figure("prefill-640", "prefill of 640 tokens", "s"),
        Figure("decode-0", "decode at depth 0", "s/token"),
        Figure("decode-700", "decode at depth 700", "s/token"),
        Figure("first-token", "first token, image + 64 text tokens", "s"),
        Figure("second-question", "first token of a second question, the way it is used", "s"),
        Figure("second-question-best", "first token of a second question, cache kept by hand", "s"),
        Figure("rss-peak", "peak RSS of the whole job", "bytes"),
        Figure("rss-anonymous", "of it anonymous, at its own peak", "bytes"),
        Figure("rss-file", "of it mapped files, at its own peak", "bytes"),
    )
}
MEMORY = ("rss-peak", "rss-anonymous", "rss-file")
# The order in which a worker takes them: decode at depth 700 goes on from the prefill of 640.
TIMED = tuple(name for name in ALL if name not in MEMORY)

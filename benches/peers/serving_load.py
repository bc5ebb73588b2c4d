"""Makes the questions of a level of load, the same for every server, and asks them from several clients at once."""

import asyncio
import base64
import itertools
import random
import time
from dataclasses import dataclass

from streamed import Client

# Each is one token of the model's tokenizer, with the blank before it.
WORDS = """of and to in is that it for on are as be at one have from or had by not but some we out were all up use how said
an do time if will way would like so her make see him look day go come did sound no most people my over water
call first who may down been now any new take get place live after back only came every good me give our picture
red blue black left right above answer question yes""".split()


@dataclass(frozen=True)
class Question:
    """`text` alone is continued as it stands; with a `picture`, which is a PNG, it is a chat's question about it."""

    text: str
    tokens: int
    picture: bytes | None = None


def questions(workload, count, options, first):
    """`count` questions, no two alike; those of numbers that were asked before are never made again."""
    made = []
    for number in range(first, first + count):
        draw = random.Random(number)
        if workload == "text":
            words = [draw.choice(WORDS) for _ in range(options.prompt)]
            made.append(Question(" " + " ".join(words), options.tokens))
        else:
            words = " ".join(draw.choice(WORDS) for _ in range(8))
            made.append(Question(f"look at {words}", options.picture_tokens, options.picture))
    return made


def body(question, model, never):
    """The request of OpenAI's API and its endpoint; `never` is how the server is told not to end."""
    asked = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    asked |= {"temperature": 0, "max_tokens": question.tokens, **never}
    if question.picture is None:
        return "/completions", asked | {"prompt": question.text}
    url = f"data:image/png;base64,{base64.b64encode(question.picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    return "/chat/completions", asked | {"messages": [{"role": "user", "content": content}]}


def ask(url, bodies, clients, timeout):
    """Asks all from `clients` clients, each of which reads a whole answer before it asks again."""
    return asyncio.run(ask_all(url, bodies, clients, timeout))


async def ask_all(url, bodies, clients, timeout):
    left, answers = iter(bodies), []

    async def one():
        client = Client(url, timeout=timeout)
        for endpoint, asked in left:
            answers.append(told(await client.ask(asked, endpoint), asked["max_tokens"]))
        client.close()

    begin = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return {"seconds": time.perf_counter() - begin, "answers": answers}


def told(answered, wanted):
    """What is kept of one answer; one of another length than was asked for is an error."""
    error = answered.error
    if error is None and answered.lost:
        error = "the answer has no end"
    if error is None and answered.tokens != wanted:
        error = f"{answered.tokens} tokens instead of {wanted}"
    return answer(answered.pieces, answered.tokens, answered.prompt_tokens, error)


def answer(pieces, tokens, prompt_tokens, error=None):
    """The record of one answer from the times of its pieces, in seconds since it was asked for."""
    between = [round(b - a, 5) for a, b in itertools.pairwise(pieces)]
    first = round(pieces[0], 5) if pieces else None
    return {"first": first, "between": between, "tokens": tokens, "prompt_tokens": prompt_tokens, "error": error}

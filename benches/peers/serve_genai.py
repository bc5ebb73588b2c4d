"""Answers levels of load with onnxruntime-genai, driven by lines of JSON on its standard input.

settings: `model`, a directory of the model builder; `tokenizer`, a tokenizer.json; `context`, positions of a sequence; `way`,
`engine` for requests that its engine schedules, or `batch` for one `Generator` whose sequences begin and end together.
A line is `{"clients", "questions": [{"text", "tokens"}]}`; its answer `{"seconds", "answers"}` as of `serving_load.ask`.
"""

import argparse
import json
import sys
import time
from collections import deque

import numpy as np
import onnxruntime_genai as og
from serving_load import answer
from tokenizers import Tokenizer


def load(settings, threads):
    config = og.Config(str(settings["model"]))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    config.overlay(json.dumps({"search": {"max_length": settings["context"]}}))
    return og.Model(config)


class Engine:
    """Requests join as their clients ask; the engine chooses what it computes together."""

    def __init__(self, model):
        self.engine = og.Engine(model)
        self.events = self.engine.create_event_buffer(64)

    def ask(self, questions, clients):
        """`questions` are pairs of token ids and how many are to be said; each of `clients` asks when it was answered."""
        left, active, answers = deque(questions), [], []
        while left or active:
            while left and len(active) < clients:
                active.append(Asked(self.engine, *left.popleft()))
            for event in self.engine.run(self.events):
                asked = next(one for one in active if one.request is event.request)
                if event.flags & og.EngineEventFlags.FAILED:
                    raise RuntimeError(f"the engine failed: {event.error_code}")
                if event.flags & og.EngineEventFlags.TOKEN:
                    asked.pieces.append(time.perf_counter() - asked.begin)
                if event.flags & og.EngineEventFlags.TURN_FINISHED:
                    asked.request.close()
                    active.remove(asked)
                    answers.append(answer(asked.pieces, len(asked.pieces), asked.length))
        return answers


class Asked:
    def __init__(self, engine, ids, count):
        self.length, self.pieces = len(ids), []
        options = og.RequestOptions()
        options.set_max_session_tokens(len(ids) + count)
        self.request = engine.create_request(options=options)
        turn = og.TurnOptions(self.request)
        turn.set_max_generated_tokens(count)
        # The end of the text cannot be chosen before as many were.
        turn.set_min_generated_tokens(count)
        turn.set_do_sample(False)
        self.begin = time.perf_counter()
        self.request.begin_turn(np.asarray(ids, np.int32), turn)


class Batch:
    """As many questions as there are clients are one batch, and the next ones begin when all of it is answered."""

    def __init__(self, model):
        self.model = model

    def ask(self, questions, clients):
        answers = []
        for first in range(0, len(questions), clients):
            answers += self.group(questions[first : first + clients])
        return answers

    def group(self, questions):
        lengths, counts = {len(ids) for ids, _ in questions}, {count for _, count in questions}
        if len(lengths) > 1 or len(counts) > 1:
            raise ValueError(
                f"a batch needs questions of one length, these have {sorted(lengths)} and {sorted(counts)}"
            )
        length, count = lengths.pop(), counts.pop()
        begin, pieces = time.perf_counter(), []
        parameters = og.GeneratorParams(self.model)
        whole = length + count
        parameters.set_search_options(max_length=whole, min_length=whole, do_sample=False, batch_size=len(questions))
        generator = og.Generator(self.model, parameters)
        ids = np.asarray([ids for ids, _ in questions], np.int32)
        generator.append_tokens(ids if len(questions) > 1 else ids[0])
        for _ in range(count):
            generator.generate_next_token()
            generator.get_next_tokens()
            pieces.append(time.perf_counter() - begin)
        return [answer(pieces, len(pieces), length) for _ in questions]


WAYS = {"engine": Engine, "batch": Batch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=json.loads, required=True, metavar="JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    settings = options.settings
    tokenizer = Tokenizer.from_file(settings["tokenizer"])
    way = WAYS[settings["way"]](load(settings, options.threads))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        questions = [(tokenizer.encode(one["text"]).ids, one["tokens"]) for one in asked["questions"]]
        begin = time.perf_counter()
        answers = way.ask(questions, asked["clients"])
        print(json.dumps({"seconds": time.perf_counter() - begin, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()

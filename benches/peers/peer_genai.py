"""Measures onnxruntime-genai, which runs the language model; LLaVA's vision is beyond it.

settings: `model`, a directory of the model builder; `session`, session options of the decoder, by genai's names.
"""

import json

import onnxruntime_genai as og
import worker
from figures import AFTER, BEFORE, CONTEXT, IMAGE


class Genai:
    def __init__(self, settings, threads):
        self.directory = settings["model"]
        self.session = {"intra_op_num_threads": threads, **settings.get("session", {})}
        self.model = self.generator = None

    def load(self):
        config = og.Config(str(self.directory))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": self.session}}}))
        self.model = og.Model(config)

    def reset(self):
        self.generator = None
        parameters = og.GeneratorParams(self.model)
        # Random weights may choose the end: it is forbidden throughout.
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self.generator = og.Generator(self.model, parameters)

    def read(self, tokens):
        self.generator.append_tokens(tokens)
        self.generator.generate_next_token()

    def step(self):
        self.generator.generate_next_token()

    def rewind(self, length):
        self.generator.rewind_to(length)
        self.generator.generate_next_token()

    def before_second_question(self):
        self.reset()
        self.read(worker.tokens(BEFORE + IMAGE + AFTER))

    def second_question(self):
        """Continuous decoding: the second turn is appended to the first."""
        self.read(worker.tokens(AFTER, seed=2))

    def before_second_question_best(self):
        self.before_second_question()
        self.generator.rewind_to(BEFORE + IMAGE)

    def second_question_best(self):
        self.read(worker.tokens(AFTER, seed=2))


if __name__ == "__main__":
    options = worker.arguments(__doc__)
    worker.run(Genai(options.settings, options.threads), options)

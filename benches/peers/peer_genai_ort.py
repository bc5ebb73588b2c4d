"""Measures onnxruntime-genai together with an f32 encoder in ONNX Runtime, as a user could assemble them.

settings: those of `peer_genai.py` and of `peer_ort.py`.
"""

import worker
from figures import AFTER, BEFORE, IMAGE
from peer_genai import Genai
from peer_ort import Vision


class Assembled(Genai):
    def __init__(self, settings, threads):
        super().__init__(settings, threads)
        self.vision = Vision(settings, threads)
        self.encode = self.vision.encode

    def load(self):
        self.vision.load()
        super().load()

    def before_first_token(self):
        self.reset()

    def first_token(self):
        self.encode()
        self.read(worker.tokens(BEFORE + IMAGE + AFTER))


if __name__ == "__main__":
    options = worker.arguments(__doc__)
    worker.run(Assembled(options.settings, options.threads), options)

"""Measures the encoder and the projector as f32 graphs in plain ONNX Runtime, the baseline of encoders.

settings: `vision` and `projector`, the graphs of a package's f32 form.
"""

import numpy as np
import onnxruntime as ort
import worker


class Vision:
    """The two graphs, run one after the other."""

    def __init__(self, settings, threads):
        self.settings, self.threads = settings, threads
        self.pixels = np.random.default_rng(0).standard_normal((1, 3, 336, 336)).astype(np.float32)

    def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.graphs = [
            ort.InferenceSession(self.settings[name], options, providers=["CPUExecutionProvider"])
            for name in ("vision", "projector")
        ]

    def encode(self):
        value = self.pixels
        for graph in self.graphs:
            value = graph.run([graph.get_outputs()[0].name], {graph.get_inputs()[0].name: value})[0]
        return value


if __name__ == "__main__":
    options = worker.arguments(__doc__)
    worker.run(Vision(options.settings, options.threads), options)

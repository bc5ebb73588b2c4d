"""How far two results are apart, and the file that the figures are kept in."""

import datetime
import json
import platform
import shlex
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, f64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(found: np.ndarray, wanted: np.ndarray) -> dict:
    """KL(wanted, found) in nats a position, how often the largest logit is the same one, relative L2 distance."""
    p, q = log_softmax(wanted), log_softmax(found)
    each = (np.exp(p) * (p - q)).sum(-1)
    apart = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return {
        "kl": float(f"{each.mean():.3g}"),
        "kl_p99": float(f"{np.quantile(each, 0.99):.3g}"),
        "top1": round(float((found.argmax(-1) == wanted.argmax(-1)).mean()), 4),
        "distance": float(f"{apart.mean():.3g}"),
    }


def cosines(found: np.ndarray, wanted: np.ndarray) -> dict:
    """The least and the mean cosine of rows, and the relative L2 distance of all."""
    found, wanted = (values.astype(np.float64).reshape(-1, values.shape[-1]) for values in (found, wanted))
    each = (found * wanted).sum(-1) / (np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1))
    apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    return {
        "cosine_min": round(float(each.min()), 6),
        "cosine_mean": round(float(each.mean()), 6),
        "features_distance": float(f"{apart:.3g}"),
    }


def versions() -> dict:
    """What computed the figures."""
    return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "python": platform.python_version()}


class Kept:
    """Results, each told on stdout when it comes and added to a JSON file, if one is named."""

    def __init__(self, path: Path | None, about: dict):
        self._path = path
        command = shlex.join(["python", *sys.argv])
        self._run = {"command": command, "date": datetime.date.today().isoformat(), **about, "results": []}

    def add(self, result: dict) -> None:
        """Keeps one result; the file then holds all earlier runs and what this one has so far."""
        result = {key: value for key, value in result.items() if value != ""}
        print(json.dumps(result), flush=True)
        if self._path is None:
            self._run["results"].append(result)
            return
        runs = json.loads(self._path.read_text()) if self._path.exists() else []
        if self._run["results"]:
            runs = runs[:-1]
        self._run["results"].append(result)
        self._path.write_text(json.dumps([*runs, self._run], indent=1) + "\n")

    @staticmethod
    def distances(found: np.ndarray, wanted: np.ndarray) -> dict:
        """As `divergence`."""
        return divergence(found, wanted)

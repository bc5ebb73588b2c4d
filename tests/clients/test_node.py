"""The `openai` package for JavaScript, as it is installed by npm, asks the server."""

import json
import subprocess

from conftest import IMAGES, MODEL
from test_openai import ANSWER


def test_it_asks_in_every_way(node_folder, server):
    command = ["node", "ask.mjs", f"{server}/v1", MODEL, str(IMAGES / "red-triangle.png")]
    told = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    told = json.loads(told.stdout)
    assert told["whole"] == told["streamed"] == told["responses"] == ANSWER
    assert told["pieces"] > 1 and told["tokens"] == 3
    assert told["formed"]["color"] in ("red", "green", "blue")
    assert told["refused"] == {"bad": True, "param": "temperature"}

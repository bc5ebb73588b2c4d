"""The blocks of `docs/serving.md` that ask a server are run, and print what stands below them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ADDRESS = "http://127.0.0.1:8080"
FENCE = re.compile(r"^```(sh|python|js)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def blocks():
    found = FENCE.findall((ROOT / "docs/serving.md").read_text(encoding="utf-8"))
    return [(kind, code, expected) for kind, code, expected in found if ADDRESS in code]


def test_there_is_one_for_each_client():
    assert {kind for kind, _, _ in blocks()} == {"sh", "python", "js"}
    assert any("langchain" in code for _, code, _ in blocks())


@pytest.mark.parametrize(("kind", "code", "expected"), blocks(), ids=lambda value: value[:12].strip())
def test_a_block_prints_what_stands_below_it(kind, code, expected, server, request, tmp_path):
    assert expected.strip(), "nothing stands below the block"
    code = code.replace(ADDRESS, server)
    command = {"sh": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}.get(kind)
    if kind == "js":
        script = request.getfixturevalue("node_folder") / "block.mjs"
        script.write_text(code)
        command = ["node", str(script)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    assert re.fullmatch(pattern, told.stdout.strip(), re.S), told.stdout


def test_every_metric_stands_in_the_table(client, server):
    import urllib.request

    client.models.list()
    told = urllib.request.urlopen(f"{server}/metrics").read().decode()
    names = set(re.findall(r"^# TYPE (\S+) ", told, re.M))
    assert len(names) > 20
    written = Path(ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"`{name}(_total)?[{{`]", written), f"{name} is not in docs/serving.md"
    for name in re.findall(r"`(llava_phi_\w+?)(?:_total)?[{`]", written):
        assert name in names, f"{name} is in docs/serving.md and not in the metrics"

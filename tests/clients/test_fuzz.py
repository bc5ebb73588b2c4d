"""The server is sent what its own document allows and much that it does not, and must answer as the document says."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from conftest import KEY, MODEL, data_uri

SECONDS = int(os.environ.get("LLAVA_PHI_FUZZ_SECONDS", "20"))
# Whether a change lands must not depend on luck; who looks for faults takes other numbers.
SEED = os.environ.get("LLAVA_PHI_FUZZ_SEED", "1")

# All but whether everything that the schemas allow is accepted: that two parameters contradict each other, that a text is
# no regular expression or that an image is none is beyond what a schema says.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)


def document(address, folder):
    """The server's document, in which names of models and addresses of images are mostly ones that there are."""
    with urllib.request.urlopen(urllib.request.Request(f"{address}/openapi.json", headers=header())) as reply:
        document = json.load(reply)
    cut = data_uri("red-triangle.png")[:200]
    images = [data_uri("red-triangle.png"), data_uri("red-triangle.png"), cut, "https://example.org/a.png", "data:,"]
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    found = set()

    def visit(value):
        if isinstance(value, dict):
            # The document can only say that a stream is text; what is read takes its events apart.
            if "schema" in value.get("text/event-stream", {}):
                value["text/event-stream"]["schema"] = event
            for name, property in (
                value.get("properties", {}).items() if isinstance(value.get("properties"), dict) else ()
            ):
                if name == "model" and "additionalProperties" in value:
                    value["properties"][name] = {"type": "string", "enum": [MODEL, MODEL, MODEL, "another"]}
                    found.add("model")
                elif name == "url" or (name == "image_url" and property.get("type") == "string"):
                    value["properties"][name] = {"type": "string", "enum": images}
                    found.add("image")
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    visit(document)
    assert found == {"model", "image"}
    file = folder / "openapi.json"
    file.write_text(json.dumps(document))
    return file


def header():
    return {"Authorization": f"Bearer {KEY}"}


def fuzz(file, address, folder, checks, seconds, *more):
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", address]
    command += ["--checks", ",".join(checks), "--max-time", str(seconds), "--request-timeout", "60"]
    command += ["--seed", SEED]
    command += ["--continue-on-failure", "--no-color", "--warnings", "off", *more]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds + 300)
    print(told.stdout[-20_000:])
    assert told.returncode == 0, told.stdout[-20_000:] + told.stderr[-5000:]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_is_one_that_the_document_names(server, tmp_path, mode):
    fuzz(document(server, tmp_path), server, tmp_path, CHECKS, SECONDS, "--mode", mode)


def test_with_keys_too_and_never_without(guarded, tmp_path):
    authorization = f"Authorization: Bearer {KEY}"
    checks = (*CHECKS, "ignored_auth")
    fuzz(document(guarded, tmp_path), guarded, tmp_path, checks, SECONDS, "-H", authorization)

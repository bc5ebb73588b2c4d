#!/usr/bin/env python3
"""Puts the logs of one machine's report together: report.json for programs, report.md for a person to sign."""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

COMPONENTS = ("vision_encoder", "projector", "decoder")


def variants_for(provider: str, manifest: dict) -> list[tuple[str, str]]:
    """The variants that serve a provider, and whether each serves it `whole` or in `part`, in the manifest's order."""
    serve = manifest["serve"]
    served = {part: [c["variant"] for c in serve.get(part, []) if c["provider"] == provider] for part in COMPONENTS}
    names = dict.fromkeys(name for part in reversed(COMPONENTS) for name in served[part])
    return [(name, "whole" if all(name in served[part] for part in COMPONENTS) else "part") for name in names]


def read_json(path: Path) -> object:
    """The JSON in a file: one document, else the last line that is one, else `None`."""
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    for part in (text, text.splitlines()[-1] if text else ""):
        try:
            return json.loads(part)
        except ValueError:
            continue
    return None


def read_steps(logs: Path) -> list[dict]:
    """What each step ran, how it ended, what it said."""
    steps = []
    for line in (logs / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, code, seconds, command = line.split("\t", 3)
        step = {"name": name, "exit_code": int(code), "seconds": int(seconds), "command": command}
        step["errors"] = (logs / f"{name}.err").read_text(encoding="utf-8", errors="replace")[-4000:]
        found = read_json(logs / f"{name}.json") or read_json(logs / f"{name}.out")
        text = (logs / f"{name}.out").read_text(encoding="utf-8", errors="replace")[-8000:]
        step["result"] = text if found is None else found
        steps.append(step)
    return steps


def rows_of(steps: list[dict]) -> list[str]:
    """A table row for each step, with the figure that matters most."""
    rows = []
    for step in steps:
        result = step["result"]
        said = "done" if step["exit_code"] == 0 else (step["errors"].strip().splitlines() or ["failed"])[-1]
        if step["name"].startswith("parity-") and isinstance(result, dict):
            said = f"{result['same']} of {result['questions']} answers have the reference's tokens"
            said += f", {result['failed']} failed" if result["failed"] else ""
        elif step["name"].startswith("ask-") and isinstance(result, dict):
            served = ", ".join(f"{part} {by['provider']} {by['variant']}" for part, by in result["providers"].items())
            said = f"{result['text']!r}; {served}"
        rows.append(f"| {step['name']} | {step['exit_code']} | {step['seconds']} s | {said.replace('|', '/')[:200]} |")
    return rows


def main() -> int:
    """Writes the report, or with `--variants` prints what serves a provider."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--variants", metavar="PROVIDER", help="only print the variants for a provider")
    parser.add_argument("--platform")
    parser.add_argument("--provider")
    arguments = parser.parse_args()
    manifest = json.loads(arguments.manifest.read_text(encoding="utf-8"))
    if arguments.variants:
        for row in variants_for(arguments.variants, manifest):
            print("\t".join(row))
        return 0

    steps = read_steps(arguments.directory / "logs")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = {
        "format": 1,
        "platform": arguments.platform,
        "provider": arguments.provider,
        "date": now,
        "made_on": platform.platform(),
        "package": {"name": manifest["name"], "source": manifest["source"], "format": manifest["format"]},
        "steps": steps,
    }
    (arguments.directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failed = [step["name"] for step in steps if step["exit_code"] != 0]
    lines = [
        f"# {manifest['name']} on {arguments.platform}, provider {arguments.provider}, {now}",
        "",
        "| step | exit code | time | result |",
        "|---|---|---|---|",
        *rows_of(steps),
        "",
        f"Steps that did not end well: {', '.join(failed) or 'none'}.",
        "",
        "The machine and its device, as its owner calls them: ______________________________",
        "",
        "I ran this on that machine and changed nothing in it. Name, date: ______________________________",
    ]
    text = "\n".join(lines) + "\n"
    (arguments.directory / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Fill in the last two lines of {arguments.directory / 'report.md'} and send the directory back.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

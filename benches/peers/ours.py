"""Asks the program's own benchmark and puts its answer in the form of a worker's samples."""

import json

from figures import AFTER, BEFORE, STEPS, TIMED

PARTS = {
    "load": "load",
    "encode": "encode",
    "prefill-128": "prefill",
    "prefill-640": "prefill",
    "decode-0": "decode",
    "decode-700": "decode",
    "first-token": "first-token",
    "second-question": "second-question",
}


def command(program, contender, threads, figures, job):
    """The program's command line for these figures, or for the whole job once."""
    wanted = ("encode", "prefill-640", "decode-700") if job else [name for name in TIMED if name in figures]
    only = list(dict.fromkeys(PARTS[name] for name in wanted if name in PARTS))
    lengths = [name.split("-")[1] for name in wanted if name.startswith("prefill-")]
    depths = [name.split("-")[1] for name in wanted if name.startswith("decode-")]
    words = [program, "bench", "--json", *contender.program, "--only", ",".join(only or ["load"])]
    words += ["--lengths", ",".join(lengths)] if lengths else []
    words += ["--depths", ",".join(depths)] if depths else []
    words += ["--steps", STEPS, "--text", BEFORE + AFTER, "--repetitions", 1, "--warm-up", 0 if job else 1]
    # What a contender's own arguments say goes first.
    words += [] if "--threads" in contender.program else ["--threads", threads]
    return [str(word) for word in words]


def samples(printed, figures):
    """Samples by figure from the JSON object that `bench --json` printed; times are s, or s a token."""
    found, notes = {}, {}
    for measured in json.loads(printed)["measurements"]:
        what, positions, depth = measured["what"], measured["positions"], measured["depth"]
        name = {"prefill": f"prefill-{positions}", "decode": f"decode-{depth}"}.get(what, what)
        seconds = sum(measured["samples_ms"]) / len(measured["samples_ms"]) / 1000
        if name == "project":
            # A peer's encoder is measured with its projector.
            found["encode"] = found.get("encode", 0.0) + seconds
        elif name in PARTS:
            found[name] = found.get(name, 0.0) + seconds
        if name in ("first-token", "second-question"):
            notes[name] = {"positions_read": positions, "positions_cached": depth}
    return [
        {"figure": name, "value": found[name], **notes.get(name, {})}
        for name in TIMED
        if name in found and name in figures
    ]

"""The note, the plot and the reading of the program's answer, from made samples."""

import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import contenders
import ours
import prepare
import pytest
import report
from figures import ALL
from prepare import Files
from process import run
from synthetic import noisy, record

OURS = "llava-phi-cpu-int4"


def made():
    return record(
        {
            OURS: {"decode-700": noisy(0.05), "load": noisy(1.0), "rss-peak": lambda _: 2.5e9, "first-token": noisy(5)},
            "genai": {"decode-700": noisy(0.08), "load": noisy(4.0), "rss-peak": lambda _: 3.5e9},
            "llama-q4_0": {
                "decode-700": noisy(0.1),
                "load": noisy(2.0),
                "rss-peak": lambda _: 5e9,
                "first-token": noisy(9),
            },
        }
    )


def line(text, title, heading):
    """The cells of a row of the table below a heading."""
    table = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    row = next(row for row in table.splitlines() if row.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_speed_is_told_as_times_faster_and_memory_and_load_as_a_share():
    text = report.report(made())
    heading = f"title of {OURS} against the best peer"
    decode = line(text, ALL["decode-700"].title, heading)
    assert decode[1:] == ["title of genai", "9.6 tokens/s", "15.4 tokens/s", "1.60 x as fast (1.60-1.60)"]
    load = line(text, ALL["load"].title, heading)
    assert load[1] == "title of llama-q4_0" and load[4] == "0.50 of it (0.50-0.50)"
    assert line(text, ALL["rss-peak"].title, heading)[2:] == ["3,500 MB", "2,500 MB", "0.71 of it (0.71-0.71)"]


def test_what_a_peer_does_not_have_is_an_empty_cell():
    cells = line(report.report(made()), ALL["first-token"].title, "Everybody")
    assert cells[2] == "" and cells[1] and cells[3]


def test_few_rounds_disturbed_samples_and_contenders_left_out_are_told():
    few = made()
    few["samples"] = [{**sample, "disturbed": True} for sample in few["samples"] if sample["round"] < 2]
    few["left_out"] = [{"contender": "genai", "round": 1, "reason": "needs more memory"}]
    text = report.report(few)
    assert "1.60 x as fast (1.60-1.60)*†" in text
    assert "| title of genai | 1 | needs more memory |" in text
    assert "1 to 20 % of the machine" in text


def test_a_run_without_our_program_still_has_everybodys_values():
    text = report.report(record({"genai": {"load": noisy(4.0)}}))
    assert "against" not in text and line(text, ALL["load"].title, "Everybody")[1] == "5.20 s"


def test_the_plot_is_drawn_from_the_record_alone_and_names_everybody(tmp_path):
    plot = pytest.importorskip("plot", exc_type=ImportError)
    for name in ("a.svg", "b.svg"):
        plot.draw(made(), tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert xml.fromstring(text).tag.endswith("svg")
    assert all(f"title of {name}" in text for name in (OURS, "genai", "llama-q4_0"))


def test_the_programs_answer_becomes_samples_of_the_figures_that_were_asked_for():
    def measured(what, samples, positions=None, depth=None):
        return {"what": what, "positions": positions, "depth": depth, "samples_ms": samples, "warm_up_ms": []}

    printed = {
        "measurements": [
            measured("runtime", [9.0]),
            measured("load", [1500.0]),
            measured("encode", [1000.0]),
            measured("project", [20.0]),
            measured("prefill", [8000.0], 640, 0),
            measured("decode", [50.0, 70.0], 1, 700),
            measured("second-question", [400.0], 34, 606),
        ]
    }
    wanted = ["load", "encode", "decode-700", "second-question", "prefill-128"]
    found = {sample["figure"]: sample for sample in ours.samples(json.dumps(printed), wanted)}
    assert {name: sample["value"] for name, sample in found.items()} == pytest.approx(
        {"load": 1.5, "encode": 1.02, "decode-700": 0.06, "second-question": 0.4}
    )
    assert found["second-question"]["positions_read"] == 34


def test_the_program_is_asked_for_what_its_figures_need():
    contender = contenders.ours("fast=/p --variant cpu-fast", Path("/default"))
    words = ours.command("llava-phi", contender, 2, ["decode-0", "decode-700", "prefill-128", "encode"], job=False)
    text = " ".join(words)
    assert text.startswith("llava-phi bench --json --model /p --variant cpu-fast --only encode,prefill,decode ")
    assert "--lengths 128 --depths 0,700" in text and text.endswith("--threads 2")
    assert "--warm-up 0" in " ".join(ours.command("llava-phi", contender, 2, ["load"], job=True))
    assert contenders.ours("cpu-int4", Path("/default")).program == ("--model", "/default")


def test_every_peer_has_a_worker_and_names_of_its_own():
    peers = contenders.peers(Files(Path("/work")))
    assert len({peer.name for peer in peers}) == len(peers)
    for peer in peers:
        assert (contenders.HERE / peer.script).is_file()
        settings = peer.command("python", 2, [])[3]
        assert json.loads(settings) and peer.why and not peer.ours


def test_a_process_is_followed_to_its_end_with_its_memory_and_killed_when_it_takes_too_long():
    code = "import time; kept = bytearray(300_000_000); kept[::4096] = b'1' * len(kept[::4096]); time.sleep(0.5); print('x')"
    ran = run([sys.executable, "-c", code], None, 60)
    assert (ran.code, ran.printed) == (0, "x\n") and ran.cpu_s > 0
    assert ran.memory["rss-peak"] > 280_000_000
    if sys.platform == "linux":
        assert ran.memory["rss-anonymous"] > 280_000_000
    assert run([sys.executable, "-c", "import time; time.sleep(60)"], None, 0.3).code != 0


def test_a_file_is_made_under_another_name_until_it_is_whole_and_only_once(tmp_path, monkeypatch):
    files = Files(tmp_path, given=tmp_path, given_package=tmp_path)
    for path in (files.text_checkpoint, *files.of_peers):
        path.write_text("there")
    prepare.make(files, sys.executable, 1)
    assert files.picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    monkeypatch.setattr(prepare.subprocess, "run", lambda *_, **__: pytest.fail("it is made already"))
    prepare.make(files, sys.executable, 1)


def test_what_could_not_be_made_leaves_nothing(tmp_path):
    files = Files(tmp_path, given=tmp_path / "no checkpoint", given_package=tmp_path)
    with pytest.raises(SystemExit, match="text-checkpoint could not be made"):
        prepare.make(files, sys.executable, 1)
    assert list(tmp_path.iterdir()) == []

"""The comparison of servers: its questions, how they are asked, who takes turns when, and its tables."""

import argparse
import contextlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import serving
import serving_report
from prepare import Files
from servers import Failed, InProcess, OverHttp, servers, template
from serving_load import WORDS, ask, body, questions

OPTIONS = {"prompt": 64, "tokens": 3, "picture_tokens": 2, "picture": b"\x89PNG", "threads": 2, "disturbed": 0.05}


def options(**more):
    return argparse.Namespace(**(OPTIONS | more))


def level(server, workload, clients, number, seconds, **more):
    answer = {"first": 0.5, "between": [0.05, 0.05], "tokens": 10, "prompt_tokens": 64, "error": None} | more
    found = {"server": server, "workload": workload, "clients": clients, "round": number, "seconds": seconds}
    return found | {"answers": [dict(answer) for _ in range(clients)], "cpu_s": 1.0, "busy": 0.01}


def made(rounds=5):
    """Ours gives 20 and 80 tokens a second, the peers 10 and 16, and 12 and 12; one of them has no pictures."""
    levels = []
    for number in range(rounds):
        slow = 1 + 0.3 * (number % 3)
        for server, one, eight in (("ours", 20, 80), ("a", 10, 16), ("b", 12, 12)):
            levels.append(level(server, "text", 1, number, slow * 10 / one))
            levels.append(level(server, "text", 8, number, slow * 80 / eight))
        levels.append(level("ours", "picture", 8, number, slow))
        levels.append(level("a", "picture", 8, number, 3 * slow))
    machine = {"processor": "P", "instructions": ["avx2"], "processors": 2, "memory": 24_000_000_000, "system": "S"}
    memory = [
        {"server": name, "rss-peak": size * 1e6, "rss-anonymous": 1e6} for name, size in (("ours", 900), ("a", 2000))
    ]
    return {
        "starts": [{"date": "2026-01-02", "command": "python serving.py", "machine": machine, "versions": {"x": "1"}}],
        "options": {key: value for key, value in OPTIONS.items() if key != "picture"},
        "servers": [
            {"name": name, "title": f"title of {name}", "why": "why", "ours": name == "ours"}
            for name in ("ours", "a", "b")
        ],
        "loads": [{"server": "ours", "seconds": 0.5}, {"server": "a", "seconds": 3.0}],
        "levels": levels,
        "memory": memory,
        "left_out": [],
    }


def cells(text, heading, *first):
    """The cells of the row that begins with `first` in the tables below a heading."""
    table = text.split(f"## {heading}")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")]
    return next(row for row in rows if row[: len(first)] == list(first))


def test_speed_gain_and_waits_of_each_server_are_told():
    text = serving_report.report(made())
    ours = cells(text, "Text", "title of ours", "8")
    assert ours[2:] == ["61.5", "4.00 x (4.00-4.00)", "0.50 / 0.50 s", "50 / 50 ms", "64", "0 of 40"]
    assert cells(text, "Text", "title of b", "8")[3] == "1.00 x (1.00-1.00)"
    assert cells(text, "Text", "title of ours", "1")[3] == ""
    assert cells(text, "Memory", "title of ours")[1:] == ["900 MB", "1 MB", "0.5 s"]


def test_ratios_are_to_each_peer_and_the_best_is_marked():
    text = serving_report.report(made())
    assert cells(text, "Text", "title of ours, 8 clients")[1:] == ["**5.00 x (5.00-5.00)**", "6.67 x (6.67-6.67)"]
    assert cells(text, "Text", "title of ours, 1 client")[1:] == ["2.00 x (2.00-2.00)", "**1.67 x (1.67-1.67)**"]
    assert cells(text, "The same picture", "title of ours, 8 clients")[1:] == ["**3.00 x (3.00-3.00)**", ""]


def test_a_level_with_an_error_is_told_and_not_compared():
    record = made(2)
    record["levels"][3]["answers"][0] |= {"error": "400: no", "tokens": None}
    text = serving_report.report(record)
    assert cells(text, "Text", "title of a", "8")[-1] == "1 of 16"
    assert "| title of a | text, 8 clients | 1 x 400: no |" in text
    assert cells(text, "Text", "title of ours, 8 clients")[1] == "**5.00 x (5.00-5.00)***"


def test_disturbed_levels_and_few_rounds_are_marked():
    record = made(2)
    for one in record["levels"]:
        one["busy"] = 0.4
    text = serving_report.report(record)
    assert cells(text, "Text", "title of ours", "8")[2].endswith("†")
    assert cells(text, "Text", "title of ours, 8 clients")[1].endswith("*†**")
    assert "Others took 40 to 40 %" in text


def test_the_same_number_is_the_same_question_and_no_two_are_alike():
    asked = questions("text", 8, options(), 100)
    assert asked == questions("text", 8, options(), 100) and len({one.text for one in asked}) == 8
    assert all(len(one.text.split()) == 64 and set(one.text.split()) <= set(WORDS) for one in asked)
    pictures = questions("picture", 4, options(), 100)
    assert len({one.text for one in pictures}) == 4 and {one.picture for one in pictures} == {b"\x89PNG"}


def test_a_text_is_continued_and_a_picture_is_asked_about_in_a_chat():
    endpoint, asked = body(questions("text", 1, options(), 0)[0], "m", {"ignore_eos": True})
    assert endpoint == "/completions" and asked["ignore_eos"] and asked["max_tokens"] == 3
    endpoint, asked = body(questions("picture", 1, options(), 0)[0], "m", {})
    content = asked["messages"][0]["content"]
    assert endpoint == "/chat/completions" and content[0]["image_url"]["url"] == "data:image/png;base64,iVBORw=="


def event_stream(said, tokens):
    """Choices as events, the end, and what was counted."""
    events = [{"choices": [one]} for one in said] + [{"choices": [{"finish_reason": "length"}]}]
    events.append({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 64}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


class Streams(http.server.BaseHTTPRequestHandler):
    """Says two tokens to a chat and three to a text, whatever is asked for."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        said = [{"delta": {"content": "a"}}] * 2 if "chat" in self.path else [{"text": "a"}] * 3
        self.send_response(200)
        self.end_headers()
        self.wfile.write(event_stream(said, len(said)) + b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def listening(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


@pytest.fixture
def url():
    with listening(Streams) as url:
        yield url


def test_every_question_is_answered_by_one_of_the_clients(url):
    asked = questions("text", 5, options(), 0) + questions("picture", 1, options(), 0)
    found = ask(url, [body(one, "m", {}) for one in asked], 2, 30)
    assert [one["error"] for one in found["answers"]] == [None] * 6 and found["seconds"] > 0
    assert sorted(one["tokens"] for one in found["answers"]) == [2, 3, 3, 3, 3, 3]
    assert all(len(one["between"]) == one["tokens"] - 1 and one["prompt_tokens"] == 64 for one in found["answers"])


class Closing(Streams):
    """Keeps a connection, but closes it after each answer without saying so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        said = event_stream([{"text": "a"}], 3)
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
        self.close_connection = True


def test_a_connection_that_was_closed_between_two_questions_is_opened_again():
    with listening(Closing) as url:
        found = ask(url, [body(one, "m", {}) for one in questions("text", 3, options(), 0)], 1, 30)
    assert [one["error"] for one in found["answers"]] == [None] * 3


def test_an_answer_of_another_length_is_an_error(url):
    (one,) = ask(url, [body(questions("text", 1, options(tokens=9), 0)[0], "m", {})], 1, 30)["answers"]
    assert one["error"] == "3 tokens instead of 9"


def test_a_server_that_cannot_be_reached_is_an_error_of_each_answer():
    found = ask("http://127.0.0.1:9/v1", [body(one, "m", {}) for one in questions("text", 2, options(), 0)], 1, 30)
    assert [one["error"].split(":")[0] for one in found["answers"]] == ["ConnectionRefusedError"] * 2


WORKER = """
import json, sys
print("a library says something")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["clients"] == 9:
        sys.exit("error: nine are too many")
    print(json.dumps({"seconds": 1.0, "answers": [one["tokens"] for one in asked["questions"]]}), flush=True)
"""


def test_a_worker_is_asked_by_lines_and_its_end_is_told_with_its_last_words(tmp_path):
    worker = InProcess("w", "the worker", "why", None, tmp_path, command=[sys.executable, "-c", WORKER])
    assert worker.start(60) > 0
    assert worker.ask(questions("text", 2, options(), 0), 1, 30)["answers"] == [3, 3]
    worker.pause()
    worker.resume()
    with pytest.raises(Failed, match="the worker ended: error: nine are too many"):
        worker.ask(questions("text", 1, options(), 0), 9, 30)
    worker.stop()


def test_a_server_that_ends_at_once_did_not_start_and_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    server = OverHttp("s", "the server", "why", None, tmp_path, command=command, ready_at="/", model="m", never={})
    with pytest.raises(Failed, match="the server did not start: no such model"):
        server.start(60)
    server.stop()


class Made:
    """A server that notes what it was asked, and fails where it is told to."""

    def __init__(self, name, log, workloads=("text", "picture-new", "picture"), fails=None):
        self.name, self.title, self.log, self.workloads, self.fails = name, name, log, workloads, fails

    def start(self, _):
        if self.fails == "start":
            raise Failed("no model")
        return 1.0

    def ask(self, asked, clients, _):
        if self.fails == len(self.log):
            raise Failed("it ended")
        self.log.append((self.name, asked[0].text, len(asked), clients))
        answer = {"first": 1.0, "between": [], "tokens": 1, "prompt_tokens": 1, "error": None}
        return {"seconds": 1.0, "answers": [answer] * len(asked)}

    def pause(self):
        self.log.append((self.name, "paused"))

    def resume(self):
        self.log.append((self.name, "resumed"))

    def stop(self):
        self.log.append((self.name, "stopped"))

    def cpu_seconds(self):
        return 0.0

    def memory(self):
        return {"rss-peak": 1}


def run(everybody, **more):
    record = {"levels": [], "loads": [], "memory": [], "left_out": []}
    chosen = {"clients": [1, 8], "workloads": serving.WORKLOADS, "rounds": 2, "each": 1, "least": 2, "seconds": 99.0}
    serving.Levels(options(**(chosen | {"timeout": 30.0} | more)), record, lambda: None).run(everybody)
    return record


def test_all_take_turns_with_the_same_questions_and_only_one_runs_at_a_time():
    log = []
    record = run([Made("a", log), Made("b", log, ("text",))])
    taken = [(one["server"], one["workload"], one["clients"], one["round"]) for one in record["levels"]]
    assert taken[:4] == [("a", "text", 1, 0), ("b", "text", 1, 0), ("a", "text", 8, 0), ("b", "text", 8, 0)]
    assert taken[4:7] == [("a", "picture-new", 8, 0), ("a", "picture", 1, 0), ("a", "picture", 8, 0)]
    assert taken[7:9] == [("b", "text", 1, 1), ("a", "text", 1, 1)] and len(taken) == 13
    texts = [entry for entry in log if len(entry) == 4]
    assert texts[4][1:] == texts[5][1:] and texts[4][2:] == (2, 1)
    awake = set()
    for entry in log[[*map(len, log)].index(2) :]:
        awake = awake | {entry[0]} if entry[1] == "resumed" else awake - {entry[0]}
        assert len(awake) < 2
    assert [one["server"] for one in record["memory"]] == ["a", "b"]


def test_who_does_not_start_and_who_ends_are_told_and_the_others_go_on():
    log = []
    record = run([Made("a", log), Made("b", log, fails="start")], workloads=["text"])
    assert record["left_out"] == [{"server": "b", "reason": "no model"}] and len(record["levels"]) == 4
    log = []
    record = run([Made("a", log, fails=4)], workloads=["text"])
    assert record["left_out"][0]["reason"] == "it ended" and record["left_out"][0]["clients"] == 1
    assert log[-2:] == [("a", "paused"), ("a", "stopped")] and len(record["levels"]) == 3


def test_no_round_is_begun_that_might_take_too_long(capsys):
    record = run([Made("a", [])], workloads=["text"], seconds=-1.0)
    assert record["levels"] == [] and "ended before round 0" in capsys.readouterr().err


def test_servers_are_started_with_their_settings_and_the_same_threads(tmp_path):
    (tmp_path / "package").mkdir()
    text = {"template": dict.fromkeys(("system", "after_system", "before_user", "after_user", "before_answer"), "x")}
    manifest = {"name": "n", "text": text | {"eos": [7]}}
    (tmp_path / "package" / "manifest.json").write_text(json.dumps(manifest))
    chosen = {
        "program": "llava-phi",
        "ours": "--variant v",
        "llama_server": "llama-server",
        "llama": ["-fa off", "-fa on"],
    }
    chosen |= {"genai": ["engine", "batch"], "clients": [1, 8], "context": 1024, "venv": Path("/venv")}
    ours, llama, other, engine, batch = servers(options(**chosen), Files(tmp_path), tmp_path)
    assert (ours.ours, ours.never, ours.model) == (True, {"logit_bias": {"7": -100}}, "n")
    assert "--threads 2 --parallel 8 --variant v --port" in " ".join(ours.command)
    assert "--ctx-size 8192" in " ".join(llama.command) and "-fa off" in " ".join(llama.command)
    assert llama.port != other.port and llama.name != other.name and llama.log != other.log
    assert engine.workloads == ("text",) and '"way": "batch"' in " ".join(batch.command)
    with pytest.raises(SystemExit, match="nobody is left"):
        servers(options(**(chosen | {"program": None, "llama_server": None, "genai": []})), Files(tmp_path), tmp_path)


def test_the_template_for_llama_is_the_packages():
    jinja2 = pytest.importorskip("jinja2")
    parts = {"system": 'A "chat".', "after_system": " ", "before_user": "USER: ", "after_user": " "}
    made = template({"template": parts | {"before_answer": "ASSISTANT:"}})
    rendered = jinja2.Template(made).render(messages=[{"role": "user", "content": "what?"}])
    assert rendered == 'A "chat". USER: what? ASSISTANT:'


def test_lists_of_numbers_are_a_line_each_and_nothing_else_is_changed():
    record = {"between": [0.1, 0.25, 3], "none": [], "text": "[1,\n 2]", "deep": [{"a": [1, 2]}, "b"]}
    text = serving.compact(json.dumps(record, indent=1))
    assert json.loads(text) == record and "[ 0.1, 0.25, 3 ]" in text


def test_the_report_is_printed_again_from_the_raw_data(tmp_path):
    path = tmp_path / "serving.json"
    path.write_text(json.dumps(made()))
    ran = subprocess.run([sys.executable, serving_report.__file__, path], capture_output=True, text=True)
    assert ran.stdout == serving_report.report(made())

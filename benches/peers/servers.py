"""Starts the servers that are compared, says what each is, and asks each of them questions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import process
from serving_load import ask, body

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
DRIVEN = "int4, block 32, accuracy level 4; driven from Python in its own process, so no HTTP, no JSON and no text are in its times"
GENAI = {
    "engine": f"its `Engine`: {DRIVEN}. On the processor it batches statically, never more than 4; what batches"
    " dynamically needs paged attention, which its builder makes for CUDA and WebGPU alone. Text alone",
    "batch": f"one `Generator` whose sequences are given at once and begin and end together: {DRIVEN}. Nobody can join, so"
    " it is no server; it is the most that its kernels gain from several. Text alone",
}


class Failed(Exception):
    """A server that did not start, or ended."""


class Server:
    """A process that answers; while others are measured it is stopped, so that it takes nothing from them."""

    workloads = ("text", "picture-new", "picture")
    ours = False

    def __init__(self, name, title, why, environment, folder):
        self.name, self.title, self.why = name, title, why
        self.environment, self.log = environment, folder / f"{name.replace('/', '-')}.log"
        self.process = None

    def start(self, timeout):
        """Starts it and waits until it can be asked; gives the seconds that this took."""
        begin = time.perf_counter()
        with self.log.open("w", encoding="utf-8") as log:
            self.process = self.launch(log)
        while not self.ready():
            if self.process.poll() is not None or time.perf_counter() - begin > timeout:
                raise Failed(f"{self.title} did not start: {self.last_line()}")
            time.sleep(0.05)
        return time.perf_counter() - begin

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        if self.process is None:
            return
        self.resume()
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def memory(self):
        return process.memory(self.process.pid)

    def cpu_seconds(self):
        """What its threads have spent, by `/proc`."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return 0.0
        # Behind the name, which may hold blanks.
        fields = text.rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def last_line(self):
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class OverHttp(Server):
    """A server of OpenAI's API; `command` lacks the port, `ready_at` answers 200 once it can be asked."""

    def __init__(self, *what, command, ready_at, model, never):
        super().__init__(*what)
        self.port = free_port()
        self.command = [*map(str, command), "--port", str(self.port)]
        self.ready_at, self.model, self.never = ready_at, model, never

    def launch(self, log):
        return subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def ready(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready_at}", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, questions, clients, timeout):
        bodies = [body(question, self.model, self.never) for question in questions]
        return ask(f"http://127.0.0.1:{self.port}/v1", bodies, clients, timeout)


class InProcess(Server):
    """onnxruntime-genai's engine in a worker of its own, which is driven through pipes: it has no server."""

    workloads = ("text",)

    def __init__(self, *what, command):
        super().__init__(*what)
        self.command = [*map(str, command)]

    def launch(self, log):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(self.command, stderr=log, env=self.environment, text=True, **pipes)

    def ready(self):
        return self.line() == {"ready": True}

    def ask(self, questions, clients, timeout):
        asked = [{"text": question.text, "tokens": question.tokens} for question in questions]
        try:
            self.process.stdin.write(json.dumps({"clients": clients, "questions": asked}) + "\n")
            self.process.stdin.flush()
            answered = self.line()
        except BrokenPipeError:
            answered = None
        if answered is None:
            raise Failed(f"{self.title} ended: {self.last_line()}")
        return answered

    def line(self):
        """The worker's next line; `None` at its end. What the library prints is not ours."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None


def servers(options, files, folder):
    """Those that were asked for, ours first."""
    threads = str(options.threads)
    more = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    # Our program finds the same ONNX Runtime as the peers.
    environment = {**os.environ, **more, "VIRTUAL_ENV": str(options.venv)}
    most = max(options.clients)
    manifest = json.loads((files.package / "manifest.json").read_text(encoding="utf-8"))
    asked, model = manifest["text"], manifest["name"]
    found = []
    if options.program:
        command = [options.program, "serve", "--model", files.package, "--threads", threads]
        command += ["--parallel", most, *options.ours.split()]
        why = f"`--parallel {most} {options.ours}`, its caches as they are by default"
        what = ("llava-phi", "llava-phi serve", why, environment, folder)
        never = {"logit_bias": {str(asked["eos"][0]): -100}}
        found.append(OverHttp(*what, command=command, ready_at="/ready", model=model, never=never))
        found[-1].ours = True
    for more in options.llama if options.llama_server else []:
        command = [options.llama_server, "--model", files.gguf["q4_0"], "--mmproj", files.mmproj]
        command += ["--threads", threads, "--threads-batch", threads, "--parallel", most]
        command += ["--ctx-size", most * options.context, "--chat-template", template(asked), *more.split()]
        why = (
            f"`llama-server` with {most} slots of {options.context} positions and `{more}`; repacked while it loads,"
            " continuous batching, KV f16; the other settings as they are by default"
        )
        what = (f"llama-server {more}", f"llama.cpp Q4_0 `{more}`", why, environment, folder)
        never = {"ignore_eos": True}
        found.append(OverHttp(*what, command=command, ready_at="/health", model="random", never=never))
    for way in options.genai:
        settings = {"model": files.genai_engine, "tokenizer": files.package / "tokenizer.json"}
        settings |= {"context": options.context, "way": way}
        command = [options.venv / "bin" / "python", HERE / "serve_genai.py"]
        command += ["--settings", json.dumps(settings, default=str), "--threads", threads]
        what = (f"genai-{way}", f"onnxruntime-genai int4, {way}", GENAI[way], environment, folder)
        found.append(InProcess(*what, command=command))
    if not found:
        sys.exit("error: nobody is left to measure; give --program, --llama-server or --genai")
    return found


def template(text):
    """What a package puts around a question, as a template of llama.cpp: the same positions are read."""
    parts = text["template"]
    begin, user, after, end = (
        json.dumps(part)
        for part in (
            parts["system"] + parts["after_system"],
            parts["before_user"],
            parts["after_user"],
            parts["before_answer"],
        )
    )
    one = f"{{{{ {user} + message.content + {after} }}}}"
    return f"{{{{ {begin} }}}}{{% for message in messages %}}{one}{{% endfor %}}{{{{ {end} }}}}"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

"""Starts `llava-phi serve` with the model inside the program, and a browser that tells of everything it dislikes."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from between import Between
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
PROGRAM = os.environ.get("LLAVA_PHI_BIN", str(ROOT / "target/release/llava-phi"))


def browser_path():
    """The browser to drive: the one named, or the system's; none for the one that Playwright installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("LLAVA_PHI_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def start(log, *arguments):
    """Starts the server on a free port; returns the process and the port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "serve", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return process, port
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} does not answer: {log.read_text(errors='replace')}")


def stop(process):
    process.terminate()
    process.wait(timeout=60)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    process, port = start(tmp_path_factory.mktemp("server") / "log")
    yield port
    stop(process)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    """The address and the key of a server that asks for one."""
    folder = tmp_path_factory.mktemp("guarded")
    key = "a-key-of-the-browser-test-0123456789"
    (folder / "keys").write_text(key + "\n")
    (folder / "keys").chmod(0o600)
    process, port = start(folder / "log", "--api-key-file", str(folder / "keys"))
    yield f"http://127.0.0.1:{port}/", key
    stop(process)


@pytest.fixture(scope="session")
def one_between(server):
    between = Between(server)
    yield between
    between.close()


@pytest.fixture
def between(one_between):
    one_between.reset()
    return one_between


@pytest.fixture(scope="session")
def chromium():
    # A container's root has no user namespaces for the browser's sandbox.
    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens an address; at the end nothing may have been refused, thrown, or asked of anybody else.

    `expected` are parts of messages that the browser's console may show.
    """
    visits = []

    def open_page(url, expected=(), **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-GB", **options})
        page = context.new_page()
        seen = {"url": url, "expected": expected, "console": [], "asked": [], "context": context, "page": page}
        page.on("console", lambda message: seen["console"].append((message.type, message.text)))
        page.on("pageerror", lambda error: seen["console"].append(("error", str(error))))
        page.on("request", lambda request: seen["asked"].append(request.url))
        page.on("filechooser", lambda _: None)  # from now on: the browser is told later than the next key comes
        page.add_init_script(
            "window.violations = [];"
            "document.addEventListener('securitypolicyviolation', (event) => violations.push(event.violatedDirective))"
        )
        page.goto(url)
        visits.append(seen)
        return page

    yield open_page
    for seen in visits:
        assert seen["page"].evaluate("window.violations") == []
        wrong = [text for kind, text in seen["console"] if kind in ("error", "warning")]
        assert [text for text in wrong if not any(part in text for part in seen["expected"])] == []
        assert [url for url in seen["asked"] if not url.startswith((seen["url"], "blob:", "data:"))] == []
        seen["context"].close()


def pytest_addoption(parser):
    parser.addoption("--picture", action="store_true", help="write docs/page.png anew")

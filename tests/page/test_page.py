"""Asks through the page, in a real browser, what a person would."""

import base64
import re
import shutil
import subprocess
import time

import pytest
from conftest import ROOT
from playwright.sync_api import expect

TRIANGLE = ROOT / "models/tiny/images/red-triangle.png"
PHOTO = ROOT / "tests/images/photo.jpg"
TIFF = ROOT / "tests/images/rgb.tiff"
QUESTION = "What is in the image?"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

FILES = """(files) => {
  const transfer = new DataTransfer();
  for (const { name, type, bytes } of files) {
    transfer.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, { type }));
  }
  return transfer;
}"""


def transfer(page, *paths):
    types = {".png": "image/png", ".jpg": "image/jpeg", ".tiff": "image/tiff", ".txt": "text/plain"}
    files = [
        {"name": path.name, "type": types[path.suffix], "bytes": base64.b64encode(path.read_bytes()).decode()}
        for path in paths
    ]
    return page.evaluate_handle(FILES, files)


def drop(page, *paths):
    data = transfer(page, *paths)
    for name in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#talk", name, {"dataTransfer": data})


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def said(page):
    return page.locator(".answer .said").last


def wait_for_answer(page):
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    expect(page.locator(".trouble")).to_have_count(0)
    return said(page).inner_text()


def wait_until(page, expression):
    """As `wait_for_function`, which the page's policy refuses."""
    deadline = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} does not become true"
        page.wait_for_timeout(20)


def images_of(question):
    return [part for part in question["content"] if part["type"] == "image_url"]


def test_a_dropped_image_is_asked_about_and_followed_up(visit, between):
    page = visit(between.url)
    drop(page, TRIANGLE)
    expect(page.locator("#attached img")).to_have_attribute("alt", "Image 1: red-triangle.png")
    between.pause = 0.1  # a rate is only shown of what took a while
    ask(page, QUESTION)
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)
    expect(page.locator(".answer footer p")).to_have_text(
        re.compile(r"^First word \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens · cpu-int4 on cpu$")
    )
    expect(page.locator("#news")).to_have_text("Answer: a red triangle")
    expect(page.locator("#served")).to_have_text(re.compile(r"^\S+ · cpu-int4 on cpu$"))

    between.pause = 0.0
    ask(page, "what color is the shape?")
    expect(page.locator(".answer")).to_have_count(2)
    assert "red" in wait_for_answer(page)
    roles = [message["role"] for message in between.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    sent = images_of(between.asked[-1]["messages"][0])[0]["image_url"]["url"]
    assert sent == "data:image/png;base64," + base64.b64encode(TRIANGLE.read_bytes()).decode(), "other bytes were sent"


def test_words_appear_as_they_come_and_escape_stops_them(visit, between):
    page = visit(between.url)
    page.set_input_files("#files", TRIANGLE)
    between.pause = 0.4
    ask(page, QUESTION)
    expect(page.locator("#stop")).to_be_visible()
    expect(said(page)).to_have_text(re.compile(r"^a"), timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".answer footer p")).to_contain_text("stopped")
    stopped = said(page).inner_text()
    assert "a red triangle".startswith(stopped) and stopped != "a red triangle"
    expect(page.locator("#news")).to_have_text(f"Answer stopped: {stopped}")

    # Only what is written to a connection after it was closed shows that it was.
    for _ in range(200):
        if between.left:
            break
        page.wait_for_timeout(50)
    assert between.left == 1, "the stream was not given up"

    between.pause = 0.0
    page.get_by_role("button", name="Regenerate").click()
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)
    expect(page.locator(".answer")).to_have_count(1)


def test_an_answer_stopped_before_its_first_word_gives_the_question_back(visit, between):
    page = visit(between.url)
    page.set_input_files("#files", TRIANGLE)
    between.pause = 1.0
    ask(page, QUESTION)
    page.locator("#stop").click()
    page.get_by_role("button", name="Take back").click()
    expect(page.locator("#question")).to_have_value(QUESTION)
    expect(page.locator("#attached li")).to_have_count(1)
    expect(page.locator("#welcome")).to_be_visible()


def test_images_are_pasted_removed_and_several_are_sent(visit, between):
    page = visit(between.url)
    page.evaluate(
        """(data) => document.getElementById("question").dispatchEvent(
             new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }))""",
        transfer(page, TRIANGLE, PHOTO, TIFF),
    )
    expect(page.locator("#attached li")).to_have_count(3)
    page.get_by_role("button", name="Remove photo.jpg").click()
    expect(page.locator("#attached li")).to_have_count(2)
    ask(page, "what color is the shape in the first image?")
    assert wait_for_answer(page)
    assert len(images_of(between.asked[-1]["messages"][0])) == 2
    expect(page.locator(".question .picture span")).to_have_text("rgb.tiff")  # no browser shows it; the server reads it


def test_what_is_no_image_is_refused_with_a_sentence(visit, between, tmp_path):
    page = visit(between.url)
    (tmp_path / "notes.txt").write_text("nothing to see")
    drop(page, tmp_path / "notes.txt")
    expect(page.locator("#notice")).to_have_text("notes.txt is not an image.")
    expect(page.locator("#attached li")).to_have_count(0)


def test_the_keyboard_alone_is_enough(visit, between):
    page = visit(between.url, permissions=["clipboard-read", "clipboard-write"])
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Add images")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(TRIANGLE)
    expect(page.locator("#attached li")).to_have_count(1)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in the image?")
    expect(page.locator("#question")).to_have_value("What is\nin the image?")
    page.keyboard.press("Enter")
    assert "triangle" in wait_for_answer(page)
    expect(page.locator("#question")).to_be_focused()
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Copy":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == said(page).inner_text()


def test_history_survives_a_reload_until_it_is_deleted(visit, between):
    page = visit(between.url)
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    assert wait_for_answer(page) == "a red triangle"
    page.get_by_role("button", name="New conversation").first.click()
    ask(page, "Is there a picture?")
    wait_for_answer(page)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("Is there a picture?")
    page.get_by_role("button", name=re.compile("^What is in the image")).click()
    expect(said(page)).to_have_text("a red triangle")
    picture = page.locator(".question img")
    expect(picture).to_be_visible()
    assert picture.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") > 0
    ask(page, "what color is the shape?")
    assert "red" in wait_for_answer(page)
    assert len(images_of(between.asked[-1]["messages"][0])) == 1

    page.get_by_role("button", name="Delete Is there a picture?").click()
    expect(page.locator("#conversations li")).to_have_count(2)
    page.get_by_role("button", name="Really delete?").click()
    expect(page.locator("#conversations button")).to_have_count(2)
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Really delete?").click()
    expect(page.locator("#conversations button")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    left = page.evaluate(
        """() => new Promise((resolve) => { indexedDB.open("llava-phi").onsuccess = ({ target: { result } }) => {
             const images = result.transaction("images").objectStore("images").count();
             images.onsuccess = () => resolve(images.result); }; })"""
    )
    assert left == 0
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


def test_a_busy_server_is_waited_for_and_nothing_is_lost(visit, between):
    page = visit(between.url, expected=["429"])
    between.busy = 1
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    trouble = page.locator(".trouble")
    expect(trouble).to_contain_text("8 requests wait already.")
    expect(trouble).to_contain_text("It asks to wait")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    expect(again).to_be_enabled(timeout=10_000)
    again.click()
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)
    expect(trouble).to_have_count(0)
    assert between.asked[0] == between.asked[1]


def test_a_stream_that_breaks_keeps_its_words_and_is_asked_again(visit, between):
    page = visit(between.url)
    between.broken = 1
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    expect(page.locator(".trouble")).to_contain_text("The connection broke before the answer was finished.")
    page.get_by_role("button", name="Try again").click()
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)


def test_an_image_that_the_server_cannot_read_is_named_and_taken_back(visit, between, tmp_path):
    page = visit(between.url, expected=["400"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(TRIANGLE.read_bytes()[:60])
    drop(page, broken)
    ask(page, QUESTION)
    expect(page.locator(".trouble p")).to_have_text(re.compile(r"^Image 1: .*[.]$"), timeout=60_000)
    page.get_by_role("button", name="Take back").click()
    expect(page.locator("#question")).to_have_value(QUESTION)
    page.get_by_role("button", name="Remove broken.png").click()
    drop(page, TRIANGLE)
    page.press("#question", "Enter")
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)


def test_a_server_that_does_not_answer_is_said_so(visit, between):
    page = visit(between.url, expected=["ERR_"])
    page.route("**/v1/*", lambda route: route.abort())
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Is there a picture?")
    expect(page.locator(".trouble")).to_contain_text("The server does not answer")
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    assert wait_for_answer(page)


def test_what_is_beyond_the_servers_limits_is_not_sent(visit, between):
    page = visit(between.url)

    def small(route):
        answer = route.fetch()
        limits = {"images": 1, "body_bytes": 6000}
        route.fulfill(response=answer, json={**answer.json(), "limits": limits})

    page.route("**/v1/status", small)
    page.reload()
    expect(page.locator("#served")).to_contain_text("cpu")
    drop(page, PHOTO)
    expect(page.locator("#notice")).to_contain_text("photo.jpg has 8 kB; the server takes 5 kB.")
    drop(page, TRIANGLE, TRIANGLE)
    expect(page.locator("#notice")).to_contain_text("The server takes 1 image")
    expect(page.locator("#attached li")).to_have_count(1)


def test_a_key_is_asked_for_and_forgotten_with_the_tab(visit, guarded):
    url, key = guarded
    page = visit(url, expected=["401"])
    expect(page.locator("#served")).to_contain_text("asks for an API key")
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    page.get_by_role("button", name="Enter the key").click()
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).not_to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(said(page)).to_have_text("a red triangle", timeout=60_000)
    assert key in page.evaluate("JSON.stringify(sessionStorage)")
    assert key not in page.evaluate("JSON.stringify(localStorage)")
    assert page.context.cookies() == []
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Remember the key in this browser").check()
    page.get_by_role("button", name="Done").click()
    assert key in page.evaluate("JSON.stringify(localStorage)")
    assert key not in page.evaluate("JSON.stringify(sessionStorage)")


def test_settings_reach_the_server_and_last(visit, between):
    page = visit(between.url, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#model option")).to_have_count(1)
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#tokens", "1")
    page.fill("#seed", "7")
    page.get_by_text("Dark", exact=True).click()
    assert page.evaluate(paper) != light
    page.keyboard.press("Escape")
    page.reload()
    assert page.evaluate(paper) != light
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    wait_for_answer(page)
    sent = between.asked[-1]
    assert {name: sent[name] for name in ("temperature", "max_tokens", "seed", "stream", "stream_options")} == {
        "temperature": 0.5,
        "max_tokens": 1,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["model"] == page.evaluate("document.getElementById('model').value")
    expect(page.locator(".answer footer p")).to_contain_text("cut short")


def test_a_reader_who_scrolled_up_is_left_there(visit, between):
    page = visit(between.url, viewport={"width": 320, "height": 480})
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    wait_for_answer(page)
    from_end = "(() => { const talk = document.getElementById('talk'); return talk.scrollHeight - talk.scrollTop - talk.clientHeight; })()"
    assert page.evaluate(from_end) < 2
    between.pause = 0.3
    ask(page, "Describe the image.")
    expect(said(page)).not_to_have_text("", timeout=60_000)
    assert page.evaluate(from_end) < 2
    page.hover("#talk")
    page.mouse.wheel(0, -150)
    wait_until(page, f"{from_end} > 100")
    page.evaluate("window.place = document.getElementById('talk').scrollTop")
    wait_for_answer(page)
    assert page.evaluate("document.getElementById('talk').scrollTop === window.place")
    page.get_by_role("button", name="Latest").click()
    assert page.evaluate(from_end) < 2


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The source of axe-core, which npm fetches into a folder of this run."""
    if not shutil.which("npm"):
        pytest.skip("npm is not here, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "axe-core@4"], check=True)
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.parametrize("shape", ["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(visit, between, axe, scheme, shape):
    # The policy would refuse axe itself.
    page = visit(between.url, bypass_csp=True, color_scheme=scheme, **(PHONE if shape == "phone" else {}))

    def check(state):
        page.evaluate(axe)
        found = page.evaluate("axe.run()")["violations"]
        assert [(state, each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        small = page.evaluate(
            """[...document.querySelectorAll("button, select, textarea, input:not([type=checkbox], .unseen), label:has(input)")]
               .filter((each) => each.checkVisibility() && each.getBoundingClientRect().width > 1)
               .filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 44).map((each) => each.outerHTML)"""
        )
        assert small == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    check("empty")
    drop(page, TRIANGLE, PHOTO)
    check("with images")
    ask(page, QUESTION)
    wait_for_answer(page)
    check("answered")
    if shape == "phone":
        page.locator("#bar").get_by_role("button", name="Conversations").tap()
        check("conversations")
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    check("settings")


def test_the_policy_is_strict(visit, between):
    page = visit(between.url, expected=["Content Security Policy"])
    policy = page.request.get(between.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    # The visit's own check proves that the page needs no more; this, that the policy is in force.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("window.violations.splice(0)") == ["script-src-elem"]


def test_the_picture_of_the_docs(visit, between, request):
    page = visit(between.url, color_scheme="light", viewport={"width": 1200, "height": 750})
    page.set_input_files("#files", TRIANGLE)
    ask(page, QUESTION)
    assert wait_for_answer(page) == "a red triangle"
    ask(page, "Is there a circle in the image?")
    assert wait_for_answer(page) == "no"
    shot = page.screenshot()
    assert len(shot) < 200_000
    if request.config.getoption("--picture"):
        (ROOT / "docs/page.png").write_bytes(shot)

"""The chat page in a browser, on the real server over a scripted engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flexperts.errors import ServingError
from flexperts.serving.http.keys import OPERATOR

from .scripted_engine import KEYS, ScriptedEngine, Served, served, until

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
TITLES = ["Base", "Global", "Personalized"]
WIDE, PHONE = (1280, 800), (340, 700)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def engine(standing: tuple[ScriptedEngine, Served]) -> Iterator[ScriptedEngine]:
    """The standing server's engine; whatever a test makes of it is put right again."""
    engine, _ = standing
    engine.asked.clear()
    engine.conversations.clear()
    yield engine
    engine.fault, engine.free, engine.pause = None, 0, 0.0
    engine.gate.set()


class Seen:
    """A page, and what its browser complained about and asked for."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda line: self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, key: str) -> None:
        """Go to the page with a key, and wait until questions can be asked."""
        self.page.goto(f"{self.url}/")
        self.enter(key)

    def enter(self, key: str) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_label("API key").press("Enter")
        self.page.get_by_label("Question", exact=True).wait_for()

    def ask(self, question: str) -> None:
        self.page.get_by_label("Question", exact=True).fill(question)
        self.page.get_by_label("Question", exact=True).press("Enter")

    def wait_for_answers(self) -> None:
        playwright.expect(self.page.locator(".turn:last-child [aria-busy=false]")).to_have_count(3)

    def answers(self) -> list[str]:
        return self.page.locator(".turn:last-child .text").all_inner_texts()

    def feet(self) -> list[str]:
        return self.page.locator(".turn:last-child footer").all_inner_texts()


@pytest.fixture
def seen(browser: Any, server: Served) -> Iterator[Seen]:
    context = browser.new_context(viewport={"width": WIDE[0], "height": WIDE[1]})
    context.set_default_timeout(20_000)
    seen = Seen(context.new_page(), server.url)
    yield seen
    context.close()
    assert seen.complaints == []
    assert not [url for url in seen.requests if not url.startswith(f"{server.url}/")], "the page called elsewhere"


def test_a_question_is_answered_by_every_state_side_by_side(seen: Seen, engine: ScriptedEngine) -> None:
    engine.pause = 0.02
    seen.open(KEYS[OPERATOR])
    seen.page.get_by_label("Silo").select_option("shop")
    seen.ask("how are you")
    seen.wait_for_answers()
    assert seen.page.locator(".turn h3").all_inner_texts() == TITLES
    assert seen.answers() == [f"{name}: how are you" for name in ("shop@zero_shot", "shop@global", "shop")]
    assert all(re.fullmatch(r"4 tokens · [\d.]+ tokens/s · \d+\.\d s", foot) for foot in seen.feet())
    boxes = [card.bounding_box() for card in seen.page.locator(".turn .answer").all()]
    assert len({box["y"] for box in boxes}) == 1, "not side by side"
    assert sorted(box["x"] for box in boxes) == [box["x"] for box in boxes]


def test_a_client_sees_its_own_silo_alone(seen: Seen) -> None:
    seen.open(KEYS["clinic"])
    assert seen.page.get_by_label("Silo").locator("option").all_inner_texts() == ["clinic"]


def test_the_answers_come_word_by_word_and_at_the_same_time(seen: Seen, engine: ScriptedEngine) -> None:
    engine.free = 3
    engine.gate.clear()
    seen.open(KEYS["clinic"])
    seen.ask("one two three four")
    for text in seen.page.locator(".text").all():
        playwright.expect(text).to_have_text(re.compile(r"^clinic[@\w]*: one two$"))
    assert seen.page.locator("[aria-busy=true]").count() == 3
    assert all(foot.startswith("writing · ") for foot in seen.feet())
    engine.gate.set()
    seen.wait_for_answers()
    assert all(answer.endswith(": one two three four") for answer in seen.answers())


def test_stop_ends_the_answers_here_and_in_the_engine(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    for stop in (
        lambda: seen.page.get_by_role("button", name="Stop").click(),
        lambda: seen.page.keyboard.press("Escape"),
    ):
        engine.asked.clear()
        engine.gate.clear()
        seen.ask("how are you")
        until(lambda: len(engine.asked) == 3)
        stop()
        seen.wait_for_answers()
        until(lambda: [asked.pieces and asked.pieces[-1].finish for asked in engine.asked] == ["cancelled"] * 3)
        assert all(foot.startswith("stopped · ") for foot in seen.feet())
        engine.gate.set()
    seen.ask("again")
    seen.wait_for_answers()
    assert seen.answers()[2] == "clinic: again"


def test_a_passage_and_options_go_with_the_question(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    seen.page.get_by_role("button", name="Passage").click()
    seen.page.get_by_label("Passage that the question is about").fill("a  letter\nin lines")
    seen.page.get_by_role("button", name="Options").click()
    seen.page.get_by_label("Longest answer").fill("5")
    seen.page.get_by_label("Temperature").fill("0.5")
    seen.ask("what is it")
    seen.wait_for_answers()
    assert engine.conversations == [[{"role": "user", "content": "what is it\n\na  letter\nin lines"}]] * 3
    assert {(a.sampling.max_new_tokens, a.sampling.temperature) for a in engine.asked} == {(5, 0.5)}
    assert all(foot.startswith("cut at the limit · 5 tokens") for foot in seen.feet())
    assert seen.page.locator(".about p").text_content() == "a  letter\nin lines"


def test_every_model_sees_its_own_answers_to_the_questions_before(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    seen.ask("how are you")
    seen.wait_for_answers()
    engine.conversations.clear()
    seen.ask("and now")
    seen.wait_for_answers()
    for name in ("clinic@zero_shot", "clinic@global", "clinic"):
        assert [
            {"role": "user", "content": "how are you"},
            {"role": "assistant", "content": f"{name}: how are you"},
            {"role": "user", "content": "and now"},
        ] in engine.conversations
    engine.conversations.clear()
    seen.page.get_by_role("button", name="New chat").click()
    assert seen.page.locator(".turn").count() == 0
    seen.ask("hello")
    seen.wait_for_answers()
    assert engine.conversations == [[{"role": "user", "content": "hello"}]] * 3


def test_enter_sends_and_shift_enter_breaks_the_line(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    seen.page.keyboard.type("first")  # the cursor stands where one writes
    seen.page.keyboard.press("Shift+Enter")
    seen.page.keyboard.type("second")
    assert not engine.asked
    seen.page.keyboard.press("Enter")
    seen.wait_for_answers()
    assert seen.page.locator(".question").inner_text() == "first\nsecond"
    assert seen.answers()[2] == "clinic: first\nsecond"
    seen.page.keyboard.press("Enter")
    assert seen.page.locator(".turn").count() == 1, "an empty question was sent"


def test_texts_are_shown_as_texts(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    sharp = "<img src=x onerror=alert(1)><b>bold</b><script>alert(2)</script>"
    seen.ask(sharp)
    seen.wait_for_answers()
    assert seen.page.locator(".question").inner_text() == sharp
    assert seen.answers()[2] == f"clinic: {sharp}"
    assert seen.page.locator(".turn img, .turn b, .turn script").count() == 0


def test_a_wrong_key_is_told_and_a_right_one_then_opens(seen: Seen) -> None:
    seen.page.goto(f"{seen.url}/")
    for key, told in (("wrong", "This key is not valid"), ("", "This key is not valid")):
        seen.page.get_by_label("API key").fill(key)
        seen.page.get_by_role("button", name="Open").click()
        if key:
            seen.page.get_by_role("alert").filter(has_text=told).wait_for()
    assert seen.page.get_by_label("Question", exact=True).is_hidden()
    assert seen.page.evaluate("sessionStorage.length") == 0
    assert len(seen.complaints) == 1
    assert "401" in seen.complaints.pop()  # the browser's own line for the refusal
    seen.page.get_by_label("API key").fill(KEYS["clinic"])
    seen.page.get_by_role("button", name="Open").click()
    seen.page.get_by_label("Question", exact=True).wait_for()


def test_the_key_lasts_as_long_as_the_tab_and_until_it_is_changed(seen: Seen) -> None:
    seen.open(KEYS["clinic"])
    seen.ask("private")
    seen.wait_for_answers()
    seen.page.reload()
    seen.page.get_by_label("Question", exact=True).wait_for()
    seen.ask("private")
    seen.wait_for_answers()
    seen.page.get_by_label("Question", exact=True).fill("another one that is private")
    seen.page.get_by_role("button", name="Passage").click()
    seen.page.get_by_label("Passage that the question is about").fill("private")
    seen.page.get_by_role("button", name="Change key").click()
    assert seen.page.get_by_label("API key").input_value() == ""
    assert seen.page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    assert "private" not in seen.page.content()
    seen.enter(KEYS["shop"])
    texts = seen.page.locator("textarea").evaluate_all("all => all.map(one => one.value)")
    assert texts == ["", ""]
    seen.page.get_by_role("button", name="Passage", exact=True).wait_for()


def test_the_printed_link_opens_the_page_and_leaves_no_key_in_the_address(seen: Seen) -> None:
    seen.page.goto(f"{seen.url}/#key={KEYS['shop']}")
    seen.page.get_by_label("Question", exact=True).wait_for()
    assert seen.page.url == f"{seen.url}/"
    assert not [url for url in seen.requests if KEYS["shop"] in url]


def test_a_failure_is_told_in_the_answers_place(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    engine.fault = ServingError("the engine", "it broke", "start it again")
    seen.ask("how are you")
    seen.wait_for_answers()
    assert all("the engine could not answer it" in answer for answer in seen.answers())
    assert all(foot.startswith("failed · ") for foot in seen.feet())
    engine.fault = None
    seen.ask("and now")
    seen.wait_for_answers()
    assert seen.answers()[2] == "clinic: and now"


def test_an_option_that_is_none_is_told_by_the_server(seen: Seen, engine: ScriptedEngine) -> None:
    seen.open(KEYS["clinic"])
    seen.page.get_by_role("button", name="Options").click()
    seen.page.get_by_label("Temperature").fill("5")
    seen.ask("how are you")
    seen.wait_for_answers()
    assert all(answer.lower().startswith("temperature = 5: ") for answer in seen.answers())
    assert len(seen.complaints) == 3
    seen.complaints.clear()  # the browser's own lines for the three refusals
    assert not engine.asked


def test_a_server_that_still_loads_is_waited_for(browser: Any) -> None:
    engine = ScriptedEngine()
    with served(engine, ready=False) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/#key={KEYS['clinic']}")
        page.get_by_text("still loading").wait_for()
        server.service.ready(engine)
        page.get_by_label("Question", exact=True).wait_for()
        context.close()


def test_it_fits_a_phone_and_the_answers_stack(seen: Seen) -> None:
    seen.page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    seen.page.goto(f"{seen.url}/")
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert seen.page.evaluate(widths) == [PHONE[0], PHONE[0]]
    seen.open(KEYS["clinic"])
    seen.page.get_by_role("button", name="Passage").click()
    seen.page.get_by_label("Passage that the question is about").fill("something")
    seen.page.get_by_role("button", name="Options").click()
    seen.ask("a" * 200)
    seen.wait_for_answers()
    seen.page.get_by_role("button", name="Options").click()
    assert seen.page.evaluate(widths) == [PHONE[0], PHONE[0]]
    boxes = [card.bounding_box() for card in seen.page.locator(".turn .answer").all()]
    assert len({box["x"] for box in boxes}) == 1
    inside = seen.page.locator(".field").bounding_box()
    send = seen.page.get_by_role("button", name="Send").bounding_box()
    assert send["x"] + send["width"] <= inside["x"] + inside["width"], "Send sticks out"


def test_what_an_answer_says_can_be_copied(browser: Any, server: Served) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    seen = Seen(context.new_page(), server.url)
    seen.open(KEYS["clinic"])
    seen.ask("how are you")
    seen.wait_for_answers()
    seen.page.get_by_role("article", name="Global").get_by_role("button").click()
    seen.page.get_by_role("button", name="Copied").wait_for()
    assert seen.page.evaluate("navigator.clipboard.readText()") == "clinic@global: how are you"
    context.close()


def test_the_page_forbids_whatever_it_does_not_need(server: Served) -> None:
    for path in ("/", "/page.js", "/page.css", "/icon.svg"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
    page = httpx.get(f"{server.url}/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page), "something stands inline"

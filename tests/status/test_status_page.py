"""The page of a run: what it asks and gets over HTTP, and what a browser shows while the run grows."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexperts.artifacts import RunDirectory
from flexperts.errors import ConfigError
from flexperts.files import sole_writer
from flexperts.progress import Line
from flexperts.serving.http.settings import Address
from flexperts.serving.run_page.server import page_of

from .rounds_files import RECIPE, log

PHONE = (340, 700)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "mine", RECIPE)


class Asking:
    """Requests as the page makes them."""

    def __init__(self, link: str) -> None:
        self.url, _, self.key = link.partition("/#key=")

    def get(self, seen: str = "", key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key if key is None else key}".encode()}
        return httpx.get(f"{self.url}/status.json?seen={seen}", headers=headers)


@contextmanager
def asking(path: Path, under_way: Any = lambda: (), *, every: float = 0.1) -> Iterator[Asking]:
    """Serve a page; at the end, the server waits twice ``every`` seconds for a page that has asked just before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexperts.serving.run_page.server._EVERY", every)
        with page_of(path, Address(port=0), under_way) as link:
            yield Asking(link)


def test_only_who_has_the_key_is_answered(run: RunDirectory) -> None:
    run.append_round(log(1, {"a": 1.0}))
    with asking(run.path) as page:
        assert page.url.startswith("http://127.0.0.1:")
        assert page.get().json()["status"]["runs"][0]["rounds"] == {"done": 1, "planned": 3}
        for key in ("wrong", "é", page.key[:-1], f"{page.key}x"):
            refused = page.get(key=key)
            assert refused.status_code == 401
            assert "mine" not in refused.text
        assert httpx.get(f"{page.url}/status.json").status_code == 401
        assert page.get().headers["cache-control"] == "no-store"
        with asking(run.path) as other:
            assert other.key != page.key


def test_what_was_seen_is_not_sent_again(run: RunDirectory) -> None:
    run.append_round(log(1, {"a": 1.0}))
    lines = [Line("a: training", "3 of 4 steps", 3, 4)]
    with asking(run.path, lambda: lines * 99) as page:
        first = page.get().json()
        again = page.get(first["version"]).json()
        assert again.keys() == {"version", "under_way"}
        assert again["under_way"] == [{"text": "a: training", "facts": "3 of 4 steps", "done": 3, "total": 4}] * 50
        run.append_round(log(2, {"a": 0.5}))
        assert page.get(first["version"]).json()["status"]["runs"][0]["rounds"]["done"] == 2
        with sole_writer(run.path):
            assert page.get().json()["status"]["state"] == "running"
        run.write_summary({"method": "flex"})
        assert page.get().json()["status"]["state"] == "finished"


def test_a_run_that_has_no_directory_yet_is_waited_for(tmp_path: Path) -> None:
    with asking(tmp_path / "later") as page:
        assert page.get().json() == {"under_way": []}
        RunDirectory.create(tmp_path / "later", RECIPE)
        assert page.get().json()["status"]["run"] == "later"


def test_a_damaged_file_is_told(run: RunDirectory) -> None:
    run.append_round(log(1, {"a": 1.0}))
    run.rounds_file.write_text(run.rounds_file.read_text().replace("1.0", "2.0"))
    with asking(run.path) as page:
        assert "rounds.jsonl: it is damaged (its checksum does not fit)" in page.get().json()["error"]


def test_the_page_forbids_whatever_it_does_not_need(run: RunDirectory) -> None:
    with asking(run.path) as page:
        for path in ("/", "/page.js", "/page.css", "/icon.svg"):
            answer = httpx.get(page.url + path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert not re.search("https?://", answer.text.replace("http://www.w3.org/2000/svg", ""))
        found = httpx.get(f"{page.url}/").text
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", found), "something stands inline"
        assert httpx.post(f"{page.url}/status.json").status_code == 405
        assert httpx.get(f"{page.url}/rounds.jsonl").status_code == 404


def test_connections_without_the_key_are_bounded(run: RunDirectory) -> None:
    with asking(run.path) as page:
        port = int(page.url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
        assert page.get().status_code == 200
        idle[0].settimeout(5)
        assert idle[0].recv(1) == b"", "the oldest connection is still open"
        for one in idle:
            one.close()


def test_a_port_in_use_is_refused(run: RunDirectory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"--port {port}: the server cannot listen on this address"),
            page_of(run.path, Address(port=port)),
        ):
            pass


# In a browser.

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Seen:
    """A page, and what its browser complained about and asked for."""

    def __init__(self, browser: Any, **settings: Any) -> None:
        self.page = browser.new_page(**settings)
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda line: self.complaints.append(line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, asking: Asking) -> None:
        self.page.goto(f"{asking.url}/#key={asking.key}")

    def rows(self, name: str) -> list[list[str]]:
        """The cells of a table."""
        box = self.page.locator("details", has_text=name)
        return [row.locator("th, td").all_text_contents() for row in box.locator("tbody tr").all()]

    def widths(self) -> list[int]:
        return list(
            self.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        )


@in_a_browser
def test_the_page_grows_with_the_run_and_learns_its_end(browser: Any, run: RunDirectory) -> None:
    seen, lines = Seen(browser), [Line("round 1 of 3, training", "1 of 2 clients", 1, 2)]
    seen.page.clock.install()
    with asking(run.path, lambda: lines, every=2.0) as asked, sole_writer(run.path):
        seen.open(asked)
        seen.page.get_by_text("round 1 of 3, training").wait_for()
        assert seen.page.url == f"{asked.url}/", "the key is left in the address"
        assert seen.page.get_by_role("heading", name="Over rounds").is_hidden()
        run.append_round(log(1, {"a": 4.0, "b": 2.0}, scores={"a": {"nll.global": 5.0, "rows": 1}}))
        seen.page.clock.fast_forward(2000)
        playwright.expect(seen.page.get_by_role("status")).to_have_text("running: 1 of 3 rounds of flex")
        privacy = {"epsilon": 2.5, "delta": 1e-5}
        run.append_round(log(2, {"a": 1.5}, participants=["a", "b"], missing=["b"], privacy=privacy))
        seen.page.clock.fast_forward(2000)
        seen.page.get_by_text("Missing in their last round: b").wait_for()
        assert seen.page.title() == "2 of 3, mine"
        assert seen.rows("Silos of flex") == [
            ["b", "2", "1", "1", "0", "1", "2", ""],
            ["a", "2", "2", "0", "0", "2", "1.5", ""],
        ]
        newest, first = seen.rows("Rounds of flex")
        assert (first[:3], newest[:3]) == (["1", "3", "5"], ["2", "1.5", "–"])
        assert newest[-1] == "2.5"
        loss = seen.page.get_by_role("img", name=re.compile("^Training loss over rounds"))
        assert loss.get_attribute("aria-label") == ("Training loss over rounds. loss: 3 in round 1, 1.5 in round 2")
        drawn = [circle.get_attribute("cy") for circle in loss.locator("circle").all()]
        assert float(drawn[0]) < float(drawn[1]), "the loss fell, and the line does not"
        titles = ["Training loss", "NLL", "Silos", "Bytes of a round", "Seconds of a round", "Epsilon"]
        assert seen.page.locator("figcaption").all_text_contents() == titles
        run.write_summary({"method": "flex"})
    playwright.expect(seen.page.locator("#state")).to_have_text("finished")
    assert not [url for url in seen.requests if not url.startswith(f"{asked.url}/")], "the page called elsewhere"
    assert not [url for url in seen.requests if asked.key in url], "the key was sent in an address"
    assert all("ERR_CONNECTION_REFUSED" in line for line in seen.complaints), seen.complaints
    seen.page.close()


@in_a_browser
def test_a_hostile_name_is_text_and_all_fits_a_phone_in_light_and_dark(browser: Any, run: RunDirectory) -> None:
    for number in range(1, 61):
        run.append_round(log(number, {HOSTILE: 1.0 / number, "s" * 200: 2.0}, refused={"x": f"{HOSTILE} " * 9}))
    backgrounds = []
    with asking(run.path) as asked:
        for scheme in ("light", "dark"):
            seen = Seen(browser, color_scheme=scheme, viewport={"width": PHONE[0], "height": PHONE[1]})
            seen.open(asked)
            seen.page.get_by_text("60 of 3", exact=True).wait_for()
            assert HOSTILE in [row[0] for row in seen.rows("Silos of flex")]
            assert seen.page.locator("main img, main script, main b").count() == 0
            assert seen.widths() == [PHONE[0], PHONE[0]]
            backgrounds.append(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert seen.complaints == []
            seen.page.close()
    assert len(set(backgrounds)) == 2


@in_a_browser
def test_two_runs_are_in_the_same_charts_and_a_reader_keeps_what_is_open(browser: Any, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "mine", RECIPE + '[method]\nname = "flex"\nreference = "fedavg"\n')
    other = RunDirectory.create(run.reference, RECIPE + '[method]\nname = "fedavg"\n')
    for one in (run, other):
        one.append_round(log(1, {"a": 1.0}))
        one.append_round(log(2, {"a": 0.5}))
    seen = Seen(browser)
    seen.page.clock.install()
    with asking(run.path) as asked:
        seen.open(asked)
        figure = seen.page.locator("figure").first
        figure.wait_for()
        assert figure.locator(".key li").all_text_contents() == ["flex, loss 0.5", "fedavg, loss 0.5"]
        seen.page.get_by_text("Rounds of fedavg", exact=True).click()
        other.append_round(log(3, {"a": 0.25}))
        seen.page.clock.fast_forward(2000)
        playwright.expect(figure.locator(".key li").nth(1)).to_have_text("fedavg, loss 0.25")
        assert seen.page.locator("details[open] summary").all_text_contents() == [
            "Silos of flex",
            "Silos of fedavg",
            "Rounds of fedavg",
        ]
        assert seen.page.evaluate("document.activeElement.textContent") == "Rounds of fedavg"
        seen.page.reload()  # the key lasts as long as the tab
        figure.wait_for()
    assert seen.complaints == [] or all("ERR_CONNECTION_REFUSED" in line for line in seen.complaints)
    seen.page.close()


@in_a_browser
def test_a_page_says_what_it_lacks(browser: Any, run: RunDirectory) -> None:
    seen = Seen(browser)
    seen.page.clock.install()
    with suppress(KeyboardInterrupt), asking(run.path) as asked:
        seen.page.goto(f"{asked.url}/")
        seen.page.get_by_role("alert").filter(has_text="open the link that the command printed").wait_for()
        seen.open(asked)
        seen.page.get_by_text("0 of 3", exact=True).wait_for()
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 2, "an interrupted command waits for its page"
    seen.page.clock.fast_forward(2000)
    seen.page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    seen.page.close()

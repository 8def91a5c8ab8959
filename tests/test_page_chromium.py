"""The report in a real browser: it fits, complains of nothing and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from tests.browser import CHROMIUM, Browser
from tests.test_page import HOSTILE, event, whole

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
TIMELINE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="90"><script>alert(1)</script>'
    '<rect width="1200" height="90"/></svg>'
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The page of a run with a hostile event in it, and one of two runs."""
    root = tmp_path_factory.mktemp("pages")
    run, other = whole(root / "one"), whole(root / "two")
    (run / "timeline.svg").write_text(TIMELINE)
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event(53.0, "unreadable", error=HOSTILE * 3, step=40)) + "\n")
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), str(other), "--out", str(root / "both.html")]) == 0
    return [run / "report.html", root / "both.html"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_a_page_fits_every_width_and_asks_for_nothing(
    browser: Browser, pages: list[Path], width: int, dark: bool
) -> None:
    for path in pages:
        browser.asked.clear()
        browser.open(path.as_uri(), width, dark=dark)
        assert browser.tell("document.documentElement.scrollWidth") <= width, "there is no scrolling sideways"
        assert browser.tell("document.querySelectorAll('details').forEach((d) => { d.open = true; })") is None
        assert browser.tell("document.documentElement.scrollWidth") <= width
        light = browser.tell("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 249)"
        assert light is not dark
        assert [url for url in browser.asked if not url.startswith("data:")] == [path.as_uri()]
    assert browser.errors == []


def test_a_chart_says_what_is_under_the_pointer_and_zooms(browser: Browser, pages: list[Path]) -> None:
    browser.open(pages[0].as_uri(), 1440)
    box = browser.tell("(({x, y, width, height}) => ({x, y, width, height}))"
                       "(document.querySelector('#loss-chart .plane').getBoundingClientRect())")  # fmt: skip

    def mouse(kind: str, share: float) -> None:
        browser.call("Input.dispatchMouseEvent", type=kind, x=box["x"] + share * box["width"], y=box["y"] + 50,
                     button="left", buttons=int(kind != "mouseReleased"), clickCount=1)  # fmt: skip

    view = "document.querySelector('#loss-chart svg').getAttribute('viewBox')"
    mouse("mouseMoved", 0.5)
    said = browser.tell("document.querySelector('#loss-chart .readout').textContent")
    assert said.startswith("step 2")
    assert "each step 6.95" in said
    assert browser.tell(view) == "0 0 1000 300"
    mouse("mousePressed", 0.25)
    mouse("mouseMoved", 0.5)
    mouse("mouseReleased", 0.5)
    left, _, width, _ = map(float, browser.tell(view).split())
    assert (left, width) == (pytest.approx(250, abs=3), pytest.approx(250, abs=3))
    browser.tell("document.querySelector('#loss-chart .plane').focus()")
    for key in ("Escape", "ArrowLeft"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert browser.tell(view) == "0 0 1000 300"
    assert browser.tell("document.querySelector('#loss-chart .readout').textContent").startswith("step 40")
    assert browser.errors == []


def test_colours_can_be_chosen_and_a_page_without_scripts_has_its_pictures(browser: Browser, pages: list[Path]) -> None:
    browser.open(pages[0].as_uri(), 1440)
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.tell("document.getElementById('theme').click()")
    browser.tell("document.getElementById('theme').click()")
    assert browser.tell(colour) == "rgb(17, 20, 24)"
    browser.tell("localStorage.clear()")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages[0].as_uri(), 360)
        assert browser.tell("document.querySelector('#loss-chart svg').getBoundingClientRect().width") > 200
        assert browser.tell("document.querySelectorAll('#loss-chart .columns span').length") > 2
        assert browser.tell("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.errors == []

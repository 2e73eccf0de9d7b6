"""Tests of the frame of HTML pages: what it may load, and in a browser that tables are sorted and images enlarged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.components import chromium
from dermis.html_page import Section, html_page, page_colours, picture, table

ROOT = Path(__file__).resolve().parents[2]
BROWSER = chromium()


def a_page(*, interactive: bool = True) -> str:
    rows = [["b", "10.5 (9 to 12)"], ["a", "9"], ["c", "-"], ["d", "1,200"]]
    images = "".join(picture(np.full((8, 16, 3), shade, np.uint8), f"image {shade}") for shade in (10, 200))
    return html_page(
        "A <page>",
        [
            Section("one", "One & two", table("Values", ["name", "value"], rows, classes="sortable numbers")),
            Section("three", "Three", images),
        ],
        warnings=["<strong>Careful</strong>"],
        interactive=interactive,
    )


def test_page_loads_nothing_and_runs_only_its_own_script() -> None:
    page, without = a_page(), a_page(interactive=False)
    assert "<title>A &lt;page&gt;</title>" in page and 'href="#one">One &amp; two</a>' in page
    for text in (page, without):
        assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]+", "", text))
    assert "<script" not in without and "script-src" not in without
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='\"", page) and page.count("<script>") == 1


def test_pages_and_studio_have_the_same_colours() -> None:
    def colours(path: str, prefix: str) -> list[dict[str, str]]:
        text = (ROOT / path).read_text(encoding="utf-8")
        schemes = re.findall(r":root[^{]*\{([^}]*)\}", text)[:2]
        return [dict(re.findall(rf"--{prefix}([a-z-]+):\s*(#[0-9a-f]+)", scheme)) for scheme in schemes]

    studio = colours("clients/studio/src/dermis_studio/assets/studio.css", "ds-")
    shared = colours("dermis/html_colours.css", "")
    for own, theirs in zip(shared, studio, strict=True):
        assert len(own) > 12 and own == {name: theirs[{"bar": "well"}.get(name, name)] for name in own}
    assert shared[0].keys() == shared[1].keys()
    for path in ("dermis/html_page.css", "dermis/explain/embeddings_page.html"):
        style = (ROOT / path).read_text(encoding="utf-8").partition("</style>")[0]
        assert set(re.findall(r"var\(--([a-z-]+)\)", style)) <= shared[0].keys()
        assert not re.search(r"#[0-9a-f]{3}(?:[0-9a-f]{3})?\b", style), "no colours of its own"


def test_pages_of_readers_differ_from_the_studio_in_their_grey_surroundings_only() -> None:
    def colours(path: str, shared: str = "") -> dict[str, str]:
        text = shared + (ROOT / path).read_text(encoding="utf-8")
        own = dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]+)", text))
        assert set(re.findall(r"var\(--([a-z-]+)\)", text)) <= own.keys() | {"size"}
        return own

    light = page_colours(dark=False)
    assert "color-scheme: light;" in light and "dark" not in light and light in page_colours()
    known = dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]+)", light))
    reader = colours("services/gateway/reader_page/reader.css")
    survey = colours("training/evaluation/survey_page.html", light)
    for own in (reader, survey):
        shared = {name: value for name, value in own.items() if not name.startswith("grey-")}
        assert len(shared) >= 4 and shared == {name: known[name] for name in shared}
    greys = {name: value for name, value in survey.items() if name.startswith("grey-")}
    assert len(greys) == 3 and greys.items() <= reader.items()
    assert all(max(channels(grey)) - min(channels(grey)) <= 20 for grey in greys.values())  # hardly any hue


def channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
def test_tables_are_sorted_and_images_enlarged_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    path = tmp_path / "page.html"
    path.write_text(a_page(), encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        names = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent).join('')"
        orders = []
        for _ in range(3):
            page.get_by_role("button", name="value").click()
            orders.append(page.evaluate(names))
        assert orders == ["abdc", "dbac", "bacd"]  # by number, then as before; cells without a number come last
        image = page.get_by_role("button", name="image 10", exact=True)
        image.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        assert dialog.is_visible() and "image 10" in dialog.inner_text()
        scale = page.evaluate("document.querySelector('dialog img').getBoundingClientRect().width / 16")
        assert scale == round(scale) > 1  # whole pixels, so that the picture is not filtered
        page.keyboard.press("ArrowRight")
        assert "image 200" in dialog.inner_text()
        page.keyboard.press("Escape")
        assert not dialog.is_visible() and errors == []
        browser.close()

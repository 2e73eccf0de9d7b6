"""Tests of the pages that dermis writes as files, in a browser: accessible in all sizes and schemes, and usable by keyboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from static_pages import PAGES
from studio_browser import WAIT_SECONDS, browsing, violations

SIZES = {"wide": (1280, 800), "tablet": (820, 1180), "phone": (390, 844), "narrow": (320, 640)}
# One case in every run of the tests; the others take a browser too long.
CASES = [
    pytest.param(name, size, marks=() if (name, size) == ("pairs", "narrow") else pytest.mark.full)
    for name in PAGES
    for size in SIZES
]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """open_page("heat maps", "phone") -> the page in a browser. Its scripts have no error, and it requests nothing."""
    folder = tmp_path_factory.mktemp("pages")
    with browsing("file://") as browser:

        def opened(name: str, size: str = "wide") -> Any:
            path = folder / f"{name}.html"
            if not path.exists():
                path.write_text(PAGES[name](folder), encoding="utf-8")
            width, height = SIZES[size]
            page = browser.page(width=width, height=height)
            page.on("console", lambda message: browser.errors.append(message.text) if message.type == "error" else None)
            page.goto(path.as_uri())
            return page

        yield opened
        assert browser.errors == [] and browser.foreign == []


def faults(page: Any) -> list[str]:
    """Violations in both schemes, and what makes people scroll in two directions or lose the focus."""
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found += [f"{scheme}: {each}" for each in violations(page)]
    too_wide = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
    return found + ([f"{too_wide} px too wide"] if too_wide > 0 else [])


def focused(page: Any) -> Any:
    """The element with the focus: its name, and whether the focus is seen on it or on the label around it."""
    return page.evaluate("""() => {
      const element = document.activeElement, style = (each) => each ? getComputedStyle(each) : { outlineStyle: 'none' };
      const seen = [style(element), style(element.closest('label'))].some((each) => each.outlineStyle !== 'none');
      return [element === document.body ? null : element.outerHTML.replace(/base64,[^"]*/, '').slice(0, 120), seen];
    }""")


def scroll_right(page: Any, part: Any) -> None:
    """Scroll a part of the page with the keyboard."""
    part.focus()
    page.keyboard.press("ArrowRight")
    deadline = time.monotonic() + WAIT_SECONDS
    while part.evaluate("(element) => element.scrollLeft") == 0:
        assert time.monotonic() < deadline, "it does not scroll"
        page.wait_for_timeout(20)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_pages_are_accessible_in_all_sizes_and_schemes(open_page: Open, name: str, size: str) -> None:
    page = open_page(name, size)
    assert page.locator("h1").first.inner_text()
    assert faults(page) == []
    page.context.close()


@pytest.mark.full
@pytest.mark.parametrize("name", PAGES)
def test_tab_reaches_controls_and_shows_the_focus(open_page: Open, name: str) -> None:
    page = open_page(name, "phone")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        element, seen = focused(page)
        if element is None:  # the end of the page
            break
        assert seen, element
        reached.append(element)
    assert reached
    page.context.close()


@pytest.mark.full
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["evaluation report", "heat maps", "pairs"])
def test_images_are_whole_multiples_of_their_pixels(open_page: Open, name: str, size: str) -> None:
    page = open_page(name, size)
    scales = page.evaluate("""[...document.querySelectorAll('main img:not(.reduced, .legend img)')]
      .map((image) => image.getBoundingClientRect().width / image.naturalWidth)""")
    reduced = page.evaluate("""[...document.querySelectorAll('main img.reduced')]
      .map((image) => image.naturalWidth / image.getBoundingClientRect().width)""")
    assert all(scale == round(scale) >= 1 for scale in scales)
    assert all(factor > 1 for factor in reduced) and (scales or size in {"phone", "narrow"})
    page.context.close()


@pytest.mark.full
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_enlarged_image_is_accessible_and_gives_the_focus_back(open_page: Open, size: str) -> None:
    page = open_page("evaluation report", size)
    sheet = page.get_by_role("button", name="benign", exact=True).first  # wider than a phone
    sheet.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    assert faults(page) == []
    bar, view = page.locator("dialog .tools"), page.locator("dialog .view")
    for button in bar.get_by_role("button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0] and box["y"] >= 0, "the buttons stay in view"
    if size == "phone":
        scroll_right(page, view)
    page.keyboard.press("Escape")
    assert focused(page)[0].startswith('<img alt="benign"')
    page.context.close()


@pytest.mark.full
def test_wide_tables_are_scrolled_by_keyboard_with_the_names_of_their_rows_in_view(open_page: Open) -> None:
    page = open_page("evaluation report", "phone")
    table = page.get_by_role("group", name="Numbers in lite0", exact=True)
    scroll_right(page, table)
    assert table.get_by_role("rowheader", name="FD@lite0").bounding_box()["x"] == table.bounding_box()["x"]
    page.context.close()


@pytest.mark.full
@pytest.mark.parametrize("size", SIZES)
def test_every_view_of_a_survey_is_accessible(open_page: Open, size: str) -> None:
    page = open_page("survey", size)
    page.get_by_label("Your name").fill("Ann")
    page.keyboard.press("Enter")
    assert page.get_by_role("heading", name="Image 1 of 6").is_visible()
    assert faults(page) == []
    scale = page.evaluate("document.querySelector('#image').getBoundingClientRect().width / 64")
    assert scale == round(scale) and scale >= (8 if size == "wide" else 4), "the image fills the screen"
    page.keyboard.press("Enter")
    assert "Please answer first" in page.inner_text("#message")
    for key in ("g", "4", "m"):
        page.keyboard.press(key)
    assert faults(page) == []
    page.get_by_role("button", name="Stop here").click()
    assert "1 of 6 images" in page.inner_text("#summary")
    page.get_by_text("Saving does not work here").click()
    assert faults(page) == []
    page.reload()
    assert page.get_by_role("button", name="Continue as Ann (1 of 6 answered)").is_visible()
    assert faults(page) == []
    page.context.close()


@pytest.mark.full
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_embeddings_need_neither_mouse_nor_dragging(open_page: Open, size: str) -> None:
    page = open_page("embeddings", size)
    state = "JSON.stringify([view.turn.map((x) => x.toFixed(6)), view.zoom])"
    seen = {page.evaluate(state)}
    for name in ("Zoom in", "Rotate left", "Rotate up"):  # by pointer, without dragging
        page.get_by_role("button", name=name).click()
        seen.add(page.evaluate(state))
    assert len(seen) == 4
    space = page.get_by_role("application")
    space.focus()
    page.keyboard.press("n")  # the first image
    assert "ISIC_0000000" in page.locator("#said").inner_text()
    page.keyboard.press("s")
    page.keyboard.press("n")
    page.keyboard.press("s")
    assert page.evaluate("table().trim().split('\\n').slice(1).map((line) => line.split(',')[0])") == [
        "ISIC_0000000",
        "ISIC_0000001",
    ]
    page.keyboard.press("c")
    projected = "projected(space.clientWidth, space.clientHeight)"
    place = page.evaluate(f"{projected}, [screenX[1] / space.clientWidth, screenY[1] / space.clientHeight]")
    assert place == pytest.approx([0.5, 0.5])
    page.get_by_role("button", name="Remove from the selection").click()
    assert page.evaluate("state.count") == 1
    assert faults(page) == []
    page.get_by_label("images instead of dots").check()
    page.get_by_label("Colour").select_option("probability")
    page.get_by_role("button", name="Draw around images").press("Enter")
    assert faults(page) == []
    page.context.close()

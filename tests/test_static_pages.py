"""Tests of the pages that dermis writes as files in a browser: accessible in all sizes and schemes, and usable by keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from static_pages import PAGES
from studio_browser import browsing, violations

SIZES = {"wide": (1280, 800), "tablet": (820, 1180), "phone": (390, 844), "narrow": (320, 640)}
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """open_page("heat maps", size="phone", dark=True) -> the page in a browser; its scripts must have no error."""
    folder = tmp_path_factory.mktemp("pages")
    with browsing("file://") as browser:

        def opened(name: str, *, size: str = "wide", dark: bool = False) -> Any:
            path = folder / f"{name}.html"
            if not path.exists():
                path.write_text(PAGES[name](folder), encoding="utf-8")
            width, height = SIZES[size]
            page = browser.page(dark=dark, width=width, height=height)
            page.on("console", lambda message: browser.errors.append(message.text) if message.type == "error" else None)
            page.goto(path.as_uri())
            return page

        yield opened
        assert browser.errors == [] and browser.foreign == []


def overflow(page: Any) -> int:
    """By how many pixels a page is wider than the window: people would have to scroll in two directions."""
    width: int = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
    return width


def checked_states(page: Any) -> list[str]:
    """Violations in both schemes, and the overflow."""
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found += [f"{scheme}: {each}" for each in violations(page)]
    return found + ([f"{overflow(page)} px too wide"] if overflow(page) > 0 else [])


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, marks=pytest.mark.full) for name in PAGES for size in SIZES]
    # A part in every run of the tests; the others take a browser too long.
    + [],
)
def test_pages_are_accessible_in_all_sizes_and_schemes(open_page: Open, name: str, size: str) -> None:
    page = open_page(name, size=size)
    assert page.locator("h1").first.inner_text()
    assert checked_states(page) == []
    page.context.close()

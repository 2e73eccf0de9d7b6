"""A browser that opens pages of the studio and records requests to other hosts."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from benchmarks.components import chromium

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WAIT_SECONDS = 180.0  # detects a page that hangs; long enough for a busy machine
_OPTIONS = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
_WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@dataclass
class Browser:
    """A browser and the address of a service.

    Attributes:
        browser: Playwright's browser.
        address: Address of the service.
        foreign: Addresses of requests to other hosts.
        errors: Errors of scripts.
    """

    browser: Any
    address: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def page(self, *, dark: bool = False, width: int = 1280, height: int = 800) -> Any:
        """A page of a new session, without cookies of the others."""
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            ignore_https_errors=True,  # certificates of an authority that a test made
        )
        context.set_default_timeout(WAIT_SECONDS * 1000)
        page = context.new_page()
        own = urlsplit(self.address).netloc
        page.on("request", lambda request: self._record(request.url, own))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        return page

    def open(self, path: str, **options: Any) -> Any:
        """A page of the studio, once its title is shown."""
        page = self.page(**options)
        page.goto(f"{self.address}/studio/{path}")
        page.locator(".ds-title h1").wait_for()
        return page

    def _record(self, url: str, own: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"data", "blob"} and parts.netloc != own:
            self.foreign.append(url)


@contextmanager
def browsing(address: str) -> Iterator[Browser]:
    """A browser for the studio of the service at an address; skips the test if no browser is installed."""
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    options = [*_OPTIONS, "--no-sandbox"] if os.geteuid() == 0 else list(_OPTIONS)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield Browser(browser, address)
        finally:
            browser.close()


def violations(page: Any) -> list[str]:
    """Violations of WCAG 2.2 A and AA that axe finds on a page, one line for each.

    The page is at its top, because axe takes what the header covers at the moment for a target that is always covered.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page.evaluate("window.scrollTo({ top: 0, behavior: 'instant' })")
    result = axe.Axe().run(page, options={"runOnly": _WCAG})
    return [
        f"{violation['id']}: {violation['help']}: {node['target']} {node['html'][:160]}"
        for violation in result.response["violations"]
        for node in violation["nodes"]
    ]


def press(page: Any, name: str) -> None:
    """Press the button with exactly this name."""
    page.get_by_role("button", name=name, exact=True).click()


def unfold(page: Any, name: str) -> None:
    """Open the section whose name begins so."""
    page.get_by_role("button", name=re.compile(f"^{name}")).click()


def shows(page: Any, text: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait until a text is shown."""
    page.get_by_text(text).first.wait_for(timeout=1000 * seconds)


def make_dark(page: Any) -> None:
    """Switch to the dark theme, and wait until its colours are there."""
    page.locator("[data-ds-theme]").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.wait_for_function("document.getAnimations().length === 0")


def violations_in_both_themes(page: Any) -> list[str]:
    """Violations on a page in the light theme, which it has, and in the dark one."""
    light = violations(page)
    make_dark(page)
    return [*light, *(f"dark: {each}" for each in violations(page))]


def picture(size: int = 160) -> dict[str, Any]:
    """A file for the field of an upload: a reddish disc on skin-like colour."""
    image = Image.new("RGB", (size, size), (224, 172, 150))
    image.paste((122, 62, 44), (size // 3, size // 3, 2 * size // 3, 2 * size // 3))
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"name": "lesion.png", "mimeType": "image/png", "buffer": content.getvalue()}


BROKEN = {"name": "lesion.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nnothing"}


def create_study(page: Any, images: int) -> None:
    """Create a study of uploaded images on its page."""
    page.wait_for_load_state("networkidle")
    page.get_by_label("Name").first.fill("Pilot")
    page.get_by_label("Images", exact=False).first.fill(str(images))
    press(page, "Create study")
    shows(page, f"{images // 2} real images are needed")


def delete_study(page: Any) -> None:
    """Delete the study that is shown."""
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Delete")
    shows(page, "are deleted")


def answer(reader: Any, position: int, *keys: str, total: int = 4) -> None:
    """Answer an image of a study with the keyboard."""
    shows(reader, f"Image {position} of {total}")
    reader.locator("#image:not([hidden])").wait_for()
    for key in keys:
        reader.keyboard.press(key)

"""The pictures of the documentation: `python tests/support/studio_pictures.py ADDRESS FOLDER`, for a service of the demo."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from studio_browser import Browser, browsing

SAMPLE = "class_name=malignant&seed=0&index=9"


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def generate(browser: Browser) -> Any:
    page = browser.open("")
    press(page, "Generate")
    page.get_by_text("16 images of").wait_for()
    page.locator(".ds-tile").nth(9).click()
    page.locator(".ds-detail .ds-facts").first.wait_for()
    return page


def explore(browser: Browser) -> Any:
    page = browser.open(f"explore?{SAMPLE}", dark=True)
    page.get_by_text("Not edited").first.wait_for()
    press(page, "Draw map")
    page.locator(".ds-map [data-cell]").nth(8).press("Enter")
    page.get_by_text("Edited.").first.wait_for()
    page.locator(".ds-map").scroll_into_view_if_needed()
    return page


def authenticity(browser: Browser) -> Any:
    page = browser.open(f"authenticity?{SAMPLE}")
    page.get_by_text("Limits of this answer").wait_for()
    return page


def classify(browser: Browser) -> Any:
    page = browser.open("classify")
    page.get_by_label("Index").fill("9")
    page.get_by_label("XRAI").check()
    press(page, "Classify")
    page.get_by_text("Counted as").wait_for()
    return page


def datasets(browser: Browser) -> Any:
    page = browser.open("datasets")
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("24")
    press(page, "Create dataset")
    page.get_by_role("link", name="Open the report").wait_for()
    return page


def main() -> None:
    address, folder = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    with browsing(address) as browser:
        for show in (generate, explore, authenticity, classify, datasets):
            if len(sys.argv) > 3 and show.__name__ not in sys.argv[3:]:
                continue
            page = show(browser)
            page.wait_for_timeout(1000)  # the last movement of the page
            picture = Image.open(io.BytesIO(page.screenshot()))
            # 256 colours, so that a file has less than 300 kB.
            small = picture.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
            small.save(folder / f"studio-{show.__name__}.png", optimize=True)
            page.context.close()


if __name__ == "__main__":
    main()

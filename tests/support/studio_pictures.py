"""Pictures of the documentation: `python tests/support/studio_pictures.py ADDRESS FOLDER [NAME ...]`, of a demo service."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from studio_browser import Browser, answer, browsing, create_study, picture, press

SAMPLE = "class_name=malignant&seed=0&index=9"


def generate(browser: Browser) -> Any:
    page = browser.open("")
    press(page, "Generate")
    page.get_by_text("16 images of").wait_for()
    page.locator(".ds-tile").nth(9).click()
    page.locator(".ds-detail .ds-facts").first.wait_for()
    page.evaluate("window.scrollTo({ top: 0, behavior: 'instant' })")
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
    page = browser.open(f"classify?{SAMPLE}")
    page.get_by_text("Counted as").wait_for()
    page.get_by_label("XRAI").check()
    press(page, "Classify")
    page.get_by_alt_text("Heat map").first.wait_for()
    page.evaluate("window.scrollTo({ top: 0, behavior: 'instant' })")
    return page


def datasets(browser: Browser) -> Any:
    page = browser.open("datasets")
    page.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("24")
    press(page, "Create dataset")
    page.get_by_role("link", name="Open the report").wait_for()
    return page


def embedding_map(browser: Browser) -> Any:
    page = browser.open("map")
    page.wait_for_load_state("networkidle")
    press(page, "Draw map")
    page.get_by_text("120 images. The map shows").wait_for()
    canvas = page.get_by_role("application")
    canvas.focus()
    page.keyboard.press("Enter")  # the image nearest to the middle
    page.locator(".ds-em-about").get_by_text("Nearest images of the map").wait_for()
    canvas.scroll_into_view_if_needed()
    return page


def studies(browser: Browser) -> Any:
    """The page of the one who made a study, after two readers have answered."""
    page = browser.open("studies")
    create_study(page, 20)
    page.get_by_label("Real images: benign").set_input_files([picture(120 + 4 * place) for place in range(10)])
    page.get_by_text("10 of 10 images are uploaded").first.wait_for()
    press(page, "Choose the images and open the study")
    page.locator(".ds-state", has_text="Open").first.wait_for()
    for name, keys in (("Reader 1", "grgrr"), ("Reader 2", "ggrgr")):
        page.get_by_label("Name or code").fill(name)
        press(page, "Create link")
        page.get_by_text(f"The link for {name} is below").wait_for()
        reader = browser.page()
        reader.goto(page.locator(".ds-code code").first.inner_text())
        reader.get_by_role("button", name="Begin").press("Enter")
        for position in range(1, 21):
            answer(reader, position, keys[position % 5], str(1 + position % 5), "Enter", total=20)
        reader.get_by_text("You have answered all").wait_for()
        reader.context.close()
    press(page, "Refresh")
    page.get_by_text("Results so far").wait_for()
    page.get_by_text("Results so far").scroll_into_view_if_needed()
    return page


PICTURES = {
    "generate": generate,
    "explore": explore,
    "authenticity": authenticity,
    "classify": classify,
    "datasets": datasets,
    "map": embedding_map,
    "studies": studies,
}


def main() -> None:
    address, folder = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    with browsing(address) as browser:
        for name in sys.argv[3:] or PICTURES:
            page = PICTURES[name](browser)
            page.wait_for_timeout(1000)  # the last movement of the page
            picture = Image.open(io.BytesIO(page.screenshot()))
            # 256 colours, so that a file has less than 300 kB.
            small = picture.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
            small.save(folder / f"studio-{name}.png", optimize=True)
            page.context.close()


if __name__ == "__main__":
    main()

"""What tests do on each page of the studio: its normal use, and an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from studio_browser import BROKEN, create_study, delete_study, picture, press, shows, unfold, violations

OPTIMISATION_SECONDS = 600.0  # for the hundreds of steps of a projection on a busy machine
HEAT_MAP_SECONDS = 180.0  # for the first one after a start, on a busy machine
NO_SUCH = f"pr_{'0' * 32}"


@dataclass(frozen=True)
class Steps:
    """What a test does on a page.

    Attributes:
        path: Path and query of the page.
        use: Uses the page, and returns once the result is shown.
        fail: Causes an error, and returns a text of the message that has to be shown; None if nothing can be wrong.
    """

    path: str
    use: Callable[[Any], None]
    fail: Callable[[Any], str] | None = None


def generate(page: Any) -> None:
    press(page, "Generate")
    shows(page, "16 images of")
    shows(page, "All of these images as code")
    page.locator(".ds-tile").nth(9).click()
    page.locator(".ds-detail .ds-facts").first.wait_for()
    if page.get_by_role("button", name="Show neighbours").count():  # the key may edit
        press(page, "Show neighbours")
        page.get_by_alt_text("Neighbour 5").wait_for()


def generate_with_huge_seed(page: Any) -> str:
    page.get_by_label("Seed").fill("99999999999999999999")
    press(page, "Generate")
    return "seed"


def explore(page: Any) -> None:
    shows(page, "Not edited")
    number = page.get_by_label("number input for").first
    number.fill("2")
    number.press("Enter")
    shows(page, "Edited.")
    press(page, "Make strip")
    page.get_by_text("Save strip").wait_for()
    film = page.locator("[data-ds-film]").first
    assert film.locator("output").inner_text() == "1 of 7"  # it does not move before it is started
    film.get_by_role("button", name="Play film").press("Enter")
    page.wait_for_function("document.querySelector('[data-ds-film] output').textContent === '3 of 7'")
    film.get_by_role("button", name="Pause film").press("Enter")
    film.get_by_role("slider").fill("7")
    images = page.locator(".ds-strip img")
    assert (
        film.locator("img").get_attribute("src")
        == images.nth(6).get_attribute("src")
        != images.nth(0).get_attribute("src")
    )
    press(page, "Draw map")
    page.locator(".ds-map").wait_for()
    page.locator(".ds-map [data-cell]").last.press("Enter")  # the corner at the bottom right
    page.wait_for_function(
        "[...document.querySelectorAll('input[type=range]')].slice(0, 2).map(e => e.value).join() === '3,-3'"
    )
    press(page, "Make film")
    page.get_by_text("Save film").nth(1).wait_for()


def explore_unknown_projection(page: Any) -> str:
    shows(page, "Not edited")
    page.get_by_label("Projection", exact=True).check()
    field = page.get_by_label("Id of the projection")
    field.fill(NO_SUCH)
    field.press("Enter")
    return "there is no projection"


def project(page: Any) -> None:
    page.locator("input[type=file]").set_input_files(picture())
    page.get_by_alt_text("The chosen image").wait_for()
    press(page, "Project")
    shows(page, "Reconstruction after", OPTIMISATION_SECONDS)  # while it is being made
    page.get_by_role("img", name=re.compile("Distance after [0-9]+ of")).wait_for()
    assert violations(page) == []
    shows(page, "Reconstruction.", OPTIMISATION_SECONDS)
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Delete")
    shows(page, "are deleted")


def project_and_cancel(page: Any) -> None:
    """Start a projection, and delete it before it has ended."""
    page.locator("input[type=file]").set_input_files(picture())
    page.get_by_alt_text("The chosen image").wait_for()
    press(page, "Project")
    shows(page, " steps")
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Cancel and delete")
    shows(page, "are deleted")


def project_broken(page: Any) -> str:
    page.locator("input[type=file]").set_input_files(BROKEN)
    press(page, "Project")
    return "image"


def authenticity(page: Any) -> None:
    press(page, "Check")
    shows(page, "Limits of this answer")


def authenticity_with_huge_seed(page: Any) -> str:
    page.get_by_label("Seed").fill("99999999999999999999")
    press(page, "Check")
    return "seed"


def classify(page: Any) -> None:
    page.get_by_label("Integrated gradients").check()
    press(page, "Classify")
    shows(page, "Counted as", HEAT_MAP_SECONDS)
    page.get_by_label("Heat map").last.fill("30")
    shows(page, "30 %")
    for name, side in (("1:1 (256 px)", 256), ("pixels (nearest)", 384)):
        press(page, name)
        assert [box["width"] for box in boxes(page, ".ds-stack:visible img")] == [side, side]


def boxes(page: Any, selector: str) -> list[Any]:
    """Where the elements are."""
    return [element.bounding_box() for element in page.locator(selector).all()]


def classify_broken(page: Any) -> str:
    page.get_by_label("Your own", exact=True).check()
    page.locator("input[type=file]").set_input_files(BROKEN)
    press(page, "Classify")
    return "image"


def datasets(page: Any) -> None:
    page.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("4")
    unfold(page, "Edits")
    page.get_by_label("Directions of all images").fill("sefa-2")
    page.keyboard.press("Enter")
    page.get_by_label("Strength of sefa-2").fill("2.5")
    unfold(page, "More options")
    page.get_by_label("Images in a shard").fill("20000")
    shows(page, "Images in a shard: 20,000 is not allowed")
    page.get_by_label("Images in a shard").fill("3")
    shows(page, "made in 3 shards")
    press(page, "Create dataset")
    page.get_by_role("link", name="Open the report").first.wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Delete")
    shows(page, "are deleted")


def datasets_without_images(page: Any) -> str:
    page.get_by_label("Images of").first.wait_for()
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("0")
    press(page, "Create dataset")
    return "at least one image"


def embedding_map(page: Any) -> None:
    number = page.get_by_label("number input for Generated images")
    number.fill("20")
    number.press("Enter")
    press(page, "Draw map")
    shows(page, "20 images. The map shows")
    canvas = page.get_by_role("application")
    canvas.focus()
    page.keyboard.press("Enter")  # the image nearest to the middle
    about = page.locator(".ds-em-about")
    about.get_by_text("Nearest images of the map").wait_for()
    assert (
        canvas.evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, k) => k % 4 == 3 && v > 0).length"
        )
        > 1000
    )
    chosen = about.locator("h3").first.inner_text()
    about.get_by_role("listitem").first.get_by_role("button").press("Enter")
    page.wait_for_function("name => document.querySelector('.ds-em-about h3').textContent !== name", arg=chosen)
    page.get_by_label("Colour and shape").select_option("verdict")
    before = canvas.screenshot()
    press(page, "Rotate left")
    turned = canvas.screenshot()
    press(page, "Show in the middle")
    assert len({before, turned, canvas.screenshot()}) == 3
    press(page, "Add to the selection")
    shows(page, "1 selected.")
    with page.expect_download() as saved:
        press(page, "Save as CSV")
    assert len(Path(saved.value.path()).read_text().splitlines()) == 1 + 1
    press(page, "Remove from the selection")
    shows(page, "Nothing is selected")
    with page.expect_download() as saved:
        press(page, "Save as CSV")
    rows = Path(saved.value.path()).read_text().splitlines()
    assert sum("generated" in row for row in rows) == 20 and "training images in a cube" in rows[-1]
    with page.expect_download() as saved:
        press(page, "Save as PNG")
    assert min(Image.open(saved.value.path()).size) > 300


def embedding_map_of_unknown_projection(page: Any) -> str:
    page.get_by_label("Projections").fill(NO_SUCH)
    press(page, "Draw map")
    return "there is no projection"


def studies(page: Any) -> None:
    create_study(page, 4)
    delete_study(page)


def study_without_name(page: Any) -> str:
    page.wait_for_load_state("networkidle")
    press(page, "Create study")
    return "the study has no name"


def models(page: Any) -> None:
    shows(page, "held-out images of other")


PAGES = {
    "generate": Steps("", generate, generate_with_huge_seed),
    "explore": Steps("explore", explore, explore_unknown_projection),
    "project": Steps("project", project, project_broken),
    "authenticity": Steps("authenticity", authenticity, authenticity_with_huge_seed),
    "classify": Steps("classify", classify, classify_broken),
    "datasets": Steps("datasets", datasets, datasets_without_images),
    "map": Steps("map", embedding_map, embedding_map_of_unknown_projection),
    "studies": Steps("studies", studies, study_without_name),
    "models": Steps("models", models),
}

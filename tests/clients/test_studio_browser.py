"""Tests of the studio in a browser: every page in normal use, with an error; accessibility."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from dermis.bundle import Bundle
from service_kit import assemble, listening
from studio_browser import (
    Browser,
    answer,
    browsing,
    create_study,
    delete_study,
    make_dark,
    picture,
    press,
    shows,
    violations,
    violations_in_both_themes,
)
from studio_pages import PAGES


def test_page_generates_images_and_sends_nothing_to_other_hosts(tiny_bundle: Bundle, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # open from now on, so that no other program gets the port
    parts = assemble(tiny_bundle.location, tmp_path, port=listener.getsockname()[1])
    with listening(parts, listener) as address, browsing(address) as browser:
        page = browser.open("")
        press(page, "Generate")
        shows(page, "16 images of")
        tiles = page.locator(".ds-tile")
        tiles.first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.locator(".ds-detail .ds-facts").first.wait_for()
        assert (
            page.evaluate("[...document.querySelectorAll('.ds-tile')].findIndex(tile => tile.ariaPressed === 'true')")
            == 1
        )
        assert "Seed, index" in page.locator(".ds-detail").inner_text()
        assert violations(page) == []
        assert (browser.foreign, browser.errors) == ([], [])


@pytest.mark.full
@pytest.mark.parametrize("name", PAGES)
def test_page_does_its_work_and_is_accessible(browser: Browser, name: str) -> None:
    page = browser.open(PAGES[name].path)
    PAGES[name].use(page)
    page.wait_for_function("document.querySelectorAll('.ds-bar').length === 0")
    assert violations(page) == []
    make_dark(page)
    assert violations(page) == []


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, steps in PAGES.items() if steps.fail])
def test_page_shows_an_error_and_what_to_do(browser: Browser, name: str) -> None:
    fail = PAGES[name].fail
    assert fail is not None
    page = browser.open(PAGES[name].path)
    text = fail(page)
    problem = page.locator(".ds-problem").first
    problem.wait_for()
    assert text in problem.inner_text()
    assert problem.locator(".ds-remedy").inner_text()
    assert violations(page) == []


def fits(reader: Any, width: int, height: int) -> None:
    """Check the page of a reader on a screen of this size: a phone upright or on its side, or a tablet."""
    reader.set_viewport_size({"width": width, "height": height})
    assert reader.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(reader) == []


@pytest.mark.full
def test_reader_study_from_its_creation_to_its_results(browser: Browser) -> None:
    page = browser.open("studies")
    create_study(page, 4)
    page.get_by_label("Real images: benign").set_input_files([picture(160), picture(200)])
    shows(page, "2 of 2 images are uploaded")
    assert violations(page) == []
    press(page, "Choose the images and open the study")
    page.get_by_label("Name or code").fill("Reader A")
    page.get_by_role("button", name="Create link", exact=True).dblclick()
    link = page.locator(".ds-code code").inner_text()
    assert link.startswith(f"{browser.address}/study#")
    assert page.locator(".ds-study td", has_text="Reader A").count() == 1
    page.locator(".ds-state", has_text="Open").first.wait_for()
    assert violations(page) == []

    reader = browser.page(width=820, height=1180)
    reader.goto(link)
    reader.get_by_role("button", name="Begin").wait_for()
    assert violations(reader) == []
    reader.get_by_role("button", name="Begin").press("Enter")
    answer(reader, 1, "g", "4", "Enter")
    fits(reader, 390, 844)
    answer(reader, 2, "r", "2", "Enter")
    fits(reader, 844, 390)
    answer(reader, 3, "g")
    fits(reader, 820, 1180)
    reader.reload()
    reader.get_by_role("button", name="Continue with image 3").press("Enter")
    answer(reader, 3)
    assert reader.get_by_label("Generated").is_checked()  # what was chosen before the page was loaded again
    reader.keyboard.press("Backspace")
    answer(reader, 2)
    assert reader.get_by_label("Real").is_checked()

    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    reader.route("**/v1/reading/answers/2", hold)  # while the answer is being stored, another choice is not shown
    reader.keyboard.press("Enter")
    shows(reader, "Storing the answer")
    reader.get_by_label("Generated").dispatch_event("click")
    assert reader.get_by_label("Real").is_checked()
    held[0].continue_()
    reader.unroute("**/v1/reading/answers/2")
    answer(reader, 3)
    reader.keyboard.press("Backspace")
    answer(reader, 2)
    assert reader.get_by_label("Real").is_checked()
    answer(reader, 2, "Enter")
    answer(reader, 3, "5", "Enter")
    answer(reader, 4, "r", "1", "Enter")
    shows(reader, "You have answered all 4 images")
    assert violations(reader) == []

    press(page, "Refresh")
    shows(page, "Results so far")
    assert "4 of 4" in page.locator(".ds-study").inner_text()
    assert violations(page) == []
    make_dark(page)
    assert violations(page) == []
    with page.expect_download() as saved:
        page.get_by_role("link", name="Answers as CSV").click()
    rows = Path(saved.value.path()).read_text().splitlines()
    assert len(rows) == 1 + 4 and sum(",real," in row for row in rows) >= 2
    page.reload()  # the address names the study
    shows(page, "Results so far")
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Close study")
    shows(page, "No more answers are taken")
    reader.reload()
    shows(reader, "The study is closed")
    assert violations(reader) == []
    delete_study(page)
    reader.reload()
    shows(reader, "This link does not work")
    assert violations(reader) == []


@pytest.mark.full
def test_what_is_entered_while_a_page_loads_is_kept(browser: Browser) -> None:
    page = browser.page()
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    join = "**/gradio_api/queue/join*"
    page.route(join, hold)  # the events of the page wait
    page.goto(f"{browser.address}/studio/authenticity?class_name=benign&seed=5&index=3")
    page.wait_for_function("[...document.querySelectorAll('input[type=number]')].some(field => field.value === '5')")
    page.get_by_label("Seed").fill("77")
    page.route(join, lambda route: route.continue_())  # later ones do not
    for route in held:
        route.continue_()
    shows(page, "Limits of this answer")
    assert (page.get_by_label("Seed").input_value(), page.get_by_label("Index").input_value()) == ("77", "3")


@pytest.mark.full
def test_what_was_stopped_stays_stopped(browser: Browser) -> None:
    page = browser.open("")
    page.wait_for_load_state("networkidle")
    number = page.get_by_label("number input for Number of images")
    number.fill("64")
    number.press("Enter")
    press(page, "Generate")
    page.locator(".ds-tile").first.wait_for()
    press(page, "Stop")
    shows(page, "Stopped.")
    tiles = page.locator(".ds-tile").count()
    page.wait_for_timeout(2000)  # of what was on its way
    assert page.get_by_text("Stopped.").is_visible() and page.locator(".ds-tile").count() == tiles < 64
    press(page, "Generate")
    page.get_by_role("button", name="Stop", exact=True).wait_for()


@pytest.mark.full
def test_another_dataset_is_created_while_one_is_made(browser: Browser) -> None:
    page = browser.open("datasets")
    page.wait_for_load_state("networkidle")
    page.get_by_label("Images of benign").fill("2000")
    create = page.get_by_role("button", name="Create dataset", exact=True)
    rows = page.locator(".ds-table tbody tr")
    before = rows.count()
    create.dblclick()
    page.get_by_role("button", name="Cancel", exact=True).wait_for()
    page.wait_for_timeout(1500)  # in which a second click would have made a second one
    assert rows.count() == before + 1
    create.click()
    page.wait_for_function("count => document.querySelectorAll('.ds-table tbody tr').length === count", arg=before + 2)
    for _ in range(2):
        page.once("dialog", lambda dialog: dialog.accept())
        press(page, "Cancel")
        page.locator(".ds-panel .ds-state", has_text="Cancelled").wait_for()
        page.locator(".ds-table tbody tr").nth(1).locator("button").first.click()


_OPAQUE = """selector => {
  for (let each = document.querySelector(selector); each; each = each.parentElement)
    if (getComputedStyle(each).opacity !== '1') return false;
  return true;
}"""


@pytest.mark.full
def test_a_refused_number_names_its_field(browser: Browser) -> None:
    page = browser.open("explore")
    page.wait_for_load_state("networkidle")
    field = page.get_by_label("Its seed")
    field.evaluate("e => { e.value = '-3'; e.dispatchEvent(new Event('input', { bubbles: true })); }")
    press(page, "Make film")
    shows(page, "Its seed: -3 is not allowed. Enter 0 or more.")
    page.wait_for_function(_OPAQUE, arg=".toast-title")  # while it appears, its colours are between two
    assert violations(page) == []


@pytest.mark.full
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_tablet(browser: Browser, name: str) -> None:
    page = browser.open(PAGES[name].path, width=820, height=1180)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    assert violations_in_both_themes(page) == []

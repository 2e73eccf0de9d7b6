"""The states of the studio's pages in which something is being done: accessible, with a way to stop it that works."""

from __future__ import annotations

import importlib.util
import io
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from launched_service import Launched
from studio_browser import (
    Browser,
    create_study,
    delete_study,
    picture,
    press,
    shows,
    unfold,
    violations,
    violations_in_both_themes,
)

pytestmark = pytest.mark.full

PATHS = ("", "explore", "project", "authenticity", "classify", "datasets", "map", "studies", "models")


@contextmanager
def halted(service: Launched) -> Iterator[None]:
    """Let the processes that compute wait, so that whatever asks for images stays in progress."""
    workers = [
        child
        for child in psutil.Process(service.process.pid).children()
        if "--service-name" in (line := child.cmdline()) and line[line.index("--service-name") + 1] != "gateway"
    ]
    assert len(workers) >= 4
    try:
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        yield
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Action:
    """Something that takes long.

    Attributes:
        path: Path of the page.
        button: The button that starts it.
        prepare: Brings the page into the state in which the button is.
        returns: Whether the focus returns to the button once the action was stopped.
    """

    path: str
    button: str
    prepare: Callable[[Any], None]
    returns: bool = True


def loaded(page: Any) -> None:
    page.wait_for_load_state("networkidle")


def explored(page: Any) -> None:
    shows(page, "Not edited")


def chosen(page: Any) -> None:
    """Choose an image of the page Generate."""
    press(page, "Generate")
    shows(page, "16 images of")
    page.locator(".ds-tile").nth(3).click()
    page.get_by_role("button", name="Show neighbours").wait_for()


ACTIONS = {
    "images": Action("", "Generate", loaded),
    "neighbours": Action("", "Show neighbours", chosen, returns=False),
    "strip": Action("explore", "Make strip", explored),
    "map of directions": Action("explore", "Draw map", explored),
    "film": Action("explore", "Make film", explored),
    "check": Action("authenticity", "Check", loaded),
    "classification": Action("classify", "Classify", loaded),
    "map": Action("map", "Draw map", loaded),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_action_shows_progress_and_can_be_stopped(demo: Launched, browser: Browser, name: str) -> None:
    action = ACTIONS[name]
    page = browser.open(action.path)
    action.prepare(page)
    button = page.get_by_role("button", name=action.button, exact=True)
    with halted(demo):
        button.press("Enter")
        page.locator(".ds-bar").first.wait_for()
        stop = page.get_by_role("button", name="Stop", exact=True)
        stop.wait_for()
        if action.returns:  # its button is gone, and the focus is on the one that took its place
            page.wait_for_function("document.activeElement.textContent.trim() === 'Stop'")
        assert violations_in_both_themes(page) == []
        stop.press("Enter")
        shows(page, "Stopped")
        button.wait_for()
        if action.returns:
            page.wait_for_function("name => document.activeElement.textContent.trim() === name", arg=action.button)
        assert page.locator(".ds-bar").count() == 0 and not stop.is_visible()
        assert violations(page) == []


def test_chosen_image_is_being_measured(demo: Launched, browser: Browser) -> None:
    page = browser.open("")
    loaded(page)
    press(page, "Generate")
    shows(page, "16 images of")
    with halted(demo):
        page.locator(".ds-tile").nth(2).press("Enter")
        shows(page, "Measuring ")
        assert violations_in_both_themes(page) == []
    page.locator(".ds-detail .ds-facts").first.wait_for()


def test_live_image_shows_progress_and_can_be_stopped(demo: Launched, browser: Browser) -> None:
    page = browser.open("explore")
    explored(page)
    loaded(page)
    slider = page.locator("input[type=range]").first
    with halted(demo):
        for _ in range(3):  # the later ones wait for the first
            slider.press("ArrowRight")
        shows(page, "Generating the edited image")
        stop = page.get_by_role("button", name="Stop", exact=True)
        stop.wait_for()
        assert violations_in_both_themes(page) == []
        stop.press("Enter")
        shows(page, "Stopped. Change a value")
        page.wait_for_timeout(2500)  # in which one that waits would begin
        assert page.locator(".ds-bar").count() == 0 and not stop.is_visible()
    slider.press("ArrowRight")
    shows(page, "Edited.")


def test_dataset_in_progress_and_cancelled(demo: Launched, browser: Browser) -> None:
    page = browser.open("datasets")
    loaded(page)
    with halted(demo):
        press(page, "Create dataset")
        page.get_by_role("button", name="Cancel", exact=True).wait_for()
        assert violations_in_both_themes(page) == []
        page.once("dialog", lambda dialog: dialog.accept())
        press(page, "Cancel")
        page.locator(".ds-panel .ds-state", has_text="Stopping").or_(
            page.locator(".ds-panel .ds-state", has_text="Cancelled")
        ).first.wait_for()
        assert violations(page) == []
    page.locator(".ds-panel .ds-state", has_text="Cancelled").wait_for()
    assert violations(page) == []


def test_report_of_a_dataset(browser: Browser) -> None:
    page = browser.open("datasets")
    loaded(page)
    page.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("4")
    press(page, "Create dataset")
    report = page.get_by_role("link", name="Open the report").first
    report.wait_for()
    # As a page of its own: where it is served, it may run no scripts, those of axe among them.
    page.set_content(httpx.get(f"{browser.address}/studio/{report.get_attribute('href')}").raise_for_status().text)
    page.get_by_role("heading", name="Report of a synthetic dataset").wait_for()
    assert violations(page) == []
    page.emulate_media(color_scheme="dark")
    assert violations(page) == []


def test_all_options_of_a_dataset_are_accessible(browser: Browser) -> None:
    page = browser.open("datasets", width=820, height=1180)
    loaded(page)
    for section in ("Files", "Generation", "Edits", "Checks", "More options"):
        unfold(page, section)
    page.get_by_label("JPEG").check()
    page.get_by_label("Directions of all images").fill("sefa-2")
    page.keyboard.press("Enter")
    page.get_by_label("Strength of sefa-2").wait_for()
    page.get_by_label("Range", exact=True).check()
    page.get_by_label("Nearer than").check()
    page.get_by_label("Least distance").wait_for()
    shows(page, "images are made again")
    assert violations_in_both_themes(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    page.get_by_label("Least distance").fill("150")
    shows(page, "Least distance (percentile): 150 is not allowed")
    assert violations(page) == []


def test_projection_that_waits(demo: Launched, browser: Browser) -> None:
    page = browser.open("project")
    page.locator("input[type=file]").set_input_files(picture())
    page.get_by_alt_text("The chosen image").wait_for()
    with halted(demo):
        press(page, "Project")
        page.get_by_role("button", name="Cancel and delete").wait_for()
        assert violations_in_both_themes(page) == []
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Cancel and delete")
    shows(page, "are deleted")
    assert violations(page) == []


@pytest.mark.parametrize(("path", "button"), [("project", "Project"), ("classify", "Classify")])
def test_sending_of_a_large_image_can_be_stopped(browser: Browser, path: str, button: str) -> None:
    page = browser.open(path)
    loaded(page)
    if path != "project":
        page.get_by_label("Your own", exact=True).check()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    content = io.BytesIO()
    noise.save(content, "PNG")  # 0.8 MB
    page.locator("input[type=file]").set_input_files(picture() | {"buffer": content.getvalue()})
    page.get_by_alt_text("The chosen image").wait_for()
    page.route("**/gradio_api/queue/join*", lambda route: None)  # it waits
    page.get_by_role("button", name=button, exact=True).press("Enter")
    shows(page, "Sending the image")
    page.wait_for_function("document.activeElement.textContent === 'Stop sending'")
    assert violations_in_both_themes(page) == []
    page.get_by_role("button", name="Stop sending").press("Enter")
    shows(page, "Stopped. The image was not sent.")
    page.wait_for_function("name => document.activeElement.textContent.trim() === name", arg=button)
    assert violations(page) == []
    page.unroute("**/gradio_api/queue/join*")
    page.keyboard.press("Enter")  # the page can still be used
    shows(page, " steps" if path == "project" else "Counted as")
    assert not page.get_by_text("Stopped. The image was not sent.").is_visible()
    if path == "project":
        page.once("dialog", lambda dialog: dialog.accept())
        press(page, "Cancel and delete")
        shows(page, "are deleted")


def test_study_collects_prepares_and_continues_when_the_service_is_busy(demo: Launched, browser: Browser) -> None:
    page = browser.open("studies")
    create_study(page, 4)
    page.route("**/studies/*/images*", lambda route: None)  # it waits
    page.get_by_label("Real images: benign").set_input_files([picture(160), picture(200)])
    stop = page.get_by_role("button", name="Stop the upload")
    stop.wait_for()
    shows(page, "0 of 2 images are uploaded")
    assert page.get_by_role("button", name="Create study").is_disabled()
    assert page.get_by_role("button", name="Pilot").first.is_disabled()  # of the list
    assert violations_in_both_themes(page) == []
    stop.press("Enter")
    shows(page, "The upload was stopped")

    refused: list[Any] = []

    def refuse_first(route: Any) -> None:
        if refused:
            route.continue_()
            return
        refused.append(route)
        route.fulfill(status=503, headers={"Retry-After": "2"}, json={"title": "The service is busy"})

    page.unroute("**/studies/*/images*")
    page.route("**/studies/*/images*", refuse_first)
    page.get_by_label("Real images: benign").set_input_files([picture(160), picture(200)])
    shows(page, "The service is busy. The upload continues in 2 s")
    shows(page, "2 of 2 images are uploaded")
    with halted(demo):
        press(page, "Choose the images and open the study")
        page.get_by_role("button", name="Cancel and delete").wait_for()
        assert violations(page) == []
    page.locator(".ds-state", has_text="Open").first.wait_for()
    delete_study(page)
    assert violations(page) == []


def test_upload_of_a_study_says_what_a_quota_refuses(browser: Browser) -> None:
    page = browser.open("studies")
    create_study(page, 4)
    page.route(
        "**/studies/*/images*",
        lambda route: route.fulfill(
            status=429, headers={"Retry-After": "40000"}, json={"detail": "the quota of the day is used up"}
        ),
    )
    page.get_by_label("Real images: benign").set_input_files([picture(160), picture(200)])
    shows(page, "the quota of the day is used up")
    shows(page, "0 of 2 images are uploaded")
    assert violations(page) == []
    delete_study(page)


def test_upload_adapts_to_a_slow_line(browser: Browser) -> None:
    page = browser.open("studies")
    batches = page.evaluate(
        """async () => {
          const files = Array.from({ length: 12 }, (_, place) => new File([new Uint8Array(300000)], `${place}.png`));
          const sent = [];
          window.fetch = async (address, { body }) => {
            sent.push(body.getAll('files').length);
            return new Response('{}', { status: sent.length === 1 ? 408 : 200 });
          };
          const result = await window.dermisUpload('x', files, new AbortController().signal, () => {});
          return [...sent, result.done, result.problem];
        }"""
    )
    assert batches[:2] == [3, 1]  # 1 MiB, and after 408 a quarter of it
    assert batches[-2:] == [12, ""] and max(batches[2:-2]) == 8


@pytest.mark.parametrize("path", PATHS)
def test_page_that_is_loading_is_accessible(browser: Browser, path: str) -> None:
    page = browser.page()
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    page.route("**/gradio_api/queue/join*", hold)
    page.goto(f"{browser.address}/studio/{path}")
    page.locator(".ds-title h1").wait_for()
    page.wait_for_timeout(500)  # further events of the page
    assert held
    assert violations_in_both_themes(page) == []
    for route in held:
        route.continue_()


def test_page_says_that_it_is_loading_before_its_scripts_are_there(browser: Browser) -> None:
    page = browser.page()
    page.route("**/assets/*.js", lambda route: None)  # they wait
    page.goto(f"{browser.address}/studio/", wait_until="commit")
    page.get_by_text("Loading the page").wait_for()
    assert violations(page) == []


def test_address_without_a_page(browser: Browser) -> None:
    page = browser.page()
    page.goto(f"{browser.address}/studio/nothing")
    shows(page, "The studio has no such page")
    assert violations_in_both_themes(page) == []


def test_open_choice_of_directions(browser: Browser) -> None:
    page = browser.open("explore")
    explored(page)
    page.get_by_label("Directions", exact=True).click()
    page.get_by_role("option").first.wait_for()
    assert violations_in_both_themes(page) == []

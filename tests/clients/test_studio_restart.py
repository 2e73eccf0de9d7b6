"""The pages of the studio when the service is started again: with nothing to do, and in the middle of work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from benchmarks import DEMO
from benchmarks.components import free_port
from launched_service import Launched, launching
from studio_browser import WAIT_SECONDS, Browser, answer, create_study, picture, press, shows, violations
from studio_pages import OPTIMISATION_SECONDS, PAGES, project_and_cancel


@pytest.mark.full
def test_pages_work_after_a_restart_of_the_service(
    start: Callable[..., Launched], demo: Launched, port: int, browser: Browser
) -> None:
    pages = {name: browser.open(steps.path) for name, steps in PAGES.items()}
    for page in pages.values():
        page.wait_for_load_state("networkidle")
    demo.process.terminate()
    demo.process.wait(WAIT_SECONDS)
    buttons = {
        "generate": "Generate",
        "explore": "Make strip",
        "authenticity": "Check",
        "classify": "Classify",
        "datasets": "Create dataset",
        "map": "Draw map",
    }
    for name, button in buttons.items():
        press(pages[name], button)
        shows(pages[name], "Connection to the server was lost")
    assert violations(pages["classify"]) == []
    service = start(str(DEMO), port)
    service.wait_until(service.ready)
    for name, page in pages.items():
        page.bring_to_front()
        if name in buttons:  # such a page loads itself again
            page.get_by_text("Connection to the server was lost").wait_for(state="detached")
        page.locator(".ds-title h1").wait_for()
        if name == "models":
            page.reload()
        (project_and_cancel if name == "project" else PAGES[name].use)(page)


@pytest.mark.full
def test_work_in_progress_continues_after_a_restart_of_the_service(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for launch in launching(tmp_path_factory.mktemp("interrupted")):
        interrupt(launch, browser)
        break


def interrupt(launch: Callable[..., Launched], browser: Browser) -> None:
    """Stop the service during a dataset, a projection and a reader's answer, and start it again."""
    port = free_port()
    service = launch(str(DEMO), port)
    service.wait_until(service.ready)
    there = Browser(browser.browser, f"http://127.0.0.1:{port}")
    study = there.open("studies")
    create_study(study, 4)
    study.get_by_label("Real images: benign").set_input_files([picture(160), picture(200)])
    shows(study, "2 of 2 images are uploaded")
    press(study, "Choose the images and open the study")
    study.get_by_label("Name or code").fill("Reader A")
    press(study, "Create link")
    link = study.locator(".ds-code code").inner_text()
    study.locator(".ds-state", has_text="Open").first.wait_for()
    reader = there.page()
    reader.goto(link)
    reader.get_by_role("button", name="Begin").press("Enter")
    answer(reader, 1, "g", "4")
    dataset, projection = there.open("datasets"), there.open("project")
    projection.locator("input[type=file]").set_input_files(picture())
    projection.get_by_alt_text("The chosen image").wait_for()
    press(projection, "Project")
    shows(projection, " steps")
    dataset.wait_for_load_state("networkidle")
    dataset.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for field in dataset.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("200")
    press(dataset, "Create dataset")
    dataset.get_by_role("button", name="Cancel", exact=True).wait_for()
    service.process.terminate()
    service.process.wait(WAIT_SECONDS)
    reader.keyboard.press("Enter")
    shows(reader, "The answer is not stored yet")
    assert violations(reader) == []
    shows(dataset, "Connection to the server was lost")
    again = launch(str(DEMO), port)
    again.wait_until(again.ready)
    answer(reader, 2)
    reader.keyboard.press("Backspace")
    answer(reader, 1)
    assert reader.get_by_label("Generated").is_checked()
    for page in (dataset, projection):
        page.bring_to_front()
        page.get_by_text("Connection to the server was lost").wait_for(state="detached")
    projection.get_by_text(" steps").or_(projection.get_by_text("Reconstruction.")).first.wait_for()
    dataset.get_by_role("link", name="Open the report").first.wait_for(timeout=1000 * OPTIMISATION_SECONDS)
    assert (there.foreign, there.errors) == ([], [])

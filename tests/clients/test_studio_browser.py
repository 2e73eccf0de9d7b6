"""Tests of the studio in a browser: every page in normal use, with an error, after a restart of the service; accessibility."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from benchmarks import DEMO
from benchmarks.components import free_port
from dermis.bundle import Bundle
from launched_service import ROOT, Launched, launching
from service_kit import assemble, listening
from studio_browser import (
    BROKEN,
    WAIT_SECONDS,
    Browser,
    browsing,
    create_study,
    delete_study,
    make_dark,
    picture,
    press,
    shows,
    unfold,
    violations,
    violations_in_both_themes,
)

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


def classify_broken(page: Any) -> str:
    page.get_by_label("Your own", exact=True).check()
    page.locator("input[type=file]").set_input_files(BROKEN)
    press(page, "Classify")
    return "image"


def datasets(page: Any) -> None:
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


def test_page_generates_images_and_sends_nothing_to_other_hosts(tiny_bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    parts = assemble(tiny_bundle.location, tmp_path, port=port)
    with listening(parts, port) as address, browsing(address) as browser:
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


def answer(reader: Any, position: int, *keys: str) -> None:
    """Answer an image of a study with the keyboard."""
    shows(reader, f"Image {position} of 4")
    reader.locator("#image:not([hidden])").wait_for()
    for key in keys:
        reader.keyboard.press(key)


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
    press(page, "Create link")
    link = page.locator(".ds-code code").inner_text()
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
def test_a_refused_number_names_its_field(browser: Browser) -> None:
    page = browser.open("explore")
    page.wait_for_load_state("networkidle")
    field = page.get_by_label("Its seed")
    field.evaluate("e => { e.value = '-3'; e.dispatchEvent(new Event('input', { bubbles: true })); }")
    press(page, "Make film")
    shows(page, "Its seed: value -3 is less than")
    assert violations(page) == []


@pytest.mark.full
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_tablet(browser: Browser, name: str) -> None:
    page = browser.open(PAGES[name].path, width=820, height=1180)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    assert violations_in_both_themes(page) == []


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
    for field in dataset.get_by_label("Images of").all():
        if field.is_visible():
            field.fill("200")
    press(dataset, "Create dataset")
    dataset.get_by_role("button", name="Cancel", exact=True).wait_for()
    service.process.terminate()
    service.process.wait(WAIT_SECONDS)
    reader.keyboard.press("Enter")
    shows(reader, "does not respond")
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


@pytest.mark.full
def test_studio_alone_says_that_the_service_does_not_respond() -> None:
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from commands.main import main; main()",
        "studio",
        "--url",
        f"http://127.0.0.1:{free_port()}",
    ]
    with subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "The studio for" in process.stdout.readline()
            with browsing(f"http://127.0.0.1:{port}") as browser:
                page = browser.page()
                page.goto(f"{browser.address}/studio/")
                shows(page, "The service does not respond")
                assert violations(page) == []
        finally:
            process.terminate()


@pytest.mark.full
def test_visitor_signs_in_over_https_and_is_offered_what_the_key_may(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    from certificates import make_authority

    authority = make_authority(tmp_path / "authority.pem")
    authority.issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    port, data = free_port(), tmp_path / "data"
    command = [
        sys.executable,
        "-c",
        "from commands.main import main; main()",
        "keys",
        "create",
        "--tenant",
        "ward-3",
        "--name",
        "reader",
    ]
    made = subprocess.run(
        [*command, "--scope", "images", "--scope", "models:read"],
        cwd=ROOT,
        env=os.environ | {"DERMIS_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"dermis_sk_\S+", made.stdout)
    assert found is not None
    for service in launching(tmp_path):
        files = {"tls_certificate": str(tmp_path / "tls.crt"), "tls_key": str(tmp_path / "tls.key")}
        launched = service(str(DEMO), port, auth="keys", **files)
        launched.client = launched.client.__class__(base_url=f"https://127.0.0.1:{port}", verify=False, trust_env=False)
        launched.wait_until(launched.ready)
        with browsing(f"https://127.0.0.1:{port}") as browser:
            check_visit(browser, found[0])
        break


def check_visit(browser: Browser, key: str) -> None:
    """Sign in with a key for images and models, use the pages, and sign out."""
    page = browser.page()
    page.goto(f"{browser.address}/studio/datasets")
    field = page.get_by_label("API key or access token")
    field.fill("dermis_sk_wrong")
    press(page, "Sign in")
    shows(page, "does not accept this key")
    assert violations(page) == []
    page.get_by_label("API key or access token").fill(key)
    press(page, "Sign in")
    shows(page, "Datasets is not available with this key")
    assert violations(page) == []
    assert page.locator(".ds-nav a").all_inner_texts() == ["Generate", "Models"]
    cookies = page.context.cookies()
    assert [(cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) for cookie in cookies] == [
        (True, True, "Strict")
    ]
    page.goto(f"{browser.address}/studio/")
    generate(page)
    assert page.evaluate("document.cookie") == ""
    assert key not in page.content()
    assert page.locator(".ds-detail a.ds-button").all_inner_texts() == ["Save PNG"]
    press(page, "Sign out")
    page.get_by_label("API key or access token").wait_for()
    assert page.context.cookies() == []
    assert (browser.foreign, browser.errors) == ([], [])

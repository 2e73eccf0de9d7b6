"""Every page of the studio without a pointer: Tab reaches each control, shows where it is, and the keys do the work."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
    pytest.skip("gradio is not installed", allow_module_level=True)

from studio_browser import WAIT_SECONDS, Browser, picture, shows, unfold

pytestmark = pytest.mark.full

MOST_TABS = 600
HEAT_MAP_SECONDS = 180.0  # for the first one after a start, on a busy machine
# Marks the element that has the focus as reached, and returns whether it was before and whether the focus can be seen.
_REACHED = """() => {
  const now = document.activeElement;
  window.reached ??= new Set();
  const before = window.reached.has(now);
  window.reached.add(now);
  if (!now || now === document.body) return { page: true, before };
  let seen = false;
  for (let each = now, depth = 0; each && depth < 3; each = each.parentElement, depth += 1) {
    const style = getComputedStyle(each);
    seen ||= style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  }
  return { page: false, before, seen, name: now.outerHTML.slice(0, 200) };
}"""
# Controls that can be used and were not reached. Of a group of radio buttons, Tab reaches one.
_NOT_REACHED = """() => [...document.querySelectorAll(
  'a[href], button, input, select, textarea, summary, [tabindex]'
)].filter((each) => {
  if (each.disabled || each.tabIndex < 0 && !each.matches('input, button, a') || !each.getClientRects().length) return false;
  // False inside of what is folded.
  if (!each.checkVisibility() || getComputedStyle(each).visibility === 'hidden') return false;
  if (each.type === 'radio') return ![...document.getElementsByName(each.name)].some((other) => window.reached.has(other));
  if (each.matches('.ds-grid .ds-tile')) return false;  // arrow keys
  return !window.reached.has(each);
}).map((each) => each.outerHTML.slice(0, 200))"""

# Names of the groups of radio buttons that are shown, in their order.
_GROUPS = """() => [...document.querySelectorAll('fieldset')].filter((each) => each.checkVisibility() &&
  each.querySelector('input[type=radio]')).map((each) => document.getElementById(each.getAttribute('aria-labelledby') ?? '')
  ?.textContent.trim() ?? '')"""


def walk(page: Any) -> list[str]:
    """Press Tab through the whole page. Returns what is wrong: controls without visible focus, and those not reached."""
    page.evaluate("() => { document.activeElement?.blur(); window.reached = new Set(); window.scrollTo(0, 0); }")
    page.locator(".ds-skip").focus()
    problems = []
    for _ in range(MOST_TABS):
        reached = page.evaluate(_REACHED)
        if reached["before"] and not reached["page"]:
            break
        if not reached["page"] and not reached["seen"]:
            problems.append(f"focus not visible: {reached['name']}")
        page.keyboard.press("Tab")
    else:
        problems.append(f"the focus does not return to the first control after {MOST_TABS} keys")
    return problems + [f"not reached: {each}" for each in page.evaluate(_NOT_REACHED)]


def use(page: Any, control: Any, *keys: str) -> None:
    """Move to a control with Tab, and press keys there."""
    control.wait_for(state="attached")
    for _ in range(MOST_TABS):
        if control.evaluate("e => e === document.activeElement"):
            break
        page.keyboard.press("Tab")
    else:
        pytest.fail(f"Tab does not reach {control}")
    for key in keys:
        page.keyboard.press(key)


def enter(page: Any, control: Any, text: str) -> None:
    """Move to a field with Tab, and replace its text."""
    use(page, control, "Control+A")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def choose(page: Any, group: str, choice: str, *keys: str) -> None:
    """Move to a group of radio buttons with Tab, and to a choice of it with arrow keys."""
    buttons = page.get_by_role("radiogroup", name=group, exact=True)
    use(page, buttons.locator("input:checked"), *keys)
    assert buttons.get_by_role("radio", name=choice, exact=True).is_checked()


def generate(page: Any) -> None:
    use(page, page.get_by_label("number input for Number of images"), "Control+A")
    page.keyboard.type("8")
    use(page, button(page, "Generate"), "Enter")
    shows(page, "8 images of")
    use(page, page.locator(".ds-tile").first, "ArrowRight", "Enter")
    page.locator(".ds-detail .ds-facts").first.wait_for()
    use(page, page.locator("[data-distance]"), "ArrowRight")
    use(page, button(page, "Show neighbours"), "Enter")
    page.get_by_alt_text("Neighbour 5").wait_for()
    use(page, page.locator(".ds-detail summary"), "Enter")


def explore(page: Any) -> None:
    shows(page, "Not edited")
    use(page, page.locator("input[type=range]").first, "ArrowRight")
    shows(page, "Edited.")
    choose(page, "Layers", "Coarse", "ArrowRight")
    use(page, button(page, "Make strip"), "Enter")
    page.get_by_text("Save strip").wait_for()
    use(page, button(page, "Draw map"), "Enter")
    page.locator(".ds-map").wait_for()
    use(page, page.locator(".ds-map [data-cell]").nth(3), "Enter")
    page.locator(".ds-map-mark:not([hidden])").wait_for()
    use(page, button(page, "Make film"), "Enter")
    page.get_by_text("Save film").nth(1).wait_for()


def project(page: Any) -> None:
    field = page.locator("input[type=file]")
    with page.expect_file_chooser() as chooser:
        use(page, field, "Enter")
    chooser.value.set_files(picture())
    page.get_by_alt_text("The chosen image").wait_for()
    use(page, button(page, "Project"), "Enter")
    shows(page, " steps")
    page.once("dialog", lambda dialog: dialog.accept())
    use(page, button(page, "Cancel and delete"), "Enter")
    shows(page, "are deleted")


def authenticity(page: Any) -> None:
    enter(page, page.get_by_label("Index"), "4")
    use(page, button(page, "Check"), "Enter")
    shows(page, "Limits of this answer")


def classify(page: Any) -> None:
    choose(page, "Heat map", "Integrated gradients: pixels", "ArrowDown", "ArrowDown")
    use(page, button(page, "Classify"), "Enter")
    shows(page, "Counted as", HEAT_MAP_SECONDS)
    use(page, page.locator("[data-ds-opacity]"), "ArrowLeft")
    shows(page, "69 %")


def datasets(page: Any) -> None:
    page.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for field in page.get_by_label("Images of").all():
        if field.is_visible():
            use(page, field, "Control+A")
            page.keyboard.type("3")
    for section in ("Files", "Generation", "Edits", "Checks", "More options"):
        use(page, page.get_by_role("button", name=re.compile(f"^{section}")), "Enter")
    enter(page, page.get_by_label("Directions of all images"), "sefa-2")
    enter(page, page.get_by_label("Strength of sefa-2"), "2")
    use(page, button(page, "Create dataset"), "Enter")
    page.get_by_role("link", name="Open the report").first.wait_for()


def embedding_map(page: Any) -> None:
    enter(page, page.get_by_label("number input for Generated images"), "20")
    use(page, button(page, "Draw map"), "Enter")
    shows(page, "20 images. The map shows")
    use(page, page.get_by_role("application"), "Enter")
    page.locator(".ds-em-about").get_by_text("Nearest images of the map").wait_for()


def studies(page: Any) -> None:
    enter(page, page.get_by_label("Name").first, "By keyboard")
    enter(page, page.get_by_label("Images", exact=False).first, "4")
    use(page, button(page, "Create study"), "Enter")
    shows(page, "2 real images are needed")


def models(page: Any) -> None:
    shows(page, "held-out images of other")


PAGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "generate": ("", generate),
    "explore": ("explore", explore),
    "project": ("project", project),
    "authenticity": ("authenticity", authenticity),
    "classify": ("classify", classify),
    "datasets": ("datasets", datasets),
    "map": ("map", embedding_map),
    "studies": ("studies", studies),
    "models": ("models", models),
}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_used_with_the_keyboard_alone(browser: Browser, name: str) -> None:
    path, work = PAGES[name]
    page = browser.open(path)
    page.wait_for_load_state("networkidle", timeout=1000 * WAIT_SECONDS)
    problems = walk(page)
    page.locator(".ds-skip").focus()
    work(page)
    assert problems + walk(page) == []


def unfolded(page: Any) -> None:
    """Open all sections of the page Datasets."""
    page.get_by_label("Images of benign").wait_for()  # the fields follow from the model
    for section in ("Files", "Generation", "Checks", "More options"):
        unfold(page, section)


CHOICES: dict[str, Callable[[Any], None]] = {
    "": lambda page: None,
    "explore": lambda page: None,
    "project": lambda page: None,
    "classify": lambda page: None,
    "datasets": unfolded,
}


@pytest.mark.parametrize("path", CHOICES)
def test_arrow_keys_choose_in_each_group_of_radio_buttons(browser: Browser, path: str) -> None:
    page = browser.open(path)
    page.wait_for_load_state("networkidle", timeout=1000 * WAIT_SECONDS)
    CHOICES[path](page)
    names = page.evaluate(_GROUPS)
    assert names and all(names)
    page.locator(".ds-skip").focus()
    for name in names:
        group = page.get_by_role("radiogroup", name=name, exact=True)
        buttons = group.get_by_role("radio").all()
        [first] = [place for place, button in enumerate(buttons) if button.is_checked()]
        for key, step in (("ArrowDown", 1), ("ArrowUp", 0), ("ArrowRight", 1), ("ArrowLeft", 0)):
            use(page, group.locator("input:checked"), key)
            page.wait_for_timeout(100)  # for what Gradio does then
            states = [button.is_checked() for button in buttons]
            assert [place for place, checked in enumerate(states) if checked] == [(first + step) % len(buttons)], name
        inside = group.locator("input:focus")
        assert inside.count() == 1
        page.keyboard.press("Tab")  # one stop for the whole group
        assert inside.count() == 0, name


def calls(browser: Browser, route: str) -> float:
    """How often the service has answered requests of a route."""
    lines = httpx.get(f"{browser.address}/metrics").raise_for_status().text.splitlines()
    counts = [line for line in lines if line.startswith("dermis_http_request_duration_seconds_count{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts if f'route="{route}"' in line)


def test_lists_of_choices_close_when_the_focus_leaves(browser: Browser) -> None:
    page = browser.open("explore")
    shows(page, "Not edited")
    page.wait_for_load_state("networkidle")
    made = calls(browser, "/v1/edits")
    assert made >= 2
    options = page.get_by_role("option")
    for name in ("Class", "Directions"):
        box = page.get_by_role("combobox", name=name, exact=True)
        for leave in ("Tab", "Shift+Tab"):
            use(page, box)
            options.first.wait_for()
            page.keyboard.press(leave)
            assert not box.evaluate("e => e === document.activeElement")
            page.wait_for_timeout(500)  # a list that opens again does so after the focus has left
            options.first.wait_for(state="detached")
            assert box.get_attribute("aria-expanded") == "false"
    use(page, box, "Escape")
    options.first.wait_for(state="detached")
    page.keyboard.press("Shift")
    page.wait_for_timeout(500)
    assert options.count() == 0
    page.wait_for_load_state("networkidle")
    assert calls(browser, "/v1/edits") == made  # nothing was chosen, so nothing is generated again

"""Waits of the walk-through of the studio: `python -m benchmarks.studio_walkthrough --real FOLDER [--images N] [--answers N]`.

A real service with the demo bundle and a real browser (Chromium) do the steps of docs/studio-walkthrough.md: generate, explore,
compare, classify, a dataset of 48 images, and a reader study with `--images` images, which two readers begin to answer. Printed
is how long somebody who does the same has to wait for each result; reading, choosing and typing take no time here. FOLDER has a
folder of real images for each class, FOLDER/benign and FOLDER/malignant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import DEMO
from benchmarks.components import chromium
from benchmarks.dataset_job import launched
from dermis.bundle import open_bundle

CLASS_IMAGES = 24  # of each class of the dataset
SAMPLE = "class_name=malignant&seed=0&index=9"  # the one that is opened
KEYS = ("g", "r", "r", "g", "g", "r")
_WAIT_MILLISECONDS = 1_800_000


@dataclass
class Walk:
    """A browser on the pages of a service.

    Attributes:
        address: Address of the service.
        page: The page.
        waits: Seconds of each step, in their order.
    """

    address: str
    page: Any
    waits: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def waiting(self, step: str) -> Iterator[None]:
        """Measure a step."""
        started = time.perf_counter()
        yield
        self.waits[step] = time.perf_counter() - started
        print(f"{self.waits[step]:8.2f} s  {step}", file=sys.stderr, flush=True)

    def press(self, name: str) -> None:
        """Press the button with exactly this name."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def shows(self, text: str) -> None:
        """Wait for a text."""
        self.page.get_by_text(text).first.wait_for()


def look(walk: Walk) -> None:
    """Steps 1 to 4: generate an image, explore, compare and classify it."""
    page = walk.page
    with walk.waiting("open the studio"):
        page.goto(walk.address)
        page.get_by_role("button", name="Generate", exact=True).and_(page.locator(":enabled")).wait_for()
    with walk.waiting("generate 16 images"):
        walk.press("Generate")
        walk.shows("16 images of")
    with walk.waiting("open one of them"):
        page.locator(".ds-tile").nth(9).click()
        page.locator(".ds-detail .ds-facts").first.wait_for()
    with walk.waiting("show its neighbours"):
        walk.press("Show neighbours")
        page.get_by_alt_text("Neighbour 5").wait_for()
    with walk.waiting("explore it"):
        page.get_by_role("link", name="Explore", exact=True).last.click()
        walk.shows("Not edited")
    with walk.waiting("draw a map of two directions"):
        walk.press("Draw map")
        page.locator(".ds-map").wait_for()
    with walk.waiting("make a film to another sample"):
        walk.press("Make film")
        page.get_by_text("Save film").first.wait_for()
    with walk.waiting("compare it with the training images"):
        page.goto(f"{walk.address}/studio/authenticity?{SAMPLE}")
        walk.shows("Limits of this answer")
    with walk.waiting("classify it"):
        page.goto(f"{walk.address}/studio/classify?{SAMPLE}")
        walk.shows("Counted as")
    with walk.waiting("its heat map (XRAI)"):
        page.get_by_label("XRAI").check()
        walk.press("Classify")
        page.get_by_alt_text("Heat map").first.wait_for()


def make_dataset(walk: Walk) -> None:
    """Step 5: a dataset."""
    page = walk.page
    with walk.waiting("open the page of datasets, with its estimate"):
        page.goto(f"{walk.address}/studio/datasets")
        page.get_by_label("Images of benign").wait_for()
        page.wait_for_load_state("networkidle")
    shown = [each for each in page.get_by_label("Images of").all() if each.is_visible()]
    for number in shown:
        number.fill(str(CLASS_IMAGES))
    with walk.waiting(f"make a dataset of {CLASS_IMAGES * len(shown)} images"):
        walk.press("Create dataset")
        page.get_by_role("link", name="Open the report").wait_for()


def make_study(walk: Walk, images: int, real: dict[str, list[Path]]) -> list[str]:
    """Step 6: a reader study. Returns the links of two readers."""
    page = walk.page
    page.goto(f"{walk.address}/studio/studies")
    page.wait_for_load_state("networkidle")
    page.get_by_label("Name").first.fill("Walk-through")
    page.get_by_label("Images", exact=False).first.fill(str(images))
    walk.press("Create study")
    walk.shows(f"{images // 2} real images are needed")
    with walk.waiting(f"upload {images // 2} real images"):
        for name, paths in real.items():
            page.get_by_label(f"Real images: {name}").set_input_files([str(path) for path in paths])
            walk.shows(f"{len(paths)} of {len(paths)} images are uploaded.")
            page.get_by_label(f"Real images: {name}").and_(page.locator(":enabled")).wait_for()
    with walk.waiting(f"prepare the {images} images"):
        walk.press("Choose the images and open the study")
        page.locator(".ds-state", has_text="Open").first.wait_for()
    links = []
    for name in ("Reader 1", "Reader 2"):
        page.get_by_label("Name or code").fill(name)
        walk.press("Create link")
        walk.shows(f"The link for {name} is below")
        links.append(page.locator(".ds-code code").first.inner_text())
    return links


def read(walk: Walk, links: Sequence[str], images: int, answers: int) -> None:
    """Let each reader answer some images, and look at the results."""
    for number, link in enumerate(links):
        reader = walk.page.context.new_page()
        with walk.waiting(f"open the page of reader {number + 1}, and its first image"):
            reader.goto(link)
            reader.get_by_role("button", name="Begin").press("Enter")
            reader.locator("#image:not([hidden])").wait_for()
        with walk.waiting(f"{answers} answers of reader {number + 1}"):
            for position in range(1, answers + 1):
                reader.get_by_text(f"Image {position} of {images}").wait_for()
                reader.locator("#image:not([hidden])").wait_for()
                for key in (KEYS[(position + number) % len(KEYS)], str(1 + position % 5), "Enter"):
                    reader.keyboard.press(key)
            reader.get_by_text(f"Image {answers + 1} of {images}").wait_for()
        reader.close()
    with walk.waiting("show the results"):
        walk.press("Refresh")
        walk.shows("Results so far")


def measure(real: Path, images: int, answers: int) -> dict[str, Any]:
    """Do the walk-through."""
    from playwright.sync_api import sync_playwright

    program = chromium()
    if program is None:
        sys.exit("no Chromium is installed (Debian: apt install chromium)")
    bundle = open_bundle(DEMO)
    share = images // 2 // len(bundle.class_names)
    files = {name: sorted((real / name).iterdir())[:share] for name in bundle.class_names if (real / name).is_dir()}
    for name in bundle.class_names:
        if len(files.get(name, [])) < share:
            sys.exit(f"--real: {real / name} has fewer than {share} images")
    options = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        launched(bundle, Path(folder)) as client,
        sync_playwright() as playwright,
    ):
        ready = time.perf_counter() - started
        browser = playwright.chromium.launch(executable_path=program, args=options)
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        context.set_default_timeout(_WAIT_MILLISECONDS)
        walk = Walk(str(client.base_url).rstrip("/"), context.new_page(), {"start the service": ready})
        look(walk)
        make_dataset(walk)
        read(walk, make_study(walk, images, files), images, answers)
        browser.close()
    return {"waits_seconds": walk.waits, "total_seconds": sum(walk.waits.values()), "cpus": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--real", type=Path, required=True, help="a folder with a folder of real images for each class")
    parser.add_argument("--images", type=int, default=200, help="images of the reader study")
    parser.add_argument("--answers", type=int, default=10, help="answers of each of the two readers")
    options = parser.parse_args()
    result = measure(options.real, options.images, options.answers)
    if options.json:
        print(json.dumps(result))
        return
    print("| step | wait |\n| --- | --- |")
    for step, seconds in result["waits_seconds"].items():
        print(f"| {step} | {seconds:.1f} s |")
    print(f"| all waits together | {result['total_seconds'] / 60:.1f} min |\n\n{result['cpus']} cores")


if __name__ == "__main__":
    main()

"""Speed of the studio: `python -m benchmarks.studio [--json] [--bundle DIR] [--interactions N] [--projections N]`.

A real service with the bundle and a real browser (Chromium). Measured are, on this machine:

- the first page from the request until its fields can be used, in a browser that has its files already (warm) and in one
  that has none (cold);
- Explore, from the last movement of a slider until the edited image is shown;
- the memory of the page (JavaScript heap after a collection) and of the gateway, before and after many interactions: sliders of
  Explore, and after them images that are opened on the page Generate;
- the time of a projection (one image, the fast schedule) with the previews that the page Project shows and without, in turns,
  in this process after the service has been stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks import DEMO
from benchmarks.components import chromium
from benchmarks.dataset_job import launched
from dermis.bundle import Bundle, open_bundle

REQUIRED_PAGE_SECONDS = 1.5
REQUIRED_IMAGE_SECONDS = 0.3
# Growth from the first quarter of the interactions to their end that counts as none: heaps of Python and of the C library keep
# a few megabytes for themselves.
ALLOWED_PAGE_MEGABYTES = 2.0
ALLOWED_GATEWAY_MEGABYTES = 8.0
_WAIT_MILLISECONDS = 120_000
# Moves a slider as a pointer does, and returns the milliseconds until another image is shown.
_MOVE = """
async ([place, value]) => {
  const shown = () => document.querySelectorAll('.ds-before-after .ds-figure img')[2]?.src;
  const before = shown();
  const slider = document.querySelectorAll('input[type=range]')[place];
  const started = performance.now();
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, value);
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  slider.dispatchEvent(new Event('change', { bubbles: true }));
  slider.dispatchEvent(new PointerEvent('pointerup', { bubbles: true }));
  while (shown() === before) {
    if (performance.now() - started > 60000) throw new Error('no other image in 60 s');
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  return performance.now() - started;
}
"""


def page_seconds(context: Any, address: str) -> float:
    """Seconds from the request of the first page until it can be used."""
    page = context.new_page()
    started = time.perf_counter()
    page.goto(f"{address}/studio/", wait_until="commit")
    page.get_by_role("button", name="Generate", exact=True).and_(page.locator(":enabled")).wait_for()
    seconds = time.perf_counter() - started
    page.close()
    return seconds


def heap_megabytes(page: Any) -> float:
    """JavaScript heap of a page after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return float(used) / 1e6


def gateway_megabytes(port: int) -> float:
    """Resident memory of the gateway, the largest of the processes that hold the socket of a port; 0 if none is found.

    The supervisor that opened the socket holds it too.
    """
    sizes = [0.0]
    for process in psutil.process_iter(["pid"]):
        try:
            listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            if any(each.laddr.port == port for each in listening):
                sizes.append(float(process.memory_info().rss) / 1e6)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return max(sizes)


def opened_images_megabytes(context: Any, address: str, port: int, count: int) -> list[float]:
    """Memory of the gateway after a quarter of the images that are opened on the page Generate, and after all of them."""
    page = context.new_page()
    page.goto(f"{address}/studio/")
    page.get_by_role("button", name="Generate", exact=True).and_(page.locator(":enabled")).click()
    page.get_by_text("16 images of").wait_for()
    sizes = []
    for number in range(count):
        if number == count // 4:
            sizes.append(gateway_megabytes(port))
        page.locator(".ds-tile").nth(number % 16).click()
        page.get_by_role("heading", name=re.compile(f", index {number % 16}$")).wait_for()
    page.close()
    return [*sizes, gateway_megabytes(port)]


def projection_seconds(bundle: Bundle, rounds: int, steps: int) -> dict[str, Any]:
    """Time projections of a generated image with and without previews, in turns."""
    import torch

    from dermis.cpus import available_cpus
    from dermis.projection.encoder import load_encoder
    from dermis.projection.projector import ImageProjector
    from dermis.projection.schedule import FAST
    from dermis.synthesizer import Synthesizer
    from services.inference.projections import ProjectionPreview, ProjectionTask, project_images
    from services.settings import Settings

    torch.set_num_threads(available_cpus())
    with Synthesizer(bundle, device="cpu") as synthesizer:
        image = synthesizer.images([0], [0], [0])
    encoder = load_encoder(bundle, device="cpu")
    projector = ImageProjector(
        bundle, distance=Settings.model_fields["projection_distance"].default, device="cpu", encode=encoder
    )
    task = ProjectionTask(replace(FAST, steps=steps))
    times: dict[bool, list[float]] = {True: [], False: []}
    previews: list[list[ProjectionPreview]] = []
    for number in range(-1, 2 * rounds):
        shown = number % 2 == 0
        started = time.perf_counter()
        project_images(projector, image, [None], task, lambda done: None, previews.append if shown else None)
        if number >= 0:  # the first one compiles and allocates
            times[shown].append(time.perf_counter() - started)
    return {
        "projection_seconds_with_previews": statistics.median(times[True]),
        "projection_seconds_without": statistics.median(times[False]),
        "previews_of_a_projection": len(previews) / rounds,
        "projections": rounds,
        "projection_steps": steps,
    }


def measure(bundle: Bundle, interactions: int) -> dict[str, Any]:
    """Measure pages, sliders and memory."""
    from playwright.sync_api import sync_playwright

    program = chromium()
    if program is None:
        sys.exit("no Chromium is installed (Debian: apt install chromium)")
    options = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with (
        tempfile.TemporaryDirectory() as folder,
        launched(bundle, Path(folder)) as client,
        sync_playwright() as playwright,
    ):
        address = str(client.base_url).rstrip("/")
        browser = playwright.chromium.launch(executable_path=program, args=options)
        cold = []
        for _ in range(4):  # the first one may wait until the studio is built
            context = browser.new_context()
            context.set_default_timeout(_WAIT_MILLISECONDS)
            cold.append(page_seconds(context, address))
            context.close()
        context = browser.new_context(reduced_motion="reduce")
        context.set_default_timeout(_WAIT_MILLISECONDS)
        warm = [page_seconds(context, address) for _ in range(11)][1:]
        page = context.new_page()
        page.goto(f"{address}/studio/explore")
        page.get_by_text("Not edited").first.wait_for()
        times, heaps, gateways = [], [], []
        port = client.base_url.port or 0
        for number in range(interactions + 1):
            if number % max(1, interactions // 4) == 0:
                heaps.append(heap_megabytes(page))
                gateways.append(gateway_megabytes(port))
            value = str(round(0.1 + 3.8 * ((number * 37) % 101) / 101, 1) * (-1 if number % 2 else 1))
            times.append(page.evaluate(_MOVE, [number % 3, value]) / 1000)
            page.wait_for_timeout(50)
        opened = opened_images_megabytes(context, address, port, max(4, interactions // 2))
        browser.close()
    times = times[1:]
    grown_page = heaps[-1] - heaps[1]
    grown_gateway = max(gateways[-1] - gateways[1], opened[-1] - opened[0])
    return {
        "first_page_cold_seconds": statistics.median(cold[1:]),
        "first_page_warm_seconds": statistics.median(warm),
        "image_after_slider_seconds": statistics.median(times),
        "image_after_slider_seconds_p90": statistics.quantiles(times, n=10)[-1],
        "page_heap_megabytes": [round(each, 1) for each in heaps],
        "gateway_megabytes": [round(each, 1) for each in gateways],
        "gateway_megabytes_of_opened_images": [round(each, 1) for each in opened],
        "interactions": interactions,
        "met": statistics.median(warm) < REQUIRED_PAGE_SECONDS
        and statistics.median(times) < REQUIRED_IMAGE_SECONDS
        and grown_page <= ALLOWED_PAGE_MEGABYTES
        and grown_gateway <= ALLOWED_GATEWAY_MEGABYTES,
        "bundle": bundle.name,
        "cpus": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--interactions", type=int, default=200, help="movements of sliders, at least 4")
    parser.add_argument("--projections", type=int, default=5, help="projections of each kind; 0: none")
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of a projection; 100 are those of the fast schedule"
    )
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    result = measure(bundle, options.interactions)
    if options.projections:
        result |= projection_seconds(bundle, options.projections, options.steps)
    if options.json:
        print(json.dumps(result))
        return
    for line in table(result):
        print(line)


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table of docs/benchmarks-service.md."""
    over = f"MB over {result['interactions']} interactions"
    rows = [
        ("first page, cold", f"{result['first_page_cold_seconds']:.2f} s", ""),
        ("first page, warm", f"{result['first_page_warm_seconds']:.2f} s", f"{REQUIRED_PAGE_SECONDS:g} s"),
        (
            "image after a slider, median",
            f"{result['image_after_slider_seconds']:.3f} s",
            f"{REQUIRED_IMAGE_SECONDS:g} s",
        ),
        ("90 % of the images", f"{result['image_after_slider_seconds_p90']:.3f} s", ""),
        (
            "heap of the page",
            f"{' '.join(f'{each:.0f}' for each in result['page_heap_megabytes'])} {over}",
            "no growth",
        ),
        ("gateway", f"{' '.join(f'{each:.0f}' for each in result['gateway_megabytes'])} {over}", "no growth"),
        (
            "gateway, while images of Generate are opened",
            " ".join(f"{each:.0f}" for each in result["gateway_megabytes_of_opened_images"])
            + f" MB after {result['interactions'] // 8} and {result['interactions'] // 2} of them",
            "no growth",
        ),
    ]
    if "projections" in result:
        many = f"{result['previews_of_a_projection']:.1f}"
        rows += [
            (
                f"projection of {result['projection_steps']} steps with previews ({many} of them)",
                f"{result['projection_seconds_with_previews']:.2f} s",
                "",
            ),
            ("projection without previews", f"{result['projection_seconds_without']:.2f} s", ""),
        ]
    lines = ["| | measured | required |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value} | {required} |" for name, value, required in rows]
    return [
        *lines,
        "",
        f"{result['bundle']}, {result['cpus']} cores; page, image and memory met: {'yes' if result['met'] else 'NO'}",
    ]


if __name__ == "__main__":
    main()

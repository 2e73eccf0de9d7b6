"""Speed of the studio: `python -m benchmarks.studio [--json] [--bundle DIR] [--interactions N]`.

A real service with the bundle and a real browser (Chromium). Measured are, on this machine:

- the first page from the request until its fields can be used, in a browser that has its files already (warm) and in one
  that has none (cold);
- Explore, from the last movement of a slider until the edited image is shown;
- the memory of the page (JavaScript heap after a collection) and of the gateway, before and after many interactions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks import DEMO
from benchmarks.components import chromium
from benchmarks.dataset_job import launched
from dermis.bundle import Bundle, open_bundle

REQUIRED_PAGE_SECONDS = 1.5
REQUIRED_IMAGE_SECONDS = 0.3
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
    """Resident memory of the process that listens on a port."""
    for process in psutil.process_iter(["pid"]):
        try:
            listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            if any(each.laddr.port == port for each in listening):
                return float(process.memory_info().rss) / 1e6
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return 0.0


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
        browser.close()
    times = times[1:]
    return {
        "first_page_cold_seconds": statistics.median(cold[1:]),
        "first_page_warm_seconds": statistics.median(warm),
        "image_after_slider_seconds": statistics.median(times),
        "image_after_slider_seconds_p90": statistics.quantiles(times, n=10)[-1],
        "page_heap_megabytes": [round(each, 1) for each in heaps],
        "gateway_megabytes": [round(each, 1) for each in gateways],
        "interactions": interactions,
        "met": statistics.median(warm) < REQUIRED_PAGE_SECONDS and statistics.median(times) < REQUIRED_IMAGE_SECONDS,
        "bundle": bundle.name,
        "cpus": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--interactions", type=int, default=200)
    options = parser.parse_args()
    result = measure(open_bundle(options.bundle), options.interactions)
    if options.json:
        print(json.dumps(result))
        return
    print(f"first page, cold   {result['first_page_cold_seconds']:.2f} s")
    print(f"first page, warm   {result['first_page_warm_seconds']:.2f} s (required: {REQUIRED_PAGE_SECONDS:g} s)")
    median, slow = result["image_after_slider_seconds"], result["image_after_slider_seconds_p90"]
    print(f"image after slider {median:.3f} s, 90 % below {slow:.3f} s (required: {REQUIRED_IMAGE_SECONDS:g} s)")
    for name, key in (("page heap", "page_heap_megabytes"), ("gateway", "gateway_megabytes")):
        print(
            f"{name:<18} {' '.join(f'{each:.0f}' for each in result[key])} MB over {result['interactions']} interactions"
        )
    print(f"met: {'yes' if result['met'] else 'NO'}")


if __name__ == "__main__":
    main()

"""Fixtures of the browser tests of the studio: a service of the demo bundle and a browser for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import DEMO
from launched_service import Launched, launching


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Launched]]:
    yield from launching(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def port() -> int:
    from benchmarks.components import free_port

    return free_port()


@pytest.fixture(scope="module")
def demo(start: Callable[..., Launched], port: int) -> Launched:
    """A service with the demo bundle."""
    service = start(str(DEMO), port)
    service.wait_until(service.ready)
    return service


@pytest.fixture
def browser(demo: Launched, port: int) -> Iterator[Any]:
    """A browser whose pages cause no errors of scripts and no requests to other hosts."""
    from studio_browser import browsing

    with browsing(f"http://127.0.0.1:{port}") as browser:
        yield browser
        assert (browser.foreign, browser.errors) == ([], [])

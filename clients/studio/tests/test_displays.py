"""Tests of displays: what an older one does when a newer one begins on the same page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import pytest
from dermis_studio.access import Visitors
from dermis_studio.app import BUILDERS
from dermis_studio.displays import Displays
from dermis_studio.service import Service
from dermis_studio.studio import Studio


def request(page: str) -> gr.Request:
    return gr.Request(session_hash=page)


def test_older_display_ends_without_a_trace_when_a_newer_one_begins() -> None:
    displays = Displays()
    closed = []

    @displays.newest(2)
    async def counting(request: gr.Request, name: str) -> AsyncIterator[Any]:
        try:
            for number in range(3):
                yield f"{name}{number}", number
        finally:
            closed.append(name)

    async def check() -> None:
        first, elsewhere = counting(request("one"), "a"), counting(request("two"), "b")
        assert [await anext(first), await anext(elsewhere)] == [("a0", 0), ("b0", 0)]
        second = counting(request("one"), "c")
        assert await anext(second) == ("c0", 0)
        assert [values async for values in first] == [(gr.skip(), gr.skip())] and closed == ["a"]
        assert [values async for values in second] == [("c1", 1), ("c2", 2)]
        assert [values async for values in elsewhere] == [("b1", 1), ("b2", 2)]  # another page

    asyncio.run(check())


def test_displays_of_pages_beyond_the_limit_end() -> None:
    displays = Displays(most=2)
    first = displays.begin(request("one"))
    second = displays.begin(request("two"))
    assert first() and second()
    assert first()  # it still shows something
    displays.begin(request("three"))
    assert first() and not second()


def test_value_that_stays_the_same_is_reported_once_a_page() -> None:
    displays = Displays(most=2)
    values = [("one", "a"), ("one", "a"), ("one", "b"), ("two", "b"), ("one", "b")]
    assert [displays.changed(request(page), "model", value) for page, value in values] == [
        True,
        False,
        True,
        True,
        False,
    ]
    displays.forget(request("one"), "model")
    assert displays.changed(request("one"), "model", "b")
    assert displays.changed(request("three"), "model", "b") and displays.changed(request("two"), "model", "b")


@pytest.mark.parametrize("path", ["", "authenticity", "classify", "datasets", "explore", "map", "project", "studies"])
def test_page_stops_what_runs_before_it_sends_an_event(path: str) -> None:
    """Gradio sends a listener once the one before it has ended, and ignores an event whose listener still runs."""
    service = Service("http://127.0.0.1:9")
    with gr.Blocks() as blocks:
        BUILDERS[path](Studio(service, Visitors(service, needs_key=False)), blocks)
    listeners: dict[tuple[int | None, str], list[Any]] = {}
    for function in blocks.fns.values():
        for target in function.targets:
            listeners.setdefault(target, []).append(function)
    stopping = {target: [bool(each.cancels) for each in found] for target, found in listeners.items()}
    assert any(any(each) for each in stopping.values())
    for target, order in stopping.items():
        if any(order):
            assert order[-1] is False and all(each.fn is None for each in listeners[target][:-1])
        if target[1] == "select" and path in {"datasets", "project", "studies"}:
            assert [each.trigger_mode for each in listeners[target] if each.fn] == ["multiple"]


def test_button_that_stops_a_handler_is_shown_while_it_runs() -> None:
    displays = Displays()

    async def counting(request: gr.Request) -> AsyncIterator[Any]:
        for number in range(2):
            yield number

    with gr.Blocks():
        start, stop, result = gr.Button(), gr.Button(), gr.HTML()
        shown = displays.run_until_stopped([start.click], counting, [], [result], (start, stop), "Stopped", "map")
    hidden, visible = gr.update(visible=False), gr.update(visible=True)

    async def check() -> None:
        ran = [values async for values in shown(request("one"))]
        assert ran == [(0, hidden, visible), (1, hidden, visible), (gr.skip(), visible, hidden)]
        stopped = shown(request("one"))
        await anext(stopped)
        displays.begin(request("one"))  # elsewhere on the page
        assert await anext(stopped) == (1, hidden, visible)
        displays.begin(request("one"), "map")
        assert [values async for values in stopped] == [(gr.skip(),) * 3]  # the buttons are those of what stopped it

    asyncio.run(check())


def test_what_has_no_button_of_its_own_is_stopped_and_begun_again_while_it_runs() -> None:
    displays = Displays()

    async def counting(request: gr.Request) -> AsyncIterator[Any]:
        for number in range(2):
            yield number

    with gr.Blocks() as blocks:
        stop, grid, result = gr.Button(), gr.HTML(), gr.HTML()
        shown = displays.run_until_stopped(
            [grid.select], counting, [], [result], (None, stop), "Stopped", trigger_mode="multiple"
        )
    assert [each.trigger_mode for each in blocks.fns.values() if each.targets[0][1] == "select"] == ["multiple"]

    async def check() -> None:
        ran = [values async for values in shown(request("one"))]
        assert ran == [
            (0, gr.update(visible=True)),
            (1, gr.update(visible=True)),
            (gr.skip(), gr.update(visible=False)),
        ]

    asyncio.run(check())

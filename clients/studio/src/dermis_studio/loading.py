"""What pages of one model do when they are loaded, and when another model is chosen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr
from dermis_client import Model

from dermis_studio.access import Visitor
from dermis_studio.displays import Handler
from dermis_studio.samples import find_model
from dermis_studio.studio import PRIVATE, Studio, chosen_model, query_of, shows_problems

Updates = Callable[[Model, Visitor, dict[str, str]], Sequence[Any]]


def fill_for_model(
    studio: Studio,
    blocks: gr.Blocks,
    model: gr.Dropdown,
    fields: Sequence[Any],
    updates: Updates,
    *,
    problem: Any,
    result: Any,
    nothing: str,
) -> Any:
    """Fill the fields of a page when it is loaded, and again when another model is chosen.

    Args:
        studio: The studio.
        blocks: The page.
        model: The choice of the model.
        fields: The fields that depend on the model.
        updates: Returns updates of `fields` from the model, the visitor, and the query of the address; the query is empty when
            the visitor has chosen another model.
        problem: Where an error is shown when the page is loaded.
        result: Where the result of the page is shown, and an error when another model is chosen.
        nothing: What `result` shows for another model.

    Returns:
        The loading of the page, for what comes after it.
    """

    @shows_problems(len(fields) + 2)
    async def load(request: gr.Request) -> Any:
        visitor = await studio.visitor(request)
        async with studio.client(request) as client:
            update, chosen = await chosen_model(client, request)
        return [nothing if problem is result else "", update, *updates(chosen, visitor, query_of(request))]

    @shows_problems(len(fields) + 1)
    async def choose(name: str, request: gr.Request) -> Any:
        visitor = await studio.visitor(request)
        async with studio.client(request) as client:
            chosen = await find_model(client, name)
        return [nothing, *updates(chosen, visitor, {})]

    loaded = blocks.load(load, None, [problem, model, *fields], **PRIVATE)
    model.input(choose, model, [result, *fields], trigger_mode="always_last", **PRIVATE)
    return loaded


def run_if_named(loaded: Any, run: Handler, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Run a page after it has been loaded, if its address names a sample.

    Args:
        loaded: The loading of the page.
        run: What the button of the page does. Its first parameter is the request.
        inputs: Its inputs.
        outputs: Its outputs.
    """

    async def run_named(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        if query_of(request).get("class_name"):
            async for shown in run(request, *values):
                yield shown
        else:  # a generator without any value would empty its outputs
            yield gr.skip() if len(outputs) == 1 else tuple(gr.skip() for _ in outputs)

    loaded.then(run_named, list(inputs), list(outputs), concurrency_limit=None, **PRIVATE)

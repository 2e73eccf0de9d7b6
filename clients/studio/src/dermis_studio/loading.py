"""What pages of one model do when they are loaded, and when another model is chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from dermis_client import Model

from dermis_studio import quotas
from dermis_studio.access import Visitor
from dermis_studio.displays import Handler
from dermis_studio.quotas import Left
from dermis_studio.samples import find_model
from dermis_studio.studio import PRIVATE, Studio, chosen_model, query_of, shows_problems


@dataclass(frozen=True)
class Offer:
    """What a page can offer.

    Attributes:
        model: The model.
        visitor: Who sees the page.
        left: What is left of the quotas that the page uses.
        query: The query of the address; empty when the visitor has chosen another model.
    """

    model: Model
    visitor: Visitor
    left: Left
    query: Mapping[str, str]

    @property
    def samples(self) -> bool:
        """Whether the visitor may generate images."""
        return self.visitor.may("images") and not self.left.blocks(quotas.IMAGES)


Updates = Callable[[Offer], Sequence[Any]]


def fill_for_model(
    studio: Studio,
    blocks: gr.Blocks,
    model: gr.Dropdown,
    fields: Sequence[Any],
    updates: Updates,
    *,
    uses: Sequence[str],
    note: Any,
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
        updates: Returns updates of `fields`.
        uses: Names of the quotas that the page uses.
        note: Where it is explained which of them are used up.
        problem: Where an error is shown when the page is loaded.
        result: Where the result of the page is shown, and an error when another model is chosen.
        nothing: What `result` shows for another model.

    Returns:
        The loading of the page, for what comes after it.
    """

    @shows_problems(len(fields) + 3)
    async def load(request: gr.Request) -> Any:
        visitor = await studio.visitor(request)
        async with studio.client(request) as client:
            (update, chosen), left = await asyncio.gather(
                chosen_model(studio, client, request), quotas.left(client, *uses)
            )
        loaded_result = nothing if problem is result else ""
        return [loaded_result, update, left.note, *updates(Offer(chosen, visitor, left, query_of(request)))]

    @shows_problems(len(fields) + 2)
    async def choose(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return [gr.skip()] * (len(fields) + 2)
        visitor = await studio.visitor(request)
        async with studio.client(request) as client:
            chosen, left = await asyncio.gather(find_model(client, name), quotas.left(client, *uses))
        return [nothing, left.note, *updates(Offer(chosen, visitor, left, {}))]

    loaded = blocks.load(load, None, [problem, model, note, *fields], **PRIVATE)
    model.input(choose, model, [result, note, *fields], trigger_mode="always_last", **PRIVATE)
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

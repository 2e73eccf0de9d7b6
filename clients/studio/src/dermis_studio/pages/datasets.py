"""The page Datasets: ask for one, watch it, and what there is of those that are finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient

from dermis_studio import markup, quotas, snippets
from dermis_studio.access import Needs
from dermis_studio.displays import stops
from dermis_studio.pages import dataset_view as view
from dermis_studio.pages.dataset_request import RequestFields
from dermis_studio.samples import find_model
from dermis_studio.studio import (
    PRIVATE,
    AddressField,
    Studio,
    chosen_model,
    fill_from_address,
    heading,
    html,
    problem_of,
    query_of,
    shows_problems,
)

NOTHING = markup.empty_state("No dataset selected", "Create a dataset, or open one of the list below.")
CREATES: Needs = (("datasets:write",), ("models:read",))
USES = (quotas.IMAGES, quotas.JOBS, quotas.STORED)
_ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (!button || event.detail > 1) return;
  const message = button.dataset.confirm;
  if (message && !window.confirm(message)) return;
  trigger('select', { act: button.dataset.act, id: button.dataset.id });
});
"""


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Datasets", "Images with labels, metadata, report and manifest, generated in the background from one request."
    )
    with gr.Row(elem_classes=["ds-work", "ds-wide"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side", "ds-long"]):
            html("<h2>New dataset</h2>")
            readonly = html(visible=False)
            with gr.Column(elem_classes=["ds-fields"]) as builder:
                fields = RequestFields()
                estimate = html(markup.progress("Estimating size and time", None))
                create = gr.Button("Create dataset", variant="primary", interactive=False)
                code = html()
        with gr.Column(elem_classes=["ds-section"]):
            current = html(NOTHING, js_on_load=_ON_LOAD)
            table = html(markup.progress("Loading the datasets", None), js_on_load=_ON_LOAD)

    async def load(request: gr.Request) -> Any:
        try:
            lacking = (await studio.visitor(request)).lacks(CREATES)
            if lacking:
                scopes = " and ".join(f"<code>{name}</code>" for (name,) in lacking)
                note = f"<p>Your key cannot create datasets: that needs the scope {scopes}.</p>"
                unchanged = [gr.skip()] * (len(fields.outputs) + 2)
                return [gr.update(value=note, visible=True), gr.update(visible=False), *unchanged]
            async with studio.client(request) as client:
                (update, chosen), left = await asyncio.gather(
                    chosen_model(studio, client, request), quotas.left(client, *USES)
                )
            query = query_of(request)
        except Exception as error:
            return [gr.update(value=problem_of(error), visible=True)] + [gr.skip()] * (len(fields.outputs) + 3)
        return [
            gr.update(value="", visible=False),
            gr.update(visible=True),
            update,
            *fields.updates(chosen, query.get("class_name"), other=False),
            gr.update(interactive=not left.blocks(*USES)),
        ]

    @shows_problems(len(fields.outputs) + 1)
    async def choose_model(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return [gr.skip()] * (len(fields.outputs) + 1)
        async with studio.client(request) as client:
            chosen = await find_model(client, name)
        return [gr.skip(), *fields.updates(chosen, None, other=True)]

    @studio.displays.newest(4, "estimate")
    async def reckon(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        free = gr.update(interactive=True)
        try:
            visitor = await studio.visitor(request)
            if visitor.lacks(CREATES):
                yield "", "", gr.skip(), gr.skip()
                return
            async with studio.client(request) as client:
                chosen, usage = await asyncio.gather(
                    find_model(client, fields.named(values)["model"]), client.usage.retrieve()
                )
                body = fields.request(chosen, values)
                left = quotas.left_of(usage, *USES, asked={quotas.IMAGES: sum(body["classes"].values())})
                if left.blocks(*USES):
                    yield left.note, gr.skip(), gr.skip(), gr.update(interactive=False)
                    return
                address, then = studio.shown_address(request), 'result.wait(progress=True).download("lesions")'
                code = markup.code_block(
                    "curl", snippets.curl(address, "/v1/datasets", body, with_key=visitor.key is not None)
                ) + markup.code_block("Python", snippets.python(address, "datasets.create", body, then))
                shown = f'<details class="ds-more"><summary>Copy as code</summary>{code}</details>'
                if visitor.may("images") and not view.is_measured(chosen, body):
                    images = markup.counted(view.PROBE_IMAGES, "image")
                    measuring = markup.progress(f"Measuring size and time on {images}", None)
                    yield left.note + measuring, shown, gr.skip(), free
                expected = await view.estimate(client, chosen, body, visitor)
            signing = gr.skip() if expected.signs is None else gr.update(visible=expected.signs)
            yield left.note + expected.words + view.quotas(usage), shown, signing, free
        except Exception as error:
            yield problem_of(error), gr.skip(), gr.skip(), free

    async def start(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """Create a dataset and follow it. The next one can be created meanwhile, but not while the request is sent."""
        with studio.displays.sending(request) as begins:
            if not begins:
                yield gr.skip(), gr.skip()
                return
            is_newest = studio.displays.begin(request)
            yield markup.progress("Sending the request", None), gr.skip()
            try:
                async with studio.client(request) as client:
                    body = fields.request(await find_model(client, fields.named(values)["model"]), values)
                    dataset = await client.datasets.create(**body)
            except Exception as error:
                yield (problem_of(error) if is_newest() else gr.skip()), gr.skip()
                return
        if not is_newest():  # another dataset was opened
            yield gr.skip(), gr.skip()
            return
        async for shown in follow(request, dataset.id):
            yield shown

    @studio.displays.newest(2)
    async def follow(request: gr.Request, dataset_id: str) -> AsyncIterator[Any]:
        try:
            async with studio.client(request) as client:
                async for shown in followed(client, dataset_id, True):
                    yield shown
        except Exception as error:
            yield problem_of(error), gr.skip()

    @studio.displays.newest(2)
    async def act(event: gr.EventData, request: gr.Request) -> AsyncIterator[Any]:
        message: Mapping[str, Any] = event._data if isinstance(event._data, dict) else {}
        name, dataset_id = message.get("act"), str(message.get("id"))
        try:
            visitor = await studio.visitor(request)
            writes = visitor.may("datasets:write")
            async with studio.client(request) as client:
                if name == "delete":
                    await client.datasets.delete(dataset_id)
                    done = markup.success("The dataset and its files are deleted.")
                    yield done, view.table(await view.recent(client), None)
                    return
                if name == "cancel":
                    await client.datasets.cancel(dataset_id)
                async for shown in followed(client, dataset_id, writes):
                    yield shown
        except Exception as error:
            yield problem_of(error), gr.skip()

    @studio.displays.newest(2)
    async def reopen(request: gr.Request) -> AsyncIterator[Any]:
        """Open the dataset that the address names, or else the newest one that is not finished."""
        datasets = None
        try:
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                datasets = await view.recent(client)
                yield gr.skip(), view.table(datasets, None)
                active = [dataset.id for dataset in datasets if not dataset.finished]
                dataset_id = query_of(request).get("dataset") or next(iter(active), None)
                if dataset_id is not None:
                    async for shown in followed(client, dataset_id, visitor.may("datasets:write")):
                        yield shown
        except Exception as error:
            yield problem_of(error), "" if datasets is None else gr.skip()

    fill_from_address(
        blocks,
        AddressField("seed", fields.seed),
        AddressField("truncation", fields.truncation),
        AddressField("noise", fields.noise),
    )
    reckoned = [estimate, code, fields.signing, create]
    loaded = blocks.load(load, None, [readonly, builder, fields.model, *fields.outputs, create], **PRIVATE)
    loaded.then(reckon, fields.inputs, reckoned, **PRIVATE)
    following = blocks.load(reopen, None, [current, table], concurrency_limit=None, **PRIVATE)
    chosen = fields.model.input(
        choose_model, fields.model, [estimate, *fields.outputs], trigger_mode="always_last", **PRIVATE
    )
    chosen.then(reckon, fields.inputs, reckoned, **PRIVATE)
    fields.on_change(reckon, reckoned)
    stops(create.click, following)
    created = create.click(
        start, fields.inputs, [current, table], concurrency_limit=None, trigger_mode="multiple", **PRIVATE
    )
    for component in (current, table):
        stops(component.select, following, created)
        component.select(act, None, [current, table], concurrency_limit=None, trigger_mode="multiple", **PRIVATE)


async def followed(client: AsyncDermisClient, dataset_id: str, writes: bool) -> AsyncIterator[Any]:
    """Show a dataset until it has ended, and then what there is of it. Yields values of the dataset and of the list."""
    dataset = await client.datasets.retrieve(dataset_id)
    yield view.described(dataset, writes), view.table(await view.recent(client), dataset.id)
    if not dataset.finished:
        before = dataset.state
        async for event in client.datasets.events(dataset_id):
            dataset = event.dataset
            if dataset.finished:
                break
            changed = dataset.state != before
            listed = view.table(await view.recent(client), dataset.id) if changed else gr.skip()
            before = dataset.state
            yield view.described(dataset, writes), listed
    about = await view.results(client, dataset)
    yield view.described(dataset, writes, about), view.table(await view.recent(client), dataset.id)

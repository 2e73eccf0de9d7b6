"""The page Datasets: ask for one, watch it, and what there is of those that are finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, Model

from dermis_studio import markup, snippets
from dermis_studio.displays import stops
from dermis_studio.pages import dataset_view as view
from dermis_studio.samples import NOISE, find_model
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

CLASS_FIELDS = 8  # classes with a field of their own; a model with more has one text field for all
FORMATS = (("Folder of images (zip)", "imagefolder"), ("WebDataset (tar shards)", "webdataset"), ("Parquet", "parquet"))
GATES = (
    ("No comparison", "none"),
    ("Nearer than 99 % of the training images are to each other", "min_distance"),
    ("Within the radius of its nearest training image (strict)", "authentic"),
)
REJECTED = (("Make another image", "resample"), ("Leave it out", "drop"), ("Keep it, with a flag", "flag"))
FILTERS = (("Keep all images", "all"), ("Keep those that the classifier puts into their class", "agreeing"))
TRIES = 8
NOTHING = markup.empty_state("No dataset selected", "Create a dataset, or open one of the list below.")
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
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            html("<h2>New dataset</h2>")
            readonly = html(visible=False)
            with gr.Column(elem_classes=["ds-fields"]) as builder:
                model = gr.Dropdown(label="Model", choices=[], visible=False)
                counts = [
                    gr.Number(label="Images", value=50, precision=0, minimum=0, visible=False)
                    for _ in range(CLASS_FIELDS)
                ]
                listed = gr.Textbox(
                    label="Images of each class", info="One line for each: class = number", lines=6, visible=False
                )
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                with gr.Accordion("Files", open=False):
                    kind = gr.Radio(label="Layout", choices=list(FORMATS), value="imagefolder")
                    image_format = gr.Radio(
                        label="Images",
                        choices=[("PNG, lossless", "png"), ("JPEG", "jpeg"), ("WebP", "webp")],
                        value="png",
                    )
                    quality = gr.Slider(1, 100, value=95, step=1, label="Quality", visible=False, buttons=[])
                with gr.Accordion("Generation", open=False):
                    truncation = gr.Slider(
                        0.0,
                        1.5,
                        value=1.0,
                        step=0.05,
                        label="Truncation",
                        info="Lower: more typical, less varied.",
                        buttons=[],
                    )
                    noise = gr.Radio(
                        label="Noise",
                        choices=[(words.capitalize(), mode) for mode, words in NOISE.items()],
                        value="random",
                    )
                with gr.Accordion("Checks", open=False):
                    gate = gr.Radio(
                        label="Reject an image that is ... to a training image", choices=list(GATES), value="none"
                    )
                    rejected = gr.Radio(label="Rejected image", choices=list(REJECTED), value="resample", visible=False)
                    agreeing = gr.Radio(label="Classifier", choices=list(FILTERS), value="all")
                estimate = html()
                create = gr.Button("Create dataset", variant="primary", interactive=False)
                code = html()
        with gr.Column(elem_classes=["ds-section"]):
            current = html(NOTHING, js_on_load=_ON_LOAD)
            table = html(js_on_load=_ON_LOAD)

    fields = [model, *counts, listed, seed, kind, image_format, quality, truncation, noise, gate, rejected, agreeing]

    async def load(request: gr.Request) -> Any:
        try:
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                update, chosen = await chosen_model(client, request)
            query = query_of(request)
        except Exception as error:
            return [gr.update(value=problem_of(error), visible=True)] + [gr.skip()] * (CLASS_FIELDS + 6)
        writes = visitor.may("datasets:write")
        note = (
            ""
            if writes
            else "<p>Your key cannot create datasets: that needs the scope <code>datasets:write</code>.</p>"
        )
        return [
            gr.update(value=note, visible=not writes),
            gr.update(visible=writes),
            update,
            *class_updates(chosen, query.get("class_name")),
            gr.update(visible=chosen.authenticity is not None),
            gr.update(visible=chosen.classifier is not None),
            gr.update(interactive=True),
        ]

    @shows_problems(CLASS_FIELDS + 4)
    async def choose_model(name: str, request: gr.Request) -> Any:
        async with studio.client(request) as client:
            chosen = await find_model(client, name)
        return [
            gr.skip(),
            *class_updates(chosen, None),
            gr.update(visible=chosen.authenticity is not None),
            gr.update(visible=chosen.classifier is not None),
        ]

    @shows_problems(2)
    async def reckon(request: gr.Request, *values: Any) -> Any:
        visitor = await studio.visitor(request)
        if not visitor.may("datasets:write"):
            return "", ""
        async with studio.client(request) as client:
            chosen = await find_model(client, values[0])
            body = body_of(chosen, values)
            words, usage = await asyncio.gather(view.estimate(client, chosen, body, visitor), client.usage.retrieve())
        address, then = studio.shown_address(request), 'result.wait(progress=True).download("lesions")'
        code = markup.code_block(
            "curl", snippets.curl(address, "/v1/datasets", body, with_key=visitor.key is not None)
        ) + markup.code_block("Python", snippets.python(address, "datasets.create", body, then))
        return words + view.quotas(usage), f'<details class="ds-more"><summary>Copy as code</summary>{code}</details>'

    @studio.displays.newest(2)
    async def start(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            async with studio.client(request) as client:
                body = body_of(await find_model(client, values[0]), values)
                dataset = await client.datasets.create(**body)
                async for shown in followed(client, dataset.id, True):
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
            yield problem_of(error), gr.skip()

    fill_from_address(blocks, AddressField("seed", seed))
    loaded = blocks.load(load, None, [readonly, builder, model, *counts, listed, gate, agreeing, create], **PRIVATE)
    loaded.then(reckon, fields, [estimate, code], **PRIVATE)
    following = blocks.load(reopen, None, [current, table], concurrency_limit=None, **PRIVATE)
    model.input(choose_model, model, [estimate, *counts, listed, gate, agreeing], **PRIVATE)
    image_format.change(lambda value: gr.update(visible=value != "png"), image_format, quality, **PRIVATE)
    gate.change(lambda value: gr.update(visible=value != "none"), gate, rejected, **PRIVATE)
    changes = [field.input if hasattr(field, "input") else field.change for field in fields]
    gr.on(changes, reckon, fields, [estimate, code], trigger_mode="always_last", **PRIVATE)
    stops(create.click, following)
    created = create.click(start, fields, [current, table], concurrency_limit=None, **PRIVATE)
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


def class_updates(model: Model, asked: str | None) -> list[Any]:
    """Return updates of the fields of the classes and of the text field."""
    names = model.classes
    fits = len(names) <= CLASS_FIELDS
    updates = []
    for position in range(CLASS_FIELDS):
        if fits and position < len(names):
            value = 50 if asked not in names or asked == names[position] else 0
            updates.append(gr.update(label=f"Images of {names[position]}", value=value, visible=True))
        else:
            updates.append(gr.update(visible=False))
    text = "\n".join(f"{name} = 10" for name in names)
    return [*updates, gr.update(value=text, visible=not fits)]


def body_of(model: Model, values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the body of a request, with the options that differ from the defaults.

    Args:
        model: The model.
        values: The values of the fields of the page, in order.

    Raises:
        ValueError: There is no image, or a line of the text field cannot be read.
    """
    counts, rest = values[1 : 1 + CLASS_FIELDS], values[1 + CLASS_FIELDS :]
    listed, seed, kind, image_format, quality, truncation, noise, gate, rejected, agreeing = rest
    if len(model.classes) <= CLASS_FIELDS:
        classes = {name: int(count or 0) for name, count in zip(model.classes, counts, strict=False)}
    else:
        classes = classes_of_lines(listed or "")
    classes = {name: count for name, count in classes.items() if count > 0}
    if not classes:
        raise ValueError("no images are asked for; ask for at least one image")
    body: dict[str, Any] = {"model": model.name, "classes": classes, "seed": int(seed or 0)}
    if kind != "imagefolder":
        body["format"] = kind
    if image_format != "png":
        body |= {"image_format": image_format, "image_quality": int(quality)}
    if truncation != 1.0:
        body["truncation_psi"] = truncation
    if noise != "random":
        body["noise_mode"] = noise
    if gate != "none" and model.authenticity is not None:
        body["privacy"] = {"gate": gate, "on_reject": rejected}
    if agreeing == "agreeing" and model.classifier is not None:
        body["classifier"] = {"keep": "agreeing", "tries": TRIES}
    return body


def classes_of_lines(text: str) -> dict[str, int]:
    """Read lines of the form `class = number`.

    Raises:
        ValueError: A line cannot be read.
    """
    result: dict[str, int] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, count = line.rpartition("=")
        if not equals or not count.strip().isdigit():
            raise ValueError(f"the line {line[:80]!r} cannot be read; write the class, =, and a number of images")
        result[name.strip()] = int(count)
    return result

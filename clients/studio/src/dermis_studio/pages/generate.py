"""The page Generate: a few images, and what is known about each of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, EditedImage, GeneratedImage, Model
from dermis_client.models import NoiseMode

from dermis_studio import markup, quotas, snippets
from dermis_studio.access import Visitor
from dermis_studio.samples import (
    NOISE,
    SampleRef,
    enlarged,
    find_model,
    generate_one,
    measured,
    options,
    png,
    reduced,
    tile_image,
)
from dermis_studio.starts import links, offered
from dermis_studio.studio import PRIVATE, Studio, chosen_model, heading, html, problem_of, query_of, shows_problems

MAX_IMAGES = 64
COUNT = 16  # at first
CHUNK = 4  # images of one call, so that the grid fills while images arrive
ALL = "All classes"
NOT_CHOSEN = markup.empty_state("No image selected", "Select an image of the grid to see what is known about it.")
NOTHING = markup.empty_state("No images yet", "Choose a class and a number of images, then press Generate.")
# What the browser sends when a tile is chosen.
_ON_LOAD = """
element.addEventListener('click', (event) => {
  const tile = event.target.closest('[data-sample]');
  if (tile) trigger('select', JSON.parse(tile.dataset.sample));
});
"""
NEIGHBOURS = 6
NEIGHBOUR_DISTANCE = 0.3
_NEIGHBOURS_ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-neighbours]');
  if (!button) return;
  const distance = Number(element.querySelector('[data-distance]').value);
  trigger('select', { ...JSON.parse(button.dataset.neighbours), distance });
});
element.addEventListener('input', (event) => {
  if (event.target.matches('[data-distance]')) event.target.nextElementSibling.textContent = event.target.value;
});
"""


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Generate images",
        "Synthetic dermoscopy, made while you wait. The same seed and options give the same images again.",
    )
    with gr.Row(elem_classes=["ds-work", "ds-three"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            class_name = gr.Radio(label="Class", choices=[ALL], value=ALL)
            count = gr.Slider(1, MAX_IMAGES, value=COUNT, step=1, label="Number of images", buttons=[])
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, info="Another seed gives other images.")
            new_seed = gr.Button("Draw a new seed", size="sm")
            truncation = gr.Slider(
                0.0, 1.5, value=1.0, step=0.05, label="Truncation", info="Lower: more typical, less varied.", buttons=[]
            )
            noise = gr.Radio(
                label="Noise",
                choices=[(words.capitalize(), mode) for mode, words in NOISE.items()],
                value="random",
                info="Fine texture that is drawn for each image.",
            )
            used_up = html()
            start = gr.Button("Generate", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Column():
            status = html(markup.progress("Loading the models", None))
            grid = html(NOTHING, js_on_load=_ON_LOAD)
            code = html()
        with gr.Column(elem_classes=["ds-panel", "ds-detail"]):
            detail = html(NOT_CHOSEN, js_on_load=_NEIGHBOURS_ON_LOAD)
            neighbours = html()
            stop_neighbours = gr.Button("Stop", variant="stop", size="sm", visible=False)

    @shows_problems(6)
    async def load(request: gr.Request) -> Any:
        async with studio.client(request) as client:
            (update, chosen), left = await asyncio.gather(
                chosen_model(studio, client, request), quotas.left(client, quotas.IMAGES)
            )
        classes = class_update(chosen, query_of(request).get("class_name"))
        usable = gr.update(interactive=not left.blocks(quotas.IMAGES))
        return "", update, classes, count_update(left.remaining(quotas.IMAGES)), left.note, usable

    @shows_problems(2)
    async def choose_model(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return gr.skip(), gr.skip()
        async with studio.client(request) as client:
            return gr.skip(), class_update(await find_model(client, name), None)

    async def generate(
        model: str | None,
        class_name: str,
        count: float,
        seed: float | None,
        truncation: float,
        noise: NoiseMode,
        request: gr.Request,
    ) -> AsyncIterator[Any]:
        tiles, total = "", int(count)
        yield markup.progress(f"Generating {markup.counted(total, 'image')}", 0.0), '<div class="ds-grid">', ""
        try:
            async with studio.client(request) as client:
                chosen = await find_model(client, model)
                classes = shares(total, chosen.classes if class_name == ALL else [class_name])
                body = {"classes": classes, "seed": int(seed or 0)} | options(chosen.name, truncation, noise)
                address, with_key = studio.shown_address(request), (await studio.visitor(request)).key is not None
                async for images in arriving(client, chosen, classes, int(seed or 0), truncation, noise):
                    tiles += "".join([tile(image, chosen.name, truncation, noise) for image in images])
                    done = tiles.count("<button")
                    text = f"{done} of {markup.counted(total, 'image')}"
                    yield markup.progress(text, done / total), f'<div class="ds-grid">{tiles}', gr.skip()
            note = f"{markup.counted(total, 'image')} of {size_words(chosen)}."
            shown = copied_as_code(address, body, "All of these images as code", with_key=with_key)
            yield f'<p class="ds-muted" role="status">{escape(note)}</p>', gr.skip(), shown
        except Exception as error:
            yield problem_of(error), gr.skip() if tiles else NOTHING, gr.skip()

    @studio.displays.newest(3, "detail")
    async def show(event: gr.EventData, request: gr.Request) -> AsyncIterator[Any]:
        studio.displays.begin(request, "neighbours")  # those of another image
        no_neighbours = ("", gr.update(visible=False))
        try:
            sample = SampleRef.parse(event._data if isinstance(event._data, dict) else {})
            if sample is None:
                yield NOT_CHOSEN, *no_neighbours
                return
            yield markup.progress(f"Measuring {sample.words}", None), *no_neighbours
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                chosen = await find_model(client, sample.model)
                image = await generate_one(client, sample)
                about = await measured(client, visitor, chosen, sample, image)
            address = studio.shown_address(request)
            yield await asyncio.to_thread(described, image, sample, chosen, about, visitor, address), *no_neighbours
        except Exception as error:
            yield problem_of(error), *no_neighbours

    async def show_neighbours(event: gr.EventData, request: gr.Request) -> AsyncIterator[str]:
        message = event._data if isinstance(event._data, dict) else {}
        try:
            sample = SampleRef.parse(message)
            if sample is None:
                raise ValueError("no image is selected; select one first")
            distance = NEIGHBOUR_DISTANCE if message.get("distance") is None else float(message["distance"])
            yield markup.progress(f"Generating {markup.counted(NEIGHBOURS, 'neighbour')}", None)
            async with studio.client(request) as client:
                images = await client.edits.neighbours(
                    (sample.class_name, sample.seed, sample.index),
                    count=NEIGHBOURS,
                    distance=distance,
                    **options(sample.model, sample.truncation, sample.noise),
                )
            yield neighbourhood(list(images), distance)
        except Exception as error:
            yield problem_of(error)

    blocks.load(load, None, [status, model, class_name, count, used_up, start], **PRIVATE)
    model.input(choose_model, model, [status, class_name], trigger_mode="always_last", **PRIVATE)
    new_seed.click(lambda: secrets.randbelow(10**6), None, seed, **PRIVATE)
    inputs = [model, class_name, count, seed, truncation, noise]
    events, stopped = [start.click, seed.submit], '<p class="ds-muted" role="status">Stopped.</p>'
    unchanged = (gr.skip(), gr.skip())
    studio.displays.run_until_stopped(
        events, generate, inputs, [status, grid, code], (start, stop), (stopped, *unchanged)
    )
    shown = [detail, neighbours, stop_neighbours]
    grid.select(show, None, shown, concurrency_limit=None, trigger_mode="multiple", **PRIVATE)
    studio.displays.run_until_stopped(
        [detail.select],
        show_neighbours,
        [],
        [neighbours],
        (None, stop_neighbours),
        stopped,
        "neighbours",
        trigger_mode="multiple",
    )


def class_update(model: Model, chosen: str | None) -> Any:
    """Return an update of the choice of the class."""
    choices = [ALL, *model.classes] if len(model.classes) > 1 else list(model.classes)
    return gr.update(choices=choices, value=chosen if chosen in choices else choices[0])


def count_update(left: float | None) -> Any:
    """Return an update of the number of images, of which no more can be chosen than are left today."""
    if left is None or not 1 <= left < MAX_IMAGES:
        return gr.skip()
    most = int(left)
    return gr.update(maximum=most, value=min(most, COUNT), info=f"{most} are left today.")


def shares(total: int, classes: list[str]) -> dict[str, int]:
    """Divide a number of images equally among classes; the first ones get those that remain."""
    each, more = divmod(total, len(classes))
    counts = {name: each + (position < more) for position, name in enumerate(classes)}
    return {name: count for name, count in counts.items() if count}


def parts(classes: dict[str, int], most: int) -> Iterator[tuple[str, int, int]]:
    """Divide images into calls of at most `most` images of one class: class, index of the first image, and number."""
    index = 0
    for name, count in classes.items():
        for offset in range(0, count, most):
            part = min(most, count - offset)
            yield name, index, part
            index += part


async def arriving(
    client: AsyncDermisClient, model: Model, classes: dict[str, int], seed: int, truncation: float, noise: NoiseMode
) -> AsyncIterator[list[GeneratedImage]]:
    """Generate images in calls of a few each: those that one call for all of them would return, in the same order."""
    for name, index, part in parts(classes, CHUNK):
        result = await client.images.generate(
            {name: part},
            seed=seed,
            start_index=index,
            model=model.name,
            truncation_psi=truncation,
            noise_mode=noise,
            image_format="png",
        )
        yield list(result)


def tile(image: GeneratedImage, model: str, truncation: float, noise: NoiseMode) -> str:
    """Return the tile of an image, which can be chosen."""
    sample = SampleRef(model, image.class_name, image.seed, image.index, truncation, noise)
    url, side = tile_image(image)
    return (
        f'<button type="button" class="ds-tile" aria-pressed="false" data-sample="{markup.attribute(asdict(sample))}" '
        f'aria-label="{escape(sample.words)}: show what is known"><img src="{url}" width="{side}" height="{side}" alt="">'
        f'<span class="ds-tag" aria-hidden="true">{escape(image.class_name)}</span></button>'
    )


def size_words(model: Model) -> str:
    """Return the size of the images of a model, and how they are shown."""
    resolution = model.resolution or 0
    how = "shown 1:1" if resolution <= 160 else "shown at 128 px (Lanczos); select one to see all of its pixels"
    return f"{resolution} x {resolution} px, {how}"


def described(
    image: GeneratedImage, sample: SampleRef, model: Model, about: str, visitor: Visitor, address: str
) -> str:
    """Return everything about one image."""
    picture = enlarged(image.content, image.media_type, f"Generated image: {sample.words}", "")
    starts = links(sample.query, offered(visitor))
    rows = [
        ("Class", escape(sample.class_name)),
        ("Seed, index", f"{sample.seed}, {sample.index}"),
        ("Truncation", f"{sample.truncation:g}"),
        ("Noise", escape(NOISE.get(sample.noise, sample.noise))),
        ("Model", f"{escape(model.name)} {markup.short_digest(model.digest)}"),
        ("SHA-256", markup.short_digest(image.sha256)),
    ]
    code = copied_as_code(address, sample.body, "Copy as code", with_key=visitor.key is not None)
    around = (
        f'<h3>Latent neighbours</h3><label class="ds-opacity">Distance <input type="range" min="0.1" max="1" step="0.1" '
        f'value="{NEIGHBOUR_DISTANCE}" data-distance><output>{NEIGHBOUR_DISTANCE}</output></label><div class="ds-actions">'
        f'<button type="button" class="ds-button" data-neighbours="{markup.attribute(asdict(sample))}">Show neighbours'
        "</button></div>"
    )
    return (
        f"<h2>{escape(sample.class_name)}, index {sample.index}</h2>{picture}{markup.facts(rows)}{about}"
        f'<h3>Use as start</h3><div class="ds-actions">{starts}'
        f'<a class="ds-button" download="{escape(image.file_name)}" href="{markup.data_url(image.content, image.media_type)}">'
        f"Save PNG</a></div>{code}" + (around if visitor.may("edits") else "")
    )


def copied_as_code(address: str, body: dict[str, Any], title: str, *, with_key: bool) -> str:
    """Return a request for images as commands to copy, closed at first.

    Args:
        address: Address of the service.
        body: Body of /v1/images; the client of Python has arguments with the same names.
        title: What is shown while it is closed.
        with_key: Whether the service needs a key.
    """
    curl = snippets.curl(address, "/v1/images", body, with_key=with_key)
    python = snippets.python(address, "images.generate", body, 'result.save("lesions")')
    code = markup.code_block("curl", curl) + markup.code_block("Python", python)
    return f'<details class="ds-more"><summary>{escape(title)}</summary>{code}</details>'


def neighbourhood(images: list[EditedImage], distance: float) -> str:
    """Return the neighbours of a sample."""
    tiles = "".join(
        f'<img class="ds-pixels" src="{markup.data_url(png(picture), "image/png")}" width="{picture.width}" '
        f'height="{picture.height}" alt="Neighbour {image.sample}">'
        for image in images
        for picture in (reduced(image.image, 120),)
    )
    return (
        f'<div class="ds-grid">{tiles}</div><p class="ds-muted">'
        f"{markup.counted(len(images), 'image')} whose w is {distance:g} of its length "
        "away, each in another direction, with the noise of this image. At most 120 px (Lanczos).</p>"
    )

"""The page Map: where generated and projected images are in the features that the index compares."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, EmbeddingMap, Model
from dermis_client.synthetic_image import SyntheticImage
from PIL import Image

from dermis_studio import downloads, markup, quotas
from dermis_studio.access import Visitor, key_of
from dermis_studio.loading import Offer, fill_for_model
from dermis_studio.pages.generate import parts, shares
from dermis_studio.pages.map_points import NOT_KNOWN, OWN, PROJECTED, Point, element, of_sample, thumbnail
from dermis_studio.samples import SampleRef, find_model
from dermis_studio.sources import chosen_projection, content_of, drop, made_here, opened
from dermis_studio.starts import offered
from dermis_studio.studio import (
    PRIVATE,
    AddressField,
    Studio,
    cookies_of,
    fill_from_address,
    heading,
    html,
    problem_of,
    query_of,
)

MAX_IMAGES = 480
CHUNK = 16  # images of one call
_SHOWN_EVERY = 4  # calls after which the map is shown again
NOTHING = markup.empty_state(
    "No map yet",
    "Press Draw map. Images that the model finds similar are near each other; circles show where the training images are.",
)
_NO_INDEX = "<p>This model has no index of its training images, so there is no map of it.</p>"
_UPLOADS_OFF = (
    '<p class="ds-muted">Images of your own: project one, then enter its id here. This service does not place uploaded images: '
    "it could show who is in the training set.</p>"
)
USES = (quotas.COMPARISONS, quotas.COMPARISONS_NOW, quotas.IMAGES)
_SEPARATORS = re.compile(r"[\s,;]+")


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Map of embeddings",
        "Generated and projected images in the features with which the model compares images, beside where its training images "
        "are.",
    )
    with gr.Row(elem_classes=["ds-work", "ds-wide"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            count = gr.Slider(20, MAX_IMAGES, value=120, step=20, label="Generated images", buttons=[])
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
            truncation = gr.Slider(
                0.0, 1.5, value=1.0, step=0.05, label="Truncation", info="Lower: more typical, less varied.", buttons=[]
            )
            with gr.Column(elem_classes=["ds-fields"], visible=False) as of_projections:
                here_made = made_here()
                projections = gr.Textbox(
                    label="Projections", info="Their ids, which the page Project shows. Up to 8.", max_length=400
                )
            with gr.Column(elem_classes=["ds-fields"], visible=False) as of_file:
                file = drop()
            note = html()
            used_up = html()
            start = gr.Button("Draw map", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Column(elem_classes=["ds-section"]):
            status = html(markup.progress("Loading the models", None))
            drawing = html(NOTHING)

    async def draw(
        request: gr.Request,
        name: str,
        count: float,
        seed: float | None,
        truncation: float,
        projections: str | None,
        file: str | None,
    ) -> AsyncIterator[Any]:
        total = int(count)
        yield markup.progress("Reading the map of the training images", None), gr.skip()
        try:
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                chosen = await find_model(client, name)
                known = await client.embeddings.retrieve(chosen.name)
                points = await _named(studio, client, request, visitor, chosen, projections, file)
                first = 0 if points else None
                named, done, calls = {point.query for point in points}, 0, 0
                yield markup.progress(f"0 of {markup.counted(total, 'image')}", 0.0), element(known, points, first)
                async for part in _samples(client, visitor, chosen, total, int(seed or 0), truncation):
                    points += [point for point in part if point.query not in named]
                    calls, done = calls + 1, done + len(part)
                    shown = calls % _SHOWN_EVERY == 0 and done < total
                    drawn = await asyncio.to_thread(element, known, points, first) if shown else gr.skip()
                    yield markup.progress(f"{done} of {markup.counted(total, 'image')}", done / total), drawn
            words = f"{markup.counted(len(points), 'image')}. {_explained(known)}"
            yield (
                f'<p class="ds-muted" role="status">{words}</p>',
                await asyncio.to_thread(element, known, points, first),
            )
        except Exception as error:
            yield problem_of(error), gr.skip()

    here_made.select(with_projection, projections, projections, **PRIVATE)
    fill_from_address(blocks, AddressField("seed", seed), AddressField("projection", projections))
    fields = [of_projections, of_file, note, start]
    fill_for_model(
        studio,
        blocks,
        model,
        fields,
        _allowed,
        uses=USES,
        note=used_up,
        problem=status,
        result=drawing,
        nothing=NOTHING,
    )
    inputs = [model, count, seed, truncation, projections, file]
    words = '<p class="ds-muted" role="status">Stopped. The map has the images that had been placed.</p>'
    events = [start.click, seed.submit]
    studio.displays.run_until_stopped(events, draw, inputs, [status, drawing], (start, stop), (words, gr.skip()))


def with_projection(event: gr.EventData, named: str | None) -> str:
    """Return the ids that are named, and the one that was chosen."""
    ids = [each for each in _SEPARATORS.split(named or "") if each]
    chosen = chosen_projection(event)
    return " ".join(ids if not chosen or chosen in ids else [*ids, chosen])


def _allowed(offer: Offer) -> list[Any]:
    """Return updates of the fields that depend on the model: what it, the key and the quotas allow."""
    index, visitor = offer.model.authenticity, offer.visitor
    uploads = index is not None and bool(index.get("uploads"))
    may_upload = uploads and visitor.may("authenticity:uploads")
    note = _NO_INDEX if index is None else "" if may_upload else "" if uploads else _UPLOADS_OFF
    return [
        gr.update(visible=index is not None and visitor.may("projections")),
        gr.update(visible=may_upload),
        note,
        gr.update(interactive=index is not None and not offer.left.blocks(*USES)),
    ]


def _explained(known: EmbeddingMap) -> str:
    """Say how much of the embeddings the map shows."""
    drawn, compared = sum(known.explained[:3]), sum(known.explained)
    return (
        f"The map shows three principal components of the training images' embeddings, {drawn:.0%} of their variance. "
        f"Neighbours are compared in {markup.counted(len(known.explained), 'component')}, {compared:.0%}."
    )


async def _samples(
    client: AsyncDermisClient, visitor: Visitor, model: Model, total: int, seed: int, truncation: float
) -> AsyncIterator[list[Point]]:
    """Place generated images, in calls of a few each."""
    pages = offered(visitor, other_than="map")
    for class_name, index, part in parts(shares(total, model.classes), CHUNK):
        placed = await client.embeddings.place_generated(
            {class_name: part},
            seed=seed,
            start_index=index,
            model=model.name,
            truncation_psi=truncation,
            images=visitor.may("images"),
        )
        samples = [SampleRef(model.name, class_name, seed, index + place, truncation) for place in range(part)]
        yield await asyncio.to_thread(
            lambda samples, placed: [of_sample(*pair, pages) for pair in zip(samples, placed, strict=True)],
            samples,
            list(placed),
        )


async def _named(
    studio: Studio,
    client: AsyncDermisClient,
    request: gr.Request,
    visitor: Visitor,
    model: Model,
    projections: str | None,
    file: str | None,
) -> list[Point]:
    """Return the points of the images that the visitor names: an own one, projections, and the sample of the address."""
    points = []
    if file:
        content, _ = content_of(file)
        placed = await client.embeddings.place(content, model=model.name)
        picture = await asyncio.to_thread(lambda: thumbnail(opened(content)))
        points.append(Point("Your image", OWN, NOT_KNOWN, placed[0], picture))
    ids = [each for each in _SEPARATORS.split(projections or "") if each]
    if len(ids) > 8:
        raise ValueError("more than 8 projections are named; remove some of their ids")
    if ids:
        named = await client.embeddings.place_projections(ids, model=model.name)
        for projection_id, embedding in zip(ids, named, strict=True):
            shown = await _reconstruction(studio, client, request, projection_id)
            words = f"Projection {projection_id[:11]}"
            pages = offered(visitor, projection=True, other_than="map")
            points.append(Point(words, PROJECTED, NOT_KNOWN, embedding, shown, f"projection={projection_id}", pages))
    sample = SampleRef.parse(query_of(request))
    if sample is not None and sample.class_name in model.classes:
        placed = await client.embeddings.place_generated(
            {sample.class_name: 1},
            seed=sample.seed,
            start_index=sample.index,
            model=model.name,
            truncation_psi=sample.truncation,
            noise_mode=sample.noise,
            images=visitor.may("images"),
        )
        points.append(of_sample(sample, placed[0], offered(visitor, other_than="map")))
    return points


async def _reconstruction(
    studio: Studio, client: AsyncDermisClient, request: gr.Request, projection_id: str
) -> Image.Image | None:
    """Return the image of a finished projection, small."""
    projection = await client.projections.retrieve(projection_id)
    path = projection.data[0].files.get("image", "") if projection.data else ""
    if not path:
        return None
    content = await downloads.projection_file(
        studio.service, key_of(cookies_of(request)), projection_id, path.rpartition("/")[2]
    )
    return await asyncio.to_thread(lambda: thumbnail(SyntheticImage.of(Image.open(io.BytesIO(content)).convert("RGB"))))

"""The page Authenticity: how near an image is to the training images, in words and numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AuthenticityResult, Model

from dermis_studio import markup, quotas
from dermis_studio.loading import Offer, fill_for_model, run_if_named
from dermis_studio.samples import check, distance, find_model
from dermis_studio.sources import Picture, SourceFields, picture
from dermis_studio.studio import Studio, heading, html, problem_of, query_of

NOTHING = markup.empty_state(
    "No image checked yet", "Choose a sample or an image, then press Check. No training image is shown here."
)

USES = (quotas.COMPARISONS, quotas.COMPARISONS_NOW, quotas.IMAGES, quotas.UPLOADS)


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Authenticity",
        "How near an image is to the images that the generator was trained with, compared with how near those are to "
        "each other.",
    )
    with gr.Row(elem_classes=["ds-work"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            source = SourceFields()
            used_up = html()
            start = gr.Button("Check", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Column():
            result = html(markup.progress("Loading the models", None))

    def updates(offer: Offer) -> list[Any]:
        samples, files, note = sources_of(offer)
        shown = source.updates(offer.model, offer.query, note, samples=samples, files=files)
        usable = (samples or files) and not offer.left.blocks(quotas.COMPARISONS, quotas.COMPARISONS_NOW)
        return [*shown, gr.update(interactive=usable)]

    async def run(request: gr.Request, name: str, *values: Any) -> AsyncIterator[Any]:
        yield markup.progress("Comparing the image with the training images", None)
        try:
            async with studio.client(request) as client:
                chosen = await find_model(client, name)
                image = await picture(client, chosen, values, query_of(request))
                if image.sample is not None:
                    checked = await check(client, image.sample)
                else:
                    checked = await client.authenticity.check(image.content, model=chosen.name)
            yield await asyncio.to_thread(described, image, chosen, checked)
        except Exception as error:
            yield problem_of(error)

    inputs, fields = [model, *source.inputs], [*source.outputs, start]
    stopped = markup.empty_state("Stopped", "Press Check to start again.")
    shown = studio.displays.run_until_stopped([start.click], run, inputs, [result], (start, stop), stopped)
    source.fill_from_address(blocks)
    loaded = fill_for_model(
        studio, blocks, model, fields, updates, uses=USES, note=used_up, problem=result, result=result, nothing=NOTHING
    )
    run_if_named(loaded, shown, inputs, [result, start, stop])


def sources_of(offer: Offer) -> tuple[bool, bool, str]:
    """Return whether a visitor may compare samples and files, and what the page says about it as HTML."""
    index, visitor = offer.model.authenticity, offer.visitor
    if index is None:
        return False, False, "<p>This model has no index of its training images.</p>"
    samples = offer.samples and visitor.may("authenticity:generated")
    if not index.get("uploads"):
        note = "This service compares no images of its users: the answer could show who is in the training set."
        return samples, False, f"<p class='ds-muted'>{note}</p>"
    if not visitor.may("authenticity:uploads"):
        note = "Images of your own need the scope <code>authenticity:uploads</code>."
        return samples, False, f"<p class='ds-muted'>{note}</p>"
    files = not offer.left.blocks(quotas.UPLOADS)
    return samples, files, "<p class='ds-muted'>Your image is compared in memory, and not kept.</p>" * files


def described(image: Picture, model: Model, result: AuthenticityResult) -> str:
    """Return an image with its verdict."""
    verdict = result[0]
    index = model.authenticity or {}
    of_training = markup.counted(int(index.get("vectors", 0)), "training image")
    rows = [
        ("Distance", f"{verdict.distance:.2f} to the nearest of {of_training}"),
        ("Percentile", f"{verdict.percentile} of 100"),
        (
            "Authentic",
            "yes: outside of the radius of that image" if verdict.authentic else "no: within the radius of that image",
        ),
    ]
    if verdict.copy_detected is not None:
        rows.append(("Copy detector", "a changed copy" if verdict.copy_detected else "no copy found"))
    rows.append(("Feature space", escape(f"{index.get('extractor', '')}, {index.get('metric', '')} distance")))
    rows.append(("Index", markup.short_digest(result.model.index)))
    if verdict.repeated:
        rows.append(("Repeated", "a similar image was compared before; this is the answer on that one"))
    limits = (
        "The comparison uses the features of one network. A copy that is cropped, turned or recoloured strongly can "
        "be far away "
        "in it.",
        "The radius of a training image is its distance to the nearest other one. Where training images are sparse, "
        "it is large, "
        "so samples that are no copies can be within it.",
        "Not near is not a proof that nothing of a patient can be learnt. The privacy audit of the model is on the "
        "page Models.",
    )
    items = "".join(f"<li>{escape(text)}</li>" for text in limits)
    return (
        f'{markup.READY}<div class="ds-panel ds-section"><h2 class="ds-hidden">Result</h2><div '
        f'class="ds-pair"><div>{image.shown()}</div><div class="ds-grow">'
        f"{distance(model, result)}{markup.facts(rows)}</div></div>"
        f"<h3>Limits of this answer</h3><ul>{items}</ul></div>"
    )

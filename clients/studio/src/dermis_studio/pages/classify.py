"""The page Classify: a calibrated probability with its thresholds, and heat maps of what it follows from."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from html import escape
from typing import Any, Literal

import gradio as gr
from dermis_client import ClassificationsResult, HeatMap, Model
from dermis_client.models import HeatMapMethod
from PIL import Image, ImageOps

from dermis_studio import markup, quotas
from dermis_studio.loading import Offer, fill_for_model, run_if_named
from dermis_studio.samples import DETAIL_PIXELS, find_model, png, probability
from dermis_studio.scales import threshold_name
from dermis_studio.sources import Picture, SourceFields, opened, picture
from dermis_studio.studio import Studio, heading, html, problem_of, query_of

NOTHING = markup.empty_state("No image classified yet", "Choose a sample or an image, then press Classify.")
NOTICE = (
    '<div class="ds-notice" role="note" aria-label="Not a medical device"><div><p><b>Not a medical device.</b> The '
    "classifier was "
    "made to measure synthetic images. Its probability is no diagnosis, and nobody must be treated or left untreated "
    "because of it."
    "</p></div></div>"
)
METHODS = (("None", "none"), ("XRAI: regions", "xrai"), ("Integrated gradients: pixels", "integrated-gradients"))

USES = (quotas.IMAGES, quotas.UPLOADS)


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Classify and explain",
        "What the classifier of the model says about an image, and which parts of it speak for and against.",
    )
    html(NOTICE)
    with gr.Row(elem_classes=["ds-work"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            source = SourceFields()
            threshold = gr.Dropdown(label="Threshold", choices=[])
            method = gr.Radio(label="Heat map", choices=list(METHODS), value="none", info="Takes seconds.")
            used_up = html()
            start = gr.Button("Classify", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Column():
            result = html(markup.progress("Loading the models", None))

    def updates(offer: Offer) -> list[Any]:
        samples, files = offer.samples, not offer.left.blocks(quotas.UPLOADS)
        shown = source.updates(offer.model, offer.query, _KEPT * files, samples=samples, files=files)
        return [*shown, *_of_model(offer.model, usable=samples or files)]

    async def run(
        request: gr.Request, name: str, threshold: str | None, method: HeatMapMethod | Literal["none"], *values: Any
    ) -> AsyncIterator[Any]:
        text = "Classifying the image" if method == "none" else "Classifying the image and computing the heat map"
        yield markup.progress(text, None)
        try:
            async with studio.client(request) as client:
                chosen = await find_model(client, name)
                image = await picture(client, chosen, values, query_of(request))
                classified = await client.classifications.create(
                    image.content,
                    model=chosen.name,
                    threshold=threshold or None,
                    heat_map=None if method == "none" else method,
                )
            yield await asyncio.to_thread(described, image, chosen, classified)
        except Exception as error:
            yield problem_of(error)

    inputs = [model, threshold, method, *source.inputs]
    stopped = markup.empty_state("Stopped", "Press Classify to start again.")
    shown = studio.displays.run_until_stopped([start.click], run, inputs, [result], (start, stop), stopped)
    source.fill_from_address(blocks)
    fields = [*source.outputs, threshold, start]
    loaded = fill_for_model(
        studio, blocks, model, fields, updates, uses=USES, note=used_up, problem=result, result=result, nothing=NOTHING
    )
    run_if_named(loaded, shown, inputs, [result, start, stop])


_KEPT = "<p class='ds-muted'>Your image is classified in memory, and not kept.</p>"


def _of_model(model: Model, *, usable: bool) -> list[Any]:
    """Updates of the thresholds and of the button."""
    classifier = model.classifier
    if classifier is None:
        return [gr.update(choices=[], value=None, info="This model has no classifier."), gr.update(interactive=False)]
    choices = [
        (f"{threshold_name(name)} ({value:.3f})", name)
        for name, value in sorted(classifier.thresholds.items(), key=lambda item: item[1])
    ]
    default = "default" if "default" in classifier.thresholds else next(iter(classifier.thresholds), None)
    return [gr.update(choices=choices, value=default, info=None), gr.update(interactive=usable)]


def described(image: Picture, model: Model, result: ClassificationsResult) -> str:
    """Return the classification of an image."""
    item = result[0]
    shown = image.shown() if item.heat_map is None else overlay(image, item.heat_map, result.positive_class)
    side = "at or above" if item.calibrated >= result.threshold.value else "below"
    name = "the given number" if result.threshold.name is None else threshold_name(result.threshold.name).lower()
    rows = [
        ("Before calibration", f"{item.probability:.3f}"),
        (
            "Classifier",
            f"{escape((model.classifier.architecture if model.classifier else '') or '')} "
            f"{markup.short_digest(result.model.classifier)}",
        ),
    ]
    return (
        f'{markup.READY}<div class="ds-panel ds-section"><h2 class="ds-hidden">Result</h2><div '
        f'class="ds-pair"><div>{shown}</div><div class="ds-grow">'
        f'<div class="ds-verdict"><b>Counted as {escape(item.class_name)}</b><p>The calibrated probability of '
        f"{escape(result.positive_class)} is {item.calibrated:.3f}, {side} the threshold {result.threshold.value:.3f} "
        f"({escape(name)}).</p></div>{probability(model, result)}{markup.facts(rows)}"
        f'<p class="ds-muted">{escape(result.notice)}</p></div></div></div>'
    )


def overlay(image: Picture, heat_map: HeatMap, positive_class: str) -> str:
    """Return an image with a heat map above it, whose opacity can be chosen, and how both are enlarged."""
    colours = Image.open(io.BytesIO(heat_map.content)).convert("RGB")
    # The pixels of a sample are enlarged by the browser; a file was reduced for its display already.
    whole = opened(image.content)
    square = ImageOps.fit(whole, (min(whole.size),) * 2) if image.sample is not None else _fitted(whole, DETAIL_PIXELS)
    views = (
        ("smooth", "smooth (Lanczos)", DETAIL_PIXELS, _fitted(whole, DETAIL_PIXELS), _resized(colours, DETAIL_PIXELS)),
        ("pixels", "pixels (nearest)", DETAIL_PIXELS, square, colours),
        ("input", f"1:1 ({colours.width} px)", colours.width, _fitted(whole, colours.width), colours),
    )
    stacks = "".join(_stack(name, side, pair, image.words, positive_class) for name, _, side, *pair in views)
    buttons = "".join(
        f'<button type="button" data-ds-show="{name}" aria-pressed="{"true" if name == "smooth" else "false"}">{words}</button>'
        for name, words, *_ in views
    )
    name = {"xrai": "XRAI", "integrated-gradients": "Integrated gradients"}.get(heat_map.method, heat_map.method)
    return (
        f'<figure class="ds-figure ds-overlay" data-ds-views><div>{stacks}</div>'
        f'<figcaption><label class="ds-opacity">Heat map <input type="range" min="0" max="100" value="70" data-ds-opacity>'
        f"<output>70 %</output></label>"
        f'<span class="ds-legend"><i class="ds-for"></i>for {escape(positive_class)} <i class="ds-against"></i>against</span>'
        f'<span class="ds-choice" role="group" aria-label="Enlarging">{buttons}</span>'
        f"<span>{escape(name)} of the centred square. 1:1: each pixel of the heat map is one of the screen, and the image is "
        f"resized to its size (Lanczos). Full colour: {heat_map.scale:.2g} logits for each 1 % of the area."
        "</span></figcaption></figure>"
    )


def _stack(name: str, side: int, pair: Sequence[Image.Image], words: str, positive_class: str) -> str:
    """An image and a heat map above it, in one of the views."""
    urls = [markup.data_url(png(each), "image/png") for each in pair]
    kind = ' class="ds-pixels"' if name != "smooth" else ""
    hidden = "" if name == "smooth" else " hidden"
    return (
        f'<div class="ds-stack" data-ds-view="{name}" style="width:{side}px;height:{side}px"{hidden}>'
        f'<img src="{urls[0]}" width="{side}" height="{side}" alt="{escape(words)}"{kind}>'
        f'<img src="{urls[1]}" width="{side}" height="{side}" alt="Heat map: parts for and against '
        f'{escape(positive_class)}"{kind}></div>'
    )


def _fitted(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.LANCZOS)

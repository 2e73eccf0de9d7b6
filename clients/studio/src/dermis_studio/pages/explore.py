"""The page Explore: an image along directions of the latent space, live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, Direction, EditedImage, EditParams, Model, SweepParams

from dermis_studio import markup, quotas, snippets
from dermis_studio.displays import stops
from dermis_studio.pages import latent_map, strips
from dermis_studio.samples import SampleRef, enlarged, find_model, options
from dermis_studio.sources import chosen_projection, made_here
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

SLIDERS = 7  # edits of one request
HERE_PIXELS = 256  # of the image beside the map
# An image that is there within this time is shown without progress, which would flicker. Then the progress is shown again and
# again: the start and the edited image have one place for it, and what comes first takes it away.
QUICK_SECONDS, REPEAT_SECONDS = 0.5, 1.0
MAX_STRENGTH = 4.0
SAMPLE, PROJECTION = "sample", "projection"
OWN, COARSE, MIDDLE, FINE, CUSTOM = "own", "coarse", "middle", "fine", "custom"
LAYERS = (("Its own", OWN), ("Coarse", COARSE), ("Middle", MIDDLE), ("Fine", FINE), ("Range", CUSTOM))
_KINDS = {"sefa": "SeFa", "ganspace": "GANSpace", "hyperplane": "attribute", "class-means": "between classes"}
# Directions with a meaning come first.
_ORDER = {"class-means": 0, "hyperplane": 1, "ganspace": 2, "sefa": 3}


@dataclass(frozen=True)
class Start:
    """The image that is edited: a sample or a projection.

    Attributes:
        model: Name of the model.
        sample: The sample, if it is one.
        projection: Id of the projection, and the position of the image in it.
    """

    model: str
    sample: SampleRef | None
    projection: tuple[str, int] | None

    @property
    def words(self) -> str:
        """What it is."""
        if self.sample is not None:
            return self.sample.words
        return "projected image"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the SDK that name it."""
        if self.sample is not None:
            sample = self.sample
            named: dict[str, Any] = {"samples": [(sample.class_name, sample.seed, sample.index)]}
            return named | options(self.model, sample.truncation, sample.noise)
        return {"projections": [self.projection], "model": self.model}

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the body of /v1/edits that name it."""
        body = dict(self.arguments)
        if self.sample is not None:
            sample = self.sample
            return body | {"samples": [{"class": sample.class_name, "seed": sample.seed, "index": sample.index}]}
        assert self.projection is not None
        return body | {"projections": [{"id": self.projection[0], "image": self.projection[1]}]}


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading("Explore", "Move an image along directions of the latent space. Strengths are in standard deviations.")
    with gr.Row(elem_classes=["ds-work", "ds-wide"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            kind = gr.Radio(label="Start from", choices=[("Sample", SAMPLE), ("Projection", PROJECTION)], value=SAMPLE)
            with gr.Column(elem_classes=["ds-fields"]) as of_sample:
                class_name = gr.Dropdown(label="Class", choices=[])
                with gr.Row():
                    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=80)
                    index = gr.Number(label="Index", value=0, precision=0, minimum=0, min_width=80)
            with gr.Column(elem_classes=["ds-fields"], visible=False) as of_projection:
                here_made = made_here()
                projection = gr.Textbox(label="Id of the projection", info="The page Project shows it.", max_length=40)
            chosen_names = gr.Dropdown(
                label="Directions", choices=[], multiselect=True, max_choices=SLIDERS, info=f"Up to {SLIDERS} at once."
            )
            sliders = [
                gr.Slider(-MAX_STRENGTH, MAX_STRENGTH, value=0, step=0.1, label="Direction", visible=False, buttons=[])
                for _ in range(SLIDERS)
            ]
            reset = gr.Button("Set all to 0", size="sm")
            layers = gr.Radio(
                label="Layers", choices=list(LAYERS), value=OWN, info="Coarse: form. Fine: colour, texture."
            )
            with gr.Row(visible=False) as ranged:
                first = gr.Number(label="First layer", value=0, precision=0, minimum=0, min_width=80)
                last = gr.Number(label="End (not included)", value=4, precision=0, minimum=1, min_width=80)
            used_up = html()
        with gr.Column(elem_classes=["ds-section"]):
            with gr.Row(elem_classes=["ds-panel", "ds-before-after"]):
                before = html(markup.progress("Loading the directions", None))
                after = html()
            live = html()
            stop_live = gr.Button("Stop", variant="stop", size="sm", visible=False)
            about = html()
            with gr.Column(elem_classes=["ds-panel"]):
                html("<h2>Strip</h2>")
                with gr.Row(elem_classes=["ds-strip-fields"]):
                    swept = gr.Dropdown(label="Direction", choices=[], min_width=160)
                    reach = gr.Slider(
                        0.5, MAX_STRENGTH, value=3, step=0.5, label="Strengths up to", buttons=[], min_width=160
                    )
                    steps = gr.Slider(3, 11, value=7, step=2, label="Images", buttons=[], min_width=160)
                    make = gr.Button("Make strip", min_width=120)
                    stop_strip = gr.Button("Stop", variant="stop", visible=False, min_width=120)
                strip = html()
            with gr.Column(elem_classes=["ds-panel"]):
                html("<h2>Map</h2>")
                with gr.Row(elem_classes=["ds-strip-fields"]):
                    across = gr.Dropdown(label="To the right", choices=[], min_width=160)
                    upwards = gr.Dropdown(label="To the top", choices=[], min_width=160)
                    extent = gr.Slider(
                        0.5, MAX_STRENGTH, value=3, step=0.5, label="Strengths up to", buttons=[], min_width=160
                    )
                    draw = gr.Button("Draw map", min_width=120)
                    stop_map = gr.Button("Stop", variant="stop", visible=False, min_width=120)
                with gr.Row(elem_classes=["ds-map-row"]):
                    area = html(js_on_load=latent_map.ON_LOAD)
                    here = html()
            with gr.Column(elem_classes=["ds-panel"]) as film:
                html("<h2>Film to another sample</h2>")
                with gr.Row(elem_classes=["ds-strip-fields"]):
                    end_class = gr.Dropdown(label="Class of the other", choices=[], min_width=140)
                    end_seed = gr.Number(label="Its seed", value=0, precision=0, minimum=0, min_width=80)
                    end_index = gr.Number(label="Its index", value=1, precision=0, minimum=0, min_width=80)
                    frames = gr.Slider(3, 24, value=9, step=1, label="Images", buttons=[], min_width=140)
                    interpolate = gr.Button("Make film", min_width=120)
                    stop_film = gr.Button("Stop", variant="stop", visible=False, min_width=120)
                between = html()

    start_fields = [model, kind, class_name, seed, index, projection]
    edit_fields = [layers, first, last, chosen_names, *sliders]
    everything = [*start_fields, *edit_fields]
    waiting = gr.update(visible=True)  # the button that stops a live image
    arrived = "", gr.update(visible=False)  # the progress of a live image, and that button

    async def load(request: gr.Request) -> Any:
        try:
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                (update, chosen), left = await asyncio.gather(
                    chosen_model(studio, client, request), quotas.left(client, quotas.IMAGES)
                )
                query = query_of(request)
                directions = await client.edits.directions(chosen.name)
        except Exception as error:
            return [problem_of(error), *[gr.skip()] * (len(fields) - 1)]
        asked = query.get("class_name")
        classes = chosen.classes
        projects = visitor.may("projections")
        usable = gr.update(interactive=not left.blocks(quotas.IMAGES))
        return [
            gr.skip(),
            gr.skip() if projects else gr.update(value=SAMPLE, visible=False),
            left.note,
            *[usable] * len(commands),
            update,
            gr.update(choices=classes, value=asked if asked in classes else (classes[0] if classes else None)),
            *direction_updates(directions),
            gr.update(choices=classes, value=classes[-1] if classes else None),
        ]

    @shows_problems(SLIDERS + 6)
    async def choose_model(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return [gr.skip()] * (SLIDERS + 6)
        async with studio.client(request) as client:
            chosen = await find_model(client, name)
            directions = await client.edits.directions(chosen.name)
        value = chosen.classes[0] if chosen.classes else None
        ends = gr.update(choices=chosen.classes, value=chosen.classes[-1] if chosen.classes else None)
        return [gr.skip(), gr.update(choices=chosen.classes, value=value), *direction_updates(directions), ends]

    def start_of(request: gr.Request, values: Sequence[Any]) -> Start:
        name, source, class_name, seed, index, projection = values
        query = query_of(request)
        if source == PROJECTION:
            if not projection:
                raise ValueError("no projection is named; enter the id of one, which the page Project makes")
            return Start(name, None, (projection.strip(), 0))
        if not class_name:
            raise ValueError("no class is chosen; choose one")
        sample = SampleRef(name, class_name, int(seed or 0), int(index or 0))
        named = SampleRef.parse(query)
        if named is not None and (named.class_name, named.seed, named.index) == (class_name, sample.seed, sample.index):
            sample = SampleRef(name, class_name, sample.seed, sample.index, named.truncation, named.noise)
        return Start(name, sample, None)

    async def show_start(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        unchanged = [gr.skip()] * 3
        if not studio.displays.changed(request, "start", values):
            yield unchanged
            return
        is_newest = studio.displays.begin(request, "start")
        try:
            start = start_of(request, values[:6])
            async with studio.client(request) as client:
                creation = asyncio.ensure_future(client.edits.create(**start.arguments))
                async with aclosing(while_running(creation, is_newest)) as waits:
                    async for _ in waits:
                        yield "", markup.progress("Generating the image", None), waiting
                if not is_newest():
                    yield unchanged
                    return
                image = (await creation)[0]
            yield shown(image, f"Start: {start.words}.", f"Before: {start.words}"), *arrived
        except Exception as error:
            if not is_newest():
                yield unchanged
                return
            studio.displays.forget(request, "start")
            yield problem_of(error), *arrived

    async def show_edit(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        unchanged = [gr.skip()] * 5
        if not studio.displays.changed(request, "edit", values):
            yield unchanged
            return
        is_newest = studio.displays.begin(request, "edit")
        try:
            start = start_of(request, values[:6])
            visitor = await studio.visitor(request)
            async with studio.client(request) as client:
                chosen = await find_model(client, start.model)
                edits = edits_of(chosen, values[6:])
                creation = asyncio.ensure_future(client.edits.create(**start.arguments, edits=edits or None))
                async with aclosing(while_running(creation, is_newest)) as waits:
                    async for _ in waits:
                        yield *[gr.skip()] * 3, markup.progress("Generating the edited image", None), waiting
                if not is_newest():
                    yield unchanged
                    return
                image = (await creation)[0]
                picture = shown(
                    image, "Edited." if edits else "Not edited: all strengths are 0.", f"After: {start.words}, edited"
                )
                close = enlarged(image.content, image.media_type, "The edited image", "Here.", pixels=HERE_PIXELS)
                yield markup.READY + picture, gr.skip(), close, *arrived
                words = ""
                if chosen.classifier is not None and visitor.may("classify"):
                    words = await probability_words(client, chosen, image)
            if not is_newest():
                yield unchanged
                return
            body = start.body | ({"edits": edits} if edits else {})
            address = studio.shown_address(request)
            arguments = start.arguments | ({"edits": edits} if edits else {})
            code = markup.code_block(
                "curl", snippets.curl(address, "/v1/edits", body, with_key=visitor.key is not None)
            ) + markup.code_block(
                "Python", snippets.python(address, "edits.create", arguments, 'result.save("edited")')
            )
            yield (
                gr.skip(),
                f'{words}<details class="ds-more"><summary>Copy as code</summary>{code}</details>',
                *[gr.skip()] * 3,
            )
        except Exception as error:
            if not is_newest():
                yield unchanged
                return
            studio.displays.forget(request, "edit")
            yield problem_of(error), gr.skip(), gr.skip(), *arrived

    def stop_showing(request: gr.Request, *values: Any) -> Any:
        """Stop a live image. What is entered now counts as shown, so that an event of it that waits does not begin it again."""
        for place, entered in (("start", values[:6]), ("edit", values)):
            studio.displays.begin(request, place)
            studio.displays.changed(request, place, entered)
        words = "Stopped. Change a value to generate the image."
        return f'<p class="ds-muted" role="status">{words}</p>', gr.update(visible=False)

    async def make_strip(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            direction, reach, steps = values[-3:]
            start = start_of(request, values[:6])
            if not direction:
                raise ValueError("no direction is chosen; choose one")
            count = int(steps)
            yield markup.progress(f"Generating {markup.counted(count, 'image')}", None)
            strengths = [round(reach * (2 * position / (count - 1) - 1), 3) for position in range(count)]
            async with studio.client(request) as client:
                chosen = await find_model(client, start.model)
                others = [edit for edit in edits_of(chosen, values[6:-3]) if edit["direction"] != direction]
                sweep: SweepParams = {"direction": direction, "strengths": strengths}
                layer_range = layers_of(chosen, *values[6:9])
                if layer_range is not None:
                    sweep["layers"] = list(layer_range)
                images = await client.edits.create(**start.arguments, edits=others or None, sweep=sweep)
            yield await asyncio.to_thread(strips.drawn, list(images), direction)
        except Exception as error:
            yield problem_of(error)

    async def draw_map(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            *names, reach = values[-3:]
            start = start_of(request, values[:6])
            if not all(names) or names[0] == names[1]:
                raise ValueError("the map needs two different directions; choose them")
            yield markup.progress(f"Generating {markup.counted(latent_map.CELLS**2, 'image')}", None)
            async with studio.client(request) as client:
                chosen = await find_model(client, start.model)
                others = [edit for edit in edits_of(chosen, values[6:-3]) if edit["direction"] not in names]
                axes = (str(names[0]), str(names[1]))
                rows = await latent_map.pictures(client, start.arguments, others, axes, float(reach))
            yield await asyncio.to_thread(latent_map.drawn, rows, axes, float(reach))
        except Exception as error:
            yield problem_of(error)

    def go_to(event: gr.EventData, names: list[str] | None, *strengths: float) -> Any:
        message = event._data if isinstance(event._data, dict) else {}
        order, values = latent_map.moved(message, names or [], strengths, SLIDERS)
        return [
            order,
            *[gr.update(label=name, value=value, visible=True) for name, value in zip(order, values, strict=True)],
            *[gr.update(value=0, visible=False)] * (SLIDERS - len(order)),
        ]

    async def make_film(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            end, count = values[6:9], int(values[9])
            sample = start_of(request, values[:6]).sample
            if sample is None or not end[0]:
                raise ValueError("a film needs two samples; start from a sample, and choose the class of the other one")
            yield markup.progress(f"Generating {markup.counted(count, 'image')}", None)
            arguments = options(sample.model, sample.truncation, sample.noise)
            async with studio.client(request) as client:
                images = await client.edits.interpolate(
                    (sample.class_name, sample.seed, sample.index),
                    (str(end[0]), int(end[1] or 0), int(end[2] or 0)),
                    images=count,
                    **arguments,
                )
            yield await asyncio.to_thread(strips.drawn, list(images), "interpolation")
        except Exception as error:
            yield problem_of(error)

    commands = [make, draw, interpolate]
    fields = [
        before,
        kind,
        used_up,
        *commands,
        model,
        class_name,
        chosen_names,
        *sliders,
        across,
        upwards,
        end_class,
    ]
    fill_from_address(
        blocks,
        AddressField("projection", kind, PROJECTION),
        AddressField("seed", seed),
        AddressField("index", index),
        AddressField("projection", projection),
    )
    loaded = blocks.load(load, None, fields, **PRIVATE)
    live_images = LiveImages(
        (show_start, start_fields, [before, live, stop_live]),
        (show_edit, everything, [after, about, here, live, stop_live]),
    )
    live_images.both_after(loaded)
    chosen_names.change(
        lambda names: gr.update(choices=names, value=names[0] if names else None), chosen_names, swept, **PRIVATE
    )
    kind.change(
        lambda source: (
            gr.update(visible=source == SAMPLE),
            gr.update(visible=source == PROJECTION),
            gr.update(visible=source == SAMPLE),
        ),
        kind,
        [of_sample, of_projection, film],
        **PRIVATE,
    )
    live_images.both_after(here_made.select(chosen_projection, None, projection, **PRIVATE))
    live_images.both_on([class_name.input, seed.input, index.input, projection.submit, projection.blur])
    other_model = model.input(
        choose_model,
        model,
        [before, class_name, chosen_names, *sliders, across, upwards, end_class],
        trigger_mode="always_last",
        **PRIVATE,
    )
    live_images.both_after(other_model)
    live_images.edited_after(
        chosen_names.input(name_sliders, [chosen_names], sliders, trigger_mode="always_last", **PRIVATE)
    )
    live_images.edited_on([*(slider.input for slider in sliders), layers.input, first.input, last.input])
    layers.change(lambda value: gr.update(visible=value == CUSTOM), layers, ranged, **PRIVATE)
    live_images.edited_after(reset.click(lambda: [0] * SLIDERS, None, sliders, **PRIVATE))
    stopped = '<p class="ds-muted" role="status">Stopped.</p>'
    studio.displays.run_until_stopped(
        [draw.click], draw_map, [*everything, across, upwards, extent], [area], (draw, stop_map), stopped, "map"
    )
    moved = [chosen_names, *sliders]
    live_images.edited_after(area.select(go_to, moved, moved, trigger_mode="always_last", **PRIVATE))
    ends = [*start_fields, end_class, end_seed, end_index, frames]
    studio.displays.run_until_stopped(
        [interpolate.click], make_film, ends, [between], (interpolate, stop_film), stopped, "film"
    )
    swept_fields = [*everything, swept, reach, steps]
    studio.displays.run_until_stopped(
        [make.click], make_strip, swept_fields, [strip], (make, stop_strip), stopped, "strip"
    )
    stops(stop_live.click, *live_images.events)
    stop_live.click(stop_showing, everything, [live, stop_live], concurrency_limit=None, **PRIVATE)


Listener = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]  # handler, inputs, outputs


class LiveImages:
    """The events that show the start and the edited image.

    The second follows on the first, but not when that was stopped.

    Args:
        start: What shows the start.
        edited: What shows the edited image.

    Attributes:
        events: What the listeners returned.
    """

    def __init__(self, start: Listener, edited: Listener) -> None:
        self._start, self._edited = start, edited
        self._options: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "always_last", **PRIVATE}
        self.events: list[Any] = []

    def both_on(self, events: Sequence[Any]) -> None:
        """Show both when one of these events arrives."""
        self._both(gr.on(list(events), *self._start, **self._options))

    def both_after(self, event: Any) -> None:
        """Show both after an event."""
        self._both(event.then(*self._start, **self._options))

    def _both(self, begun: Any) -> None:
        self.events.append(begun)
        self.edited_after(begun)

    def edited_on(self, events: Sequence[Any]) -> None:
        """Show the edited image when one of these events arrives."""
        self.events.append(gr.on(list(events), *self._edited, **self._options))

    def edited_after(self, event: Any) -> None:
        """Show the edited image after an event that was not stopped."""
        self.events.append(event.success(*self._edited, **self._options))


async def while_running(task: asyncio.Future[Any], is_wanted: Callable[[], bool]) -> AsyncGenerator[None, None]:
    """Yield after a moment and then once in a while until a task has ended or is not wanted any more.

    The task ends with the generator.
    """
    seconds = QUICK_SECONDS
    try:
        while not (await asyncio.wait({task}, timeout=seconds))[0] and is_wanted():
            yield
            seconds = REPEAT_SECONDS
    finally:
        if not task.done():
            task.cancel()


def direction_updates(directions: Sequence[Direction]) -> list[Any]:
    """Return updates of the choice of directions, of the sliders, and of the two directions of the map."""
    ordered = sorted(directions, key=lambda each: _ORDER.get(each.method, 9))
    choices = [(words_of(each), each.name) for each in ordered]
    names = [each.name for each in ordered[: min(5, SLIDERS)]]
    axes = [gr.update(choices=choices, value=next(iter(names[place:]), None)) for place in (0, 1)]
    return [gr.update(choices=choices, value=names), *name_sliders(names), *axes]


def name_sliders(names: Sequence[str]) -> list[Any]:
    """Return updates of the sliders for the chosen directions."""
    shown = [gr.update(label=name, value=0, visible=True) for name in names[:SLIDERS]]
    return shown + [gr.update(value=0, visible=False)] * (SLIDERS - len(shown))


def words_of(direction: Direction) -> str:
    """Return a direction in words."""
    return f"{direction.name} ({_KINDS.get(direction.method, direction.method)})"


def layers_of(model: Model, layers: str, first: float | None, last: float | None) -> tuple[int, int] | None:
    """Return the layers that edits change: the first, and the last + 1; None for those of each direction.

    Raises:
        ValueError: The range is empty.
    """
    count = model.num_ws or 0
    if layers == OWN or not count:
        return None
    if layers == CUSTOM:
        begin, end = int(first or 0), int(last or 0)
        if not 0 <= begin < end <= count:
            raise ValueError(f"the range of layers is empty or too large; choose one within 0 and {count}")
        return begin, end
    thirds = (0, round(count / 3), round(2 * count / 3), count)
    position = (COARSE, MIDDLE, FINE).index(layers)
    return thirds[position], thirds[position + 1]


def edits_of(model: Model, values: Sequence[Any]) -> list[EditParams]:
    """Return the edits that the fields ask for.

    Args:
        model: The model.
        values: Layers, first and last layer, the chosen directions, and the strengths.
    """
    layers, first, last, names, *strengths = values
    layer_range = layers_of(model, layers, first, last)
    result: list[EditParams] = []
    for name, strength in zip(names or [], strengths, strict=False):
        if strength:
            edit: EditParams = {"direction": name, "strength": float(strength)}
            if layer_range is not None:
                edit["layers"] = list(layer_range)
            result.append(edit)
    return result


def shown(image: EditedImage, caption: str, alt: str) -> str:
    """Return one image."""
    return enlarged(image.content, image.media_type, alt, escape(caption))


async def probability_words(client: AsyncDermisClient, model: Model, image: EditedImage) -> str:
    """Return the probability of the edited image in a line."""
    result = await client.classifications.create(image.content, model=model.name)
    return (
        f'<p class="ds-line">Calibrated probability of {escape(result.positive_class)} for the edited image: '
        f"<b>{result[0].calibrated:.3f}</b> (threshold {result.threshold.value:.3f}). Not a diagnosis.</p>"
    )

"""The page Project: the latent whose image is nearest to an image of the visitor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from html import escape
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, DermisError, Model, ProjectedImage, Projection, ProjectionPreview
from dermis_client.params import ProjectionSchedule
from PIL import Image, ImageOps

from dermis_studio import downloads, markup, quotas, scales
from dermis_studio.access import key_of
from dermis_studio.displays import stops
from dermis_studio.pages.dataset_view import when
from dermis_studio.samples import enlarged, find_model, png
from dermis_studio.sources import content_of, drop, opened
from dermis_studio.starts import links, offered
from dermis_studio.studio import (
    PRIVATE,
    Studio,
    chosen_model,
    cookies_of,
    heading,
    html,
    problem_of,
    query_of,
    shows_problems,
)

logger = logging.getLogger("dermis.studio")

MOST_PROBABLE = "Most probable"
KEPT = (
    "<h3>What is kept, and for how long</h3><ul><li>Your image: until the projection has ended.</li>"
    "<li>The latent and the reconstruction: until you delete them, or until they expire; the result says when.</li>"
    "<li>The name of the file is not sent. The projection belongs to your tenant.</li>"
    "<li>The id of the projection: in this browser, for the pages Explore and Map, until it expires or you sign out.</li></ul>"
)
NOTHING = (
    '<div class="ds-empty"><h2>No projection yet</h2><p>Choose an image, then press Project. It takes seconds to a minute.</p>'
    f'<div class="ds-kept">{KEPT}</div></div>'
)
STOPPED = markup.empty_state("Stopped", "Nothing of the image is kept. Press Project to start again.")
SHORT = '<p class="ds-muted">Kept: your image until the projection has ended, the result until you delete it or it expires.</p>'
POLL_SECONDS = 0.7
STOP_SECONDS = 10.0  # that the service has to say whether there is a projection already when the visitor stops
USES = (quotas.PROJECTIONS, quotas.UPLOADS, quotas.JOBS, quotas.STORED)
# The address names the projection, so that the page can be loaded again.
_ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (!button || event.detail > 1 || !window.confirm(button.dataset.confirm)) return;
  trigger('select', { act: button.dataset.act, id: button.dataset.id });
});
// The kind of enlargement that was chosen stays when the next reconstruction arrives.
let view = '';
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-ds-show]');
  if (button) view = button.dataset.dsShow;
});
watch('value', () => {
  if (view) for (const button of element.querySelectorAll(`[data-ds-show="${view}"][aria-pressed="false"]`)) button.click();
  const named = element.querySelector('[data-address]');
  if (!named) return;
  history.replaceState(null, '', named.dataset.address);
  const { made, until, projection, deleted } = named.dataset;
  if (projection && until) window.dermisProjections.remember(projection, made, until);
  if (deleted) window.dermisProjections.forget(deleted);
});
"""


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Project an image",
        "Find the latent whose generated image is nearest to yours. The page Explore can then edit it.",
    )
    with gr.Row(elem_classes=["ds-work"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            file = drop()
            html(SHORT)
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            class_name = gr.Dropdown(label="Class", choices=[MOST_PROBABLE], value=MOST_PROBABLE)
            schedule = gr.Radio(
                label="Schedule", choices=[("Fast", "fast"), ("Official, slower", "official")], value="fast"
            )
            video = gr.Checkbox(label="Film of the optimisation", value=True)
            used_up = html(markup.progress("Loading the models", None))
            start = gr.Button("Project", variant="primary", interactive=False)
            stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Column():
            result = html(NOTHING, js_on_load=_ON_LOAD)
    sending = gr.update(visible=False), gr.update(visible=True)  # start and stop
    sent = gr.update(visible=True), gr.update(visible=False)

    async def load(request: gr.Request) -> Any:
        try:
            async with studio.client(request) as client:
                (update, chosen), left = await asyncio.gather(
                    chosen_model(studio, client, request), quotas.left(client, *USES)
                )
            usable = gr.update(interactive=not left.blocks(*USES))
            return gr.skip(), update, class_update(chosen), left.note, usable
        except Exception as error:
            return problem_of(error), gr.skip(), gr.skip(), "", gr.skip()

    @shows_problems(2)
    async def choose_model(name: str, request: gr.Request) -> Any:
        if not studio.displays.changed(request, "model", name):
            return gr.skip(), gr.skip()
        async with studio.client(request) as client:
            return gr.skip(), class_update(await find_model(client, name))

    @studio.displays.newest(3)
    async def run(
        request: gr.Request, file: str | None, name: str, class_name: str, schedule: ProjectionSchedule, video: bool
    ) -> AsyncIterator[Any]:
        # Another image can be projected while this one is followed. If it is still being sent, nothing of it is kept.
        is_wanted = studio.displays.begin(request, "sending")
        yield markup.progress("Sending the image", None), *sending
        try:
            content, _ = content_of(file)
            projection = await created(
                studio,
                request,
                content,
                model=name or None,
                schedule=schedule,
                class_name=None if class_name == MOST_PROBABLE else class_name,
                video=video,
            )
            async with studio.client(request) as client:
                if not is_wanted():  # Gradio has not ended this handler yet
                    await client.projections.delete(projection.id)
                    return
                async for shown in followed(studio, client, request, projection, content):
                    yield shown, *sent
        except Exception as error:
            yield problem_of(error), *sent

    def stop_sending(request: gr.Request) -> Any:
        studio.displays.begin(request, "sending")
        studio.displays.begin(request)
        return STOPPED, *sent

    @studio.displays.newest()
    async def reopen(request: gr.Request) -> AsyncIterator[Any]:
        """Show the projection that the address names."""
        projection_id = query_of(request).get("projection")
        if not projection_id:
            yield gr.skip()  # a generator without any value would empty its output
            return
        try:
            async with studio.client(request) as client:
                projection = await client.projections.retrieve(projection_id)
                async for shown in followed(studio, client, request, projection, None):
                    yield shown
        except Exception as error:
            yield problem_of(error)

    @studio.displays.newest(2)
    async def act(event: gr.EventData, request: gr.Request) -> AsyncIterator[Any]:
        message = event._data if isinstance(event._data, dict) else {}
        try:
            projection_id = str(message.get("id"))
            async with studio.client(request) as client:
                await client.projections.delete(projection_id)
            done = markup.success("The projection, its latent and its images are deleted.")
            yield f'<div data-address="project" data-deleted="{escape(projection_id)}">{done}</div>', ""
        except Exception as error:
            yield problem_of(error), gr.skip()

    blocks.load(load, None, [result, model, class_name, used_up, start], **PRIVATE)
    reopened = blocks.load(reopen, None, result, concurrency_limit=None, **PRIVATE)
    model.input(choose_model, model, [result, class_name], trigger_mode="always_last", **PRIVATE)
    inputs = [file, model, class_name, schedule, video]
    stops(start.click, reopened)
    running = start.click(
        run, inputs, [result, start, stop], concurrency_limit=None, trigger_mode="multiple", **PRIVATE
    )
    stops(stop.click, running)
    stop.click(stop_sending, None, [result, start, stop], concurrency_limit=None, **PRIVATE)
    stops(result.select, running, reopened)
    result.select(act, None, [result, file], concurrency_limit=None, trigger_mode="multiple", **PRIVATE)


def class_update(model: Model) -> Any:
    """Return an update of the choice of the class."""
    return gr.update(choices=[MOST_PROBABLE, *model.classes], value=MOST_PROBABLE)


async def created(studio: Studio, request: gr.Request, content: bytes, **options: Any) -> Projection:
    """Create a projection. If the visitor stops it meanwhile, none is left, also if the service has made one already.

    Args:
        studio: The studio.
        request: The request of the visitor.
        content: The image.
        options: Options of `AsyncProjections.create`.
    """

    async def create() -> Projection:
        async with studio.client(request) as client:
            return await client.projections.create(content, **options)

    creation = asyncio.create_task(create())
    try:
        return await asyncio.shield(creation)
    except asyncio.CancelledError:
        removal = asyncio.create_task(_remove(studio, request, creation))
        _removals.add(removal)
        removal.add_done_callback(_removals.discard)
        raise


_removals: set[asyncio.Task[None]] = set()  # tasks that nothing refers to are collected


async def _remove(studio: Studio, request: gr.Request, creation: asyncio.Task[Projection]) -> None:
    """Delete a projection as soon as it has been created. If that takes long, end the sending of its image."""
    try:
        projection = await asyncio.wait_for(creation, STOP_SECONDS)
    except (TimeoutError, DermisError):
        return  # there is none
    try:
        async with studio.client(request) as client:
            await client.projections.delete(projection.id)
    except DermisError as error:
        logger.warning("a projection that its visitor has stopped could not be deleted: %s", error)


async def followed(
    studio: Studio, client: AsyncDermisClient, request: gr.Request, projection: Projection, content: bytes | None
) -> AsyncIterator[str]:
    """Show a projection until it has ended, and then its result.

    Args:
        studio: The studio.
        client: The client of the visitor.
        request: The request of the visitor.
        projection: The projection.
        content: The image of the visitor, if it is still there.
    """
    own = "" if content is None else await asyncio.to_thread(_own_figure, content)
    current, step = "", 0
    while not projection.finished:
        done = projection.progress
        text = f"{done.steps_done:,} of {markup.counted(done.steps_total, 'step')}"
        if done.eta_seconds is not None:
            text += f", {markup.duration(done.eta_seconds)} left"
        fraction = done.fraction if projection.state == "running" else None
        waiting = "Waiting for a free projector" if projection.state == "queued" else text
        preview = next((each for each in projection.previews or () if each.index == 0), None)
        if preview is not None and preview.step != step:
            shown = await _current_figure(client, projection, preview)
            current, step = (shown, preview.step) if shown else (current, step)
        yield (
            f'<div class="ds-panel '
            f'ds-section">{_top(projection, "Cancel and delete")}{markup.progress(waiting, fraction)}'
            f'<div class="ds-pair ds-live">{own}{current or _waiting_figure(projection)}</div></div>'
        )
        await asyncio.sleep(POLL_SECONDS)
        projection = await client.projections.retrieve(projection.id)
    if projection.data:
        yield await described(studio, request, projection, projection.data[0], content)
    else:
        yield markup.failure(projection.error, "projection", "project the image")


def _own_figure(content: bytes) -> str:
    """The image of the visitor beside its reconstruction."""
    url = markup.data_url(_square(content), "image/png")
    return (
        f'<figure class="ds-figure ds-own"><div><img src="{url}" width="384" height="384" alt="Your image"></div>'
        "<figcaption>Your image: the centred square, at 384 px (Lanczos).</figcaption></figure>"
    )


def _waiting_figure(projection: Projection) -> str:
    """What is in the place of the reconstruction until there is one."""
    words = "The reconstruction appears here." if projection.state == "queued" else "The first steps are being made."
    space = f'<div class="ds-first"><p>{words}</p></div>'
    return f'<figure class="ds-figure">{space}<figcaption>No reconstruction yet.</figcaption></figure>'


async def _current_figure(client: AsyncDermisClient, projection: Projection, preview: ProjectionPreview) -> str:
    """The current reconstruction and the distances so far; empty if it cannot be fetched, for instance after the end."""
    try:
        image = await client.projections.preview(projection.id, preview.index)
    except DermisError:
        return ""
    words = f"Reconstruction after step {preview.step:,}"
    distances = [(each.step, each.distance) for each in preview.distances]
    chart = scales.distance_chart(distances, projection.steps)
    figure = await asyncio.to_thread(lambda: enlarged(png(image), "image/png", words, f"{words}."))
    return f"<div>{figure}{chart}</div>"


def _top(projection: Projection, words: str) -> str:
    """The title of a projection and the button that deletes it."""
    question = "Delete the projection, its latent and its images? This cannot be undone."
    kept = ""
    if projection.data and projection.created_at is not None and projection.expires_at is not None:
        times = f'data-made="{projection.created_at.isoformat()}" data-until="{projection.expires_at.isoformat()}"'
        kept = f' data-projection="{escape(projection.id)}" {times}'
    return (
        f'<div class="ds-top" data-address="project?projection={escape(projection.id)}"{kept}><h2>Projection</h2>'
        f'<div class="ds-actions"><button type="button" class="ds-button ds-danger" data-act="delete" '
        f'data-id="{escape(projection.id)}" data-confirm="{question}">{words}</button></div></div>'
    )


def _square(content: bytes) -> bytes:
    """The centred square of an image, small, as PNG."""
    return png(ImageOps.fit(opened(content), (384, 384), Image.Resampling.LANCZOS))


async def described(
    studio: Studio, request: gr.Request, projection: Projection, item: ProjectedImage, content: bytes | None
) -> str:
    """Return the reconstruction beside the image, the distances, and what to do with it."""
    names = {kind: path.rpartition("/")[2] for kind, path in item.files.items()}
    at = f"projections/{escape(projection.id)}"
    pictures = ""
    if content is not None:
        pictures += await asyncio.to_thread(_own_figure, content)
    if "image" in names:
        found = await downloads.projection_file(
            studio.service, key_of(cookies_of(request)), projection.id, names["image"]
        )
        pictures += enlarged(found, "image/png", "The generated image that is nearest", "Reconstruction.")
    film = ""
    if "video" in names:
        film = (
            f'<h3>How the reconstruction converged</h3><figure class="ds-figure ds-film"><img '
            f'src="{at}/{escape(names["video"])}" '
            'alt="Film of the optimisation"><figcaption>A GIF has 256 colours for each image; the reconstruction above has '
            "all of them.</figcaption></figure>"
        )
    rows = [
        ("Distance", f"{item.distance:.3f} ({escape(item.distance_name)})"),
        ("Pixel error", f"{item.pixel_error:.1f} of 255 (root mean square)"),
        ("Steps, start", f"{item.steps:,}, {escape(item.start)}"),
        ("Latent space", escape(item.space)),
        ("Model", f"{escape(projection.model.name)} {markup.short_digest(projection.model.digest)}"),
        ("Id", f"<code>{escape(projection.id)}</code>"),
        ("Expires", escape(when(projection.expires_at))),
    ]
    visitor = await studio.visitor(request)
    starts = links(f"projection={projection.id}", offered(visitor, projection=True), "explore")
    files = "".join(
        markup.file_link(f"{at}/{escape(names[kind])}", words, kind="ds-button")
        for kind, words in (("latents", "Save latent"), ("image", "Save image"), ("video", "Save film"))
        if kind in names
    )
    return (
        f'<div class="ds-panel ds-section">{_top(projection, "Delete")}<div class="ds-pair">{pictures}</div>'
        f'<div class="ds-actions">{starts}{files}</div>{markup.facts(rows)}{film}</div>'
    )

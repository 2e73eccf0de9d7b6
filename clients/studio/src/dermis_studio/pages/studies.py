"""The page Reader study: create a blinded study, collect its images, invite readers, see the results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr
from dermis_client import AsyncDermisClient, NewInvitation, Study

from dermis_studio import markup, quotas
from dermis_studio.displays import stops
from dermis_studio.pages import study_view as view
from dermis_studio.studio import PRIVATE, Studio, chosen_model, heading, html, problem_of, query_of

POLL_SECONDS = 1.0
USES = (quotas.IMAGES, quotas.UPLOADS, quotas.STORED)
UPLOADS, FOLDER = "uploads", "folder"
# Buttons and the form of an invitation become events of the page. Images go to the studio in small requests, which pass them on
# with the key of the visitor, so that hundreds of them are never in one message.
_ON_LOAD = """
const tell = (text, problem) => {
  const status = element.querySelector('[data-study-status]');
  if (status) { status.textContent = text; status.classList.toggle('ds-alert', Boolean(problem)); }
};
const WAIT = 10000;  // milliseconds for which a form is not sent again, unless the page shows what came of it
let sent = -WAIT;
element.addEventListener('click', (event) => {
  if (event.detail > 1 && event.target.closest('[data-form] button')) event.preventDefault();  // a double click
  const button = event.target.closest('[data-act]');
  if (!button || event.detail > 1 || (button.dataset.confirm && !window.confirm(button.dataset.confirm))) return;
  trigger('select', { act: button.dataset.act, id: button.dataset.id, name: button.dataset.name });
});
element.addEventListener('submit', (event) => {
  const form = event.target.closest('[data-form]');
  if (!form) return;
  event.preventDefault();
  if (performance.now() - sent < WAIT) return;
  sent = performance.now();
  trigger('select', { act: form.dataset.form, id: form.dataset.id, label: form.label.value, days: Number(form.days.value) });
});
const warn = (event) => event.preventDefault();
element.addEventListener('change', async (event) => {
  const input = event.target.closest('[data-study-upload]');
  if (!input || !input.files.length) return;
  const id = input.dataset.studyUpload, files = [...input.files], total = files.length;
  const images = window.dermisCounted(total, 'image is', 'images are');
  const bar = element.querySelector('[data-study-progress]'), cancel = element.querySelector('[data-study-cancel]');
  const query = input.dataset.class ? '?class=' + encodeURIComponent(input.dataset.class) : '';
  // Until the upload has ended, nothing else is shown: its status and its Stop button are here.
  const leading = ['[data-study-upload]', '[data-act]', 'button.primary'].map((other) => `gradio-app ${other}`).join();
  const enabled = [...document.querySelectorAll(leading)].filter((other) => !other.disabled);
  for (const other of enabled) other.disabled = true;
  window.addEventListener('beforeunload', warn);
  bar.hidden = cancel.hidden = false;
  bar.max = total;
  cancel.focus();
  const controller = new AbortController();
  cancel.onclick = () => controller.abort();
  const result = await window.dermisUpload('studies/' + id + '/images' + query, files, controller.signal, (done, words) => {
    bar.value = done;
    tell(`${done} of ${images} uploaded. ${words}`);
  });
  input.value = '';
  for (const other of enabled) other.disabled = false;  // the page may be shown as it was before
  window.removeEventListener('beforeunload', warn);
  bar.hidden = cancel.hidden = true;
  input.focus();
  tell(`${result.done} of ${images} uploaded`);
  trigger('select', { act: 'uploaded', id, total, ...result });
});
let made = '';
watch('value', () => {
  sent = -WAIT;
  const form = element.querySelector('[data-made]');
  if (form && form.dataset.made !== made) { made = form.dataset.made; form.reset(); }  // its link is shown
  const named = element.querySelector('[data-address]');
  if (named) history.replaceState(null, '', named.dataset.address);
});
"""


def build(studio: Studio, blocks: gr.Blocks) -> None:
    """Build the page."""
    heading(
        "Reader study",
        "Can people tell generated from real images? Show both blinded, by a link for each reader, and see how often they are "
        "right.",
    )
    with gr.Row(elem_classes=["ds-work", "ds-wide"]):
        with gr.Column(elem_classes=["ds-panel", "ds-side"]):
            html("<h2>New study</h2>")
            name = gr.Textbox(label="Name", info="Readers see it.", max_length=200)
            model = gr.Dropdown(label="Model", choices=[], visible=False)
            count = gr.Number(
                label="Images", info="Half are real, half are generated.", value=200, precision=0, minimum=2, step=2
            )
            source = gr.Radio(
                label="Real images",
                choices=[("Upload them for this study", UPLOADS), ("Draw them from the folder of the service", FOLDER)],
                value=UPLOADS,
                visible=False,
            )
            equal = gr.Checkbox(
                label="As many images of each class",
                info="Otherwise in the proportions of the real images.",
                value=True,
            )
            with gr.Accordion("More", open=False):
                truncation = gr.Slider(
                    0.0,
                    1.5,
                    value=1.0,
                    step=0.05,
                    label="Truncation",
                    info="Lower: more typical, less varied.",
                    buttons=[],
                )
                seed = gr.Textbox(label="Seed", info="Empty: a random one. Keep it secret from readers.", max_length=19)
            used_up = html()
            create = gr.Button("Create study", variant="primary")
        with gr.Column(elem_classes=["ds-section"]):
            current = html(view.NOTHING, js_on_load=_ON_LOAD)
            table = html(markup.progress("Loading the studies", None), js_on_load=_ON_LOAD)

    async def load(request: gr.Request) -> Any:
        try:
            reads_models = (await studio.visitor(request)).may("models:read")  # without it, the default model is used
            async with studio.client(request) as client:
                studies, left = await asyncio.gather(client.studies.list(), quotas.left(client, *USES))
                update = (await chosen_model(studio, client, request))[0] if reads_models else gr.skip()
        except Exception as error:
            return problem_of(error), "", *[gr.skip()] * 4
        most = studies.max_images or 200
        return (
            gr.skip(),
            view.table(studies.data, query_of(request).get("study")),
            update,
            gr.update(visible=studies.folder_of_real_images),
            gr.update(value=min(200, most), maximum=most),
            left.note,
        )

    @studio.displays.newest(2)
    async def reopen(request: gr.Request) -> AsyncIterator[Any]:
        """Show the study that the address names."""
        study_id = query_of(request).get("study")
        if not study_id:
            yield gr.skip(), gr.skip()  # a generator without any value would empty its outputs
            return
        yield markup.progress("Loading the study", None), gr.skip()
        try:
            async with studio.client(request) as client:
                async for shown in followed(client, study_id):
                    yield shown
        except Exception as error:
            yield problem_of(error), gr.skip()

    @studio.displays.newest(2)
    async def start(
        request: gr.Request,
        name: str,
        model: str,
        count: float,
        source: str,
        equal: bool,
        truncation: float,
        seed: str,
    ) -> AsyncIterator[Any]:
        try:
            if not (name or "").strip():
                raise ValueError("the study has no name; enter one, which its readers see")
            if seed and not seed.strip().isdigit():
                raise ValueError("the seed is not a whole number; enter one, or leave it empty")
            yield markup.progress("Creating the study", None), gr.skip()
            async with studio.client(request) as client:
                study = await client.studies.create(
                    name.strip(),
                    images=int(count or 0),
                    real_images="folder" if source == FOLDER else "uploads",
                    model=model or None,
                    equal_classes=equal,
                    truncation_psi=None if truncation == 1.0 else truncation,
                    seed=int(seed) if seed else None,
                )
                async for shown in followed(client, study.id):
                    yield shown
        except Exception as error:
            yield problem_of(error), gr.skip()

    @studio.displays.newest(2)
    async def act(event: gr.EventData, request: gr.Request) -> AsyncIterator[Any]:
        message: Mapping[str, Any] = event._data if isinstance(event._data, dict) else {}
        name, study_id = message.get("act"), str(message.get("id"))
        try:
            async with studio.client(request) as client:
                if name == "delete":
                    await client.studies.delete(study_id)
                    done = markup.success("The study, its images and its answers are deleted.")
                    yield (
                        f'<div data-address="studies">{done}</div>',
                        view.table((await client.studies.list()).data, None),
                    )
                    return
                text, invited = await carried_out(client, str(name), study_id, message)
                if invited is not None:  # the client has the address that the studio itself uses
                    url = f"{studio.shown_address(request)}{invited.path}"
                    invited = invited.model_copy(update={"url": url})
                async for shown in followed(client, study_id, invited, text):
                    yield shown
        except Exception as error:
            problem = problem_of(error)
            try:  # what was there stays visible below the problem
                async with studio.client(request) as client:
                    async for shown in followed(client, study_id, None, problem):
                        yield shown
            except Exception:
                yield problem, gr.skip()

    blocks.load(load, None, [current, table, model, source, count, used_up], **PRIVATE)
    following = blocks.load(reopen, None, [current, table], concurrency_limit=None, **PRIVATE)
    fields = [name, model, count, source, equal, truncation, seed]
    stops(create.click, following)
    created = create.click(start, fields, [current, table], concurrency_limit=None, **PRIVATE)
    for component in (current, table):
        stops(component.select, following, created)
        component.select(act, None, [current, table], concurrency_limit=None, trigger_mode="multiple", **PRIVATE)


async def carried_out(
    client: AsyncDermisClient, name: str, study_id: str, message: Mapping[str, Any]
) -> tuple[str, NewInvitation | None]:
    """Carry out what a button of the page asks for.

    Returns:
        A message as HTML, and the invitation if one was created.
    """
    if name == "open":
        await client.studies.open(study_id)
    elif name == "close":
        await client.studies.close(study_id)
        return markup.success("The study is closed. No more answers are taken."), None
    elif name == "invite":
        label = str(message.get("label", "")).strip()
        days = 30 if message.get("days") is None else float(message["days"])
        return "", await client.studies.invite(study_id, label, expires_in_days=days)
    elif name == "revoke":
        invitation = await client.studies.revoke(study_id, str(message.get("name")))
        return markup.success(f"The link of {invitation.label} does not work any more."), None
    elif name == "uploaded":
        done, total = message.get("done"), message.get("total")
        if message.get("problem"):
            return _upload_problem(message), None
        stopped = "" if done == total else " The upload was stopped."
        return markup.success(f"{done} of {_uploaded(total)}.{stopped}"), None
    return "", None


def _uploaded(total: Any) -> str:
    """Return the words after "2 of " for a number from a page."""
    return f"{markup.counted(total if isinstance(total, int) else 0, 'image is', 'images are')} uploaded"


def _upload_problem(message: Mapping[str, Any]) -> str:
    """Return why an upload ended, from what `study_upload.js` says of it."""
    status = message.get("status")
    if not isinstance(status, int):  # the service did not answer, or not in time
        what = "Choose the files again."
    elif status == 422:
        what = "Choose the files again without those that are named here."
    else:
        wait = message.get("wait")
        what = f"{markup.remedy(status, wait if isinstance(wait, int | float) else None)} Then choose the files again."
    arrived = f"{message.get('done')} of {_uploaded(message.get('total'))}"
    what += f" {arrived}; images that are there already are not added twice."
    title = str(message.get("title") or "Not all images were uploaded")
    return markup.described_problem(title, str(message.get("problem")), what)


async def followed(
    client: AsyncDermisClient, study_id: str, invited: NewInvitation | None = None, message: str = ""
) -> AsyncIterator[Any]:
    """Show a study, until its images are ready. Yields values of the study and of the list."""
    while True:
        study = await client.studies.retrieve(study_id)
        yield (
            await shown_study(client, study, invited, message),
            view.table((await client.studies.list()).data, study.id),
        )
        if study.state != "preparing":
            return
        await asyncio.sleep(POLL_SECONDS)


async def shown_study(client: AsyncDermisClient, study: Study, invited: NewInvitation | None, message: str) -> str:
    """Return everything about one study as HTML."""
    invitations = await client.studies.invitations(study.id)
    results = await client.studies.results(study.id) if study.answers else None
    return view.described(study, invitations, results, invited, message)

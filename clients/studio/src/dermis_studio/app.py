"""Build the studio: the pages, Gradio, and the site around them."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from html import escape
from typing import Any

# Before Gradio is imported: no reports of use, no questions for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import gradio.state_holder
from fastapi import FastAPI
from gradio.blocks import Block
from gradio.state_holder import SessionState

from dermis_studio import frame
from dermis_studio.access import Visitors
from dermis_studio.pages import (
    authenticity,
    classify,
    datasets,
    embedding_map,
    explore,
    generate,
    models,
    project,
    studies,
)
from dermis_studio.service import Service
from dermis_studio.site import StudioSite
from dermis_studio.studio import Studio
from dermis_studio.theme import theme

BUILDERS = {
    "": generate.build,
    "explore": explore.build,
    "project": project.build,
    "authenticity": authenticity.build,
    "classify": classify.build,
    "datasets": datasets.build,
    "map": embedding_map.build,
    "studies": studies.build,
    "models": models.build,
}
_MAX_SESSIONS = 1000  # open pages; what a page has changed of its components is forgotten after as many others
_MAX_WAITING = 200  # events that wait for others; a further one is refused


def create_site(
    service: Service,
    prefix: str = "/studio",
    *,
    needs_key: bool | None = None,
    check_origin: bool = False,
    hosts: frozenset[str] = frozenset(),
) -> StudioSite:
    """Build the studio. It takes seconds, so call it in a thread.

    Args:
        service: The service that the pages call.
        prefix: The path that the studio is below.
        needs_key: Whether the service needs credentials; None if that is not known.
        check_origin: Whether to refuse requests that pages of other sites cause.
        hosts: With `check_origin`, the host names under which the studio answers, in addition to those of this machine.
    """
    for name in ("httpx", "gradio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    visitors = Visitors(service, needs_key)
    studio = Studio(service, visitors)
    first, *others = frame.PAGES
    # Nothing is kept on the disk; should a component write a file, it is deleted within minutes.
    with gr.Blocks(title="dermis studio", analytics_enabled=False, delete_cache=(300, 300), fill_width=True) as blocks:
        BUILDERS[first.path](studio, blocks)
    for page in others:
        if page.path in BUILDERS:
            with blocks.route(page.name, f"/{page.path}"):
                BUILDERS[page.path](studio, blocks)
    blocks.state_session_capacity = _MAX_SESSIONS
    setattr(gradio.state_holder, "SessionState", Session)  # noqa: B010  (it has no option for this)
    for block in blocks.blocks.values():
        if isinstance(block, gr.Dropdown | gr.Radio):
            setattr(block, "preprocess", _as_sent)  # noqa: B010  (a method cannot be assigned)
        if isinstance(block, gr.Dropdown):
            # A process that was started since the page was loaded does not know its choices, and would warn of each value.
            setattr(block, "_warn_if_invalid_choice", lambda value: None)  # noqa: B010
    _name_numbers()
    blocks.queue(default_concurrency_limit=16, max_size=_MAX_WAITING, api_open=False)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SSR mode")  # it is off
        _mount(app, blocks, prefix)
    return StudioSite(service, visitors, app, prefix, check_origin=check_origin, hosts=hosts, queue=blocks._queue)


class Session(SessionState):  # type: ignore[misc]
    """What Gradio knows of an open page: its components as they were changed, without their values.

    Gradio (6.31) keeps the last value of each input and output, uploaded images among them, and each component that a change
    has replaced, under a new id. It needs the values for links to the state of a page, which the studio does not offer, and
    it frees them only after many further pages.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        super().__init__(blocks)
        self.config_values.clear()

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(value, Block):
            value._id = key  # so that the next change of the component replaces this one
        super().__setitem__(key, value)
        self.config_values.clear()

    def _update_config(self, key: int) -> None:
        """Keep nothing."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """Keep nothing."""


def _as_sent(payload: Any) -> Any:
    """Take a choice as the browser sends it; the handlers and the service check it.

    Gradio compares it with the choices that the page was given when it was loaded. A process that was started since then
    does not know them, and would refuse each event of a page that is still open.
    """
    values = payload if isinstance(payload, list) else [payload]
    if not all(value is None or isinstance(value, str) for value in values):
        raise gr.Error("A choice has to be a text. Load the page again.")
    return payload


def _name_numbers() -> None:
    """Let Gradio name the field when it refuses a number, and say which numbers it takes.

    It makes copies of a component for the sessions of the pages, so this changes the classes and not the components.
    """
    for kind in (gr.Number, gr.Slider):
        if not getattr(kind.preprocess, "names_field", False):
            _name_numbers_of(kind)


def _name_numbers_of(kind: Any) -> None:
    refuse = kind.preprocess

    @functools.wraps(refuse)
    def preprocess(self: Any, payload: Any) -> Any:
        try:
            return refuse(self, payload)
        except gr.Error:
            raise number_refused(self.label, payload, self.minimum, self.maximum) from None

    setattr(preprocess, "names_field", True)  # noqa: B010
    setattr(kind, "preprocess", preprocess)  # noqa: B010


def number_refused(label: str, value: float, least: float | None, greatest: float | None) -> gr.Error:
    """Return the message that a number is not allowed, with those that are."""
    if least is None:
        allowed = f"at most {greatest:,g}"
    elif greatest is None:
        allowed = f"{least:,g} or more"
    else:
        allowed = f"{least:,g} to {greatest:,g}"
    message = f"{escape(label)}: {value:,g} is not allowed. Enter {allowed}."  # Gradio shows it as HTML
    return gr.Error(message, title="This number is not allowed", print_exception=False)


def _mount(app: FastAPI, blocks: gr.Blocks, prefix: str) -> None:
    """Mount the pages, with everything off that the studio does not use."""
    gr.mount_gradio_app(
        app,
        blocks,
        prefix,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[],
        theme=theme(),
    )

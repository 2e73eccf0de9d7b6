"""What the pages share: the service, the visitor of a request, and pieces of Gradio."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from dermis_client import AsyncDermisClient, DermisError, Model

from dermis_studio import markup
from dermis_studio.access import Visitor, Visitors, key_of
from dermis_studio.displays import Displays
from dermis_studio.service import Service

logger = logging.getLogger("dermis.studio")

P = ParamSpec("P")
T = TypeVar("T")

# A handler reads the visitor from its request, so it has a parameter `request: gr.Request`. No handler is part of a public API.
PRIVATE: Mapping[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Studio:
    """What the pages share.

    Attributes:
        service: The service.
        visitors: Its visitors.
        displays: What is shown on the open pages.
    """

    def __init__(self, service: Service, visitors: Visitors) -> None:
        self.service = service
        self.visitors = visitors
        self.displays = Displays()

    @asynccontextmanager
    async def client(self, request: gr.Request) -> AsyncIterator[AsyncDermisClient]:
        """A client with the credentials of the visitor who sent a request."""
        async with self.service.client(key_of(cookies_of(request))) as client:
            yield client

    async def visitor(self, request: gr.Request) -> Visitor:
        """The visitor who sent a request.

        Raises:
            DermisError: The key has ended.
        """
        visitor = await self.visitors.find(key_of(cookies_of(request)))
        if visitor is None:
            raise DermisError("the key has ended; load the page again and sign in")
        return visitor

    def shown_address(self, request: gr.Request) -> str:
        """The address of the service for programs of the visitor and for readers of studies."""
        if self.service.public_url is not None:
            return self.service.public_url
        if not self.service.own_host:
            return self.service.base_url
        url = urls_of(request)
        return f"{url.scheme}://{url.netloc}"


def cookies_of(request: gr.Request) -> Mapping[str, str]:
    """The cookies of a request."""
    inner = request.request
    return {} if inner is None else inner.cookies


def urls_of(request: gr.Request) -> Any:
    """The address of a request."""
    inner = request.request
    assert inner is not None
    return inner.url


def query_of(request: gr.Request) -> dict[str, str]:
    """The query of the address of the page. Gradio sends it with each event."""
    inner = request.request
    return {} if inner is None else dict(inner.query_params)


def html(value: str = "", **options: Any) -> gr.HTML:
    """Return a component with the studio's own HTML, without the styles of Gradio for texts."""
    return gr.HTML(value, apply_default_css=False, **options)


# Runs in the browser as soon as the page is there, so that it replaces nothing that a visitor has entered.
_FROM_ADDRESS = """(...values) => {
  const query = new URLSearchParams(window.location.search);
  return NAMES.map(({ name, kind, only, choices, least, greatest }, place) => {
    const text = query.get(name), kept = values[place];
    if (text === null) return kept;
    if (only !== null) return only;
    if (kind === 'choice') return choices.includes(text) ? text : kept;
    if (kind === 'whole') return /^\\d+$/.test(text) ? Number(text) : kept;
    if (kind === 'number') return /^\\d+(\\.\\d+)?$/.test(text) && text >= least && text <= greatest ? Number(text) : kept;
    return text;
  });
}"""


@dataclass(frozen=True)
class AddressField:
    """A field that the query of the address of a page can fill.

    Attributes:
        name: Name in the query.
        component: The field.
        value: The value that the field gets if the query has the name; None for that of the query.
    """

    name: str
    component: Any
    value: str | None = None


def address_script(fields: Sequence[AddressField]) -> str:
    """Return a function of the browser: from the values of fields to those that the address of the page gives them."""
    return _FROM_ADDRESS.replace("NAMES", json.dumps([_rule_of(field) for field in fields]))


def _rule_of(field: AddressField) -> dict[str, Any]:
    """What the browser has to know to fill a field."""
    component, rule = field.component, {"name": field.name, "kind": "text", "only": field.value}
    if isinstance(component, gr.Number):
        return rule | {"kind": "whole"}
    if isinstance(component, gr.Slider):
        return rule | {"kind": "number", "least": component.minimum, "greatest": component.maximum}
    if isinstance(component, gr.Radio):
        return rule | {"kind": "choice", "choices": [value for _, value in component.choices]}
    return rule


def fill_from_address(blocks: gr.Blocks, *fields: AddressField) -> None:
    """Fill fields from the address of the page when it is loaded. What a field cannot have fills nothing."""
    components = [field.component for field in fields]
    blocks.load(None, components, components, js=address_script(fields), **PRIVATE)


def heading(title: str, text: str) -> None:
    """Put the title of a page at its top."""
    html(f'<div class="ds-title"><h1>{escape(title)}</h1><p>{escape(text)}</p></div>')


async def chosen_model(studio: Studio, client: AsyncDermisClient, request: gr.Request) -> tuple[Any, Model]:
    """Return an update of the dropdown of models, which is hidden if there is only one, and the model of the page.

    It is the one that the address of the page names, or else the first one.

    Raises:
        DermisError: There is no model, or the service did not list them.
    """
    models = await client.models.list()
    if not models:
        raise DermisError("the service has no model for you; ask its operator")
    name = query_of(request).get("model")
    model = next((model for model in models if model.name == name), models[0])
    studio.displays.changed(request, "model", model.name)
    return gr.update(choices=[m.name for m in models], value=model.name, visible=len(models) > 1), model


def problem_of(error: Exception) -> str:
    """Return an error as HTML. Errors of the studio itself are logged."""
    if not isinstance(error, DermisError | ValueError):
        logger.exception("a page failed", exc_info=error)
    if isinstance(error, ValueError) and not isinstance(error, DermisError):
        error = DermisError(str(error))
    return markup.problem(error)


def shows_problems(outputs: int = 1) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[Any]]]:
    """A decorator of handlers: an error becomes the value of the first output, and the other outputs stay as they are.

    Args:
        outputs: Number of outputs.
    """

    def decorate(handler: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[Any]]:
        @functools.wraps(handler)
        async def handle(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return await handler(*args, **kwargs)
            except Exception as error:
                shown = problem_of(error)
                return shown if outputs == 1 else (shown, *(gr.skip() for _ in range(outputs - 1)))

        return handle

    return decorate

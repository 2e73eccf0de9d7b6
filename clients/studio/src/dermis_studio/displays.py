"""Which of the displays of a page is the newest one, so that an older one that still runs shows nothing over it.

Gradio keeps to itself when it stops an event: the listeners of one component are sent one after the other, each once the one
before has ended, and what an event has sent before it is stopped still arrives. So a page does not rely on that alone.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, ParamSpec, cast

import gradio as gr

MOST_PAGES = 10_000
P = ParamSpec("P")


class Displays:
    """The number of the newest display of each page that is open.

    Args:
        most: Number of pages; beyond it, the least recently used one is forgotten, and what it shows ends.
    """

    def __init__(self, most: int = MOST_PAGES) -> None:
        self._most = most
        self._count = 0
        self._newest: OrderedDict[str, int] = OrderedDict()

    def begin(self, request: gr.Request) -> Callable[[], bool]:
        """Begin a display on the page that sent a request. Returns a function that says whether it is still the newest one."""
        page = str(request.session_hash)
        self._count += 1
        number = self._newest[page] = self._count
        self._newest.move_to_end(page)
        while len(self._newest) > self._most:
            self._newest.popitem(last=False)
        return lambda: self._newest.get(page) == number

    def newest(self, outputs: int = 1) -> Callable[[Callable[P, AsyncIterator[Any]]], Callable[P, AsyncIterator[Any]]]:
        """A decorator of handlers that yield: they begin a display, and end without a trace when a newer one begins.

        Args:
            outputs: Number of outputs.
        """
        unchanged = gr.skip() if outputs == 1 else tuple(gr.skip() for _ in range(outputs))

        def decorate(handler: Callable[P, AsyncIterator[Any]]) -> Callable[P, AsyncIterator[Any]]:
            @functools.wraps(handler)
            async def handle(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Any]:
                is_newest = self.begin(next(value for value in args if isinstance(value, gr.Request)))
                async with aclosing(cast(Any, handler(*args, **kwargs))) as values:
                    async for shown in values:
                        if not is_newest():
                            break
                        yield shown
                if not is_newest():  # Gradio sends the last value once more when a handler ends
                    yield unchanged

            return handle

        return decorate


def stops(event: Callable[..., Any], *running: Any) -> None:
    """Let an event of a component stop running handlers. Call this before the event gets a handler of its own.

    Args:
        event: The method that adds a listener, such as `button.click`.
        running: What the listeners to be stopped returned.
    """
    event(None, None, None, cancels=list(running), api_visibility="private", show_progress="hidden")

"""Which of the displays of a page is the newest one, so that an older one that still runs shows nothing over it.

Gradio keeps to itself when it stops an event: the listeners of one component are sent one after the other, each once the one
before has ended, and what an event has sent before it is stopped still arrives. So a page does not rely on that alone.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Literal, cast

import gradio as gr

MOST_PAGES = 10_000
Handler = Callable[..., AsyncIterator[Any]]


class Displays:
    """The number of the newest display of each page that is open.

    Args:
        most: Number of pages; beyond it, the least recently used one is forgotten, and what it shows ends.
    """

    def __init__(self, most: int = MOST_PAGES) -> None:
        self._most = most
        self._count = 0
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._values: OrderedDict[str, int] = OrderedDict()
        self._sending: set[str] = set()

    def begin(self, request: gr.Request, place: str = "") -> Callable[[], bool]:
        """Begin a display on the page that sent a request.

        Args:
            request: The request.
            place: Where on the page, if it has several displays at a time.

        Returns:
            A function that says whether this is still the newest display there.
        """
        page = f"{request.session_hash}/{place}"
        self._count += 1
        number = self._newest[page] = self._count
        self._newest.move_to_end(page)
        while len(self._newest) > self._most:
            self._newest.popitem(last=False)

        def is_newest() -> bool:
            if self._newest.get(page) != number:
                return False
            self._newest.move_to_end(page)  # what is being shown is not forgotten, however many pages others open
            return True

        return is_newest

    def changed(self, request: gr.Request, place: str, value: Any) -> bool:
        """Whether a value of a page differs from that of the last call.

        Gradio (6.31) also reports an input when the focus leaves a list in which nothing was chosen.

        Args:
            request: The request.
            place: What the value is of.
            value: The value; a hash of it is kept.
        """
        page, kept = f"{request.session_hash}/{place}", hash(repr(value))
        if self._values.get(page) == kept:
            return False
        self._values[page] = kept
        self._values.move_to_end(page)  # the least recently changed one is forgotten first
        while len(self._values) > self._most:
            self._values.popitem(last=False)
        return True

    def forget(self, request: gr.Request, place: str) -> None:
        """Forget a value, so that the next one counts as changed."""
        self._values.pop(f"{request.session_hash}/{place}", None)

    @contextmanager
    def sending(self, request: gr.Request) -> Iterator[bool]:
        """Whether a page sends no request yet, for the time of a `with` block.

        Gradio's own way to ignore a second event ("once") lasts until the handler of the first one has ended, which can follow
        a job to its end.

        Args:
            request: The request.
        """
        page = str(request.session_hash)
        if page in self._sending:
            yield False
            return
        self._sending.add(page)
        try:
            yield True
        finally:
            self._sending.discard(page)

    def run_until_stopped(
        self,
        events: Sequence[Callable[..., Any]],
        handler: Handler,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        buttons: tuple[gr.Button | None, gr.Button],
        stopped: Any,
        place: str = "",
        *,
        trigger_mode: Literal["once", "multiple"] = "once",
    ) -> Handler:
        """Let events run a handler until it ends or a button stops it.

        Args:
            events: The events, such as `button.click`.
            handler: The handler, which yields values of `outputs`.
            inputs: Its inputs.
            outputs: Its outputs.
            buttons: A button that is shown while the handler does not run, if there is one, and the button that stops it, shown
                while it runs.
            stopped: The values of `outputs` once it has been stopped.
            place: Where on the page, if it has several displays at a time.
            trigger_mode: Whether an event that arrives while the handler runs is ignored, or takes its place.

        Returns:
            The handler with updates of the buttons after its values.
        """
        start, stop_button = buttons
        shown_buttons = [button for button in buttons if button is not None]
        running = tuple(gr.update(visible=button is stop_button) for button in shown_buttons)
        ended = tuple(gr.update(visible=button is start) for button in shown_buttons)

        @functools.wraps(handler)
        async def run(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async with aclosing(cast(Any, handler(*args, **kwargs))) as values:
                async for shown in values:
                    yield *(shown if isinstance(shown, tuple) else (shown,)), *running
            yield *(gr.skip() for _ in outputs), *ended

        def stop(request: gr.Request) -> Any:
            self.begin(request, place)
            return *(stopped if isinstance(stopped, tuple) else (stopped,)), *ended

        shown_here: Handler = self.newest(len(outputs) + len(shown_buttons), place)(run)
        listener: Mapping[str, Any] = {
            "api_visibility": "private",
            "show_progress": "hidden",
            "concurrency_limit": None,
        }
        everything = [*outputs, *shown_buttons]
        started = gr.on(list(events), shown_here, list(inputs), everything, trigger_mode=trigger_mode, **listener)
        stops(stop_button.click, started)
        stop_button.click(stop, None, everything, **listener)
        return shown_here

    def newest(self, outputs: int = 1, place: str = "") -> Callable[[Handler], Handler]:
        """A decorator of handlers that yield: they begin a display, and end without a trace when a newer one begins.

        Args:
            outputs: Number of outputs.
            place: Where on the page, if it has several displays at a time.
        """
        unchanged = gr.skip() if outputs == 1 else tuple(gr.skip() for _ in range(outputs))

        def decorate(handler: Handler) -> Handler:
            @functools.wraps(handler)
            async def handle(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                is_newest = self.begin(next(value for value in args if isinstance(value, gr.Request)), place)
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

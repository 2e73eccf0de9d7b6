"""Images for the routes that answer with them at once: few calls at a time, each within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from dermis.bundle import Bundle
from dermis.dataset.request import EditOption, classes_of
from dermis.directions.edit import bundle_offset
from dermis.errors import RequestError
from services.gateway.dependencies import Context
from services.inference.samples import Image
from services.problems import ProblemError

_BUSY = {"Retry-After": "5"}
_in_work = 0


async def draw_soon(context: Context, draw: Callable[[], Awaitable[list[Image]]]) -> list[Image]:
    """What `draw` gives. ProblemError if too many calls wait already, or if it takes too long."""
    global _in_work  # noqa: PLW0603
    if _in_work >= context.settings.max_waiting_image_calls:
        raise ProblemError("overloaded", "too many calls are waiting for images", headers=_BUSY)
    _in_work += 1
    try:
        return await asyncio.wait_for(draw(), context.settings.image_timeout_seconds)
    except TimeoutError:
        raise ProblemError("overloaded", "the generator is busy; try again or ask for fewer", headers=_BUSY) from None
    finally:
        _in_work -= 1


def check_classes(names: Mapping[str, str], bundle: Bundle) -> None:
    """RequestError if a class is none of the bundle's; `names` tells each one's field."""
    known = classes_of(bundle)
    for field, name in names.items():
        if name not in known:
            raise RequestError(field, f"unknown class; this model has {', '.join(known)}", "unknown-class")


def check_cutoff(truncation_cutoff: int | None, bundle: Bundle) -> None:
    """RequestError if the bundle has fewer style layers."""
    if truncation_cutoff is not None and truncation_cutoff > bundle.generator.num_ws:
        message = f"this model has {bundle.generator.num_ws} style layers"
        raise RequestError("truncation_cutoff", message, "invalid-request")


def check_edits(edits: Sequence[EditOption], bundle: Bundle) -> None:
    """RequestError, naming the field, if the bundle lacks a direction or the layers."""
    bundle_offset(bundle, [option.edit for option in edits])

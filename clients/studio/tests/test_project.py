"""Tests of the page Project: what is left of a projection whose visitor stops while the image is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from dermis_client import DermisError
from dermis_studio.pages import project

REQUEST = gr.Request(session_hash="page")


class Service:
    """A service that creates a projection once it is allowed to, in the place of the studio and of its client."""

    def __init__(self, error: Exception | None = None) -> None:
        self.allowed = asyncio.Event()
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.deleted: list[str] = []
        self.projections = self
        self.error = error

    @asynccontextmanager
    async def client(self, _request: gr.Request) -> AsyncIterator[Any]:
        yield self

    async def create(self, _content: bytes, **_options: Any) -> Any:
        self.begun.set()
        try:
            await self.allowed.wait()
            if self.error is not None:
                raise self.error
            return SimpleNamespace(id="pr_1")
        finally:
            self.ended.set()

    async def delete(self, projection_id: str) -> None:
        self.deleted.append(projection_id)


async def stop_while_sending(service: Service) -> None:
    sending = asyncio.create_task(project.created(cast(Any, service), REQUEST, b"image"))
    await service.begun.wait()
    sending.cancel()  # as Gradio does
    with pytest.raises(asyncio.CancelledError):
        await sending


@pytest.mark.parametrize("error", [None, DermisError("refused")])
def test_stopped_projection_is_deleted_if_the_service_has_created_it(error: Exception | None) -> None:
    async def scenario() -> list[str]:
        service = Service(error)
        await stop_while_sending(service)
        assert not service.ended.is_set()
        service.allowed.set()
        await asyncio.gather(*project._removals)
        return service.deleted

    assert asyncio.run(scenario()) == ([] if error else ["pr_1"])


def test_stopping_ends_the_sending_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "STOP_SECONDS", 0.01)

    async def scenario() -> tuple[bool, list[str]]:
        service = Service()
        await stop_while_sending(service)
        await asyncio.gather(*project._removals)
        return service.ended.is_set(), service.deleted

    assert asyncio.run(scenario()) == (True, [])


def test_projection_that_nobody_stops_is_returned() -> None:
    async def scenario() -> tuple[str, list[str]]:
        service = Service()
        service.allowed.set()
        made = await project.created(cast(Any, service), REQUEST, b"image")
        return made.id, service.deleted

    assert asyncio.run(scenario()) == ("pr_1", [])

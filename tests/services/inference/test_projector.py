"""Tests of the projector: a call that nobody waits for any more ends, so that the next one can begin."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dermis.projection.schedule import Schedule
from services.callers import CallerMiddleware, caller_has_disconnected
from services.inference.base import InferenceService
from services.inference.projections import ProjectionTask
from services.inference.projector import _MAX_CANCELLED, ProjectorService

TASK = ProjectionTask(Schedule(steps=3)).to_dict()


class FakeProjector:
    """Counts steps, and waits in the first one until `ready` is set or the caller has disconnected."""

    bundle: Any = SimpleNamespace(digest="d", name="tiny", provenance={})

    def __init__(self) -> None:
        self.ready, self.begun = threading.Event(), threading.Event()
        self.steps = 0

    def project(self, _targets: Any, schedule: Schedule, on_step: Callable[[Any], None], **_: Any) -> Iterator[Any]:
        for step in range(schedule.steps):
            self.begun.set()
            deadline = time.monotonic() + 10
            while not (self.ready.wait(0.01) or caller_has_disconnected()):
                assert time.monotonic() < deadline
            self.steps += 1
            on_step([(0, step + 1)])
        yield from ()


class Call:
    """A call of the projector in a thread, as BentoML makes it, whose caller leaves when `left` is set."""

    def __init__(self, service: Any, ticket: str = "one") -> None:
        self.left = threading.Event()
        self.answer: dict[str, Any] = {}
        self._service, self._ticket = service, ticket
        self._messages = [{"type": "http.request"}]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(CallerMiddleware(self._app)({"type": "http"}, self._receive, None))  # type: ignore[arg-type]

    async def _app(self, _scope: Any, receive: Any, _send: Any) -> None:
        await receive()
        images = np.zeros((1, 8, 8, 3), np.uint8)
        self.answer = await asyncio.to_thread(self._service.project, "d", images, [0], TASK, self._ticket)

    async def _receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        while not self.left.is_set():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    def problem(self) -> str:
        self._thread.join(10)
        return str(self.answer["problem"])


@pytest.fixture
def projector() -> FakeProjector:
    return FakeProjector()


@pytest.fixture
def projecting(projector: FakeProjector, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The service, with a projector that is loaded."""
    monkeypatch.setattr(InferenceService, "__init__", lambda _: None)
    made = ProjectorService.inner()  # type: ignore[attr-defined]
    made._models = {"d": SimpleNamespace(digest="d", name="tiny", location="here")}
    made._projector = lambda _: projector
    return made


def test_cancellation_before_the_first_step_ends_the_call(projecting: Any, projector: FakeProjector) -> None:
    call = Call(projecting)
    assert projector.begun.wait(10)
    asyncio.run(projecting.cancel("one"))
    projector.ready.set()
    assert call.problem() == "the projection was cancelled"
    assert projector.steps == 1


def test_cancelled_call_that_waited_for_the_thread_does_not_begin(projecting: Any, projector: FakeProjector) -> None:
    asyncio.run(projecting.cancel("one"))  # BentoML calls `project` only when the thread is free
    projector.ready.set()
    assert Call(projecting).problem() == "the projection was cancelled"
    assert projector.steps == 0 and not projector.begun.is_set()


def test_call_cancelled_while_networks_are_loaded_does_not_begin(projecting: Any, projector: FakeProjector) -> None:
    def load(_: Any) -> FakeProjector:
        asyncio.run(projecting.cancel("one"))
        return projector

    projecting._projector = load
    assert Call(projecting).problem() == "the projection was cancelled"
    assert not projector.begun.is_set()


def test_call_whose_caller_has_disconnected_ends_at_its_next_step(projecting: Any, projector: FakeProjector) -> None:
    call = Call(projecting)
    assert projector.begun.wait(10)
    call.left.set()
    assert "disconnected" in call.problem()
    assert projector.steps == 1


def test_call_that_cannot_end_in_time_is_refused(
    projecting: Any, projector: FakeProjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.inference.projector._ESTIMATED_AFTER_SECONDS", 0.0)
    monkeypatch.setattr("services.inference.projector._WORK_SECONDS", 1e-9)
    projector.ready.set()
    answer = projecting.project("d", np.zeros((1, 8, 8, 3), np.uint8), [0], TASK, "one")
    assert "longer than an hour with 3 steps" in answer["refused"] and answer["field"] == "steps"
    assert projector.steps == 1


def test_few_cancelled_tickets_are_remembered(projecting: Any) -> None:
    async def cancel_many() -> None:
        for number in range(3 * _MAX_CANCELLED):
            await projecting.cancel(str(number))

    asyncio.run(cancel_many())
    assert len(projecting._cancelled) == _MAX_CANCELLED and str(3 * _MAX_CANCELLED - 1) in projecting._cancelled

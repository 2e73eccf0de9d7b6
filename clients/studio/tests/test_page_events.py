"""Tests of what events of pages do, with a client that records calls in the place of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
from dermis_client.studies import NewInvitation, Study, StudyList
from dermis_studio.access import Visitors
from dermis_studio.pages import datasets, project, studies
from dermis_studio.service import Service
from dermis_studio.studio import Studio
from fastapi import Request

STUDY = f"st_{'0' * 32}"
TIMES = {"created_at": "2026-11-29T00:00:00Z", "expires_at": "2027-05-28T00:00:00Z"}
MODEL = {"name": "demo", "digest": "d" * 64}


class StudioOfClient(Studio):
    """A studio whose visitors have a client that a test has made."""

    def __init__(self, service: Service, client: Any) -> None:
        super().__init__(service, Visitors(service, needs_key=False))
        self._client = client

    @asynccontextmanager
    async def client(self, request: gr.Request) -> AsyncIterator[Any]:
        yield self._client


def handler(build: Callable[..., None], studio: Studio, name: str) -> Any:
    """The function of a page with this name, as Gradio calls it."""
    with gr.Blocks() as blocks:
        build(studio, blocks)
    [found] = {each.fn for each in blocks.fns.values() if getattr(each.fn, "__name__", "") == name}
    return found


def request(host: str = "localhost", scheme: str = "http") -> gr.Request:
    """A request of one page."""
    headers = [(b"host", host.encode())]
    scope = {"type": "http", "method": "POST", "scheme": scheme, "path": "/studio/", "query_string": b""}
    return gr.Request(request=Request({**scope, "headers": headers}), session_hash="page")


async def ready() -> None:
    """Let the other tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("service", "link"),
    [
        (Service("http://127.0.0.1:3000", own_host=True), "https://dermis.hospital.example/study#token"),
        (Service("http://dermis", public_url="https://public.example/"), "https://public.example/study#token"),
        (Service("https://elsewhere.example"), "https://elsewhere.example/study#token"),
    ],
)
def test_link_for_a_reader_has_the_public_address(service: Service, link: str) -> None:
    study = Study.model_validate({"id": STUDY, "state": "open", "images": 4, "seed": 1, "model": MODEL, **TIMES})
    own = f"{service.base_url}/study#token"
    made = {"id": "a", "label": "R", "state": "active", "token": "token", "path": "/study#token", "url": own, **TIMES}

    def returning(value: Any) -> Any:
        async def call(*_: Any, **__: Any) -> Any:
            return value

        return call

    calls = SimpleNamespace(
        invite=returning(NewInvitation.model_validate(made)),
        retrieve=returning(study),
        invitations=returning([]),
        list=returning(StudyList(data=[study])),
    )
    act = handler(studies.build, StudioOfClient(service, SimpleNamespace(studies=calls)), "act")

    async def shown() -> str:
        event = gr.EventData(None, {"act": "invite", "id": STUDY, "label": "R", "days": 30})
        values = [each async for each in act(event, request("dermis.hospital.example", "https"))]
        return str(values[-1][0])

    content = asyncio.run(shown())
    assert f"<code>{link}</code>" in content and "this machine only" not in content
    assert link == own or own not in content


class Datasets:
    """Datasets whose creation and progress wait until a test lets them continue."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.may_create = asyncio.Event()
        self.ended = asyncio.Event()

    async def create(self, **_: Any) -> Any:
        self.created.append(f"ds_{len(self.created)}")
        name = self.created[-1]
        await self.may_create.wait()
        return SimpleNamespace(id=name)

    async def followed(self, _client: Any, dataset_id: str, _writes: bool) -> AsyncIterator[Any]:
        yield f"{dataset_id} runs", "list"
        await self.ended.wait()
        yield f"{dataset_id} has ended", "list"


def test_next_dataset_is_created_while_one_is_followed_but_not_by_a_double_click(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def model(*_: Any) -> None:
        return None

    async def scenario() -> None:
        made = Datasets()
        monkeypatch.setattr(datasets, "followed", made.followed)
        monkeypatch.setattr(datasets, "find_model", model)
        monkeypatch.setattr(datasets.RequestFields, "named", lambda *_: {"model": "demo"})
        monkeypatch.setattr(datasets.RequestFields, "request", lambda *_: {})
        client = SimpleNamespace(datasets=made)
        studio = StudioOfClient(Service("http://127.0.0.1:9"), client)
        start = handler(datasets.build, studio, "start")

        async def press() -> list[Any]:
            return [shown async for shown in start(request())]

        first = asyncio.create_task(press())
        await ready()
        assert await press() == [(gr.skip(), gr.skip())] and made.created == ["ds_0"]  # the second click
        made.may_create.set()
        await ready()
        second = asyncio.create_task(press())
        await ready()
        assert made.created == ["ds_0", "ds_1"]
        made.ended.set()
        shown = [str(each[0]) for each in await first]
        assert shown[1] == "ds_0 runs" and "ds_0 has ended" not in shown
        assert [each[0] for each in await second][1:] == ["ds_1 runs", "ds_1 has ended"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("build", "name"), [(datasets.build, "start"), (project.build, "run")])
def test_button_works_again_while_its_job_is_followed(build: Any, name: str) -> None:
    service = Service("http://127.0.0.1:9")
    with gr.Blocks() as blocks:
        build(Studio(service, Visitors(service, needs_key=False)), blocks)
    found = [each for each in blocks.fns.values() if getattr(each.fn, "__name__", "") == name]
    assert [each.trigger_mode for each in found] == ["multiple"]


def test_of_two_projections_that_are_sent_at_once_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []

    async def scenario() -> None:
        may_create = asyncio.Event()

        async def create(*_: Any, **__: Any) -> Any:
            kept.append(f"pr_{len(kept)}")
            name = kept[-1]
            await may_create.wait()
            return SimpleNamespace(id=name)

        async def delete(name: str) -> None:
            kept.remove(name)

        async def followed(*arguments: Any) -> AsyncIterator[str]:
            yield f"{arguments[3].id} is followed"

        monkeypatch.setattr(project, "created", create)
        monkeypatch.setattr(project, "followed", followed)
        client = SimpleNamespace(projections=SimpleNamespace(delete=delete))
        run = handler(project.build, StudioOfClient(Service("http://127.0.0.1:9"), client), "run")

        async def press() -> list[Any]:
            file = "data:image/png;base64,AAAA"
            return [shown async for shown in run(request(), file, "demo", project.MOST_PROBABLE, "fast", False)]

        tasks = [asyncio.create_task(press()) for _ in range(2)]
        await ready()
        assert kept == ["pr_0", "pr_1"]
        may_create.set()
        first, second = [await task for task in tasks]
        assert kept == ["pr_1"]
        assert cast(Any, second[-1])[0] == "pr_1 is followed" and "followed" not in str(first)

    asyncio.run(scenario())

"""Tests of every method of both clients: the same requests and results, and the responses of typed calls."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dermis_client import AsyncDermisClient, Dataset, DermisClient, InvalidRequestError, NotFoundError, RawResponse
from every_call import ANSWERS, CALLS, FOLDER, NOT_HERE, MemoryService
from fake_gateway import FakeGateway, Fault
from PIL import Image
from pydantic import BaseModel

# Results of several responses over a longer time, or files: they have no one response to show.
WITHOUT_RAW_RESPONSE = {
    "datasets.list", "datasets.events", "datasets.wait", "datasets.download", "projections.wait", "projections.download",
    "studies.wait", "studies.export_csv",
}  # fmt: skip
RESOURCES = sorted({name.partition(".")[0] for name in CALLS})


def public_methods(value: object) -> set[str]:
    return {name for name, method in vars(type(value)).items() if inspect.isfunction(method) and name[0] != "_"}


def plain(value: Any) -> Any:
    """A result of either client, in a form that can be compared."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def call_both(method: str, folder: Path) -> tuple[Any, Any, MemoryService, MemoryService]:
    """The results of a method of both clients, and the services that they called."""
    resource, _, name = method.rpartition(".")
    positional, keywords = CALLS[method.replace(".with_raw_response", "")]
    arguments = [folder / "out.csv" if argument is FOLDER else argument for argument in positional]
    ours, theirs = MemoryService(), MemoryService()

    def of(client: Any) -> Any:
        for part in (*resource.split("."), name):
            client = getattr(client, part)
        return client(*arguments, **keywords)

    with httpx.Client(transport=httpx.MockTransport(ours)) as http:
        result = of(DermisClient("http://localhost", http_client=http))
        result = list(result) if isinstance(result, Iterator) else result

    async def scenario() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(theirs)) as http:
            pending = of(AsyncDermisClient("http://localhost", http_client=http))
            return [item async for item in pending] if inspect.isasyncgen(pending) else await pending

    return result, asyncio.run(scenario()), ours, theirs


def test_every_method_is_called_here_and_has_its_response() -> None:
    client, other = DermisClient("http://localhost"), AsyncDermisClient("http://localhost")
    resources = {name for name, value in vars(client).items() if name[0] != "_"}
    assert resources == set(RESOURCES)
    methods = {f"{name}.{method}" for name in RESOURCES for method in public_methods(getattr(client, name))}
    assert methods == CALLS.keys() | NOT_HERE
    for each in (client, other):
        raw = {f"{name}.{method}" for name in RESOURCES for method in vars(getattr(each, name).with_raw_response)}
        assert methods - raw == WITHOUT_RAW_RESPONSE and raw <= methods
    client.close()


@pytest.mark.parametrize("method", CALLS)
def test_both_clients_send_the_same_and_return_the_same(method: str, tmp_path: Path) -> None:
    result, other, ours, theirs = call_both(method, tmp_path)
    assert ours.requests == theirs.requests and ours.requests
    assert plain(result) == plain(other)
    if method in WITHOUT_RAW_RESPONSE:
        return
    resource, _, name = method.partition(".")
    raw, other, ours_again, theirs = call_both(f"{resource}.with_raw_response.{name}", tmp_path)
    assert ours_again.requests == theirs.requests == ours.requests
    last = ours.requests[-1]
    expected = ANSWERS[f"{last[0]} {httpx.URL(last[1]).path}"]
    for each in (raw, other):
        assert isinstance(each, RawResponse) and plain(each.parse()) == plain(result)
        assert len(each.responses) == len(ours.requests) and each.http_response is each.responses[-1]
        assert each.request_id == each.headers["x-request-id"] == f"req-{len(ours.requests)}"
        assert each.status_code == (204 if expected is None else 202 if last[0] == "POST" else 200)
        if expected is not None and not isinstance(expected, bytes):
            assert json.loads(each.content) == expected


def test_options_of_a_request_are_sent_as_the_api_has_them() -> None:
    service = MemoryService()
    with httpx.Client(transport=httpx.MockTransport(service)) as http:
        client = DermisClient("http://localhost", http_client=http)
        positional, keywords = CALLS["datasets.create"]
        client.datasets.create(*positional, **keywords)
        client.edits.create(
            projections=[("pr_1", 2)], sweep={"direction": "sefa-2", "strengths": (-1, 1), "layers": (0, 2)}
        )
        client.studies.create("n", keep_days=2)
    bodies = [json.loads(body) for *_, body in service.requests]
    assert bodies[0] == {
        "classes": {"benign": 1}, "seed": 3, "model": "demo", "format": "parquet", "image_format": "webp",
        "image_quality": 80, "truncation_psi": 0.5, "truncation_cutoff": 2, "noise_mode": "const", "shard_size": 10,
        "classifier": {"keep": "agreeing", "tries": 8}, "edits": [{"direction": "sefa-1", "strength": 1.0}],
        "privacy": {"gate": "min_distance", "percentile": 5.0}, "provenance": {"c2pa": True}, "later": [1],
    }  # fmt: skip
    assert service.requests[0][2]["idempotency-key"] == "k1"
    assert bodies[1] == {
        "projections": [{"id": "pr_1", "image": 2}],
        "sweep": {"direction": "sefa-2", "strengths": [-1.0, 1.0], "layers": [0, 2]},
    }
    assert bodies[2] == {"name": "n", "images": 200, "real_images": "uploads", "keep_days": 2.0}


# Responses


def test_a_call_of_several_requests_has_all_responses_and_its_record_goes_on(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        gateway.faults = [Fault("POST /v1/classifications", status=503)]  # the repeated attempt has no part in it
        response = client.classifications.with_raw_response.create([b"\x80"] * 20)
        assert [each.status_code for each in response.responses] == [200, 200] and len(response.parse()) == 20
        assert repr(response) == "RawResponse(status_code=200, request_id='req-1', result=ClassificationsResult)"
        created = client.datasets.with_raw_response.create({"benign": 2})
        assert created.status_code == 202 and created.headers["location"] == f"/v1/datasets/{created.parse().id}"
        done = created.parse().wait(poll_interval=0.01)
        assert isinstance(done, Dataset) and done.state == "succeeded" and len(created.responses) == 1
        with pytest.raises(NotFoundError) as caught:
            client.models.with_raw_response.retrieve("other")
        assert caught.value.headers["X-Request-Id"] == "req-1"


# Idempotency keys


def test_only_keys_that_the_service_accepts_are_sent(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        for key in ("", "a b", "a\n", "ä", "k" * 256, 7):
            calls: list[Callable[..., Any]] = [
                lambda **options: client.datasets.create({"benign": 1}, **options),
                lambda **options: client.projections.create(b"x", **options),
            ]
            for call in calls:
                with pytest.raises(InvalidRequestError, match="idempotency_key: must be 1 to 255 visible ASCII"):
                    call(idempotency_key=key)
        assert not gateway.log
        longest = "!~" + "k" * 253
        client.datasets.create({"benign": 1}, idempotency_key=longest)
    assert gateway.requests("POST")[0]["idempotency-key"] == longest

"""Tests that errors and records pass from one process to another, and can be copied."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from dermis_client import AsyncDataset, AsyncDermisClient, Dataset, DermisClient, InvalidRequestError, errors
from dermis_client.latent import Projection
from dermis_client.models import Problem
from dermis_client.studies import Study
from every_call import DATASET, PROJECTION, STUDY, MemoryService


def offline() -> DermisClient:
    return DermisClient("http://localhost", http_client=httpx.Client(transport=httpx.MockTransport(MemoryService())))


def subclasses(kind: type[errors.DermisError]) -> Iterator[type[errors.DermisError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from subclasses(each)


KINDS = sorted(
    {kind for kind in subclasses(errors.DermisError) if kind.__module__ == errors.__name__},
    key=lambda kind: kind.__name__,
)


def example(kind: type[errors.DermisError]) -> errors.DermisError:
    """An error with a value for each argument of its constructor."""
    values: dict[str, Any] = {
        "problem": Problem(type="urn:dermis:problem:x", detail="It went wrong."), "status_code": 418, "request_id": "req-1",
        "retry_after": 2.5, "headers": httpx.Headers({"X-A": "1"}), "dataset": offline().datasets.retrieve("ds_1"),
        "projection": Projection.model_validate(PROJECTION), "study": Study.model_validate(STUDY), "name": "a.png",
        "expected": "0" * 64, "actual": "1" * 64,
    }  # fmt: skip
    own = inspect.signature(kind).parameters if inspect.isfunction(kind.__init__) else {}
    arguments: dict[str, Any] = {name: values[name] for name in own if name != "message"}
    error = kind("It went wrong.", **arguments)
    error.add_note("a note")
    return error


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.deepcopy, copy.copy])
def test_errors_keep_all_attributes(kind: type[errors.DermisError], duplicate: Callable[[Any], Any]) -> None:
    error = example(kind)
    other = duplicate(error)
    assert type(other) is kind and other is not error
    assert (str(other), other.args, vars(other)) == ("It went wrong.", ("It went wrong.",), vars(error))


def test_errors_are_made_again_from_their_message_alone() -> None:
    """PyTorch does so with errors of the workers of a DataLoader."""
    for kind in KINDS:
        if kind.__name__ not in {
            "DatasetFailed",
            "DatasetCancelled",
            "ProjectionFailed",
            "StudyNotReady",
            "WaitTimeoutError",
        }:
            assert str(kind("Caught in worker 0.")) == "Caught in worker 0."
    refused = errors.ServerError("Caught in worker 0.")
    assert (refused.status_code, refused.kind, refused.errors, refused.retry_after) == (0, "", [], None)
    assert errors.IntegrityError("Caught in worker 0.").name == ""


def test_a_record_leaves_its_client_behind_but_copies_share_it() -> None:
    client = offline()
    record = client.datasets.retrieve("ds_1")
    restored = pickle.loads(pickle.dumps(record))
    assert type(restored) is Dataset and restored == record
    with pytest.raises(InvalidRequestError, match="this record of ds_1 is not connected to a client"):
        restored.refresh()
    for other in (copy.copy(record), copy.deepcopy(record), record.model_copy(deep=True, update={"state": "failed"})):
        assert other.refresh() == record

    async def scenario() -> None:
        http = httpx.AsyncClient(transport=httpx.MockTransport(MemoryService()))
        async with AsyncDermisClient("http://localhost", http_client=http) as other:
            record = await other.datasets.retrieve("ds_1")
            assert await copy.deepcopy(record).refresh() == record
            restored = pickle.loads(pickle.dumps(record))
            assert type(restored) is AsyncDataset and restored == record
            with pytest.raises(InvalidRequestError, match="not connected to a client"):
                await restored.refresh()

    asyncio.run(scenario())
    assert DATASET["id"] == record.id

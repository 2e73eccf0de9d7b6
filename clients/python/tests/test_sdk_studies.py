"""Tests of client.studies against recorded answers of the service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from dermis_client import AsyncDermisClient, DermisClient, InvalidRequestError, StudyNotReady

ID = f"st_{'0' * 32}"
TOKEN = f"dermis_rd_{'a' * 12}_{'b' * 43}"
TIMES = {"created_at": "2026-11-29T00:00:00Z", "expires_at": "2027-05-28T00:00:00Z"}
STUDY = {"id": ID, "state": "preparing", "images": 4, "seed": 7, "model": {"name": "demo", "digest": "d" * 64}, **TIMES}
RATE = {"count": 3, "total": 4, "share": 0.75, "low": 0.3, "high": 0.95}
RATES = dict.fromkeys(("accuracy", "sensitivity", "specificity", "called_generated"), RATE)
INVITATION = {"id": "a" * 12, "label": "R1", "state": "active", **TIMES}
ROW = {"reader": "R1", "invitation": "a" * 12, "position": 1, "image": 3, "class": "benign", "truth": "real"}
ROW |= {"answer": "real", "right": True, "confidence": 4, "seconds": 2.5, "answered_at": TIMES["created_at"]}


class Gateway:
    """Answers requests, and records them."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        route = f"{request.method} {request.url.path.removeprefix(f'/v1/studies/{ID}')}"
        answers: dict[str, Any] = {
            "POST /v1/studies": STUDY | {"state": "collecting"},
            "POST /images": {"added": 1, "study": STUDY | {"classes": {"benign": {"uploaded": len(self.requests)}}}},
            "POST /invitations": INVITATION | {"token": TOKEN, "path": f"/study#{TOKEN}"},
            "GET /results": {"answers": 4, "rates": RATES, "readers": [], "agreement": None},
            "GET /answers": {"data": [ROW]},
        }
        if route == "GET /answers" and request.url.params.get("format") == "csv":
            return httpx.Response(200, content=b"reader\r\nR1\r\n")
        if route == "GET ":
            return httpx.Response(200, json=STUDY | {"state": self.states.pop(0), "error": "no model"})
        return httpx.Response(201 if request.method == "POST" else 200, json=answers[route])

    def client(self) -> DermisClient:
        return DermisClient("http://localhost:1", http_client=httpx.Client(transport=httpx.MockTransport(self)))


def test_study_from_images_to_answers(tmp_path: Path) -> None:
    gateway = Gateway("preparing", "open")
    studies = gateway.client().studies
    created = studies.create("Pilot", images=4, model=None, keep_days=10)
    assert json.loads(gateway.requests[0].content) == {
        "name": "Pilot",
        "images": 4,
        "real_images": "uploads",
        "keep_days": 10.0,
    }
    assert "seed=7" not in repr(created)  # it tells the truth of every image
    uploaded = studies.add_images(ID, [b"image"] * 20, class_name="benign")
    sent = [request for request in gateway.requests if request.url.path.endswith("/images")]
    assert [request.url.params["class"] for request in sent] == ["benign", "benign"]  # 16 images at most in one request
    assert uploaded.classes["benign"].uploaded == 3
    assert studies.wait(ID, poll_interval=0.05).state == "open"
    invited = studies.invite(ID, "R1", expires_in_days=7)
    assert invited.url == f"http://localhost:1/study#{TOKEN}" and TOKEN not in repr(invited)
    assert studies.results(ID).rates.accuracy.share == 0.75
    answer = studies.answers(ID)[0]
    assert (answer.class_name, answer.right, answer.confidence) == ("benign", True, 4)
    assert studies.export_csv(ID, tmp_path / "a.csv").read_bytes() == b"reader\r\nR1\r\n"


def test_wait_says_why_a_study_is_not_ready() -> None:
    with pytest.raises(StudyNotReady, match="failed: no model") as error:
        Gateway("preparing", "failed").client().studies.wait(ID, poll_interval=0.05)
    assert error.value.study.state == "failed"
    with pytest.raises(StudyNotReady, match="collecting"):
        Gateway("collecting").client().studies.wait(ID)
    with pytest.raises(InvalidRequestError, match="st_0123"):
        Gateway().client().studies.retrieve("../keys")


def test_asynchronous_client_sends_the_same_requests() -> None:
    gateway = Gateway("open")

    async def work() -> str:
        http = httpx.AsyncClient(transport=httpx.MockTransport(gateway))
        async with AsyncDermisClient("http://localhost:1", http_client=http) as client:
            await client.studies.create("Pilot", images=4)
            await client.studies.wait(ID)
            return (await client.studies.invite(ID, "R1")).url

    assert asyncio.run(work()).endswith(TOKEN)
    assert gateway.requests[0].url.path == "/v1/studies"

"""Tests of heat maps over HTTP: as JSON or as an image, limits of concurrency, and clear errors."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.components import free_port
from dermis.bundle import amend_bundle
from dermis.bundle.classifier import NOTICE
from dermis.classifier.preprocess import to_input
from dermis.errors import RequestError
from dermis.explain.attribution import Explainer
from dermis.imaging import decode, encode
from launched_service import Launched
from service_kit import Service, assemble, listening, service, wait_for
from services.callers import CallerDisconnectedError, CallerMiddleware, check_caller
from services.errors import InferenceFailedError, InferenceUnavailableError, NotInstalledError
from services.inference.client import ExplainerClient
from tiny import make_bundle
from tiny_classifier import SIZE, make_classifier

LIMITS = {"max_heat_map_images": 2, "max_heat_map_calls": 1, "heat_map_timeout_seconds": 1.0, "max_upload_images": 4}
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
PICTURE = {"Accept": "image/png"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("bundles")
    make_classifier(root / "classifier")
    amend_bundle(make_bundle(root / "tiny"), parts={"classifier": root / "classifier"})
    with service(root / "tiny", root / "data", default_model="tiny", **LIMITS) as running:
        yield running


def send(served: Service, *files: bytes, query: str = "?heat_map=xrai", **headers: str) -> Any:
    parts = [("files", ("secret-name.png", data, "image/png")) for data in files or (encode(PIXELS),)]
    return served.client.post(f"/v1/classifications{query}", files=parts, headers=headers)


def problem(answer: Any, status: int, kind: str) -> str:
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert document["type"] == f"urn:dermis:problem:{kind}"
    return " ".join([document["detail"], *(error["field"] for error in document["errors"])])


@pytest.mark.parametrize("method", ["xrai", "integrated-gradients"])
def test_each_image_has_its_heat_map(served: Service, method: str) -> None:
    served.explainer.calls.clear()
    answer = send(served, encode(PIXELS), encode(255 - PIXELS), query=f"?heat_map={method}").json()
    assert served.explainer.calls == [method] * 2
    for item, image in zip(answer["data"], (PIXELS, 255 - PIXELS), strict=True):
        heat_map = item["heat_map"]
        data = base64.b64decode(heat_map["b64"])
        assert (heat_map["method"], heat_map["scale"], heat_map["media_type"]) == (method, 0.5, "image/png")
        assert heat_map["sha256"] == hashlib.sha256(data).hexdigest()
        assert (
            decode(data) == to_input(image, SIZE)
        ).all()  # what the fake explainer draws: the classifier's own pixels
    plain = send(served, query="").json()["data"][0]
    assert plain == answer["data"][0] | {"heat_map": None}
    assert len(served.explainer.calls) == 2


def test_heat_map_of_single_image_is_answered_as_png(served: Service) -> None:
    answer = send(served, Accept="image/png")
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "image/png"
    item = send(served).json()["data"][0]
    assert answer.content == base64.b64decode(item["heat_map"]["b64"])
    classification = answer.headers["X-Dermis-Classification"]
    assert classification == f"class={item['class']}; calibrated={item['calibrated']:.4f}; threshold=0.5000"
    assert answer.headers["X-Dermis-Notice"] == NOTICE
    alone = served.client.post(
        "/v1/classifications?heat_map=xrai", content=encode(PIXELS), headers=PICTURE | {"Content-Type": "image/png"}
    )
    assert alone.content == answer.content
    assert send(served, Accept="*/*").headers["Content-Type"] == "application/json"  # as curl sends it


def test_unsupported_heat_map_requests_are_refused(served: Service) -> None:
    image = encode(PIXELS)
    assert "at most 2 images" in problem(send(served, image, image, image), 422, "request-too-large")
    assert send(served, image, image, image, query="").status_code == 200
    assert "Accept: image/png files" in problem(
        send(served, image, image, Accept="image/png"), 422, "request-too-large"
    ).replace("; send several calls", "")
    assert "heat_map" in problem(send(served, query="?heat_map=gradcam"), 422, "invalid-request")
    assert "with heat_map" in problem(send(served, query="", Accept="image/png"), 406, "not-acceptable")
    problem(send(served, Accept="text/html"), 406, "not-acceptable")
    problem(send(served, b"no image"), 415, "unsupported-media-type")


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (NotInstalledError("heat maps need the package saliency"), 501, "not-installed"),
        (InferenceUnavailableError("the explainer does not answer; try again"), 503, "not-ready"),
        (InferenceFailedError("the explainer failed"), 500, "internal"),
    ],
)
def test_failures_of_the_explainer_are_problems(served: Service, failure: Exception, status: int, kind: str) -> None:
    served.explainer.failures.append(failure)
    detail = problem(send(served), status, kind)
    assert kind == "internal" or str(failure) in detail
    assert send(served).status_code == 200


def test_heat_map_calls_are_limited_in_number_and_time(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    heat_maps = served.client.app.state.context.heat_maps  # type: ignore[attr-defined]
    patient = served.settings.model_copy(update={"heat_map_timeout_seconds": 60.0})
    monkeypatch.setattr(heat_maps, "_settings", patient)
    served.explainer.calls.clear()
    served.explainer.gate.clear()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(send(served)))
    first.start()
    try:
        wait_for(lambda: served.explainer.calls)
        busy = send(served)
        assert "too many calls with heat maps" in problem(busy, 503, "overloaded") and busy.headers["Retry-After"]
        assert send(served, query="").status_code == 200  # classifications do not wait for heat maps
    finally:
        served.explainer.gate.set()
        first.join()
    assert answers[0].status_code == 200
    monkeypatch.undo()
    served.explainer.gate.clear()
    try:
        late = send(served)
    finally:
        served.explainer.gate.set()
    detail = problem(late, 503, "overloaded")
    assert "not ready in 1 s" in detail and "fewer" not in detail and late.headers["Retry-After"]
    assert send(served).status_code == 200


def test_heat_map_timeout_message_counts_images(served: Service) -> None:
    served.explainer.gate.clear()
    try:
        detail = problem(send(served, encode(PIXELS), encode(PIXELS)), 503, "overloaded")
    finally:
        served.explainer.gate.set()
    assert "0 of 2 heat maps" in detail and "fewer images" in detail


def test_closing_the_connection_cancels_the_computation(tmp_path: Path, served: Service) -> None:
    """The gateway cancels the call of the explainer, and no longer counts the call."""
    ended: list[str] = []

    async def explain(*_: Any) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    parts = assemble(served.settings.bundles[0], tmp_path / "data", default_model="tiny", max_heat_map_calls=1)
    parts.explainer.heat_map = explain  # type: ignore[method-assign]
    with listening(parts) as url:
        for count in (1, 2):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/classifications?heat_map=xrai", files={"files": encode(PIXELS)}, timeout=3.0)
            wait_for(lambda count=count: len(ended) == count)  # type: ignore[misc]


def test_work_of_disconnected_caller_ends_at_next_step() -> None:
    """In the explainer, the middleware detects the closed connection, and the work in a thread checks for it."""
    begun, steps = threading.Event(), []

    def work() -> str:
        check_caller()  # the caller has not disconnected yet
        begun.set()
        while len(steps) < 3000:
            steps.append(1)
            try:
                check_caller()
            except CallerDisconnectedError:
                return "given up"
            time.sleep(0.01)
        return "done"

    outcome: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert not (await receive()).get("more_body")
        outcome.append(await asyncio.to_thread(work))

    async def run(leaves: bool) -> None:
        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.to_thread(begun.wait)
            if not leaves:
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        await CallerMiddleware(app)({"type": "http"}, receive, None)  # type: ignore[arg-type]

    asyncio.run(run(leaves=True))
    assert outcome == ["given up"]
    check_caller()  # outside of a request it never raises
    steps[:] = [1] * 2990
    asyncio.run(run(leaves=False))
    assert outcome[1] == "done"


def test_attribution_of_disconnected_caller_ends_between_steps(timm_classifier: Path) -> None:
    loaded, calls = Explainer(timm_classifier), [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise CallerDisconnectedError

    with pytest.raises(CallerDisconnectedError):
        loaded.attribute(PIXELS, "integrated-gradients", check=check)
    assert calls[0] == 4


def test_heat_maps_can_be_switched_off(tmp_path: Path, served: Service) -> None:
    from services.gateway.heat_maps import HeatMaps
    from services.settings import Settings

    off = HeatMaps(Settings(_env_file=None, max_heat_map_images=0), served.explainer)
    with pytest.raises(RequestError, match="makes no heat maps"):
        off.check_enabled()


def test_remote_explainer_reports_reason_of_missing_heat_map(served: Service) -> None:
    class Client:
        answer: dict[str, Any]

        async def explain(self, digest: str, method: str, image: Any) -> dict[str, Any]:
            return self.answer

    client, bundle = Client(), served.models.bundles[0]
    remote = ExplainerClient(client, served.models)

    def ask(**answer: Any) -> Any:
        client.answer = answer
        return asyncio.run(remote.heat_map(bundle, "xrai", np.zeros((SIZE, SIZE, 3), np.uint8)))

    assert ask(content=b"png", scale=0.25).scale == 0.25
    with pytest.raises(NotInstalledError, match="saliency"):
        ask(missing="heat maps need the package saliency")
    with pytest.raises(InferenceUnavailableError, match="restart"):
        ask(problem="restart the service to load it")


@pytest.mark.full
def test_running_service_answers_heat_maps_with_real_explainer(
    timm_classifier: Path,
    launch: Callable[..., Launched],
    tmp_path: Path,
) -> None:
    amend_bundle(make_bundle(tmp_path / "tiny"), parts={"classifier": timm_classifier})
    running = launch(str(tmp_path / "tiny"), free_port(), max_heat_map_images="3")
    running.wait_until(running.ready)

    def ask(*images: bytes, **headers: str) -> httpx.Response:
        parts = [("files", ("secret-name.png", data, "image/png")) for data in images]
        return running.client.post("/v1/classifications?heat_map=xrai", files=parts, headers=headers, timeout=60)

    first, second = ask(encode(PIXELS), Accept="image/png"), ask(encode(PIXELS), Accept="image/png")
    assert first.status_code == 200, first.text
    assert first.content == second.content
    with Image.open(io.BytesIO(first.content)) as picture:
        assert picture.size == (256, 256) and picture.info["Comment"] == NOTICE
    assert len(ask(*[encode(PIXELS)] * 3).json()["data"]) == 3
    assert 'dermis_heat_maps_total{method="xrai",model="tiny"} 5.0' in running.client.get("/metrics").text
    assert "secret" not in running.log.read_text()

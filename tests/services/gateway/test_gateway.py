"""Tests of the HTTP API: responses to valid, invalid and unusual requests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dermis_client import DatasetReport
from PIL import Image

from dermis.bundle import Bundle
from service_kit import Service, service, wait_for
from services.errors import InferenceFailedError, InferenceUnavailableError
from services.gateway import events as events_module
from services.gateway.dependencies import MalformedJSONError, negotiate, parse_json
from services.jobs.service import DatasetJobs

BOTH = {"benign": 3, "malignant": 2}


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(
        tiny_bundle.location,
        tmp_path_factory.mktemp("data"),
        max_samples_per_dataset=1000,
        max_body_bytes=2000,
        max_images=8,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def dataset(served: Service) -> dict[str, Any]:
    return served.wait(served.ask({"classes": BOTH, "seed": 5}))


def problem(answer: Any, status: int, kind: str) -> dict[str, Any]:
    """The problem document that `answer` must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:dermis:problem:{kind}"
    assert document["status"] == status
    assert document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return document


@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        ({"classes": {"melanoma": 1}}, "unknown-class", "classes.melanoma"),
        ({"classes": {"benign": -1}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": 0}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": True}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": "3"}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": 3.0}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": 10**30}}, "invalid-request", "classes.benign"),
        ({"classes": {"benign": 1001}}, "request-too-large", "classes"),
        ({"classes": {}}, "invalid-request", "classes"),
        ({"classes": ["benign"]}, "invalid-request", "classes"),
        ({"seed": -1}, "invalid-request", "seed"),
        ({"seed": 2**63}, "invalid-request", "seed"),
        ({"truncation_psi": 2.5}, "invalid-request", "truncation_psi"),
        ({"truncation_cutoff": 60}, "invalid-request", "truncation_cutoff"),
        ({"format": "csv"}, "invalid-request", "format"),
        ({"sede": 1}, "invalid-request", "sede"),
    ],
)
def test_invalid_dataset_request_is_refused_by_field(
    served: Service, change: dict[str, Any], kind: str, field: str
) -> None:
    answer = served.client.post("/v1/datasets", json={"classes": BOTH} | change)
    document = problem(answer, 422, kind)
    assert document["errors"][0]["field"] == field


@pytest.mark.parametrize("path", ["/v1/datasets", "/v1/images"])
@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        (b'{"classes": ', {}, 400, "malformed-json"),
        (b"\xff\xfe", {}, 400, "malformed-json"),
        (b'{"classes": {"benign": 1}, "seed": NaN}', {}, 400, "malformed-json"),
        (b'{"classes": {"benign": 1, "benign": 2}}', {}, 400, "malformed-json"),
        (b"[" * 1500, {}, 400, "malformed-json"),
        (b'{"seed": ' + b"1" * 1500 + b"}", {}, 422, "invalid-request"),
        (b"[]", {}, 422, "invalid-request"),
        (b"", {}, 400, "malformed-json"),
        (b'"' + b"x" * 3000 + b'"', {}, 413, "too-large"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported-media-type"),
        (b"{}", {"content-encoding": "gzip"}, 415, "unsupported-media-type"),
        (b'{"classes": {"benign": 1}, "model": "other"}', {}, 404, "unknown-model"),
    ],
)
def test_invalid_request_bodies_are_problems(
    served: Service, path: str, body: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    answer = served.client.post(path, content=body, headers={"content-type": "application/json"} | headers)
    problem(answer, status, kind)


@pytest.mark.parametrize("value", [dict.fromkeys(map(str, range(6000)), -1), [[0] * 100] * 101], ids=["names", "lists"])
def test_body_with_very_many_values_is_refused_before_it_is_validated(value: object) -> None:
    with pytest.raises(MalformedJSONError, match="10,000 values"):
        parse_json(json.dumps({"classes": value}).encode())
    assert parse_json(json.dumps([0] * 9000).encode()) == [0] * 9000


def test_body_without_length_is_refused_at_size_limit(served: Service) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = served.client.post("/v1/datasets", content=chunks(), headers={"content-type": "application/json"})
    problem(answer, 413, "too-large")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v2/datasets", 404, "not-found"),
        ("GET", "/v1/datasets/ds_0", 404, "not-found"),
        ("DELETE", f"/v1/datasets/ds_{'0' * 32}", 404, "not-found"),
        ("GET", f"/v1/datasets/ds_{'0' * 32}/events", 404, "not-found"),
        ("GET", f"/v1/datasets/ds_{'0' * 32}/files", 404, "not-found"),
        ("PATCH", "/v1/datasets", 405, "method-not-allowed"),
        ("GET", "/v1/images", 405, "method-not-allowed"),
        ("GET", "/v1/models/other", 404, "unknown-model"),
        ("GET", "/v1/datasets?limit=0", 422, "invalid-request"),
        ("GET", "/v1/datasets?limit=x", 422, "invalid-request"),
        ("GET", "/v1/datasets?state=lost", 422, "invalid-request"),
        ("GET", "/v1/datasets?cursor=abc", 422, "invalid-request"),
    ],
)
def test_unknown_paths_and_invalid_parameters_are_problems(
    served: Service, method: str, path: str, status: int, kind: str
) -> None:
    answer = served.client.request(method, path)
    problem(answer, status, kind)
    assert ("allow" in answer.headers) == (status == 405)


def test_dataset_files_match_their_list(served: Service, dataset: dict[str, Any]) -> None:
    assert dataset["state"] == "succeeded"
    assert dataset["progress"]["samples_done"] == 5
    assert dataset["request"]["model"] == "tiny"
    files = served.client.get(dataset["links"]["files"]).json()["data"]
    assert {file["name"] for file in files} == {
        "images.zip",
        "metadata.csv",
        "preview.png",
        "README.md",
        "croissant.json",
        "report.json",
        "report.html",
        "manifest.json",
    }
    for file in files:
        got = served.client.get(file["url"])
        assert len(got.content) == file["bytes"]
        assert hashlib.sha256(got.content).hexdigest() == file["sha256"]
        assert got.headers["etag"] == f'"{file["sha256"]}"'
        assert got.headers["content-type"] == file["media_type"]
    problem(served.client.get(dataset["links"]["files"] + "/..%2f..%2fjobs.sqlite"), 404, "not-found")


def test_file_downloads_support_ranges_and_validators(served: Service, dataset: dict[str, Any]) -> None:
    url = dataset["links"]["files"] + "/metadata.csv"
    whole = served.client.get(url)
    body, etag = whole.content, whole.headers["etag"]

    def get(**headers: str) -> Any:
        return served.client.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})

    part = get(Range="bytes=10-19")
    assert (part.status_code, part.content) == (206, body[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(body)}"
    assert get(Range="bytes=-7").content == body[-7:]
    assert get(Range="bytes=20-").content == body[20:]
    assert get(Range=f"bytes=5-{len(body) * 2}").content == body[5:]
    assert get(Range="bytes=10-19", If_Range=etag).status_code == 206
    assert get(Range="bytes=10-19", If_Range='"other"').content == body
    for ignored in ("bytes=0-1,4-5", "lines=1-2", "bytes=9-3", "bytes=x"):
        assert get(Range=ignored).content == body
    outside = get(Range=f"bytes={len(body)}-")
    problem(outside, 416, "range-not-satisfiable")
    assert outside.headers["content-range"] == f"bytes */{len(body)}"
    for known in (etag, f'"a", W/{etag}', "*"):
        unchanged = get(If_None_Match=known)
        assert (unchanged.status_code, unchanged.content) == (304, b"")
    head = served.client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(body))


def test_report_is_json_or_an_isolated_page(served: Service, dataset: dict[str, Any]) -> None:
    url = dataset["links"]["self"] + "/report"
    answer = served.client.get(url)
    assert answer.headers["content-type"] == "application/json" and answer.headers["vary"] == "Accept"
    report = DatasetReport.model_validate_json(answer.content)
    assert report.images == 5 and len(report.scorecard) == 7 and report.origin.digest == dataset["model"]["digest"]
    page = served.client.get(url, headers={"Accept": "text/html,*/*;q=0.1"})
    assert page.headers["content-type"].startswith("text/html") and page.text.startswith("<!doctype html>")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script-src" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert served.client.get(url, params={"format": "html"}).content == page.content
    assert served.client.get(url, params={"format": "json"}, headers={"Accept": "text/html"}).content == answer.content
    unchanged = served.client.get(url, headers={"If-None-Match": answer.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    problem(served.client.get(url, params={"format": "pdf"}), 422, "invalid-request")
    problem(served.client.get(url, headers={"Accept": "image/png"}), 406, "not-acceptable")
    problem(served.client.get(f"/v1/datasets/ds_{'0' * 32}/report"), 404, "not-found")


def test_dataset_without_a_report_says_why(
    served: Service, dataset: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = DatasetJobs.files
    monkeypatch.setattr(
        DatasetJobs, "files", lambda jobs, job: [file for file in files(jobs, job) if file.name[:6] != "report"]
    )
    answer = served.client.get(dataset["links"]["self"] + "/report")
    problem(answer, 404, "not-found")
    assert "earlier version" in answer.json()["detail"]


def test_idempotency_key_repeats_dataset_and_refuses_other_body(served: Service) -> None:
    headers = {"Idempotency-Key": "once"}
    first = served.ask({"classes": {"benign": 1}}, **headers)
    again = served.ask({"classes": {"benign": 1}, "seed": 0}, **headers)
    assert again["id"] == first["id"]
    other = served.client.post("/v1/datasets", json={"classes": {"benign": 2}}, headers=headers)
    problem(other, 409, "idempotency-conflict")
    odd = served.client.post("/v1/datasets", json={"classes": {"benign": 1}}, headers={"Idempotency-Key": "a b"})
    problem(odd, 422, "invalid-request")


def test_idempotency_key_of_old_noise_default_finds_its_dataset(served: Service) -> None:
    headers = {"Idempotency-Key": "before"}
    before = served.ask({"classes": {"benign": 1}, "noise_mode": "const"}, **headers)  # as the request was stored then
    assert served.ask({"classes": {"benign": 1}}, **headers)["id"] == before["id"]
    stated = {"classes": {"benign": 1}, "noise_mode": "random"}
    problem(served.client.post("/v1/datasets", json=stated, headers=headers), 409, "idempotency-conflict")


def test_events_report_progress_and_end_with_dataset(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    served.generator.gate.clear()
    asked = served.ask({"classes": {"benign": 40}, "shard_size": 20})
    event = events_module._event

    def open_gate_first(*arguments: Any) -> str:
        served.generator.gate.set()
        return event(*arguments)

    monkeypatch.setattr(events_module, "_event", open_gate_first)  # this client gives a stream only once it has ended
    stream = served.client.get(asked["links"]["events"])
    assert stream.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in stream.text.strip().split("\n\n") if block != ": heartbeat"]  # sent on a busy machine
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    assert events[0]["event"] == "progress"
    assert [event["event"] for event in events].index("succeeded") == len(events) - 1
    assert json.loads(events[-1]["data"])["progress"]["samples_done"] == 40


def test_unfinished_dataset_has_no_files_and_can_be_cancelled(served: Service) -> None:
    served.generator.gate.clear()
    try:
        asked = served.ask({"classes": {"benign": 40}, "shard_size": 20})
        problem(served.client.get(asked["links"]["files"]), 409, "dataset-not-ready")
        cancelling = served.client.delete(asked["links"]["self"])
        assert cancelling.status_code == 202
        assert cancelling.json()["state"] in ("cancelling", "cancelled")
    finally:
        served.generator.gate.set()
    assert served.wait(asked)["state"] == "cancelled"
    assert not (Path(served.settings.storage) / asked["id"]).exists()
    assert served.client.delete(asked["links"]["self"]).status_code == 204
    problem(served.client.get(asked["links"]["self"]), 404, "not-found")


def test_pages_list_every_dataset_once_newest_first(served: Service, dataset: dict[str, Any]) -> None:
    asked = [served.ask({"classes": {"benign": 1}, "seed": seed})["id"] for seed in range(3)]
    ids: list[str] = []
    cursor = None
    while True:
        page = served.client.get("/v1/datasets", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        ids += [item["id"] for item in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert ids[:3] == asked[::-1]
    assert dataset["id"] in ids[3:]
    assert len(set(ids)) == len(ids)
    done = served.client.get("/v1/datasets", params={"state": "succeeded", "limit": 100}).json()["data"]
    assert {item["state"] for item in done} == {"succeeded"}


def test_images_have_requested_media_type(served: Service) -> None:
    def post(accept: str | None, **body: Any) -> Any:
        headers = {} if accept is None else {"accept": accept}
        return served.client.post("/v1/images", json={"classes": {"malignant": 1}} | body, headers=headers)

    answer = post(None).json()
    (sample,) = answer["data"]
    data = base64.b64decode(sample["b64"])
    assert hashlib.sha256(data).hexdigest() == sample["sha256"]
    assert (sample["class"], sample["index"]) == ("malignant", 0)
    png = post("image/png")
    assert png.content == data
    assert png.headers["x-dermis-model"] == f"tiny@{answer['model']['digest']}"
    assert Image.open(io.BytesIO(post("image/*", image_format="webp").content)).format == "WEBP"
    assert Image.open(io.BytesIO(post("image/jpeg;q=0.5, text/html").content)).format == "JPEG"
    sheet = Image.open(io.BytesIO(post("image/png", classes={"malignant": 2, "benign": 2}).content))
    assert sheet.size[0] > 16
    problem(post("text/html"), 406, "not-acceptable")
    later = post(None, start_index=1)
    assert later.json()["data"][0]["sha256"] != sample["sha256"]
    two = post(None, classes={"benign": 1, "malignant": 1}).json()["data"]
    assert [(one["class"], one["index"]) for one in two] == [("benign", 0), ("malignant", 1)]
    assert two[1]["sha256"] == later.json()["data"][0]["sha256"]


def test_pixels_are_those_of_the_png_files(served: Service) -> None:
    body = {"classes": {"malignant": 2, "benign": 1}, "seed": 3, "start_index": 4, "truncation_psi": 0.7}
    files = served.client.post("/v1/images", json=body).json()
    answer = served.client.post(
        "/v1/images", json=body, headers={"Accept": "application/x-npz, application/json;q=0.5"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-npz")
    assert answer.headers["x-dermis-model"] == f"tiny@{files['model']['digest']}" and answer.headers["vary"] == "Accept"
    archive = np.load(io.BytesIO(answer.content), allow_pickle=False)
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["b64"]))) for one in files["data"]]
    assert np.array_equal(archive["images"], np.stack([np.asarray(picture) for picture in pictures]))
    metadata = json.loads(archive["metadata.json"])
    names = ("class", "seed", "index")
    assert metadata["data"] == [{name: one[name] for name in names} for one in files["data"]]
    assert [metadata["class_names"][label] for label in archive["labels"]] == ["malignant", "malignant", "benign"]
    assert metadata["model"] == files["model"]
    assert metadata["digital_source_type"].endswith("/trainedAlgorithmicMedia")
    assert b"trainedAlgorithmicMedia" in archive["images.xmp"] and b'dermis:seed="3"' in archive["images.xmp"]
    npz = {"Accept": "application/x-npz"}
    problem(served.client.post("/v1/images", json={"classes": {"benign": 9}}, headers=npz), 422, "request-too-large")
    for accept in ("*/*", "application/*"):
        answer = served.client.post("/v1/images", json=body, headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"classes": {"benign": 9}}, "request-too-large"),
        ({"classes": {"melanoma": 1}}, "unknown-class"),
        ({"classes": {"benign": 1}, "start_index": 2**40}, "invalid-request"),
        ({"classes": {"benign": 2}, "start_index": 2**40 - 1}, "invalid-request"),
        ({"classes": {"benign": 1}, "truncation_cutoff": 60}, "invalid-request"),
        ({"classes": {"benign": 1}, "image_format": "gif"}, "invalid-request"),
    ],
)
def test_invalid_images_request_is_refused_with_its_kind(served: Service, body: dict[str, Any], kind: str) -> None:
    problem(served.client.post("/v1/images", json=body), 422, kind)


def test_unavailable_and_failed_generator_give_different_problems(served: Service) -> None:
    # A dataset of an earlier test that is still running would receive the failures instead of these calls.
    wait_for(lambda: not any(job.active for job in served.jobs.datasets.page("default", 100)))
    served.generator.failures.append(InferenceUnavailableError("the generator does not answer"))
    away = served.client.post("/v1/images", json={"classes": {"benign": 1}})
    problem(away, 503, "not-ready")
    assert away.headers["retry-after"]
    served.generator.failures.append(InferenceFailedError("secret detail"))
    failed = served.client.post("/v1/images", json={"classes": {"benign": 1}})
    assert "secret" not in problem(failed, 500, "internal")["detail"]


def test_service_answers_models_health_metrics_and_documentation(served: Service) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["name"], model["default"], model["classes"]) == ("tiny", True, ["benign", "malignant"])
    assert served.client.get("/v1/models/tiny").json()["card"].startswith("# Tiny")
    assert served.client.get("/livez").json() == {"status": "alive"}
    assert served.client.get("/readyz").json() == {"status": "ready"}
    metrics = served.client.get("/metrics").text
    assert "dermis_dataset_jobs" in metrics
    assert 'route="/v1/models/{name}"' in metrics
    document = served.client.get("/openapi.json").json()
    assert {"/v1/datasets", "/v1/datasets/{dataset_id}/files/{name}", "/v1/images", "/v1/models"} <= set(
        document["paths"]
    )
    page = served.client.get("/docs").text
    assert "http://" not in page.replace("http://127.0.0.1", "")
    assert "https://" not in page
    assert served.client.get("/docs/swagger-ui.css").status_code == 200


def test_damaged_bundle_is_reported_and_others_are_served(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The service stays ready: all replicas may have the same bundles, and then none would receive requests."""
    bundles = tmp_path / "bundles"
    shutil.copytree(tiny_bundle.location, bundles / "tiny")
    shutil.copytree(tiny_bundle.location, bundles / "worse")
    (bundles / "worse" / "bundle.json").write_text("{")
    with service(bundles, tmp_path / "data") as running:
        assert [model["name"] for model in running.client.get("/v1/models").json()["data"]] == ["tiny"]
        assert running.client.get("/readyz").status_code == 200
        assert running.client.get("/livez").status_code == 200
        shown = re.findall(r"^dermis_model_info\{(.*)\} (.*)$", running.client.get("/metrics").text, re.MULTILINE)
        assert [value for _, value in shown] == ["1.0", "0.0"]
        assert shown[1][0] == 'digest="",model="worse",resolution=""'
        answer = running.client.post("/v1/images", json={"classes": {"benign": 1}, "model": "worse"})
        problem(answer, 503, "model-unavailable")
        assert running.client.post("/v1/images", json={"classes": {"benign": 1}}).status_code == 200

        weights = bundles / "tiny" / "generator.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        running.models._checked = float("-inf")  # no need to wait for the next check of the files
        detail = problem(running.client.get("/readyz"), 503, "not-ready")["detail"]  # now it has no other bundle
        assert "tiny" in detail and "worse" in detail
        assert "model not served" in caplog.messages
        assert f'dermis_model_info{{digest="{tiny_bundle.digest}",model="tiny",resolution="16"}} 0.0' in (
            running.client.get("/metrics").text
        )
        answer = running.client.post("/v1/datasets", json={"classes": {"benign": 1}})
        problem(answer, 503, "model-unavailable")


def test_service_without_bundle_answers_not_ready(tmp_path: Path) -> None:
    with service(tmp_path / "nothing", tmp_path / "data") as running:
        assert running.client.get("/v1/models").json()["data"] == []
        assert "nothing" in problem(running.client.get("/readyz"), 503, "not-ready")["detail"]
        answer = running.client.post("/v1/datasets", json={"classes": {"benign": 1}})
        problem(answer, 503, "model-unavailable")


def test_negotiation_follows_quality_and_specificity() -> None:
    offers = ["application/json", "image/png"]
    assert negotiate(None, offers) == "application/json"
    assert negotiate("*/*", offers) == "application/json"
    assert negotiate("image/*, application/json;q=0.5", offers) == "image/png"
    assert negotiate("application/json;q=0, */*", offers) == "image/png"
    assert negotiate("text/html;q=x, nonsense", offers) is None


def test_full_queue_answers_too_many_requests(tiny_bundle: Bundle, tmp_path: Path) -> None:
    limits = {"max_active_datasets": 1, "max_active_projections": 1}
    with service(tiny_bundle.location, tmp_path / "data", default_model="tiny", **limits) as running:
        running.generator.gate.clear()
        running.projector.gate.clear()
        image = io.BytesIO()
        Image.new("RGB", (20, 20)).save(image, "PNG")
        path = "/v1/projections?steps=1"
        assert running.client.post(path, files={"files": image.getvalue()}).status_code == 202
        running.ask({"classes": {"benign": 1}})
        for full in (
            running.client.post(path, files={"files": image.getvalue()}),
            running.client.post("/v1/datasets", json={"classes": {"benign": 2}}),
        ):
            assert "1 " in problem(full, 429, "too-many-requests")["detail"]
            assert int(full.headers["Retry-After"]) > 0

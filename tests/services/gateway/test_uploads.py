"""Tests of uploaded images: how they are read, which are refused and how, and that nothing of them is kept."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from dermis.bundle import amend_bundle
from dermis.bundle.classifier import NOTICE
from dermis.classifier.onnx_session import Classifier
from dermis.classifier.preprocess import to_input
from dermis.image_reading import ImageError, read_image
from pictures import (
    BAD,
    PIXELS,
    chunk,
    encoded,
    many_chunks,
    many_entries,
    many_segments,
    many_webp_chunks,
    picture,
    scans,
    sixteen_bit,
    with_exif,
)
from service_kit import Service, service
from services.errors import InferenceFailedError, InferenceUnavailableError
from tiny import make_bundle
from tiny_classifier import SIZE, make_classifier

LIMITS = {"max_upload_bytes": 300_000, "max_upload_images": 4, "max_upload_pixels": 100_000, "max_upload_calls": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("bundles")
    make_bundle(root / "bundles" / "plain", name="plain")
    make_classifier(root / "classifier")
    amend_bundle(make_bundle(root / "bundles" / "tiny"), parts={"classifier": root / "classifier"})
    with service(root / "bundles", root / "data", default_model="tiny", **LIMITS) as running:
        yield running


def send(served: Service, *files: bytes, query: str = "", **options: Any) -> Any:
    parts = [("files", (f"secret-name-{i}.png", data, "image/png")) for i, data in enumerate(files)]
    return served.client.post(f"/v1/classifications{query}", files=parts, **options)


def problem(answer: Any, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:dermis:problem:{kind}"
    return document


# -- reading


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_read_as_rgb(kind: str) -> None:
    read = read_image(picture(kind, **({} if kind == "PNG" else {"quality": 95})))
    assert read.dtype == np.uint8 and read.shape == PIXELS.shape
    assert np.abs(read.astype(int) - PIXELS).mean() < (1e-9 if kind == "PNG" else 2.5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    read = read_image(picture("JPEG" if mode == "CMYK" else "PNG", mode))
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"))
    expected = {
        "1": np.asarray(Image.fromarray(PIXELS).convert("1")).astype(int) * 255,
        "L": grey,
        "LA": grey,
    }.get(mode, PIXELS)
    expected = expected[..., None].repeat(3, axis=2) if expected.ndim == 2 else expected
    assert read.shape == PIXELS.shape
    assert np.abs(read.astype(int) - expected).mean() < {"P": 12, "CMYK": 6}.get(mode, 1e-9)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_become_their_upper_eight(colour: int, channels: int) -> None:
    expected = PIXELS if channels >= 3 else PIXELS[..., :1].repeat(3, axis=2)
    assert (read_image(sixteen_bit(colour, channels)) == expected).all()


def test_transparency_is_left_out() -> None:
    hidden = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert (read_image(encoded(Image.fromarray(hidden), "PNG")) == PIXELS).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright(orientation: int, kind: str) -> None:
    turned = {  # how a viewer shows the stored pixels (EXIF 2.3, table 6)
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: PIXELS.transpose(1, 0, 2)[:, ::-1],
        7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
        8: PIXELS.transpose(1, 0, 2)[::-1],
    }[orientation]
    read = read_image(with_exif(orientation, kind))
    assert read.shape == turned.shape
    assert np.abs(read.astype(int) - turned).mean() < 6


def test_image_read_with_size_is_square_input_of_classifier() -> None:
    for data in (picture(), with_exif(6), picture(mode="L"), sixteen_bit(0, 1)):
        assert (read_image(data, size=SIZE) == to_input(read_image(data), SIZE)).all()
    assert (read_image(picture(), size=30) == read_image(picture())[:, 5:35]).all()


def test_image_with_damaged_exif_is_read() -> None:
    data = picture("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(data).shape == PIXELS.shape


def test_first_picture_of_multi_picture_file_is_read() -> None:
    behind = Image.fromarray(PIXELS[::-1].copy())
    data = encoded(Image.fromarray(PIXELS), "MPO", save_all=True, append_images=[behind], quality=95)
    assert np.abs(read_image(data).astype(int) - PIXELS).mean() < 3


def test_files_with_many_parts_below_limit_are_read() -> None:
    assert (read_image(many_chunks(900)) == PIXELS).all()
    for data in (many_segments(900), many_webp_chunks(900), many_segments(1, 0xE1, many_entries(900))):
        assert read_image(data).shape == PIXELS.shape


def test_file_with_too_many_parts_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.7 million empty chunks held a decoder for 105 s."""

    def no_decoder(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "open", no_decoder)
    for data in (many_chunks(500_000), many_segments(500_000), many_webp_chunks(500_000)):
        with pytest.raises(ImageError, match="parts"):
            read_image(data)


def test_a_progressive_jpeg_of_some_scans_is_read() -> None:
    assert read_image(scans(10)).shape == PIXELS.shape


@pytest.mark.parametrize("case", BAD)
def test_bad_image_is_refused_and_large_image_is_not_decoded(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, kind, words = BAD[case]
    data = make()
    if kind == "image-too-large":
        assert len(data) < 30_000

        def load(self: Any) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        monkeypatch.setattr(Image, "open", load)
    with pytest.raises(ImageError) as caught:
        read_image(data)
    assert words in str(caught.value)


# -- answers


def test_form_and_raw_body_give_probabilities_of_classifier(served: Service) -> None:
    files = [picture(), with_exif(6), picture("WEBP", lossless=True)]
    answer = send(served, *files)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    bundle = served.models.find("tiny")
    assert bundle.classifier is not None
    with Classifier(bundle, threads=1) as classifier:
        scores = classifier.classify([read_image(data) for data in files])
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    assert [one["probability"] for one in body["data"]] == scores.probabilities.tolist()
    assert [one["calibrated"] for one in body["data"]] == scores.calibrated.tolist()
    assert body["model"] == {"name": "tiny", "digest": bundle.digest, "classifier": bundle.classifier.digest}
    assert body["threshold"] == {"name": "default", "value": 0.5}
    assert body["notice"] == NOTICE and body["positive_class"] == "malignant"
    assert answer.headers["x-dermis-model"] == f"tiny@{bundle.digest}"
    for i, data in enumerate(files):
        # What the type says is not what counts.
        raw = served.client.post("/v1/classifications", content=data, headers={"Content-Type": "image/jpeg"}).json()
        assert raw["data"] == [body["data"][i] | {"index": 0}]


def test_the_threshold_decides_the_class(served: Service) -> None:
    calibrated = send(served, picture()).json()["data"][0]["calibrated"]
    at = send(served, picture(), query=f"?threshold={calibrated:.17f}").json()
    assert at["threshold"] == {"name": None, "value": float(f"{calibrated:.17f}")}
    assert at["data"][0]["class"] == "malignant"
    above = send(served, picture(), query=f"?threshold={calibrated + 1e-6:.9f}").json()
    assert above["data"][0]["class"] == "benign"
    named = send(served, picture(), query="?threshold=sensitivity_90&model=tiny").json()
    assert named["threshold"] == {"name": "sensitivity_90", "value": 0.25}


@pytest.mark.parametrize(
    ("query", "status", "kind", "words"),
    [
        ("?threshold=best", 422, "invalid-request", "default, sensitivity_90"),
        ("?threshold=1.5", 422, "invalid-request", "from 0 to 1"),
        ("?threshold=nan", 422, "invalid-request", "default, sensitivity_90"),
        ("?threshold=-1", 422, "invalid-request", "threshold"),
        ("?threshold=", 422, "invalid-request", "threshold"),
        ("?model=other", 404, "unknown-model", "plain, tiny"),
        ("?model=plain", 422, "no-classifier", "/v1/models"),
    ],
)
def test_invalid_query_is_refused_by_field(served: Service, query: str, status: int, kind: str, words: str) -> None:
    document = problem(send(served, picture(), query=query), status, kind)
    assert words in document["detail"]
    assert document["errors"][0]["field"] == query[1:].partition("=")[0]


@pytest.mark.parametrize("case", [case for case in BAD if case != "bomb of text"])
def test_a_bad_image_is_named_by_its_place(served: Service, case: str) -> None:
    make, kind, words = BAD[case]
    data = make()
    status = {"unsupported-media-type": 415, "image-too-large": 413, "unusable-image": 422}[kind]
    document = problem(send(served, picture(), picture(), data), status, kind)
    assert document["detail"].startswith("files[2]: ") and words in document["detail"]
    assert [error["field"] for error in document["errors"]] == ["files[2]"]
    alone = served.client.post("/v1/classifications", content=data, headers={"Content-Type": "image/png"})
    assert problem(alone, status, kind)["errors"][0]["field"] == "body"


def test_all_bad_images_are_listed(served: Service) -> None:
    document = problem(send(served, b"x", picture(), b""), 415, "unsupported-media-type")
    assert [error["field"] for error in document["errors"]] == ["files[0]", "files[2]"]
    assert "and 1 more" in document["detail"]


FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind", "words"),
    [
        (b"", FORM, 400, "bad-request", "boundary"),
        (b"--b--\r\n", FORM, 422, "invalid-request", "at least one image"),
        (b"--c\r\n\r\n", FORM, 400, "bad-request", "boundary"),
        (b"--b\r\nno colon\r\n\r\n", FORM, 400, "bad-request", "boundary"),
        (
            b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n' + picture(),
            FORM,
            400,
            "bad-request",
            "ended early",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n',
            FORM,
            422,
            "invalid-request",
            "parts called files",
        ),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "bad-request", "needs a boundary"),
        (b"x", {"Content-Type": "multipart/form-data" + ';"' * 20_000}, 400, "bad-request", "1000 characters"),
        (b"x", {"Content-Type": "application/json"}, 415, "unsupported-media-type", "multipart/form-data"),
        (b"x", {"Content-Type": "multipart/mixed; boundary=b"}, 415, "unsupported-media-type", "image/webp"),
        (b"x", {}, 415, "unsupported-media-type", "image/png"),
        (b"x", {"Content-Type": "image/png", "Content-Encoding": "gzip"}, 415, "unsupported-media-type", "Encoding"),
        (b"x" * 300_001, {"Content-Type": "image/png"}, 413, "too-large", "300000 bytes"),
        (b"x" * 300_001, FORM, 413, "too-large", "300000 bytes"),
    ],
)
def test_body_that_is_not_an_upload_is_refused(
    served: Service, body: bytes, headers: dict[str, str], status: int, kind: str, words: str
) -> None:
    answer = served.client.post("/v1/classifications", content=body, headers=headers)
    assert words in problem(answer, status, kind)["detail"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(served: Service) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 10_000
            yield bytes(10_000)

    answer = served.client.post("/v1/classifications", content=chunks(), headers={"Content-Type": "image/png"})
    problem(answer, 413, "too-large")


def test_too_many_images_are_refused(served: Service) -> None:
    document = problem(send(served, *[picture()] * 5), 422, "request-too-large")
    assert "at most 4" in document["detail"] and document["errors"][0]["field"] == "files"


def test_file_content_resembling_boundary_is_read_completely(served: Service) -> None:
    """Parts whose bytes look nearly like the boundary are put together again."""
    text = b"".join(b"\r\n--" + b"boundary"[:i] + b"\r\n-" for i in range(8))
    whole = picture()[:33] + chunk(b"tEXt", b"note\0" + text) + picture()[33:]
    expected = send(served, picture()).json()["data"]
    headers = {"Content-Type": "multipart/form-data; boundary=boundary"}
    part = b'--boundary\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + whole
    answer = served.client.post("/v1/classifications", content=part + b"\r\n--boundary--\r\n", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == expected


# -- privacy and load


def test_uploaded_content_is_neither_logged_nor_stored(
    served: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_files(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file")

    files = [with_exif(6), with_exif(3)[:-100], b"Jane" * 60_000]
    for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, no_files)
    before = set(Path(served.settings.data_dir).rglob("*"))
    with caplog.at_level(logging.DEBUG):
        answers = [send(served, data) for data in files]
    assert [answer.status_code for answer in answers] == [200, 422, 415]
    assert "request" in caplog.text
    logs_and_answers = caplog.text + "".join(answer.text + repr(answer.headers) for answer in answers)
    assert "Jane" not in logs_and_answers and "secret-name" not in logs_and_answers
    assert set(Path(served.settings.data_dir).rglob("*")) == before


def test_calls_beyond_limit_are_refused_with_retry_after(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Semaphore(0), threading.Event()

    async def waits(*arguments: Any) -> Any:
        import asyncio

        entered.release()
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return np.zeros(1, np.float32)

    monkeypatch.setattr(served.classifier, "logits", waits)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(send(served, picture()))) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            assert entered.acquire(timeout=30)
        busy = send(served, picture())
        problem(busy, 503, "overloaded")
        assert busy.headers["retry-after"]
    finally:
        gate.set()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert send(served, picture()).status_code == 200


def test_unavailable_and_failed_classifier_differ_in_problem(served: Service) -> None:
    served.classifier.failures.append(InferenceUnavailableError("the classifier does not answer"))
    away = send(served, picture())
    problem(away, 503, "not-ready")
    assert away.headers["retry-after"]
    served.classifier.failures.append(InferenceFailedError("secret detail"))
    assert "secret" not in problem(send(served, picture()), 500, "internal")["detail"]


def test_models_route_describes_classifier(served: Service) -> None:
    tiny, plain = served.client.get("/v1/models").json()["data"]
    assert plain["classifier"] is None
    assert tiny["classifier"]["thresholds"] == {"default": 0.5, "sensitivity_90": 0.25}
    assert (tiny["classifier"]["input_size"], tiny["classifier"]["metrics"]) == (SIZE, {"auc": 0.5})
    assert NOTICE in served.client.get("/v1/models/tiny").json()["card"]
    assert NOTICE in served.client.get("/openapi.json").json()["info"]["description"]
    assert send(served, picture()).status_code == 200
    assert 'route="/v1/classifications"' in served.client.get("/metrics").text


def test_upload_that_does_not_arrive_times_out(tmp_path: Path) -> None:
    import asyncio

    from starlette.requests import Request

    from services.gateway.uploads import Uploads
    from services.problems import ProblemError
    from services.settings import Settings

    async def never() -> Any:
        await asyncio.sleep(60)

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"image/png")]}
        settings = Settings(_env_file=None, upload_timeout_seconds=1.0).model_copy(
            update={"upload_timeout_seconds": 0.05}
        )
        await Uploads(settings).images(Request(scope, never), 16)

    with pytest.raises(ProblemError, match=r"did not arrive in 0\.05 s") as caught:
        asyncio.run(ask())
    assert caught.value.kind == "upload-timeout"

"""Tests of POST /v1/authenticity, GET /v1/directions and POST /v1/edits: results equal those of the library."""

from __future__ import annotations

import base64
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle
from dermis.dataset.privacy import pass_gate
from dermis.dataset.request import GateOptions
from dermis.imaging import Images, decode, encode
from dermis.latents import partner_z
from dermis.synthesizer import Synthesizer
from service_kit import Service, draw, service
from services.inference.samples import Options, pack_rows
from tiny_index import make_complete_and_plain_bundle, noise

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    return make_complete_and_plain_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def bundle(bundles: tuple[Bundle, str]) -> Bundle:
    return bundles[0]


@pytest.fixture(scope="module")
def running(bundles: tuple[Bundle, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(
        bundles[1],
        tmp_path_factory.mktemp("data"),
        default_model="tiny",
        authenticity_uploads=True,
        max_compared_per_minute=20,
        max_images=12,
    ) as running_service:
        yield running_service


def sent(images: Images) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (f"patient-{i}.png", encode(image), "image/png")) for i, image in enumerate(images)]


# -- authenticity


def test_verdicts_equal_those_of_library_and_reveal_no_patient(
    running: Service, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.concatenate([noise(60)[7:9], noise(2, seed=5)])  # two training images and two others
    with caplog.at_level(logging.DEBUG):
        answer = running.client.post("/v1/authenticity", files=sent(images))
    assert answer.status_code == 200, answer.text
    document = answer.json()
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = checker.check(images)
    assert [row["authentic"] for row in document["data"]] == expected.authentic.tolist()
    assert [row["distance"] for row in document["data"]] == [round(float(d), 2) for d in expected.distances]
    assert [row["distance"] for row in document["data"]][:2] == [0, 0]
    assert [set(row) for row in document["data"]] == [{"index", "authentic", "distance", "percentile"}] * 4
    assert bundle.authenticity is not None and document["model"]["index"] == bundle.authenticity.digest
    assert "patient" not in answer.text + caplog.text


def test_changed_copies_of_an_upload_get_its_answer(running: Service) -> None:
    image = noise(1, seed=8)[0]
    views = np.stack([image, image[::-1], np.rot90(image), np.clip(image * 0.9 + 5, 0, 255).astype(np.uint8)])
    rows = running.client.post("/v1/authenticity", files=sent(views[:2])).json()["data"]
    rows += running.client.post("/v1/authenticity", files=sent(views[2:])).json()["data"]
    assert "repeated" not in rows[0] and all(row["repeated"] is True for row in rows[1:])
    answers = {(row["distance"], row["percentile"], row["authentic"]) for row in rows}
    assert len(answers) == 1


def test_distances_of_uploads_are_rounded_and_copies_answered_alone_as_set(bundle: Bundle, tmp_path: Path) -> None:
    image = noise(1, seed=8)[0]
    views = np.stack([image, *(np.roll(image, k, axis=0) // k for k in (2, 3)), image[::-1]])
    options = {"authenticity_repeat_seconds": 0, "authenticity_distance_step": 0.125}
    with service(
        bundle.location, tmp_path / "data", default_model="tiny", authenticity_uploads=True, **options
    ) as running_service:
        rows = running_service.client.post("/v1/authenticity", files=sent(views)).json()["data"]
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = checker.check(views).distances
    assert all("repeated" not in row for row in rows)
    assert [row["distance"] for row in rows] == [round(float(distance) * 8) / 8 for distance in expected]
    assert len({round(float(distance), 2) for distance in expected}) > len({row["distance"] for row in rows})


@pytest.mark.parametrize(
    "gate",
    [
        {"gate": "authentic"},
        {"gate": "min_distance", "percentile": 30.0},
        {"gate": "min_distance", "percentile": 70.0, "detect_copies": False},
    ],
)
def test_images_with_results_of_a_gate(running: Service, bundle: Bundle, gate: dict[str, Any]) -> None:
    body = {"classes": {"benign": 8, "malignant": 4}, "seed": 3}
    listed = running.client.post("/v1/images", json={**body, "privacy": gate}).json()["data"]
    images = np.stack([decode(base64.b64decode(row["b64"])) for row in listed])
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = pass_gate(checker, images, GateOptions(**gate)).tolist()
    assert [row.pop("passed") for row in listed] == expected and len(set(expected)) == 2
    assert running.client.post("/v1/images", json=body).json()["data"] == listed, "the same images"
    npz = running.client.post(
        "/v1/images", json={**body, "privacy": gate}, headers={"Accept": "application/x-npz"}
    ).content
    metadata = json.loads(np.load(io.BytesIO(npz))["metadata.json"])
    assert [row["passed"] for row in metadata["data"]] == expected


def test_gate_of_images_that_cannot_be_is_refused(running: Service) -> None:
    body: dict[str, Any] = {"classes": {"benign": 1}, "privacy": {"gate": "authentic"}}

    def refusal(body: dict[str, Any], path: str = "/v1/images", accept: str = "application/json") -> tuple[str, str]:
        answer = running.client.post(path, json=body, headers={"Accept": accept})
        assert answer.status_code == 422, answer.text
        return answer.json()["type"].rpartition(":")[2], answer.json()["errors"][0]["field"]

    assert refusal({**body, "model": "plain", "classes": {"benign": 1}}) == ("no-index", "privacy")
    assert refusal(body, accept="image/png") == ("invalid-request", "privacy")
    assert refusal(body, "/v1/authenticity") == ("invalid-request", "privacy")
    on_reject = {**body, "privacy": {"on_reject": "drop"}}
    assert refusal(on_reject) == ("invalid-request", "privacy.on_reject")


def test_generated_images_are_compared_without_being_sent(running: Service, bundle: Bundle) -> None:
    body = {"classes": {"benign": 2, "malignant": 1}, "seed": 3, "edits": [{"direction": "axis-0", "strength": 1.0}]}
    response = running.client.post("/v1/authenticity", json=body)
    assert response.status_code == 200, response.text
    listed = running.client.post("/v1/images", json=body).json()["data"]
    images = np.stack([decode(base64.b64decode(row["b64"])) for row in listed])
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = checker.check(images)
    assert [row["authentic"] for row in response.json()["data"]] == expected.authentic.tolist()
    assert [row["distance"] for row in response.json()["data"]] == [round(float(d), 2) for d in expected.distances]


def test_uploads_are_refused_beyond_the_limit_and_without_an_index(running: Service, tmp_path: Path) -> None:
    none = running.client.post("/v1/authenticity?model=plain", files=sent(noise(1)))
    assert none.status_code == 422 and none.json()["type"].endswith("no-index")
    assert (
        running.client.post("/v1/authenticity", content=b"GIF89a", headers={"Content-Type": "image/png"}).status_code
        == 415
    )
    answers = [running.client.post("/v1/authenticity", files=sent(noise(8))) for _ in range(3)]
    assert answers[-1].status_code == 429 and int(answers[-1].headers["Retry-After"]) > 0
    assert running.client.get("/v1/models/tiny").json()["authenticity"]["vectors"] == 60
    assert running.client.get("/v1/models/tiny").json()["authenticity"]["uploads"] is True


def test_uploads_are_refused_unless_operator_enables_comparison(bundle: Bundle, tmp_path: Path) -> None:
    with service(bundle.location, tmp_path / "data", default_model="tiny") as closed:
        raw = closed.client.post("/v1/authenticity", content=encode(noise(1)[0]), headers={"Content-Type": "image/png"})
        for answer in (closed.client.post("/v1/authenticity?model=tiny", files=sent(noise(2))), raw):
            assert answer.status_code == 403 and answer.json()["type"].endswith("uploads-disabled")
            assert "DERMIS_AUTHENTICITY_UPLOADS=true" in answer.json()["detail"] and "data" not in answer.json()
        assert closed.client.post("/v1/authenticity", json={"classes": {"benign": 1}}).status_code == 200
        assert closed.client.get("/v1/models/tiny").json()["authenticity"]["uploads"] is False
        assert closed.client.get("/v1/models").json()["data"][0]["authenticity"]["uploads"] is False


# -- directions and edits


def edited(running: Service, **changes: Any) -> Any:
    body = {
        "samples": [{"class": "benign", "seed": 1, "index": 4}, {"class": "malignant"}],
        "edits": [{"direction": "axis-2", "strength": 0.5}],
        "sweep": {"direction": "axis-1", "strengths": [-2.0, 0.0, 2.0], "layers": [0, 3]},
        **changes,
    }
    return running.client.post("/v1/edits", json={k: v for k, v in body.items() if v is not None})


def test_directions_are_listed(running: Service) -> None:
    listing = running.client.get("/v1/directions").json()
    assert [row["name"] for row in listing["data"]] == ["axis-0", "axis-1", "axis-2"]
    assert listing["data"][1] == {"name": "axis-1", "method": "sefa", "layers": [0, 6], "scale": 2.0, "facts": {}}
    assert running.client.get("/v1/directions?model=plain").json()["data"] == []
    assert running.client.get("/v1/directions?model=no").status_code == 404


def test_a_sweep_gives_every_sample_at_every_strength(running: Service, bundle: Bundle) -> None:
    rows = edited(running).json()["data"]
    assert [(row["sample"], row["strength"]) for row in rows] == [(s, x) for s in (0, 1) for x in (-2, 0, 2)]
    directions = [direction.name for direction in bundle.directions]
    from dermis.directions.edit import Edit

    edits = [Edit("axis-2", 0.5), Edit("axis-1", 2.0, (0, 3))]
    expected = draw(pack_rows(Options(bundle.digest, edits=edits, directions=directions), 1, [4], [0]))[0]
    assert np.array_equal(decode(base64.b64decode(rows[2]["b64"])), expected)
    alone = edited(running, sweep=None, edits=None).json()["data"]
    plain = running.client.post("/v1/images", json={"classes": {"malignant": 1}}).json()["data"]
    assert alone[1]["sha256"] == plain[0]["sha256"] and alone[1]["strength"] is None


def test_edits_are_returned_as_sheet_or_animation(running: Service) -> None:
    def shown(kind: str) -> Image.Image:
        body = {
            "samples": [{"class": "benign"}, {"class": "malignant"}],
            "sweep": {"direction": "axis-0", "strengths": [-1.0, 0.0, 1.0]},
        }
        answer = running.client.post("/v1/edits", json=body, headers={"Accept": kind})
        assert answer.headers["content-type"] == kind
        return Image.open(io.BytesIO(answer.content))

    assert shown("image/png").size == (3 * 16 + 4 * 2, 2 * 16 + 3 * 2)
    moving = shown("image/gif")
    assert moving.size == (32, 16) and moving.n_frames == 4  # there and back  # type: ignore[attr-defined]
    moving.fp.seek(0)  # type: ignore[union-attr]
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in moving.fp.read()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"samples": [{"class": "naevus"}]}, "samples.0.class"),
        ({"sweep": {"direction": "north", "strengths": [1.0]}}, "sweep.direction"),
        ({"sweep": {"direction": "axis-0", "strengths": [1.0], "layers": [4, 2]}}, "sweep.layers"),
        ({"sweep": {"direction": "axis-0", "strengths": [99.0]}}, "sweep.strengths.0"),
        ({"edits": [{"direction": "axis-0", "strength": 1.0, "layers": [0, 9]}]}, "edits[0].layers"),
        ({"samples": [{"class": "benign", "index": i} for i in range(7)]}, "samples"),
    ],
)
def test_invalid_edit_is_refused_by_field(running: Service, changes: dict[str, Any], field: str) -> None:
    answer = edited(running, **changes)
    assert answer.status_code == 422, answer.text
    assert field in json.dumps([error["field"] for error in answer.json()["errors"]])


def test_gateway_does_not_import_inference_packages() -> None:
    """Otherwise each of its processes would need hundreds of megabytes more, and start more slowly."""
    code = (
        "import sys, services.service; print({'torch', 'faiss', 'onnxruntime', 'scipy', 'sklearn'} & set(sys.modules)); "
        "import services.studies.results; print({'torch', 'faiss', 'onnxruntime', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["set()", "set()"], done.stdout + done.stderr


# -- interpolations and neighbours


def latent_images(running: Service, kind: str, accept: str = "application/json", **body: Any) -> Any:
    return running.client.post(f"/v1/edits/{kind}", json=body, headers={"Accept": accept})


@pytest.fixture(scope="module")
def synthesizer(bundle: Bundle) -> Iterator[Synthesizer]:
    with Synthesizer(bundle, device="cpu", threads=1) as made:
        yield made


def decoded(answer: Any) -> list[Images]:
    assert answer.status_code == 200, answer.text
    return [decode(base64.b64decode(row["b64"])) for row in answer.json()["data"]]


@pytest.mark.full
def test_interpolation_begins_and_ends_with_its_samples(running: Service, synthesizer: Synthesizer) -> None:
    body = {
        "start": {"class": "benign", "seed": 5, "index": 1},
        "end": {"class": "malignant", "seed": 6, "index": 2},
        "images": 3,
        "truncation_psi": 0.7,
    }
    answer = latent_images(running, "interpolations", **body)
    assert [row["strength"] for row in answer.json()["data"]] == [0.0, 0.5, 1.0]
    ws = synthesizer.ws([5, 6], [1, 2], [0, 1], truncation_psi=0.7)
    line = np.stack([ws[0], (ws[0] + ws[1]) / 2, ws[1]])
    expected = synthesizer.images_from_ws(line, "random", seeds=[5] * 3, indices=[1] * 3)
    assert all(np.array_equal(image, wanted) for image, wanted in zip(decoded(answer), expected, strict=True))
    assert np.array_equal(expected[0], synthesizer.images([5], [1], [0], truncation_psi=0.7)[0])
    film = Image.open(io.BytesIO(latent_images(running, "interpolations", "image/gif", **body).content))
    assert getattr(film, "n_frames", 1) == 4  # there and back


@pytest.mark.full
def test_neighbours_have_the_distance_and_the_noise_of_the_sample(
    running: Service, synthesizer: Synthesizer, bundle: Bundle
) -> None:
    body = {"sample": {"class": "malignant", "seed": 5, "index": 1}, "count": 2, "distance": 0.5}
    answer = latent_images(running, "neighbours", **body)
    ws = synthesizer.ws([5], [1], [1])[0]
    mean = synthesizer.ws([5], [1], [1], truncation_psi=0.0)[0]
    partners = synthesizer.ws_of(np.stack([partner_z(5, 1, n, bundle.generator.z_dim) for n in (0, 1)]), [1, 1])
    moved = []
    for partner in partners:
        towards = (partner - ws) / np.linalg.norm(partner - ws)
        moved.append(ws + 0.5 * np.linalg.norm(ws - mean) * towards)
    expected = synthesizer.images_from_ws(np.stack(moved), "random", seeds=[5, 5], indices=[1, 1])
    shown = decoded(answer)
    assert all(np.abs(image.astype(int) - wanted).max() <= 1 for image, wanted in zip(shown, expected, strict=True))
    assert [row["sample"] for row in answer.json()["data"]] == [0, 1]
    more = decoded(latent_images(running, "neighbours", **(body | {"count": 3})))
    assert np.array_equal(more[0], shown[0]) and not np.array_equal(more[2], shown[0])


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("interpolations", {"images": 1}, "images"),
        ("interpolations", {"images": 13}, "images"),
        ("interpolations", {"end": {"class": "rare"}}, "end.class"),
        ("neighbours", {"distance": 0.0}, "distance"),
        ("neighbours", {"count": 13}, "count"),
        ("neighbours", {"truncation_cutoff": 99}, "truncation_cutoff"),
    ],
)
def test_latent_images_refuse_bad_requests(running: Service, kind: str, change: dict[str, Any], field: str) -> None:
    sample = {"class": "benign"}
    body = {"start": sample, "end": sample} if kind == "interpolations" else {"sample": sample}
    answer = latent_images(running, kind, **(body | change))
    assert answer.status_code in (413, 422), answer.text
    document = answer.json()
    assert field in json.dumps(document["errors"]) + document["detail"]
